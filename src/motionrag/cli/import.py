"""``motionrag import``: the reference's published checkpoints -> our weights."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the folder and print what was read, missing and filled; see ``conf/import.yaml`` for the keys."""
    from motionrag.release import import_release

    sizes = {"resampler": cfg.resampler, "cama": cfg.cama}
    report = import_release(str(cfg.release), str(cfg.path), str(cfg.out), sizes, cfg.sites)
    for file, info in report["files"].items():
        absent = report["absent"].get(file, [])
        note = f"; without {_named(absent)}" if absent else ""
        print(f"read {file}: {info['tensors']} tensors, {info['parameters']:,} values, {info['dtype']}{note}")
    for file in report["missing"]:
        print(f"missing {file}: {WITHOUT[file]}")
    if report["filled"]:
        print(f"filled from a fixed seed: {_named(report['filled'])}")
    words = f"--config-dir {cfg.out} +release={cfg.release}"
    return {
        "summary": f'{cfg.release} -> {cfg.out}; use: motionrag generate {words} image=FILE prompt="..." db=DB',
        "out": str(cfg.out),
        **report,
    }


WITHOUT = {
    "motion_proj.ckpt": "the motion Resampler comes from Motion-Adapter.ckpt",
    "17_frames.ckpt": "the backbone keeps its own weights",
}


def _named(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
