"""``motionrag report DIR...``: run folders -> one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the page; see ``conf/report.yaml`` for the keys."""
    from motionrag.report import write_report
    from motionrag.sweeps import read_plan

    runs = [Path(str(run)) for run in cfg.runs]
    out = Path(str(cfg.out)) if cfg.out is not None else runs[0] / "report.html"
    page = write_report(
        runs, out, title=str(cfg.title), max_clips=int(cfg.max_clips), max_references=int(cfg.max_references)
    )
    sweeps = [run for run in runs if (run / "sweep.json").is_file()]
    number = len(runs) - len(sweeps) + sum(len(read_plan(sweep)["points"]) for sweep in sweeps)
    return {"summary": f"{number} run{'s' * (number != 1)} -> {page}", "report": str(page)}
