"""Runs side by side: what was varied, a table with a row for each, plots against it, their clips of one prompt.

The runs are the points of a sweep (``motionrag.sweeps``: its table says what was varied), or run folders of
``motionrag evaluate`` and ``motionrag train``, where everything in ``config.yaml`` that differs was varied, but for
what says where a run is kept and what it is called. Folders without one are told apart by the settings in
``metrics.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from motionrag import page, sweeps
from motionrag.errors import MotionRAGError

# Where a run is kept, what it is called, whom it tells, its seeds (a column of their own): not what was varied.
KEPT = re.compile(
    r"(run_dir|name|title|notes|test clips|logger)(\.|$)|(.*\.)?(out|dirpath|save_dir|_partial_|_recursive_)$"
    r"|(.*\.)?seeds?(\.|$)"
)
MAX_LINES = 8  # of a plot; with more, whatever else was varied is averaged
REST = "other settings"
MAX_WORDS = 8  # values of a parameter that are no numbers, on the axis of a plot
LOG_RANGE = 50  # values that span more than this stand on a logarithmic axis


Line = dict[float, list[tuple[str, float]]]  # of a plot: place on the axis -> runs and their values


class Metric(NamedTuple):
    """A column: which metric, and of which domain and condition of an evaluation."""

    name: str
    domain: str = ""
    condition: str = ""


@dataclass
class Run:
    """One row. ``parameters``: what was varied -> its value as text; a run that has no such key lacks it."""

    name: str
    folder: Path
    parameters: dict[str, str]
    seed: int | None
    state: str
    step: int | None
    metrics: dict[Metric, float]
    labels: dict[str, str]
    error: str | None = None


@dataclass
class Heading:
    """Of a column: its name, and in small what else there is to say."""

    text: str
    small: str = ""


@dataclass
class Cell:
    """``value`` is what sorting sees (numbers in full, empty if missing), ``text`` what is read."""

    text: str = "–"
    value: str = ""
    best: bool = False
    small: str = ""


@dataclass
class Comparison:
    """Everything the page shows of several runs."""

    name: str
    lead: str
    headings: list[Heading]
    rows: list[tuple[str, list[Cell]]]  # state, cells
    plots: list[tuple[str, str, list[dict[str, Any]]]] = field(
        default_factory=list
    )  # parameter, legend, charts
    clips: list[page.Row] = field(default_factory=list)
    shared_clips: int = 0


# ---------------------------------------------------------------- reading


def read_sweep(folder: Path) -> list[Run]:
    """The points of the sweep in ``folder``, as they are now."""
    runs = []
    for row in sweeps.write_table(folder):
        done, run = row["state"] in sweeps.DONE, Path(row["folder"])
        evaluation = _evaluation(run) if done else {}
        parameters = {key: value for key, value in row["parameters"].items() if key != "seed"}
        seed = row["seed"] if row["seed"] is not None else _number(row["parameters"].get("seed"))
        metrics = _numbers(evaluation) or _logged(row["metrics"])
        labels = {**page.LABELS, **evaluation.get("labels", {})}
        name, state, step, error = row["name"], row["state"], row["step"], row["error"]
        runs.append(Run(name, run, parameters, seed, state, step, metrics, labels, error))
    return runs


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Run folders that were started one by one; what was varied is found by comparing them."""
    evaluations = [_evaluation(folder) for folder in folders]
    if all((folder / "config.yaml").is_file() for folder in folders):
        configs = [_config(folder / "config.yaml") for folder in folders]
    else:
        configs = [dict(_flat(evaluation.get("settings", {}))) for evaluation in evaluations]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.resolve().parent.name}/{folder.resolve().name}" for folder in folders]
    parameters = varied(configs)
    runs = []
    for i, (folder, evaluation) in enumerate(zip(folders, evaluations, strict=True)):
        finished = bool(evaluation) or (folder / "results.json").is_file()
        step, logged = sweeps.measured(folder, finished)
        runs.append(
            Run(
                name=names[i],
                folder=folder,
                parameters={key: values[i] for key, values in parameters.items() if values[i] is not None},
                seed=_number(configs[i].get("seed")),
                state="finished" if finished else "unfinished",
                step=step,
                metrics=_numbers(evaluation) or _logged(logged),
                labels={**page.LABELS, **evaluation.get("labels", {})},
            )
        )
    return runs


def varied(configs: Sequence[dict[str, str]]) -> dict[str, list[str | None]]:
    """Flat configs of several runs -> the keys that differ, with each run's value (None: it has no such key).

    Keys that always have the same value as another are one: ``optimizer.lr = scheduler.max_lr``. Where a part has a
    name (``backbone.name``), that stands for everything in it that changes with it; where its name or class differs,
    options that only one kind has are left out. Paths and classes are cut to what differs.
    """
    by_values: dict[tuple[str | None, ...], list[str]] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = tuple(config.get(key) for config in configs)
        if len(set(values)) > 1 and not KEPT.match(key):
            by_values.setdefault(values, []).append(key)
    first = {
        min(keys, key=lambda key: (key.count("."), len(key))): values for values, keys in by_values.items()
    }
    alike = {
        key: [other for other in by_values[values] if _word(other) != _word(key)]
        for key, values in first.items()
    }
    kinds = [key for key in first if key.endswith((".name", "._target_"))]

    def told(key: str) -> bool:
        """The name or class of a part that holds this key says as much."""
        for kind in kinds:
            if key == kind or not key.startswith(kind[: kind.rindex(".") + 1]):
                continue
            only_there = None in first[key] and len(set(first[key])) == 2
            follows = len(set(zip(first[kind], first[key], strict=True))) == len(set(first[kind]))
            same = kind.endswith(".name") and _partition(first[key]) == _partition(first[kind])
            if same or (only_there and follows):
                return True
        return False

    return {
        " = ".join([key, *alike[key][:2]]): _shortened(values)
        for key, values in first.items()
        if not told(key)
    }


def _partition(values: Sequence[str | None]) -> list[int]:
    return [values.index(value) for value in values]


def _shortened(values: Sequence[str | None]) -> list[str | None]:
    """Paths and dotted names without the parts that all have in common at the front and at the end."""
    present = [value for value in values if value is not None]
    mark = next(
        (mark for mark in ("/", ".") if all(mark in value and " " not in value for value in present)), None
    )
    if mark is None or any(_number(value) is not None for value in present):
        return list(values)
    split = [value.split(mark) for value in present]
    front = end = 0
    while all(len(parts) - front > 1 and parts[front] == split[0][front] for parts in split):
        front += 1
    while all(len(parts) - front - end > 1 and parts[-1 - end] == split[0][-1 - end] for parts in split):
        end += 1
    short = iter(mark.join(parts[front : len(parts) - end]) for parts in split)
    return [None if value is None else next(short) for value in values]


def _config(path: Path) -> dict[str, str]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return dict(_flat(OmegaConf.to_container(OmegaConf.load(path))))
    except (YAMLError, OmegaConfBaseException, AttributeError) as error:
        line = str(error).splitlines()[0]
        raise MotionRAGError(
            f"{path} is no config ({line}): expected what motionrag wrote; take it away or run again"
        ) from error


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value as text of every leaf; a list of one is its element."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and len(value) == 1:
        yield from _flat(value[0], key)
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value))
    else:
        words = {None: "null", True: "true", False: "false"}
        plain = value is None or isinstance(value, bool)
        yield key, words[value] if plain else f"{value:.12g}" if isinstance(value, float) else str(value)


def _evaluation(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of an evaluation, empty where there is none."""
    path = folder / "metrics.json"
    return page.read(path) if path.is_file() else {}


def _numbers(evaluation: dict[str, Any]) -> dict[Metric, float]:
    return {
        Metric(name, domain, condition): value
        for condition, domains in evaluation.get("conditions", {}).items()
        for domain, values in domains.items()
        for name, value in values.items()
        if name != "n" and value is not None
    }


def _logged(values: dict[str, float]) -> dict[Metric, float]:
    return {Metric(name): value for name, value in values.items()}


def _number(text: str | None) -> int | float | None:
    """``3`` and ``1e-4`` are numbers, ``null`` and ``nan`` are not."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return None if not math.isfinite(number) else int(number) if number.is_integer() else number


# ---------------------------------------------------------------- table


def compare(name: str, runs: list[Run], max_clips: int) -> Comparison:
    """The table, plots and clips of ``runs``; see ``Comparison``."""
    _condition_as_parameter(runs)
    parameters = list(dict.fromkeys(key for run in runs for key in run.parameters))
    found = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    ranks = [
        list(dict.fromkeys([*(page.METRICS if i == 0 else ()), *(m[i] for m in found)])) for i in range(3)
    ]
    metrics = sorted(found, key=lambda m: [rank.index(part) for rank, part in zip(ranks, m, strict=True)])
    labels = {key: text for run in runs for key, text in run.labels.items()}
    seeds, steps = any(run.seed is not None for run in runs), any(run.step is not None for run in runs)
    headings = [
        Heading("run"),
        *(Heading(*key.split(" = ")[:1], small=" = ".join(key.split(" = ")[1:])) for key in parameters),
    ]
    headings += [Heading("seed")] * seeds + [Heading("state")] + [Heading("step")] * steps
    headings += [Heading(page.heading(metric.name), _where(metric, metrics, labels)) for metric in metrics]
    best = {metric: _best(metric, runs) for metric in metrics}
    rows = []
    for run in runs:
        cells = [Cell(run.name, run.name), *(_cell(run.parameters.get(key)) for key in parameters)]
        cells += (
            [_cell(run.seed)] * seeds
            + [Cell(run.state, run.state, small=run.error or "")]
            + [_cell(run.step)] * steps
        )
        for metric in metrics:
            value = run.metrics.get(metric)
            text = "–" if value is None else _written(metric.name, value)
            good = value is not None and run.state == "finished" and value == best[metric]
            cells.append(Cell(text, "" if value is None else repr(value), good))
        rows.append((run.state, cells))
    comparison = Comparison(name, _lead(runs, parameters), headings, rows)
    comparison.plots = list(_plots(runs, parameters, metrics, labels))
    comparison.clips, comparison.shared_clips = _clips(runs, parameters, max_clips)
    return comparison


def _condition_as_parameter(runs: list[Run]) -> None:
    """Where every run has one condition, but not all the same, the condition is what was varied."""
    conditions = [{metric.condition for metric in run.metrics} - {""} for run in runs]
    if all(len(each) <= 1 for each in conditions) and len(set().union(*conditions)) > 1:
        for run, each in zip(runs, conditions, strict=True):
            if each:
                run.parameters["condition"] = page.label(*each, run.labels)
            run.metrics = {metric._replace(condition=""): value for metric, value in run.metrics.items()}


def _lead(runs: list[Run], parameters: list[str]) -> str:
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    seeds = {run.seed for run in runs if run.seed is not None}
    what = [key.split(" = ")[0] for key in parameters] + ["seed"] * (len(seeds) > 1)
    more = f" and {len(what) - 8} more" if len(what) > 8 else ""
    said = f"Varied: {', '.join(what[:8])}{more}." if what else "Their settings do not differ."
    return f"{len(runs)} runs ({counts}). {said}"


def _cell(value: str | int | float | None) -> Cell:
    return Cell() if value is None else Cell(str(value), str(value))


def _written(metric: str, value: float) -> str:
    return f"{value:.{page.METRICS[metric][1]}f}" if metric in page.METRICS else f"{value:.4g}"


def _where(metric: Metric, metrics: Sequence[Metric], labels: dict[str, str]) -> str:
    """Domain and condition of a metric, as far as there are several."""
    parts = [
        page.label(metric[i], labels)
        for i in (1, 2)
        if len({other[i] for other in metrics}) > 1 and metric[i]
    ]
    return ", ".join(parts)


def _best(metric: Metric, runs: list[Run]) -> float | None:
    """The best value of finished runs; None if nobody says whether more is better, or there is only one."""
    more_is_better = page.METRICS.get(metric.name, ("", 0, False if "loss" in metric.name else None))[2]
    values = [run.metrics[metric] for run in runs if run.state == "finished" and metric in run.metrics]
    if more_is_better is None or len(set(values)) < 2:
        return None
    return max(values) if more_is_better else min(values)


# ---------------------------------------------------------------- plots


def _plots(
    runs: list[Run], parameters: list[str], metrics: list[Metric], labels: dict[str, str]
) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """For every varied parameter: its name, what the marks mean, a chart for each metric and domain."""
    conditions, domains = ({metric[i]: None for metric in metrics} for i in (2, 1))
    for key, along in _apart(runs, parameters).items():
        shown = [run for run in runs if run.state == "finished" and key in run.parameters]
        places, numeric = _places([run.parameters[key] for run in shown])
        if len(places) < 2 or key.endswith("_target_") or not (numeric or len(places) <= MAX_WORDS):
            continue
        others = [other for other in parameters if other != key and other not in along]
        settings = _settings(shown, key, others, MAX_LINES // len(conditions))
        charts = []
        for name, domain in dict.fromkeys(metric[:2] for metric in metrics):
            lines: dict[str, Line] = {}
            for condition in conditions:
                for run in shown:
                    value = run.metrics.get(Metric(name, domain, condition))
                    if value is not None:
                        said = [page.label(condition, labels)] if len(conditions) > 1 else []
                        said += [settings[run.folder]] if settings[run.folder] else []
                        label = REST if REST in said else ", ".join(said)
                        at = lines.setdefault(label, {}).setdefault(places[run.parameters[key]], [])
                        at.append((run.name, value))
            if len({place for line in lines.values() for place in line}) > 1:
                where = page.label(domain, labels) if len(domains) > 1 else ""
                charts.append(_chart(name, lines, places, numeric) | {"where": where})
        legend = "Dots are single runs; rings and lines are the means of those with the same value"
        legend += ", whatever else was varied." if others and not any(settings.values()) else "."
        if along:
            legend += f" Changed together with it, so that the plots cannot tell which mattered: {', '.join(along)}."
        if left := [f"{run.name} ({run.state})" for run in runs if run.state != "finished"]:
            legend += f" Not drawn: {', '.join(left)}."
        if charts:
            yield key.split(" = ")[0], legend, charts


def _apart(runs: list[Run], parameters: list[str]) -> dict[str, list[str]]:
    """One parameter, rather one of numbers, of those that changed together in all finished runs -> the others."""
    together: dict[tuple[int, ...], list[tuple[bool, str]]] = {}
    for key in parameters:
        values = [run.parameters.get(key) for run in runs if run.state == "finished"]
        numeric = all(_number(value) is not None for value in values)
        together.setdefault(tuple(_partition(values)), []).append((not numeric, key))
    groups = [[key for _, key in sorted(group, key=lambda pair: pair[0])] for group in together.values()]
    return {group[0]: group[1:] for group in groups}


def _places(values: Sequence[str]) -> tuple[dict[str, float], bool]:
    """Where each value of a parameter stands on the axis, and whether they are numbers; words stand in a row."""
    numbers = {value: _number(value) for value in values}
    if None in numbers.values() or not numbers:
        return {value: float(i) for i, value in enumerate(numbers)}, False
    low, high = min(numbers.values()), max(numbers.values())
    scale = math.log10 if low > 0 and high / low > LOG_RANGE else float
    return {value: scale(number) for value, number in numbers.items()}, True


def _settings(runs: list[Run], key: str, others: list[str], room: int) -> dict[Path, str]:
    """The line of a plot against ``key`` that each run belongs to: whatever else was varied, in words.

    ``REST`` for settings that were run with one value only, as no line goes through them. All runs are of one line,
    the mean over everything else, if no setting has several values (a search), or more than ``room`` have.
    """
    differ = [other for other in others if len({run.parameters.get(other) for run in runs}) > 1]
    said = {
        run.folder: ", ".join(f"{_word(other)} {run.parameters.get(other, '–')}" for other in differ)
        for run in runs
    }
    values: dict[str, set[str]] = {}
    for run in runs:
        values.setdefault(said[run.folder], set()).add(run.parameters[key])
    through = [setting for setting, each in values.items() if len(each) > 1]
    if not 0 < len(through) <= room:
        return dict.fromkeys(said, "")
    return {folder: setting if setting in through else REST for folder, setting in said.items()}


def _chart(metric: str, lines: dict[str, Line], places: dict[str, float], numeric: bool) -> dict[str, Any]:
    """Dots, means and lines in the coordinates of the picture, with the parameter's own values as ticks."""
    points = [(place, value) for line in lines.values() for place, at in line.items() for _, value in at]
    axes = page.Axes.around(points)
    if not numeric:  # words keep a distance from the ends
        axes.x = (axes.x[0] - 0.5, axes.x[1] + 0.5)
    drawn = []
    colour = 1 if REST in lines or len(lines) == 1 else 0  # 0 is grey
    for label, line in lines.items():
        means = [(axes.x_at(place), axes.y_at(fmean(v for _, v in line[place]))) for place in sorted(line)]
        rest = label == REST
        drawn.append(
            {
                "label": label,
                "series": 0 if rest else colour % MAX_LINES,
                "points": "" if rest or not numeric else " ".join(f"{x},{y}" for x, y in means),
                "means": means if not rest and any(len(at) > 1 for at in line.values()) else [],
                "dots": [
                    (axes.x_at(place), axes.y_at(value), f"{run}: {_written(metric, value)}")
                    for place, at in line.items()
                    for run, value in at
                ],
            }
        )
        colour += not rest
    ticks: list[tuple[float, str, int]] = []  # place, text, row: words take turns in two rows
    used = {place for place, _ in points}
    for text, place in sorted(places.items(), key=lambda item: item[1]):
        at, room = axes.x_at(place), 7 if numeric else 150 // len(used)
        short = text if len(text) <= room else f"{_number(text):.2g}" if numeric else text[:room] + "…"
        if not numeric and place in used:
            ticks.append((at, short, len(ticks) % 2))
        elif place in used and (not ticks or at - ticks[-1][0] > 4 + 3.2 * (len(short) + len(ticks[-1][1]))):
            ticks.append((at, short, 0))
    heading = page.heading(metric)
    return {
        "name": heading,
        "lines": drawn,
        "words": not numeric,
        "x_ticks": ticks,
        "y_ticks": axes.y_ticks(),
    }


# ---------------------------------------------------------------- clips


def _clips(runs: list[Run], parameters: list[str], limit: int) -> tuple[list[page.Row], int]:
    """The first test clips that two or more runs kept, with each run's output; and how many there are."""
    kept: dict[tuple[str, str], list[tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        if run.state in sweeps.DONE and (run.folder / "clips.json").is_file():
            for clip in page.read(run.folder / "clips.json"):
                kept.setdefault((str(clip.get("id")), clip.get("prompt", "")), []).append((run, clip))
    shared = {key: both for key, both in kept.items() if len(both) > 1}
    chosen = page.chosen([both[0][1] for both in shared.values()], [], limit)
    return [_row(shared[str(clip["id"]), clip["prompt"]], parameters) for clip in chosen], len(shared)


def _row(both: list[tuple[Run, dict[str, Any]]], parameters: list[str]) -> page.Row:
    run, clip = both[0]
    try:
        outputs = [page.figure(run.folder, clip["truth"], "truth", role="truth")]
        for other, its in both:
            condition = main_condition(list(its["outputs"]))
            said = condition == "motionrag" or "condition" in other.parameters
            details = () if said else (page.label(condition, other.labels),)
            details += page.scores(its.get("scores", {}).get(condition, {}))
            outputs.append(
                page.figure(other.folder, its["outputs"][condition], _label(other, both, parameters), details)
            )
        first_frame = page.figure(run.folder, clip["first_frame"], "first frame")
    except (KeyError, IndexError) as error:
        raise MotionRAGError(
            f"clips.json of {', '.join(str(run.folder) for run, _ in both)}: clip {clip.get('id')} lacks {error}; "
            "run motionrag evaluate again"
        ) from error
    return page.Row(
        id=str(clip["id"]),
        domain=page.label(clip.get("domain", ""), run.labels),
        prompt=clip["prompt"],
        motion_prompt=clip.get("motion_prompt", ""),
        first_frame=first_frame,
        references=[],
        outputs=outputs,
    )


def main_condition(conditions: list[str]) -> str:
    """The one of a run's conditions to show: with retrieval, else the first that is not the backbone alone."""
    if "motionrag" in conditions:
        return "motionrag"
    return ([name for name in conditions if name != "backbone"] or conditions)[0]


def _label(run: Run, both: list[tuple[Run, dict[str, Any]]], parameters: list[str]) -> str:
    """What tells this run from the others of a row: `k 3, seed 1`; its name if nothing does."""
    words = [_word(key) for key in parameters]
    parts = [
        f"{word if words.count(word) == 1 else key.split(' = ')[0]} {run.parameters[key]}"
        for key, word in zip(parameters, words, strict=True)
        if key in run.parameters and len({other.parameters.get(key) for other, _ in both}) > 1
    ]
    if len({other.seed for other, _ in both}) > 1:
        parts.append(f"seed {run.seed}")
    return ", ".join(parts) or run.name


def _word(key: str) -> str:
    """The last part of a key that says something: `k` of `retrieval.k`, `backbone` of `backbone.name`."""
    parts = [part for part in key.split(" = ")[0].split(".") if part not in ("name", "_target_")]
    return page.label((parts or [key])[-1])
