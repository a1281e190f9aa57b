"""The paper's table: one condition, one with retrieval, their difference, and what retrieval costs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from motionrag.io import atomic_path, write_json, write_text
from motionrag.page import LABELS, METRICS, sample_counts

#: Stages that only a condition with retrieval goes through, and how the paper's table calls them.
OVERHEAD = {"retrieval": "retrieval", "cama": "CAMA"}


@dataclass
class Row:
    """One line: metric -> value, its standard deviation over seeds, and the ends of its 95 % interval, if known."""

    name: str
    values: dict[str, float]
    deviations: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class PaperTable:
    """The lines of one domain.

    overhead: seconds per clip of retrieval, CAMA (look-up of tokens, Resampler, CAMA) and adapter (time of sampling
    with motion tokens minus without), their sum being the difference in `seconds_per_clip`; empty without them. samples:
    metric of a whole set -> `samples`, in each of its two sets, and `features`, the width of each.
    """

    domain: str
    clips: int
    seeds: int
    columns: list[str]
    rows: list[Row]
    overhead: dict[str, float]
    samples: dict[str, dict[str, int]] = field(default_factory=dict)

    def cell(self, row: Row, metric: str) -> str:
        """A number as it is printed, with its deviation and interval."""
        text = self.number(row, metric)
        if metric in row.deviations:
            text += f" ± {row.deviations[metric]:.{_digits(metric)}f}"
        if metric in row.intervals:
            text += f" [{', '.join(self.end(row, metric, i) for i in (0, 1))}]"
        return text

    def number(self, row: Row, metric: str) -> str:
        """The number alone."""
        sign = "+" if row.name == "difference" else ""
        return _number(row.values[metric], metric, sign) if metric in row.values else "–"

    def end(self, row: Row, metric: str, which: int) -> str:
        """The lower (0) or upper (1) end of the interval; nothing where there is none."""
        return _number(row.intervals[metric][which], metric) if metric in row.intervals else ""

    def caption(self) -> str:
        """Domain, clips, seeds, and what metrics of a whole set stand on."""
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        counts = sample_counts({name: self.samples[name] for name in self.columns if name in self.samples})
        return f"{LABELS.get(self.domain, self.domain)}, {self.clips} clips{seeds}{counts}"

    def overhead_line(self) -> str:
        """What retrieval costs, in a sentence."""
        parts = " + ".join(f"{name} {seconds:.3f}" for name, seconds in self.overhead.items())
        return f"overhead per clip: {parts} = {sum(self.overhead.values()):.3f} s" if parts else ""


def paper_tables(
    result: Mapping[str, Any], columns: Sequence[str], backbone: str | None = None
) -> list[PaperTable]:
    """A table for each domain of `result` (`metrics.json`), of its first condition and the one to compare with it.

    That is `motionrag`, or else the second. columns: metrics; those that were not measured are left out. backbone:
    name for the condition `backbone`.
    """
    conditions = result["conditions"]
    first, *others = conditions
    second = "motionrag" if "motionrag" in others else (others or [None])[0]
    tables = []
    for domain, base in conditions[first].items():
        rows = [_row(result, first, domain, backbone if first == "backbone" and backbone else first)]
        if second and domain in conditions[second]:
            label = "+ retrieval" if second == "motionrag" else second
            rows += [_row(result, second, domain, label), _difference(result, first, second, domain)]
        tables.append(
            PaperTable(
                domain=domain,
                clips=int(base["n"]),
                seeds=max(
                    (len(entry["seeds"]) for entry in result["spread"][first][domain].values()), default=1
                ),
                columns=[name for name in columns if any(name in row.values for row in rows)],
                rows=rows,
                overhead=_overhead(result, first, second, domain),
                samples=result.get("samples", {}).get(domain, {}),
            )
        )
    return tables


def _row(result: Mapping[str, Any], condition: str, domain: str, label: str) -> Row:
    values = {k: v for k, v in result["conditions"][condition][domain].items() if k != "n"}
    spread = result["spread"][condition][domain]
    deviations = {k: v["standard_deviation"] for k, v in spread.items() if "standard_deviation" in v}
    return Row(label, values, deviations)


def _difference(result: Mapping[str, Any], first: str, second: str, domain: str) -> Row:
    base, other = (result["conditions"][condition][domain] for condition in (first, second))
    values = {name: other[name] - base[name] for name in base if name in other and name != "n"}
    entries = result["differences"].get(second, {}).get(domain, {})
    intervals = {name: entry["interval"] for name, entry in entries.items() if "interval" in entry}
    return Row("difference", values, intervals=intervals)


def _overhead(result: Mapping[str, Any], first: str, second: str | None, domain: str) -> dict[str, float]:
    base, other = (result["seconds"].get(condition, {}).get(domain) for condition in (first, second))
    if not base or not other or first != "backbone":
        return {}
    parts = {name: other.get(stage, 0.0) for stage, name in OVERHEAD.items()}
    return parts | {"adapter": other["sampling"] - base["sampling"]}


def write_tables(out: Path, tables: Sequence[PaperTable]) -> None:
    """`table.json`, `table.csv`, `table.md` and `table.tex` in `out`."""
    write_json(
        out / "table.json",
        [
            {
                "domain": t.domain,
                "clips": t.clips,
                "seeds": t.seeds,
                "overhead_seconds": t.overhead,
                "samples": t.samples,
            }
            | {"rows": {row.name: {name: row.values.get(name) for name in t.columns} for row in t.rows}}
            for t in tables
        ],
    )
    write_text(out / "table.csv", _csv(tables))
    write_text(out / "table.md", "\n".join(_markdown(table) for table in tables))
    write_text(out / "table.tex", "\n".join(_latex(table) for table in tables))


def write_per_clip(
    path: Path, per_clip: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]]
) -> None:
    """A CSV file with one row for each clip, condition and seed."""
    rows = [
        {"id": clip_id, "condition": condition, "seed": seed, **values}
        for clip_id, conditions in per_clip.items()
        for condition, seeds in conditions.items()
        for seed, values in seeds.items()
    ]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]) if rows else ["id", "condition", "seed"])
        writer.writeheader()
        writer.writerows(rows)


def _csv(tables: Sequence[PaperTable]) -> str:
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["domain", "row", "clips", "seeds", *columns])
    for table in tables:
        for row in table.rows:
            values = [row.values.get(name, "") for name in columns]
            writer.writerow([table.domain, row.name, table.clips, table.seeds, *values])
    return text.getvalue()


def _markdown(table: PaperTable) -> str:
    lines = [f"**{table.caption()}**", "", "| | " + " | ".join(heading(c) for c in table.columns) + " |"]
    lines.append("|---|" + "---:|" * len(table.columns))
    for row in table.rows:
        lines.append(f"| {row.name} | " + " | ".join(table.cell(row, c) for c in table.columns) + " |")
    return "\n".join([*lines, "", *([table.overhead_line(), ""] if table.overhead else [])])


def _latex(table: PaperTable) -> str:
    """A `tabular` for the package booktabs."""
    heads = " & ".join(_tex(heading(c)) for c in table.columns)
    lines = [f"% {table.caption()}", rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [rf" & {heads} \\", r"\midrule"]
    for row in table.rows:
        if row.name == "difference":
            lines.append(r"\midrule")
        cells = " & ".join(_tex(table.cell(row, c)) for c in table.columns)
        lines.append(rf"{_tex(row.name)} & {cells} \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *([f"% {table.overhead_line()}"] if table.overhead else []), ""])


TEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$", "−": "$-$", "–": "--",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)


def heading(metric: str) -> str:
    """A metric's name with an arrow towards better."""
    name, _, more_is_better = METRICS.get(metric, (metric.replace("_", " "), 0, None))
    return name + {True: " ↑", False: " ↓", None: ""}[more_is_better]


def _number(value: float, metric: str, sign: str = "") -> str:
    return f"{value:{sign}.{_digits(metric)}f}".replace("-", "−")


def _digits(metric: str) -> int:
    return METRICS.get(metric, ("", 3, None))[1]
