"""``motionrag describe backbone=NAME``: parameters, adapter sites, FLOPs and memory of a configuration."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

GIGA, TERA = 1e9, 1e12


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print three tables and return their numbers; see ``conf/describe.yaml`` for the keys."""
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from rich.console import Console

    from motionrag.describe import Configuration, backbone_on_meta, describe, encoders_on_meta
    from motionrag.errors import MotionRAGError
    from motionrag.release import RELEASES

    choice = HydraConfig.get().runtime.choices.backbone
    sizes = cfg.tiny if choice.endswith("_tiny") else cfg.full
    family = choice.split("_")[0]
    backbone = backbone_on_meta(cfg.backbone)
    motion_encoder, appearance_encoder = encoders_on_meta(sizes.encoders)
    with torch.device("meta"):
        resampler, cama = instantiate(sizes.resampler), instantiate(sizes.cama)
        adapter = instantiate(cfg.motion_adapter)(backbone.adapter_sites(), token_width=resampler.output_dim)
    steps = RELEASES[family].settings["steps"] if cfg.steps is None else int(cfg.steps)
    if steps < 1:
        raise MotionRAGError(f"steps={steps}: expected at least 1 denoising step")
    if not 1 <= cfg.k <= cama.max_references:
        raise MotionRAGError(
            f"k={cfg.k}: expected 1 to {cama.max_references} reference clips, which this CAMA takes"
        )
    results = describe(
        Configuration(backbone, motion_encoder, appearance_encoder, resampler, adapter, cama),
        k=int(cfg.k),
        steps=steps,
        size=int(sizes.encoders.appearance.size),
        release=family if family == choice else None,
    )
    console = Console()
    for table in tables(results):
        console.print(table)
    trained = sum(results["parameters"]["trained"].values())
    frozen = sum(results["parameters"]["frozen"].values())
    agrees = results["as_published"]
    verdict = (
        "never published"
        if agrees is None
        else "as published"
        if all(agrees.values())
        else "NOT as published"
    )
    return {
        "summary": f"{backbone.name}: {trained / 1e6:.1f} M trained, {frozen / 1e9:.2f} B frozen parameters, "
        f"{len(results['sites'])} sites, {verdict}",
        **results,
    }


def tables(results: dict[str, Any]) -> list[Any]:
    """Rich tables: parameters, FLOPs, memory."""
    from rich.table import Table

    agrees = results["as_published"] or {}
    clip = " x ".join(map(str, results["clip"]))
    counts = Table("network", "parameters", "bf16 GB", "", title=f"{results['backbone']}, clips of {clip}")
    for kind, members in results["parameters"].items():
        for name, number in members.items():
            equal = {True: ", as published", False: ", NOT as published"}.get(agrees.get(name), "")
            counts.add_row(name, f"{number:,}", f"{2 * number / GIGA:.2f}", kind + equal)
    widths = sorted(set(results["sites"].values()))
    sites = {True: "as published", False: "NOT as published"}.get(agrees.get("sites"), "")
    counts.add_row(
        "adapter sites", str(len(results["sites"])), "", f"{'/'.join(map(str, widths))} wide {sites}"
    )

    steps = results["clip_of_steps"]
    columns = {
        "Stage 1 step": results["stage_1_step"],
        "Stage 2 step": results["stage_2_step"],
        f"a clip, {steps} steps": results["one_clip"],
    }
    work = Table("TFLOPs", *columns, title="work, batch 1")
    for part in dict.fromkeys(p for column in columns.values() for p in column["flops"]):
        work.add_row(part, *(_tera(column["flops"].get(part)) for column in columns.values()))
    work.add_row("all", *(_tera(column["total_flops"]) for column in columns.values()), style="bold")
    again = results["stage_1_step"]["recomputed_flops"]
    work.add_row("+ gradient checkpointing", _tera(again), "", "")

    memory = Table("peak of live tensors", "bf16 GB", title="memory, batch 1")
    for name, column in columns.items():
        for how, number in column["peak_bytes"].items():
            memory.add_row(f"{name}, {how}", f"{number / GIGA:.2f}")
    return [counts, work, memory]


def _tera(number: int | None) -> str:
    return "" if number is None else f"{number / TERA:.3g}"
