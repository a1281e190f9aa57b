"""``motionrag sweep status|retry DIR``: what became of a sweep, and another start for what failed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Print the sweep's table (`status`), after running again whatever is not finished (`retry`).

    Raises MotionRAGError, after the table, when that left points unfinished.
    """
    from motionrag import sweeps
    from motionrag.errors import MotionRAGError

    if len(cfg.what) != 2 or cfg.what[0] not in ("status", "retry"):
        raise MotionRAGError("expected motionrag sweep status DIR or motionrag sweep retry DIR")
    folder = Path(str(cfg.what[1])).resolve()
    rows = sweeps.write_table(folder)
    retried = cfg.what[0] == "retry"
    if retried:
        environment = os.environ | {sweeps.RETRY: str(time.time())}  # a point of two launches is tried once
        for launch in sweeps.read_plan(folder)["launches"]:
            # a process of its own: this one is a Hydra app already, and the sweep starts from where it was typed
            command = [sys.executable, "-m", "motionrag.cli", launch["verb"], *launch["overrides"]]
            command += ["-m", f"hydra.sweep.dir={folder}"]
            subprocess.run(command, cwd=launch["cwd"], env=environment, check=False)
        rows = sweeps.write_table(folder)
    print(table(rows, str(cfg.metric)))
    left = [row for row in rows if row["state"] not in (*sweeps.DONE, *sweeps.LIVE)]
    if retried and left:
        raise MotionRAGError(
            f"{len(left)} of {len(rows)} points are not finished, the first {left[0]['name']}: "
            f"{left[0]['error'] or left[0]['state']} (log: {left[0]['log']})"
        )
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
