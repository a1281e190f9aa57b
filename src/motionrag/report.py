"""Run folders -> one HTML page that needs nothing else: no network, no files beside it.

A run folder may hold an evaluation, training logs, or both.

Evaluation (``motionrag evaluate``, ``motionrag demo``):

- ``metrics.json``: ``{"conditions": {NAME: {DOMAIN: {METRIC: number, "n": clips}}}, "settings": {...},
  "notes": [...], "labels": {NAME or DOMAIN: text}}``; the last three are optional. The first condition is
  the one the others are compared with.
- ``clips.json``: a list of ``{"id", "domain", "prompt", "motion_prompt", "first_frame": FILE, "references":
  [{"id", "caption", "motion_caption", "score", "clip": FILE}], "outputs": {NAME: FILE}, "truth": FILE,
  "scores": {NAME: {METRIC: number}}}``; files are relative to the run folder.

Training (``motionrag train``): any ``metrics.csv`` of Lightning's CSVLogger inside the folder; its columns
with ``loss`` in their name become curves over ``step``.

``provenance.json`` is shown when it is there.
"""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrag.errors import MotionRAGError
from motionrag.io import write_text

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
CURVE_POINTS = 300


# ---------------------------------------------------------------- what the template gets


@dataclass
class Cell:
    """One number of the table: its text, the difference to the first condition, and how to show both."""

    text: str = ""
    difference: str = ""
    verdict: str = ""  # better, worse or nothing
    best: bool = False


@dataclass
class Table:
    """Conditions x (domains x metrics)."""

    domains: list[tuple[str, int]]  # label, number of columns
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


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


@dataclass
class Headline:
    """The first metric of one domain, first condition against the last compared one."""

    domain: str
    metric: str
    bars: list[tuple[str, str, float, bool]]  # label, text, share of the axis in [0, 1], is the first


@dataclass
class Section:
    """Everything the page shows of one run folder."""

    name: str
    headlines: list[Headline] = field(default_factory=list)
    table: Table | None = None
    notes: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    total_rows: int = 0
    curves: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)


def write_report(
    runs: list[Path], out: Path, title: str = "MotionRAG", max_clips: int = 12, max_references: int = 3
) -> Path:
    """Write the page for ``runs`` (in this order) to ``out`` and return its path.

    ``max_clips`` side-by-side rows per run are shown, equally many of each domain, the first of each; with
    the ``max_references`` nearest reference clips. Raises ``MotionRAGError`` naming the folder or file when
    one of ``runs`` is no run folder or a file it names is missing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not runs:
        raise MotionRAGError("report needs at least one run folder: motionrag report outputs/demo")
    sections = [read_run(Path(run), max_clips, max_references) for run in runs]
    environment = Environment(
        loader=PackageLoader("motionrag", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(title=title, sections=sections)
    return write_text(out, page)


def read_run(folder: Path, max_clips: int, max_references: int) -> Section:
    """Read one run folder; see the module's description for what it may hold."""
    if not folder.is_dir():
        raise MotionRAGError(
            f"no run folder {folder}: give folders written by motionrag evaluate, train or demo"
        )
    section = Section(name=folder.resolve().name)
    logs = sorted(folder.rglob("metrics.csv"))
    if not (folder / "metrics.json").is_file() and not logs:
        raise MotionRAGError(
            f"{folder} is no run folder: expected metrics.json and clips.json (motionrag evaluate, demo) "
            "or a metrics.csv (motionrag train)"
        )
    if (folder / "metrics.json").is_file():
        _add_evaluation(section, folder, max_clips, max_references)
    section.curves = [curve for log in logs for curve in _curves(log, folder)]
    if (folder / "provenance.json").is_file():
        section.provenance = _provenance(_json(folder / "provenance.json"))
    return section


# ---------------------------------------------------------------- evaluation


def _add_evaluation(section: Section, folder: Path, max_clips: int, max_references: int) -> None:
    metrics = _json(folder / "metrics.json")
    if not isinstance(metrics, dict) or not metrics.get("conditions"):
        raise MotionRAGError(
            f'{folder / "metrics.json"}: expected {{"conditions": {{NAME: {{DOMAIN: {{METRIC: number}}}}}}}}; '
            "run motionrag evaluate again"
        )
    conditions = metrics["conditions"]
    labels = {**LABELS, **metrics.get("labels", {})}
    section.table = metric_table(conditions, labels)
    section.headlines = list(_headlines(conditions, labels))
    section.notes = [str(note) for note in metrics.get("notes", [])]
    section.settings = {_label(key): _plain(value) for key, value in metrics.get("settings", {}).items()}
    clips = _json(folder / "clips.json")
    section.total_rows = len(clips)
    order = [domain for values in conditions.values() for domain in values]
    section.rows = [_row(folder, clip, labels, max_references) for clip in _chosen(clips, order, max_clips)]


def metric_table(conditions: dict[str, dict[str, dict[str, float]]], labels: dict[str, str]) -> Table:
    """Numbers of all conditions, with the best of each column and differences to the first condition."""
    first = next(iter(conditions))
    domains = list(dict.fromkeys(domain for values in conditions.values() for domain in values))
    columns = []
    for domain in domains:
        present = {metric for values in conditions.values() for metric in values.get(domain, {})}
        known = [metric for metric in METRICS if metric in present]
        columns += [(domain, metric) for metric in [*known, *sorted(present - METRICS.keys() - {"n"})]]
    rows = []
    for name, values in conditions.items():
        cells = []
        for domain, metric in columns:
            every = [other.get(domain, {}).get(metric) for other in conditions.values()]
            base = conditions[first].get(domain, {}).get(metric)
            value = values.get(domain, {}).get(metric)
            cells.append(
                _cell(metric, value, None if name == first else base, [x for x in every if x is not None])
            )
        rows.append((_label(name, labels), cells))
    headings = [
        (_label(domain, labels) + _clips(conditions, domain), sum(column[0] == domain for column in columns))
        for domain in domains
    ]
    return Table(headings, [_heading(metric) for _, metric in columns], rows)


def _clips(conditions: dict[str, dict[str, dict[str, float]]], domain: str) -> str:
    """How many clips the numbers of a domain stand on, e.g. ``, 20 clips``."""
    counts = sorted({values[domain]["n"] for values in conditions.values() if "n" in values.get(domain, {})})
    return f", {' or '.join(map(str, counts))} clips" if counts else ""


def _cell(metric: str, value: float | None, base: float | None, every: list[float]) -> Cell:
    _, digits, more_is_better = METRICS.get(metric, ("", 3, None))
    if value is None:
        return Cell(text="–")
    cell = Cell(text=f"{value:.{digits}f}")
    if more_is_better is None:
        return cell
    cell.best = len(every) > 1 and value == (max(every) if more_is_better else min(every))
    if base is not None:
        cell.difference = f"{value - base:+.{digits}f}".replace("-", "−")
        if float(f"{value - base:.{digits}f}") != 0:
            cell.verdict = "better" if (value > base) == more_is_better else "worse"
    return cell


def _headlines(conditions: dict[str, dict], labels: dict[str, str]) -> Iterator[Headline]:
    """The first ranked metric of every domain as bars, one per condition."""
    first = next(iter(conditions))
    for domain in conditions[first]:
        ranked = [
            m
            for m, (_, _, better) in METRICS.items()
            if better is not None and m in conditions[first][domain]
        ]
        if not ranked:
            continue
        values = {name: numbers.get(domain, {}).get(ranked[0]) for name, numbers in conditions.items()}
        values = {name: value for name, value in values.items() if value is not None}
        largest = max([*values.values(), 1e-9])
        digits = METRICS[ranked[0]][1]
        bars = [
            (_label(name, labels), f"{value:.{digits}f}", max(value, 0) / largest, name == first)
            for name, value in values.items()
        ]
        yield Headline(_label(domain, labels), _heading(ranked[0]), bars)


def _chosen(clips: list[dict], order: list[str], limit: int) -> list[dict]:
    """The first clips of every domain, equally many, domains in the order of the table."""
    by_domain: dict[str, list[dict]] = {domain: [] for domain in order}
    for clip in clips:
        by_domain.setdefault(clip.get("domain", ""), []).append(clip)
    groups = [group for group in by_domain.values() if group]
    share = math.ceil(limit / max(len(groups), 1))
    return [clip for group in groups for clip in group[:share]]


def _row(folder: Path, clip: dict, labels: dict[str, str], max_references: int) -> Row:
    try:
        scores = clip.get("scores", {})
        references = [
            _figure(
                folder,
                reference["clip"],
                label=reference.get("motion_caption") or reference.get("caption", ""),
                details=_reference_lines(rank, reference.get("score")),
            )
            for rank, reference in enumerate(clip.get("references", [])[:max_references], start=1)
        ]
        outputs = [
            _figure(folder, file, _label(name, labels), _scores(scores.get(name, {})), role=name)
            for name, file in clip["outputs"].items()
        ]
        outputs.append(_figure(folder, clip["truth"], "truth", role="truth"))
        return Row(
            id=str(clip["id"]),
            domain=_label(clip.get("domain", ""), labels),
            prompt=clip["prompt"],
            motion_prompt=clip.get("motion_prompt", ""),
            first_frame=_figure(folder, clip["first_frame"], "first frame"),
            references=references,
            outputs=outputs,
        )
    except KeyError as error:
        raise MotionRAGError(
            f"{folder / 'clips.json'}: clip {clip.get('id', '?')} has no {error}; run motionrag evaluate again"
        ) from error


def _figure(folder: Path, file: str, label: str, details: tuple[str, ...] = (), role: str = "") -> Figure:
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


def _reference_lines(rank: int, score: float | None) -> tuple[str, ...]:
    return (f"reference {rank}",) if score is None else (f"reference {rank}", f"similarity {score:.2f}")


def _scores(scores: dict[str, float]) -> tuple[str, ...]:
    parts = []
    for metric, value in scores.items():
        heading, digits, ranked = METRICS.get(metric, (_label(metric), 2, None))
        if ranked is not None and value is not None:
            parts.append(f"{heading} {value:.{digits}f}")
    return tuple(parts)


# ---------------------------------------------------------------- curves


def _curves(log: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """One chart per log: every column with ``loss`` in its name, over ``step``."""
    series: dict[str, list[tuple[float, float]]] = {}
    with log.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            for name, text in row.items():
                if name and "loss" in name and text:
                    try:
                        point = float(row.get("step") or number), float(text)
                    except ValueError as error:
                        raise MotionRAGError(
                            f"{log}, line {number + 2}: expected numbers, got {text!r}; it is no log of motionrag train"
                        ) from error
                    if all(map(math.isfinite, point)):
                        series.setdefault(name, []).append(point)
    # Lightning logs a step and an epoch form of one value: the finer one says it all
    for name in [name for name in series if name.endswith("_epoch")]:
        if name.removesuffix("_epoch") + "_step" in series:
            del series[name]
    if series:
        place = log.parent.relative_to(folder)
        name = " / ".join(part for part in place.parts if not part.startswith("version_"))
        yield chart(series, name or folder.resolve().name)


def chart(series: dict[str, list[tuple[float, float]]], name: str) -> dict[str, Any]:
    """Lines in the coordinates of a 560 x 220 picture, with the ticks of both axes.

    Long series are averaged in windows down to a few hundred points.
    """
    left, right, top, bottom = 48, 548, 12, 190
    series = {key: _thin(points) for key, points in series.items()}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def x_at(x: float) -> float:
        return round(left + (right - left) * (x - x_low) / (x_high - x_low), 1)

    def y_at(y: float) -> float:
        return round(bottom - (bottom - top) * (y - y_low) / (y_high - y_low or 1), 1)

    lines = [
        {
            "label": key.replace("/", " ").replace("_", " "),
            "validation": key.startswith("val"),
            "points": " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points),
            "ends": f"{points[0][1]:.3g} → {points[-1][1]:.3g}",
            "dots": [(x_at(x), y_at(y)) for x, y in points] if len(points) <= 30 else [],
        }
        for key, points in series.items()
    ]
    return {
        "name": name,
        "lines": lines,
        "x_ticks": [(x_at(tick), f"{tick:g}") for tick in x_ticks if x_low <= tick <= x_high],
        "y_ticks": [(y_at(tick), f"{tick:g}") for tick in y_ticks],
    }


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / CURVE_POINTS)
    windows = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in w) / len(w), sum(y for _, y in w) / len(w)) for w in windows]


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


# ---------------------------------------------------------------- words


def _provenance(record: dict[str, Any]) -> dict[str, str]:
    git = record.get("git")
    state = " with uncommitted changes" if git and git["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    shown = {
        "command": " ".join(record.get("argv", [])),
        "date": record.get("date"),
        "seed": record.get("seed"),
        "commit": f"{git['commit']}{state}" if git else None,
        "versions": versions,
        "python": record.get("python"),
        "platform": record.get("platform"),
    }
    return {key: str(value) for key, value in shown.items() if value not in (None, "")}


def _heading(metric: str) -> str:
    heading, _, more_is_better = METRICS.get(metric, (_label(metric), 0, None))
    return heading + {True: " ↑", False: " ↓", None: ""}[more_is_better]


def _label(name: str, labels: dict[str, str] | None = None) -> str:
    return (labels or {}).get(name) or str(name).replace("_", " ")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MotionRAGError(f"{path} is missing: run motionrag evaluate again, it writes it last") from error
    except ValueError as error:
        raise MotionRAGError(
            f"{path} is no JSON ({error}): write it again with motionrag evaluate"
        ) from error
