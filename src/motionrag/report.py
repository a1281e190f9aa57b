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

``provenance.json`` is shown when it is there. Several run folders, and the points of a sweep, are compared as well:
see ``motionrag.comparison``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrag import page
from motionrag.comparison import compare, read_runs, read_sweep
from motionrag.errors import MotionRAGError
from motionrag.io import write_text

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
    rows: list[page.Row] = field(default_factory=list)
    total_rows: int = 0
    curves: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)


def write_report(
    runs: list[Path],
    out: Path,
    title: str = "MotionRAG",
    max_clips: int = 12,
    max_references: int = 3,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page for ``runs`` (in this order) to ``out`` and return its path.

    A folder of a sweep becomes a comparison of its points, with their curves. Two or more other folders are
    compared with each other, and shown one after the other below. ``max_clips`` side-by-side rows per run or
    comparison are shown, equally many of each domain, the first of each; with the ``max_references`` nearest
    reference clips. ``notes`` stand below the title. Raises ``MotionRAGError`` naming the folder or file when
    one of ``runs`` is no run folder or a file it names is missing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not runs:
        raise MotionRAGError("report needs at least one run folder: motionrag report outputs/demo")
    runs = [Path(run) for run in runs]
    swept = [run for run in runs if (run / "sweep.json").is_file()]
    single = [run for run in runs if run not in swept]
    sections = [read_run(run, max_clips, max_references) for run in single]
    sections += [
        Section(name=run.resolve().name, curves=curves) for run in swept if (curves := read_curves(run))
    ]
    comparisons = [compare(run.resolve().name, read_sweep(run), max_clips) for run in swept]
    if len(single) > 1:
        comparisons.append(compare("These runs", read_runs(single), max_clips))
    environment = Environment(
        loader=PackageLoader("motionrag", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    return write_text(
        out, template.render(title=title, notes=notes, sections=sections, comparisons=comparisons)
    )


def unfinished(folder: Path) -> bool:
    """Whether there is nothing to show of a run's folder: neither metrics nor a training's log, nor a sweep."""
    return folder.is_dir() and not (
        any((folder / name).is_file() for name in ("metrics.json", "sweep.json"))
        or any(folder.rglob("metrics.csv"))
    )


def read_run(folder: Path, max_clips: int, max_references: int) -> Section:
    """Read one run folder; see the module's description for what it may hold."""
    if not folder.is_dir():
        raise MotionRAGError(
            f"no run folder {folder}: give folders written by motionrag evaluate, train or demo"
        )
    section = Section(name=folder.resolve().name)
    section.curves = read_curves(folder)
    if unfinished(folder):
        raise MotionRAGError(
            f"{folder} is no run folder: expected metrics.json and clips.json (motionrag evaluate, demo) "
            "or a metrics.csv (motionrag train)"
        )
    if (folder / "metrics.json").is_file():
        _add_evaluation(section, folder, max_clips, max_references)
    if (folder / "provenance.json").is_file():
        section.provenance = _provenance(page.read(folder / "provenance.json"))
    return section


# ---------------------------------------------------------------- evaluation


def _add_evaluation(section: Section, folder: Path, max_clips: int, max_references: int) -> None:
    metrics = page.read(folder / "metrics.json")
    if not isinstance(metrics, dict) or not metrics.get("conditions"):
        raise MotionRAGError(
            f'{folder / "metrics.json"}: expected {{"conditions": {{NAME: {{DOMAIN: {{METRIC: number}}}}}}}}; '
            "run motionrag evaluate again"
        )
    conditions = metrics["conditions"]
    labels = {**page.LABELS, **metrics.get("labels", {})}
    section.table = metric_table(conditions, labels, metrics.get("samples"))
    section.headlines = list(_headlines(conditions, labels))
    section.notes = [str(note) for note in metrics.get("notes", [])]
    section.settings = {page.label(key): _plain(value) for key, value in metrics.get("settings", {}).items()}
    clips = page.read(folder / "clips.json")
    section.total_rows = len(clips)
    order = [domain for values in conditions.values() for domain in values]
    section.rows = [
        _row(folder, clip, labels, max_references) for clip in page.chosen(clips, order, max_clips)
    ]


def metric_table(
    conditions: dict[str, dict[str, dict[str, float]]],
    labels: dict[str, str],
    samples: Mapping[str, Mapping[str, Mapping[str, int]]] | None = None,
) -> Table:
    """Numbers of all conditions, with the best of each column and differences to the first condition.

    samples: domain -> metric -> how many samples it stands on, where that is not one for each clip and seed.
    """
    first = next(iter(conditions))
    domains = list(dict.fromkeys(domain for values in conditions.values() for domain in values))
    columns = []
    for domain in domains:
        present = {metric for values in conditions.values() for metric in values.get(domain, {})}
        known = [metric for metric in page.METRICS if metric in present]
        columns += [(domain, metric) for metric in [*known, *sorted(present - page.METRICS.keys() - {"n"})]]
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
        rows.append((page.label(name, labels), cells))
    headings = [
        (
            page.label(domain, labels)
            + _clips(conditions, domain)
            + page.sample_counts((samples or {}).get(domain, {})),
            sum(column[0] == domain for column in columns),
        )
        for domain in domains
    ]
    return Table(headings, [page.heading(metric) for _, metric in columns], rows)


def _clips(conditions: dict[str, dict[str, dict[str, float]]], domain: str) -> str:
    """How many clips the numbers of a domain stand on, e.g. ``, 20 clips``."""
    counts = sorted({values[domain]["n"] for values in conditions.values() if "n" in values.get(domain, {})})
    return f", {' or '.join(map(str, counts))} clips" if counts else ""


def _cell(metric: str, value: float | None, base: float | None, every: list[float]) -> Cell:
    _, digits, more_is_better = page.METRICS.get(metric, ("", 3, None))
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
            for m, (_, _, better) in page.METRICS.items()
            if better is not None and m in conditions[first][domain]
        ]
        if not ranked:
            continue
        values = {name: numbers.get(domain, {}).get(ranked[0]) for name, numbers in conditions.items()}
        values = {name: value for name, value in values.items() if value is not None}
        largest = max([*values.values(), 1e-9])
        digits = page.METRICS[ranked[0]][1]
        bars = [
            (page.label(name, labels), f"{value:.{digits}f}", max(value, 0) / largest, name == first)
            for name, value in values.items()
        ]
        yield Headline(page.label(domain, labels), page.heading(ranked[0]), bars)


def _row(folder: Path, clip: dict, labels: dict[str, str], max_references: int) -> page.Row:
    try:
        scores = clip.get("scores", {})
        references = [
            page.figure(
                folder,
                reference["clip"],
                label=reference.get("motion_caption") or reference.get("caption", ""),
                details=_reference_lines(rank, reference.get("score")),
            )
            for rank, reference in enumerate(clip.get("references", [])[:max_references], start=1)
        ]
        outputs = [
            page.figure(folder, file, page.label(name, labels), page.scores(scores.get(name, {})), role=name)
            for name, file in clip["outputs"].items()
        ]
        outputs.append(page.figure(folder, clip["truth"], "truth", role="truth"))
        return page.Row(
            id=str(clip["id"]),
            domain=page.label(clip.get("domain", ""), labels),
            prompt=clip["prompt"],
            motion_prompt=clip.get("motion_prompt", ""),
            first_frame=page.figure(folder, clip["first_frame"], "first frame"),
            references=references,
            outputs=outputs,
        )
    except KeyError as error:
        raise MotionRAGError(
            f"{folder / 'clips.json'}: clip {clip.get('id', '?')} has no {error}; run motionrag evaluate again"
        ) from error


def _reference_lines(rank: int, score: float | None) -> tuple[str, ...]:
    return (f"reference {rank}",) if score is None else (f"reference {rank}", f"similarity {score:.2f}")


# ---------------------------------------------------------------- curves


def read_curves(folder: Path) -> list[dict[str, Any]]:
    """One chart for every log below ``folder``."""
    return [curve for log in sorted(folder.rglob("metrics.csv")) for curve in _curves(log, folder)]


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
    series = {key: _thin(points) for key, points in series.items()}
    axes = page.Axes.around([point for points in series.values() for point in points])
    x_at, y_at = axes.x_at, axes.y_at
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
        "x_ticks": axes.x_ticks(),
        "y_ticks": axes.y_ticks(),
    }


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / CURVE_POINTS)
    windows = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in w) / len(w), sum(y for _, y in w) / len(w)) for w in windows]


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


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
