"""``motionrag sweep status|retry DIR``: what became of a sweep, and another start for what failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print the sweep's table (`status`), after running again whatever is not finished (`retry`)."""
    from motionrag import sweeps
    from motionrag.errors import MotionRAGError

    if len(cfg.what) != 2 or cfg.what[0] not in ("status", "retry"):
        raise MotionRAGError("expected motionrag sweep status DIR or motionrag sweep retry DIR")
    folder = Path(str(cfg.what[1])).resolve()
    rows = sweeps.write_table(folder)
    if cfg.what[0] == "retry":
        for launch in sweeps.read_plan(folder)["launches"]:
            # a process of its own: this one is a Hydra app already, and the sweep starts from where it was typed
            command = [sys.executable, "-m", "motionrag.cli", launch["verb"], *launch["overrides"]]
            subprocess.run([*command, "-m", f"hydra.sweep.dir={folder}"], cwd=launch["cwd"], check=False)
        rows = sweeps.write_table(folder)
    print(table(rows, str(cfg.metric)))
    return {"summary": f"{len(rows)} points, {sweeps.summary(rows)} [{folder / 'sweep.csv'}]", "points": rows}


def table(rows: list[dict[str, Any]], metric: str) -> str:
    """One line for each point, aligned; under a failed one its error."""
    lines = [["point", "state", "step", metric, "seconds", "log"]]
    for row in rows:
        value = row["metrics"].get(metric)
        numbers = [row["step"], None if value is None else f"{value:.4g}", row["seconds"]]
        shown = ["-" if number is None else str(number) for number in numbers]
        lines.append([row["name"], row["state"], *shown, row["log"] or "-"])
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    shown = []
    for line, error in zip(lines, [None, *(row["error"] for row in rows)], strict=True):
        shown.append("  ".join([*(w.ljust(width) for w, width in zip(line, widths, strict=False)), line[5]]))
        shown += [f"  error: {error}"] if error else []
    return "\n".join(shown)
