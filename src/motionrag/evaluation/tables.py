"""The paper's table: one condition, one with retrieval, their difference, and what retrieval costs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motionrag.io import write_json, write_text
from motionrag.report import LABELS, METRICS

#: Stages that only a condition with retrieval goes through, and how the paper's table calls them.
OVERHEAD = {"retrieval": "retrieval", "cama": "CAMA"}


@dataclass
class Row:
    """One line: metric -> value, and metric -> what to print after it (a spread, an interval)."""

    name: str
    values: dict[str, float]
    after: dict[str, str]


@dataclass
class PaperTable:
    """The lines of one domain.

    overhead: seconds per clip of retrieval, CAMA (look-up of tokens, Resampler, CAMA) and adapter (time of sampling
    with motion tokens minus without), their sum being the difference in `seconds_per_clip`; empty without them.
    """

    domain: str
    clips: int
    seeds: int
    columns: list[str]
    rows: list[Row]
    overhead: dict[str, float]

    def cell(self, row: Row, metric: str) -> str:
        """A number as it is printed, with its spread."""
        if metric not in row.values:
            return "–"
        value, digits = row.values[metric], _digits(metric)
        text = f"{value:+.{digits}f}" if row.name == "difference" else f"{value:.{digits}f}"
        return (text + row.after.get(metric, "")).replace("-", "−")

    def caption(self) -> str:
        """Domain, clips and seeds."""
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        return f"{LABELS.get(self.domain, self.domain)}, {self.clips} clips{seeds}"

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
            )
        )
    return tables


def _row(result: Mapping[str, Any], condition: str, domain: str, label: str) -> Row:
    values = {k: v for k, v in result["conditions"][condition][domain].items() if k != "n"}
    spread = result["spread"][condition][domain]
    after = {
        name: f" ± {entry['standard_deviation']:.{_digits(name)}f}"
        for name, entry in spread.items()
        if "standard_deviation" in entry
    }
    return Row(label, values, after)


def _difference(result: Mapping[str, Any], first: str, second: str, domain: str) -> Row:
    base, other = (result["conditions"][condition][domain] for condition in (first, second))
    values = {name: other[name] - base[name] for name in base if name in other and name != "n"}
    after = {
        name: " [{:.{d}f}, {:.{d}f}]".format(*entry["interval"], d=_digits(name))
        for name, entry in result["differences"].get(second, {}).get(domain, {}).items()
        if "interval" in entry
    }
    return Row("difference", values, after)


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
            {"domain": t.domain, "clips": t.clips, "seeds": t.seeds, "overhead_seconds": t.overhead}
            | {"rows": {row.name: {name: row.values.get(name) for name in t.columns} for row in t.rows}}
            for t in tables
        ],
    )
    write_text(out / "table.csv", _csv(tables))
    write_text(out / "table.md", "\n".join(_markdown(table) for table in tables))
    write_text(out / "table.tex", "\n".join(_latex(table) for table in tables))


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


def _digits(metric: str) -> int:
    return METRICS.get(metric, ("", 3, None))[1]
