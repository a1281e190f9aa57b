"""``motionrag report DIR...``: run folders -> one self-contained HTML page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the page; see ``conf/report.yaml`` for the keys."""
    from motionrag.report import unfinished, write_report
    from motionrag.sweeps import read_plan

    runs = [Path(str(run)) for run in cfg.runs]
    left_out = [run for run in runs if run.is_file() or unfinished(run)]
    notes = []
    if len(left_out) < len(runs):  # else the error says what a run folder holds
        runs = [run for run in runs if run not in left_out]
        notes = [f"left out {run}: {why_left_out(run)}" for run in left_out]
    out = Path(str(cfg.out)) if cfg.out is not None else runs[0] / "report.html"
    for note in notes:
        log.warning("%s", note)
    page = write_report(
        runs, out, title=str(cfg.title), max_clips=int(cfg.max_clips), max_references=int(cfg.max_references),
        notes=notes,
    )  # fmt: skip
    sweeps = [run for run in runs if (run / "sweep.json").is_file()]
    number = len(runs) - len(sweeps) + sum(len(read_plan(sweep)["points"]) for sweep in sweeps)
    return {"summary": f"{number} run{'s' * (number != 1)} -> {page}", "report": str(page)}


def why_left_out(run: Path) -> str:
    """What is wrong with something given beside finished runs, such as one of all names that `runs/*` stands for."""
    if run.is_file():
        return "it is a file, not a run folder"
    return "it has not finished, no metrics.json or metrics.csv yet"
