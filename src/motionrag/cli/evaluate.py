"""``motionrag evaluate``: a test split with and without retrieval -> metrics, clips, a table."""

from __future__ import annotations

import csv
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from motionrag.generate import MotionRAG
    from motionrag.retrieval.database import RetrievalDatabase
    from motionrag.retrieval.retrievers import Retriever

CONDITIONS = ("backbone", "motionrag", "mean", "random", "oracle", "known_only", "still")
SHOWN_SIDE = 160  # kept clips are enlarged to about this, so that a browser shows them well


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write ``metrics.json``, ``clips.json``, ``per_clip.csv`` and ``clips/``; see ``conf/evaluate.yaml``."""
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate
    from rich.console import Console
    from rich.progress import track

    from motionrag.backbones.base import RANDOM_WEIGHTS
    from motionrag.cli.generate import build
    from motionrag.errors import MotionRAGError
    from motionrag.io import write_json
    from motionrag.retrieval.database import RetrievalDatabase, check_depth

    conditions = list(cfg.conditions)
    unknown = [c for c in conditions if c not in CONDITIONS]
    if unknown or not conditions:
        raise MotionRAGError(
            f"conditions={conditions}: unknown {unknown}; choose from {', '.join(CONDITIONS)}"
        )
    db = RetrievalDatabase(str(cfg.db))
    check_depth(db, int(cfg.k))
    model = build(cfg)
    db.check_encoders({"motion": model.motion_encoder, "appearance": model.appearance_encoder})
    clips = read_split(Path(str(cfg.shards)), model.backbone, cfg.limit)
    finder = References(db, instantiate(cfg.retriever, db=db), int(cfg.k), int(cfg.seed))
    if "known_only" in conditions:
        check_depth(db, int(cfg.k), len(finder.new))  # now, not after the conditions before it
    scores = Scores(model, bool(cfg.trajectory))
    out = Path(str(cfg.out) if cfg.out else HydraConfig.get().runtime.output_dir)
    shown = Gallery(out, db, model.backbone.fps, int(cfg.save_clips), finder)

    batches = [clips[i : i + int(cfg.batch_size)] for i in range(0, len(clips), int(cfg.batch_size))]
    for condition in conditions:
        for batch in track(batches, description=f"{condition:<10}"):
            truth = torch.stack([clip["video"] for clip in batch])
            start = time.perf_counter()
            video = generate(model, cfg, condition, batch, truth, finder)
            seconds = (time.perf_counter() - start) / len(batch)
            scores.add(condition, batch, video, truth, seconds)
            shown.add(condition, batch, video)
    table, per_clip = scores.table(), scores.per_clip
    settings = {key: cfg[key] for key in ("k", "steps", "guidance", "motion_scale", "seed")}
    settings |= {"backbone": model.backbone.name, "database": f"{len(db)} clips", "test clips": len(clips)}
    notes = list(cfg.notes)
    if model.backbone.random_weights:
        notes.append(RANDOM_WEIGHTS.format(model.backbone.name))
    result = {"conditions": table, "settings": settings, "labels": LABELS, "notes": notes}
    write_json(out / "metrics.json", result)
    shown.write(per_clip)
    write_csv(out / "per_clip.csv", per_clip)
    Console().print(*rich_tables(table))
    best = {d: v["action_score"] for d, v in table[conditions[-1 if len(conditions) < 2 else 1]].items()}
    first = {d: v["action_score"] for d, v in table[conditions[0]].items()}
    summary = ", ".join(f"{d}: {first[d]:.1f} -> {best[d]:.1f}" for d in first)
    return {"summary": f"Action Score {summary} ({len(clips)} clips) -> {out}", "conditions": table}


LABELS = {
    "mean": "mean of references, no CAMA",
    "known_only": "database without new motions",
    "still": "still first frame",
}


def clip_seed(seed: int, clip_id: str) -> int:
    """A 63-bit seed for one clip: its noise is the same in every condition, batch and process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}".encode()).digest()[:8], "big") >> 1


def read_split(shards: Path, backbone: Any, limit: int | None) -> list[dict[str, Any]]:
    """Test clips as dicts: the shard's columns, `video` (T, 3, H, W), `domain` ("all" where there is none)."""
    from motionrag.data.shards import ShardIndex, read_shard
    from motionrag.data.video import read_clip
    from motionrag.errors import MotionRAGError
    from motionrag.generate import fit, to_float

    clips: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for file in ShardIndex.open(shards).files:
        for record, data in read_shard(file):
            domain = str(record.metadata.get("domain") or "all")
            if limit is not None and counts.get(domain, 0) >= limit:
                continue
            counts[domain] = counts.get(domain, 0) + 1
            decoded = read_clip(
                data, record.start_sec, record.end_sec, frames=backbone.frames, fps=backbone.fps
            )
            video = fit(to_float(decoded.frames), backbone.height, backbone.width)
            clips.append({**asdict(record), "domain": domain, "video": video})
    if not clips:
        raise MotionRAGError(f"shards={shards}: no test clips there; pack some with motionrag pack")
    return clips


class References:
    """Finds the reference clips of a test clip, by its motion caption; never clips of its own source."""

    def __init__(self, db: RetrievalDatabase, retriever: Retriever, k: int, seed: int):
        from motionrag.retrieval.retrievers import RandomRetriever

        self.db, self.k = db, k
        self.retriever, self.random = retriever, RandomRetriever(db, seed)
        self.new: set[str] = set()
        self.by_source: dict[str, set[str]] = {}
        for clip_id in db.ids:
            clip = db.clip(clip_id)
            self.by_source.setdefault(clip["source"], set()).add(clip_id)
            if clip["metadata"].get("domain") == "new":
                self.new.add(clip_id)

    def __call__(self, clip: dict[str, Any], condition: str) -> tuple[list[str], np.ndarray]:
        """Ids nearest first, and scores."""
        own = self.by_source.get(clip["source"], set())
        if condition == "random":
            return self.random.retrieve(clip["motion_caption"], self.k, own)
        return self.retriever.retrieve(
            clip["motion_caption"], self.k, own | (self.new if condition == "known_only" else set())
        )


def generate(
    model: MotionRAG,
    cfg: DictConfig,
    condition: str,
    batch: list[dict],
    truth: torch.Tensor,
    find: References,
) -> torch.Tensor:
    """Videos (B, T, 3, H, W) of one condition from the first frames of `truth`."""
    import torch

    image = truth[:, 0]
    if condition == "still":
        return truth[:, :1].expand_as(truth)
    tokens = None
    if condition == "oracle":
        tokens = model.motion_tokens(model.motion_encoder(truth))
    elif condition != "backbone":
        ids = [find(clip, condition)[0] for clip in batch]
        motion = torch.stack([find.db.motion_features(i) for i in ids])
        if condition == "mean":
            tokens = model.motion_tokens(motion).mean(1)
        else:
            tokens = model.adapt(motion, torch.stack([find.db.appearance_features(i) for i in ids]), image)
    return model.generate(
        image, [clip["caption"] for clip in batch], tokens, steps=int(cfg.steps), guidance=float(cfg.guidance),
        seeds=[clip_seed(int(cfg.seed), clip["id"]) for clip in batch], motion_scale=float(cfg.motion_scale),
    )  # fmt: skip


class Scores:
    """All metrics, per condition and domain; the metrics' own classes keep the per-clip values."""

    def __init__(self, model: MotionRAG, trajectory: bool):
        self.model, self.trajectory = model, trajectory
        self.metrics: dict[tuple[str, str], dict[str, Any]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.domains: dict[str, str] = {}

    def add(
        self, condition: str, batch: list[dict], video: torch.Tensor, truth: torch.Tensor, seconds: float
    ) -> None:
        """Measure one batch; `seconds` is the time per clip it took to generate."""
        import torch

        from motionrag.data.motionworld import track_object
        from motionrag.generate import to_uint8
        from motionrag.metrics.action_score import ActionScore
        from motionrag.metrics.dino_score import DinoScore
        from motionrag.metrics.trajectory_error import TrajectoryError

        self.seconds.setdefault(condition, []).extend([seconds] * len(batch))
        logits = self.model.motion_encoder.logits
        class_token = [
            self.model.appearance_encoder(v.flatten(0, 1))[:, 0].unflatten(0, v.shape[:2])
            for v in (video, truth)
        ]
        values = {
            "action_score": (ActionScore, logits(video), logits(truth)),
            "dino_score": (DinoScore, *class_token),
        }
        if self.trajectory:
            paths = [
                torch.stack([torch.from_numpy(track_object(c)) for c in to_uint8(v)]) for v in (video, truth)
            ]
            values["trajectory_error"] = (TrajectoryError, *paths)
        for row, clip in enumerate(batch):
            self.domains[clip["id"]] = clip["domain"]
            found = self.metrics.setdefault((condition, clip["domain"]), {})
            for name, (metric, pred, target) in values.items():
                found.setdefault(name, metric()).update(
                    pred[row : row + 1], target[row : row + 1], [clip["id"]]
                )

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """condition -> domain -> metric -> mean, with the number of clips `n`."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (condition, domain), metrics in self.metrics.items():
            row = {name: float(metric.compute()) for name, metric in metrics.items()}
            row["seconds_per_clip"] = sum(self.seconds[condition]) / len(self.seconds[condition])
            row["n"] = len(next(iter(metrics.values())).per_clip())
            out.setdefault(condition, {})[domain] = row
        return out

    @property
    def per_clip(self) -> dict[str, dict[str, dict[str, float]]]:
        """clip id -> condition -> metric -> value."""
        out: dict[str, dict[str, dict[str, float]]] = {}
        for (condition, _), metrics in self.metrics.items():
            for name, metric in metrics.items():
                for clip_id, value in metric.per_clip().items():
                    out.setdefault(clip_id, {}).setdefault(condition, {})[name] = value
        return out


class Gallery:
    """Keeps clips for the report: outputs, truth, first frame, references."""

    def __init__(self, out: Path, db: RetrievalDatabase, fps: float, per_domain: int, find: References):
        self.out, self.db, self.fps, self.find = out, db, fps, find
        self.left: dict[str, int] = {}
        self.per_domain, self.entries = per_domain, {}

    def add(self, condition: str, batch: list[dict], video: torch.Tensor) -> None:
        """Write one condition's videos of the clips that are kept."""
        for clip, one in zip(batch, video, strict=True):
            entry = self.entries.get(clip["id"]) or self._start(clip)
            if entry is not None:
                entry["outputs"][condition] = self._write(f"{clip['id']}_{condition}", enlarge(one))

    def _start(self, clip: dict[str, Any]) -> dict[str, Any] | None:
        from PIL import Image

        left = self.left.setdefault(clip["domain"], self.per_domain)
        if left == 0:
            return None
        self.left[clip["domain"]] = left - 1
        truth, clip_id = enlarge(clip["video"]), clip["id"]
        (self.out / "clips").mkdir(parents=True, exist_ok=True)
        Image.fromarray(truth[0]).save(self.out / "clips" / f"{clip_id}_first.png")
        ids, scores = self.find(clip, "motionrag")
        references = [
            {"id": i, "caption": self.db.caption(i), "motion_caption": self.db.motion_caption(i), "score": float(s),
             "clip": self._write(f"{clip_id}_ref{n}", self.db.preview(i))}
            for n, (i, s) in enumerate(zip(ids[:3], scores[:3], strict=True))
        ]  # fmt: skip
        self.entries[clip_id] = entry = {
            "id": clip_id, "domain": clip["domain"], "prompt": clip["caption"], "motion_prompt": clip["motion_caption"],
            "first_frame": f"clips/{clip_id}_first.png", "references": references, "outputs": {},
            "truth": self._write(f"{clip_id}_truth", truth),
        }  # fmt: skip
        return entry

    def _write(self, name: str, frames: np.ndarray) -> str:
        from motionrag.data.video import write_mp4

        write_mp4(self.out / "clips" / f"{name}.mp4", frames, self.fps)
        return f"clips/{name}.mp4"

    def write(self, per_clip: dict[str, dict]) -> None:
        """Write ``clips.json``."""
        from motionrag.io import write_json

        write_json(
            self.out / "clips.json", [{**e, "scores": per_clip[e["id"]]} for e in self.entries.values()]
        )


def enlarge(video: torch.Tensor) -> np.ndarray:
    """(T, 3, H, W) in [-1, 1] -> uint8 (T, H', W', 3), small clips smoothly enlarged by a whole factor."""
    from torch.nn.functional import interpolate

    from motionrag.generate import to_uint8

    factor = max(SHOWN_SIDE // min(video.shape[-2:]), 1)
    return to_uint8(interpolate(video.float(), scale_factor=factor, mode="bicubic") if factor > 1 else video)


def write_csv(path: Path, per_clip: dict[str, dict[str, dict[str, float]]]) -> None:
    """One row for each clip and condition."""
    from motionrag.io import atomic_path

    rows = [{"id": i, "condition": c, **v} for i, by in per_clip.items() for c, v in by.items()]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rich_tables(table: dict[str, dict[str, dict[str, float]]]) -> list[Any]:
    """The means for the terminal, one table for each domain that fits 80 columns; the best value is bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from motionrag.report import metric_table

    shown = []
    for domain in next(iter(table.values())):
        page = metric_table({condition: {domain: row[domain]} for condition, row in table.items()}, {})
        one = Table("condition", title=page.domains[0][0], title_justify="left", box=SIMPLE_HEAD)
        for heading in page.columns:
            one.add_column(heading, justify="right")
        for condition, (_, cells) in zip(table, page.rows, strict=True):
            one.add_row(condition, *(f"[bold]{cell.text}[/]" if cell.best else cell.text for cell in cells))
        shown.append(one)
    return shown
