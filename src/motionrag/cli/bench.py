"""``motionrag bench NAME``: measure the speed of one part and print a table."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run the benchmark of ``conf/bench/NAME.yaml``, print its rows, return all it found."""
    from hydra.utils import instantiate
    from rich.console import Console
    from rich.table import Table

    from motionrag.errors import MotionRAGError

    if "bench" not in cfg:
        raise MotionRAGError(
            "bench needs the name of a benchmark, as in motionrag bench adapter (--help lists them)"
        )
    results = instantiate(cfg.bench)
    columns = list(results["rows"][0])
    table = Table(*columns, title=results["title"])
    for row in results["rows"]:
        table.add_row(*(_cell(row[column]) for column in columns))
    Console(width=max(Console().width, 120)).print(table)  # a terminal wraps it, a file keeps all columns
    return results


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
