"""What the pages of ``motionrag report`` share: names of metrics, pictures and clips, axes, files of a run."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrag.errors import MotionRAGError

# Metric -> heading, digits, and whether more is better (None: neither).
METRICS: dict[str, tuple[str, int, bool | None]] = {
    "action_score": ("Action Score", 1, True),
    "dino_score": ("DINO score", 1, True),
    "clip_score": ("CLIP score", 1, True),
    "clip_text_score": ("CLIP text", 1, True),
    "clip_video_score": ("CLIP video", 1, True),
    "subject_consistency": ("Subject", 1, True),
    "motion_smoothness": ("Smoothness", 1, True),
    "dynamic_degree": ("Dynamic, %", 1, None),
    "motion_arrival": ("Arrival", 1, True),
    "psnr": ("PSNR, dB", 1, True),
    "trajectory_error": ("Path error, px", 2, False),
    "motion_distance": ("Motion distance", 3, False),
    "fvd": ("FVD", 1, False),
    "fid": ("FID", 1, False),
    "seconds_per_clip": ("s per clip", 2, None),
}
LABELS = {
    "backbone": "without retrieval",
    "motionrag": "with retrieval",
    "oracle": "true clip as reference",
    "random": "with random references",
    "known": "known motions",
    "new": "new motions",
}
MEDIA = {
    ".mp4": "video/mp4",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
}
PIXEL_WIDTH = 128  # clips this narrow are enlarged with hard edges


# ---------------------------------------------------------------- words and numbers


def name(metric: str) -> str:
    """What a metric is called."""
    return METRICS.get(metric, (label(metric),))[0]


def heading(metric: str) -> str:
    """What stands above a metric's numbers: its name, and an arrow where more or less is better."""
    more_is_better = METRICS.get(metric, ("", 0, None))[2]
    return name(metric) + {True: " ↑", False: " ↓", None: ""}[more_is_better]


def sample_counts(samples: Mapping[str, Mapping[str, int]]) -> str:
    """How many samples the metrics of a whole set stand on (metric -> `samples`), e.g. ``, FVD of 20 samples``."""
    return "".join(f", {name(metric)} of {each['samples']} samples" for metric, each in samples.items())


def label(name: str, labels: dict[str, str] | None = None) -> str:
    """How a condition, a domain or any other name is written."""
    return (labels or {}).get(name) or str(name).replace("_", " ")


def scores(values: dict[str, float]) -> tuple[str, ...]:
    """One clip's metrics, a line each, for below it; those that are neither good nor bad are left out."""
    parts = []
    for metric, value in values.items():
        name, digits, ranked = METRICS.get(metric, (label(metric), 2, None))
        if ranked is not None and value is not None:
            parts.append(f"{name} {value:.{digits}f}")
    return tuple(parts)


def read(path: Path) -> Any:
    """A JSON file that motionrag evaluate writes; raises MotionRAGError naming it when it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MotionRAGError(f"{path} is missing: run motionrag evaluate again, it writes it last") from error
    except ValueError as error:
        raise MotionRAGError(
            f"{path} is no JSON ({error}): write it again with motionrag evaluate"
        ) from error


# ---------------------------------------------------------------- pictures and clips


@dataclass
class Figure:
    """A picture or clip with what is written under it."""

    label: str
    uri: str
    video: bool
    pixel: bool
    details: tuple[str, ...] = ()
    role: str = ""


@dataclass
class Row:
    """One test clip side by side: first frame, reference clips, outputs, truth."""

    id: str
    domain: str
    prompt: str
    motion_prompt: str
    first_frame: Figure
    references: list[Figure]
    outputs: list[Figure]


def figure(folder: Path, file: str, label: str, details: tuple[str, ...] = (), role: str = "") -> Figure:
    """The file that ``clips.json`` of a run names, read; raises MotionRAGError when it is missing or cannot be shown."""
    path = folder / file
    if not path.is_file():
        raise MotionRAGError(
            f"{folder / 'clips.json'} names {file}, which is missing: run motionrag evaluate again"
        )
    if path.suffix.lower() not in MEDIA:
        raise MotionRAGError(
            f"{path}: a page can show {', '.join(sorted(MEDIA))}; write the clip in one of them"
        )
    kind = MEDIA[path.suffix.lower()]
    uri = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return Figure(label, uri, kind.startswith("video"), _width(path) <= PIXEL_WIDTH, details, role)


def _width(path: Path) -> int:
    """Width of a picture or clip in pixels."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].width
    except (FFmpegError, IndexError) as error:
        raise MotionRAGError(f"{path} is no readable picture or clip: {error}") from error


def chosen(clips: list[dict], order: list[str], limit: int) -> list[dict]:
    """The first clips of every domain, equally many, domains in the order of the table."""
    by_domain: dict[str, list[dict]] = {domain: [] for domain in order}
    for clip in clips:
        by_domain.setdefault(clip.get("domain", ""), []).append(clip)
    groups = [group for group in by_domain.values() if group]
    share = math.ceil(limit / max(len(groups), 1))
    return [clip for group in groups for clip in group[:share]]


# ---------------------------------------------------------------- axes


@dataclass
class Axes:
    """The area of a 560 x 220 picture in which points are drawn: data coordinates -> the picture's."""

    x: tuple[float, float]
    y: tuple[float, float]
    levels: list[float]  # round numbers from end to end of the vertical axis

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> Axes:
        """Axes that hold all points."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        levels = _ticks(min(ys), max(ys))
        x = min(xs), max(max(xs), min(xs) + 1e-9)
        return cls(x, (min(levels[0], *ys), max(levels[-1], *ys)), levels)

    def x_at(self, x: float) -> float:
        low, high = self.x
        return round(48 + 500 * (x - low) / (high - low), 1)

    def y_at(self, y: float) -> float:
        low, high = self.y
        return round(190 - 178 * (y - low) / (high - low or 1), 1)

    def x_ticks(self) -> list[tuple[float, str]]:
        low, high = self.x
        return [(self.x_at(tick), f"{tick:g}") for tick in _ticks(low, high) if low <= tick <= high]

    def y_ticks(self) -> list[tuple[float, str]]:
        return [(self.y_at(tick), f"{tick:g}") for tick in self.levels]


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]
