"""``motionrag evaluate``: a test split with and without retrieval, or anyone's videos -> metrics, clips, tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from motionrag.backbones.base import Backbone
    from motionrag.evaluation.gallery import Gallery
    from motionrag.evaluation.scores import Metrics, Scores

LABELS = {
    "finetuned": "backbone fine-tuned on full captions",
    "mean": "mean of references, no CAMA",
    "fusion": "merged references, no CAMA",
    "known_only": "database without new motions",
    "still": "still first frame",
}
#: What may differ from a protocol's config without a word: where things lie and are computed, what is kept and shown,
#: and the weights, which are what is measured and stand in the settings.
FREE = {
    "weights", "backbone.path", "out", "device", "offload", "batch_size", "save_clips", "export_vbench", "notes",
    "seed", "metric_errors", "resamples", "table", "clips", "truth", "prompts", "needs", "protocol",
}  # fmt: skip


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write ``metrics.json``, ``clips.json``, ``per_clip.csv``, ``table.*`` and ``clips/``; see ``conf/evaluate.yaml``."""
    from hydra.core.hydra_config import HydraConfig
    from rich.console import Console

    from motionrag.errors import MotionRAGError
    from motionrag.evaluation.scores import mean_over_seeds
    from motionrag.evaluation.tables import paper_tables, write_per_clip, write_tables
    from motionrag.evaluation.terminal import rich_paper_table, rich_tables, summary
    from motionrag.io import write_json

    for key in ("resamples", "save_clips"):
        if cfg[key] < 0:
            raise MotionRAGError(f"{key}={cfg[key]}: expected a whole number from 0 on")
    out = Path(str(cfg.out) if cfg.out else HydraConfig.get().runtime.output_dir)
    work = score_folders if cfg.clips or cfg.truth else score_split
    scores, gallery, settings, notes = work(cfg, out)

    result = {"spread": scores.spread(), "differences": scores.differences(), "seconds": scores.seconds()}
    result = {"conditions": scores.table(), "settings": settings, "labels": LABELS, **result}
    result |= {name: scores.left(result[name]) for name in ("spread", "differences")}
    result["samples"] = scores.samples()
    result["notes"] = [*cfg.notes, *notes, *changes(cfg), *few_samples(result["samples"])]
    result["notes"] += incompetent(result["conditions"])
    result["notes"] += [f"without {name}, which failed: {why}" for name, why in scores.metrics.failed.items()]
    per_clip = scores.per_clip()
    gallery.write({i: mean_over_seeds(conditions) for i, conditions in per_clip.items()})
    write_per_clip(out / "per_clip.csv", per_clip)
    tables = paper_tables(result, list(cfg.table), settings.get("backbone"))
    write_tables(out, tables)
    write_json(out / "metrics.json", result)

    console = Console()
    console.print(*rich_tables(result["conditions"], result["samples"]))
    for table in tables:
        if len(table.rows) > 1:
            console.print(rich_paper_table(table))
    for note in result["notes"][len(cfg.notes) :]:
        print(f"note: {note}")
    return {"summary": f"{summary(result['conditions'])} -> {out}", "conditions": result["conditions"]}


Work = tuple["Scores", "Gallery", dict[str, Any], list[str]]


def score_split(cfg: DictConfig, out: Path) -> Work:
    """Generate the clips of a test split under every condition and seed, and measure them."""
    from hydra.utils import instantiate
    from rich.progress import track

    from motionrag.backbones.base import RANDOM_WEIGHTS
    from motionrag.cli.generate import build
    from motionrag.errors import MotionRAGError
    from motionrag.evaluation.conditions import CONDITIONS, Generation, References, warm_up
    from motionrag.evaluation.gallery import Gallery, VBench
    from motionrag.evaluation.scores import Scores
    from motionrag.evaluation.split import count_split, read_split
    from motionrag.generate import check_sampling
    from motionrag.metrics.batch import ClipBatch
    from motionrag.modules.fusion import Fusion
    from motionrag.retrieval.database import check_depth
    from motionrag.retrieval.group import open_database

    conditions, seeds = list(cfg.conditions), list(cfg.seeds)
    unknown = [c for c in conditions if c not in CONDITIONS]
    if unknown or not conditions:
        raise MotionRAGError(
            f"conditions={conditions}: unknown {unknown}; choose from {', '.join(CONDITIONS)}"
        )
    if cfg.fusion not in get_args(Fusion):
        raise MotionRAGError(f"fusion={cfg.fusion}: choose from {', '.join(get_args(Fusion))}")
    whole = all(type(seed) is int for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise MotionRAGError(f"seeds={seeds}: expected at least one whole number, each once")
    if cfg.limit is not None and (type(cfg.limit) is not int or cfg.limit < 1):
        raise MotionRAGError(f"limit={cfg.limit}: expected at least 1 clip, or null for all")
    if int(cfg.batch_size) < 1:
        raise MotionRAGError(f"batch_size={cfg.batch_size}: expected at least 1 clip")
    check_sampling(int(cfg.steps), float(cfg.guidance), float(cfg.motion_scale))
    for node in cfg.make:
        instantiate(node)
    check_inputs(cfg)
    counts = count_split(str(cfg.shards), cfg.limit)
    db = open_database(cfg.db)
    check_depth(db, int(cfg.k))
    metrics = load_metrics(cfg, counts)
    model = build(cfg)
    model.check_database(db)
    finetuned = load_finetuned(cfg).to(model.device) if "finetuned" in conditions else None
    find = References(
        db, instantiate(cfg.retriever, db=db), int(cfg.k), str(cfg.query), cfg.without, cfg.order
    )
    if "known_only" in conditions:
        check_depth(db, int(cfg.k), len(find.left_out))  # now, not after the conditions before it
    fps, sampling = model.backbone.fps, {key: cfg[key] for key in ("steps", "guidance", "motion_scale")}
    scores, gallery = Scores(metrics, int(cfg.resamples)), Gallery(out, fps, int(cfg.save_clips), db)
    vbench = VBench(out, fps) if cfg.export_vbench else None

    count, read_notes = 0, []
    total = sum(-(-count // int(cfg.batch_size)) for count in counts.values())
    split = read_split(str(cfg.shards), model.backbone, cfg.limit, int(cfg.batch_size))
    for clips in track(split, description="evaluating", total=total):
        generation = Generation(model, find, clips, cfg.fusion, finetuned, **sampling)
        if not count:
            warm_up(generation, conditions)
        measured: ClipBatch | None = None
        for seed in seeds:
            for condition in conditions:
                video, seconds = generation.video(condition, seed)
                tokens = [None, None]
                if metrics.need_tokens:
                    tokens = [generation.output_tokens(video), generation.tokens("motionrag", seed)]
                if measured is None:
                    measured = ClipBatch(
                        clips.ids, video, clips.truth, clips.captions, clips.truth[:, 0], *tokens, fps=fps
                    )
                else:  # features of the true clips stay
                    measured = measured.with_video(video, *tokens)
                scores.add(condition, clips.domain, seed, measured, seconds)
                if seed == seeds[0]:
                    nearest = partial(generation.references, "motionrag", seed)
                    gallery.add(condition, clips.records, clips.truth, video, nearest)
                if vbench:
                    vbench.add(condition, seeds.index(seed), clips.records, clips.truth[:, 0], video)
        count += len(clips.records)
        read_notes += clips.notes
    if vbench:
        vbench.write()
    settings = {"k": int(cfg.k), **sampling, "seeds": seeds}
    settings |= {"backbone": model.backbone.name, "database": f"{len(db)} clips", "test clips": count}
    parts = ["adapter", "cama", "finetuned"] if finetuned else ["adapter", "cama"]
    settings |= {f"{part} weights": str(cfg.weights[part]) for part in parts if cfg.weights[part]}
    settings |= {"protocol": str(cfg.protocol)} if cfg.protocol else {}
    notes = [RANDOM_WEIGHTS.format(model.backbone.name)] if model.backbone.random_weights else []
    if read_notes:
        notes.append(f"{len(read_notes)} of {count} test clips are not whole, the first: {read_notes[0]}")
    return scores, gallery, settings, notes


def score_folders(cfg: DictConfig, out: Path) -> Work:
    """Measure videos that lie in folders."""
    from rich.progress import track

    from motionrag.errors import MotionRAGError
    from motionrag.evaluation.folders import open_folders
    from motionrag.evaluation.gallery import Gallery, VBench
    from motionrag.evaluation.scores import Scores
    from motionrag.metrics.batch import ClipBatch

    if not cfg.clips or not cfg.truth:
        lacking = "truth" if cfg.clips else "clips"
        raise MotionRAGError(f"{lacking}=DIR is missing: evaluate clips=DIR truth=DIR, or shards=DIR db=DB")
    made = dict(cfg.clips) if OmegaConf.is_dict(cfg.clips) else {"clips": str(cfg.clips)}
    folders = open_folders(made, str(cfg.truth), cfg.prompts)
    metrics = load_metrics(cfg, Counter(folders.domains.values()))
    scores = Scores(metrics, int(cfg.resamples))
    gallery = vbench = None
    for clip_id in track(folders.ids, description="evaluating"):
        videos, truth, fps = folders.read(clip_id)
        gallery = gallery or Gallery(out, fps, int(cfg.save_clips))
        vbench = vbench or (VBench(out, fps) if cfg.export_vbench else None)
        for writer in filter(None, (gallery, vbench)):
            writer.fps = fps  # each clip's own
        prompt, domain = folders.prompts.get(clip_id), folders.domains[clip_id]
        record = {"id": clip_id, "domain": domain, "caption": prompt or clip_id, "motion_caption": ""}
        batch = ClipBatch(
            [clip_id], truth[None], truth[None], [prompt] if prompt else None, truth[None, 0], fps=fps
        )
        for condition, video in videos.items():
            batch = batch.with_video(video[None])
            scores.add(condition, domain, 0, batch)
            gallery.add(condition, [record], truth[None], video[None])
            if vbench:
                vbench.add(condition, 0, [record], truth[None, 0], video[None])
    if vbench:
        vbench.write()
    settings = {"clips": made, "truth": str(cfg.truth), "test clips": len(folders.ids)}
    return scores, gallery, settings, []


def load_metrics(cfg: DictConfig, clips: Mapping[str, int]) -> Metrics:
    """The metrics of the config, checked against how many clips there are of each domain, before any is generated."""
    from hydra.utils import instantiate

    from motionrag.errors import MotionRAGError
    from motionrag.evaluation.scores import Metrics

    if not cfg.get("metrics"):  # an empty list in the defaults leaves no key
        raise MotionRAGError("metrics=[]: choose at least one, e.g. metrics=[action_score,dino_score]")
    makers = {str(name): partial(instantiate, node) for name, node in cfg.metrics.items()}
    metrics = Metrics(makers, str(cfg.metric_errors))
    metrics.check_counts(clips)
    return metrics


def check_inputs(cfg: DictConfig) -> None:
    """Raise MotionRAGError unless the test split and the database are named, and all that a protocol needs is there."""
    from motionrag.errors import MotionRAGError

    for key, how in cfg.needs.items():
        path = OmegaConf.select(cfg, str(key))
        if path is None or not (Path(str(path)).exists() or str(path).startswith("pkg:")):
            raise MotionRAGError(f"protocol={cfg.protocol}: {key}={path} is not there; {how}")
    if missing := [key for key in ("shards", "db") if not cfg[key]]:
        given = " ".join(f"{key}=DIR" for key in missing)
        raise MotionRAGError(
            f"evaluate needs {given}: motionrag evaluate shards=DIR db=DB, protocol=NAME, or clips=DIR truth=DIR"
        )


def load_finetuned(cfg: DictConfig) -> Backbone:
    """The backbone of the condition `finetuned`; raises MotionRAGError if its weights are not named or do not fit."""
    from hydra.utils import instantiate

    from motionrag.errors import MotionRAGError
    from motionrag.release import load_finetune

    if not (path := cfg.weights.get("finetuned")):
        raise MotionRAGError(
            "the condition finetuned needs weights.finetuned=FILE, tensors of a fine-tuned backbone (docs/evaluation.md)"
        )
    backbone = instantiate(cfg.backbone)
    load_finetune(backbone.denoiser, path)
    return backbone


def changes(cfg: DictConfig) -> list[str]:
    """What of the chosen protocol this run does otherwise, as one note."""
    if not cfg.protocol:
        return []
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    words = [f"protocol={cfg.protocol}"]
    if (name := cfg.backbone.get("name")) in cfg.get("sampling", ()):
        words.append(f"backbone={name}")  # one of those that the protocol has settings for
    if HydraConfig.initialized() and "release" in (running := HydraConfig.get()).runtime.choices:
        words.append(f"+release={running.runtime.choices['release']}")
        words += [word for word in running.overrides.hydra if word.startswith("hydra.searchpath=")]
    mine, theirs = (
        OmegaConf.to_container(each, resolve=True) | {"make": OmegaConf.to_container(each.make)}
        for each in (cfg, compose("evaluate", overrides=words))
    )  # what `make` refers to has been compared where it stands
    changed = [
        f"{key}={value}"
        for name in sorted(mine.keys() | theirs.keys())
        for key, value in differing(name, mine.get(name), theirs.get(name))
    ]
    return [f"not the protocol {cfg.protocol}: changed {', '.join(changed)}"] if changed else []


def differing(key: str, mine: Any, theirs: Any) -> list[tuple[str, Any]]:
    """The innermost keys under `key`, but for those in FREE, whose values are not the same, with mine."""
    if key in FREE or mine == theirs:
        return []
    both = isinstance(mine, dict) and isinstance(theirs, dict)
    if both and mine.get("_target_") == theirs.get("_target_") and (key != "metrics" or [*mine] == [*theirs]):
        parts = dict.fromkeys([*mine, *theirs])
        return [each for k in parts for each in differing(f"{key}.{k}", mine.get(k), theirs.get(k))]
    if isinstance(mine, dict):
        mine = mine.get("_target_", ",".join(mine))
    return [(key, ",".join(map(str, mine)) if isinstance(mine, list) else mine)]


def few_samples(samples: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[str]:
    """A note for each metric whose samples are fewer than its features."""
    from motionrag.page import name

    counts: dict[tuple[str, int], set[int]] = {}
    for metrics in samples.values():
        for metric, each in metrics.items():
            if each["samples"] < each["features"]:
                counts.setdefault((metric, each["features"]), set()).add(each["samples"])
    return [
        f"{name(metric)}: {' or '.join(map(str, sorted(found)))} samples, fewer than the {features} features: far above "
        "its limit, compare only values of as many samples"
        for (metric, features), found in counts.items()
    ]


def incompetent(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """A note for each domain where the backbone alone shows the motion no better than its first frame, standing still."""
    notes = []
    for domain, still in table.get("still", {}).items():
        base = table.get("backbone", {}).get(domain, {})
        for metric, sign in (("action_score", 1), ("trajectory_error", -1)):
            if metric in base and metric in still and sign * (base[metric] - still[metric]) <= 0:
                notes.append(
                    f"{domain}: the backbone alone is no better than a still image ({metric} {base[metric]:.2f} against "
                    f"{still[metric]:.2f}), so little follows from what motion tokens add to it"
                )
    return notes
