"""What an evaluation shows in the terminal: the means, the paper's table and a line of summary."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from motionrag.evaluation.tables import PaperTable, heading
from motionrag.report import metric_table


def summary(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The first metric of the first condition, and of the second if there is one, in a line."""
    first, *others = table
    metric = next(iter(next(iter(table[first].values()))))
    parts = []
    for domain, row in table[first].items():
        values = [row, *(table[c][domain] for c in others[:1] if domain in table[c])]
        parts.append(f"{domain}: " + " -> ".join(f"{v[metric]:.1f}" for v in values))
    clips = sum(row["n"] for row in table[first].values())
    return f"{heading(metric).rstrip(' ↑↓')} {', '.join(parts)} ({clips} clips)"


def rich_tables(
    table: Mapping[str, Mapping[str, Mapping[str, float]]],
    samples: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> list[Table]:
    """The means for the terminal, one table for each domain that fits 80 columns; the best value is bold."""
    shown = []
    for domain in next(iter(table.values())):
        page = metric_table(
            {condition: {domain: row[domain]} for condition, row in table.items()}, {}, samples
        )
        first = Column("condition", min_width=max(map(len, table)))
        one = Table(first, title=page.domains[0][0], title_justify="left", box=SIMPLE_HEAD)
        for name in page.columns:
            one.add_column(name, justify="right")
        for condition, (_, cells) in zip(table, page.rows, strict=True):
            one.add_row(condition, *(f"[bold]{cell.text}[/]" if cell.best else cell.text for cell in cells))
        shown.append(one)
    return shown


def rich_paper_table(table: PaperTable) -> Table:
    """The paper's table for the terminal."""
    shown = Table(
        Column("", min_width=max(len(row.name) for row in table.rows)),
        title=table.caption(), title_justify="left", caption=table.overhead_line(), caption_justify="left",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    for metric in table.columns:
        shown.add_column(heading(metric), justify="right")
    for row in table.rows:
        cell = table.number if row.name == "difference" else table.cell
        shown.add_row(row.name, *(cell(row, metric) for metric in table.columns))
        if row.intervals:  # beneath, or the table gets wider than a terminal
            for which, name in enumerate(("95 % from", "to")):
                shown.add_row(name, *(table.end(row, metric, which) for metric in table.columns), style="dim")
    return shown
