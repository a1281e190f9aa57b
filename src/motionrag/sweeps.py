"""A sweep's folder: which points it has, what became of each, one table.

`sweep.json` in the folder holds the plan (what was launched, from where, the overrides of every point) and, with
`sweep.csv`, a row for each point. Every point runs in a folder of its own, named by what was varied, whose `state.json`
says who runs it and is touched while they do. The table can always be made again from these, by any process.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import logging
import math
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from motionrag.errors import MotionRAGError
from motionrag.io import read_json, write_json, write_text

SCHEMA = "motionrag.sweep/1"
log = logging.getLogger(__name__)
DONE = ("finished", "pruned")  # pruned: a search saw that others were better
LIVE = ("running", "queued")  # somebody works on it, or will without being asked
BEAT = 30  # seconds between signs of life of a running point
SILENT = 300  # seconds without one after which a point of another machine is taken for dead
RETRY = (
    "MOTIONRAG_RETRY"  # environment: when `motionrag sweep retry` began; points started since are left alone
)


def name_of(varied: dict[str, str]) -> str:
    """Folder name of a point: `k=3_seed=1`. Other characters than those of plain names become `-`."""
    text = "_".join(f"{key}={value}" for key, value in varied.items()) or "point"
    plain = re.sub(r"[^\w.=+-]", "-", text)
    if plain == text and len(plain) <= 120:
        return plain
    return (
        f"{plain[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"  # different points, different names
    )


def plan(
    folder: Path, verb: str, launch: Sequence[str], points: Sequence[Sequence[str]], varied: Sequence[str]
) -> list[dict[str, Any]]:
    """Add `points` (override lists) to the sweep in `folder`; returns those that are still to run.

    Finished and pruned points and those somebody works on stay as they are. Raises MotionRAGError when a point's folder
    belongs to one with other settings.
    """
    with _alone(folder):
        return _plan(folder, verb, launch, points, varied)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for whoever reads and writes the table in `folder` now."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # somebody else's, to look at
        yield
        return
    with (folder / ".lock").open("a+b") as file:
        with suppress(OSError):  # a file system without locks; the sweep makes the table once more at its end
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plan(
    folder: Path, verb: str, launch: Sequence[str], points: Sequence[Sequence[str]], varied: Sequence[str]
) -> list[dict[str, Any]]:
    path = folder / "sweep.json"
    sweep = read_plan(folder) if path.is_file() else {"schema": SCHEMA, "launches": [], "points": []}
    known = {point["name"]: point for point in sweep["points"]}
    names = []
    for overrides in points:
        settings = dict(override.split("=", 1) for override in overrides if "=" in override)
        name = name_of({key: settings[key] for key in varied})
        before = known.setdefault(
            name, {"name": name, "parameters": {k: settings[k] for k in varied}, "overrides": list(overrides)}
        )
        if changed := sorted(set(before["overrides"]) ^ set(overrides)):
            raise MotionRAGError(
                f"{folder / name} belongs to a run with other settings (different: {', '.join(changed)}): "
                "choose another hydra.sweep.dir"
            )
        names.append(name)
    launched = {"verb": verb, "overrides": list(launch), "cwd": os.getcwd()}
    sweep["launches"] += [launched] if launched not in sweep["launches"] else []
    sweep["points"] = list(known.values())
    write_json(path, sweep)
    states = {row["name"]: row["state"] for row in _write_table(folder)}
    since = float(os.environ.get(RETRY, math.inf))
    tried = {
        name for name in names if (_read(folder / name / "state.json") or {}).get("started", -1) >= since
    }
    todo = [known[name] for name in names if states[name] not in (*DONE, *LIVE) and name not in tried]
    for point in todo:
        (folder / point["name"] / "state.json").unlink(missing_ok=True)  # it waits again
    return todo


def read_plan(folder: Path) -> dict[str, Any]:
    """The sweep's `sweep.json`; raises MotionRAGError when there is none."""
    try:
        sweep = read_json(folder / "sweep.json")
        assert sweep["schema"] == SCHEMA
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise MotionRAGError(
            f"{folder} is no sweep (no sweep.json of this version in it): give the folder named by hydra.sweep.dir"
        ) from error
    return sweep


# ---------------------------------------------------------------- one point


@contextmanager
def point(folder: Path, explain: Callable[[Exception], str | None], first: bool = True) -> Iterator[None]:
    """Keep `state.json` of the run in `folder`, touched every `BEAT` seconds, and the sweep's table, while the block runs it.

    `explain` makes one line of a mistake of the user's, None of a fault of the program, whose traceback goes to the log.
    Of several processes the first keeps them, and any that fails says so; the first failure stays.
    """
    state = {
        "state": "running",
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": slurm_job(),
        "started": time.time(),
    }
    if first:
        write_json(folder / "state.json", state)
    try:
        with _signs_of_life(folder / "state.json") if first else nullcontext():
            yield
    except Exception as error:
        line = explain(error)
        log.error("failed: %s", line or error, exc_info=None if line else error)
        if (_read(folder / "state.json") or state)["state"] == "running":
            _ended(folder, state, "failed", line or f"{type(error).__name__}: {error}")
        raise
    if first:
        _ended(folder, state, "finished", None)


@contextmanager
def _signs_of_life(path: Path) -> Iterator[None]:
    """Touch `path` every `BEAT` seconds: what other machines see of a process."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):  # a file system that is away for a moment must not end the signs
                os.utime(path)

    thread = threading.Thread(target=touch, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _born(pid: int) -> str | None:
    """When a process of this machine started (ids are used again, 1 in every container); None if there is none.

    Where there is no /proc (macOS) it is "?" for every process there is.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "?"


def _ended(folder: Path, state: dict[str, Any], how: str, error: str | None) -> None:
    seconds = round(time.time() - state["started"], 1)
    line = error.strip().splitlines()[0] if error and error.strip() else error
    write_json(folder / "state.json", {**state, "state": how, "seconds": seconds, "error": line})
    if (folder.parent / "sweep.json").is_file():
        write_table(folder.parent)


def mark_pruned(folder: Path) -> None:
    """Say in the state of the run in `folder` that it ended early, because others were better."""
    write_json(folder / "state.json", {**read_json(folder / "state.json"), "state": "pruned"})
    write_table(folder.parent)


def checkpoint(folder: Path) -> Path:
    """Where a training in `folder` keeps its newest checkpoint."""
    return folder / "checkpoints" / "last.ckpt"


def slurm_job() -> str | None:
    """Id of the Slurm job this process runs in, as squeue prints it."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


# ---------------------------------------------------------------- the table


def write_table(folder: Path) -> list[dict[str, Any]]:
    """Look at every point, write `sweep.json` and `sweep.csv` where they say otherwise, return the rows.

    A row: name, parameters, seed, state (waiting, queued, running, finished, pruned, failed, stopped), step, metrics, seconds,
    error, folder, log. `stopped` was running and is not any more; `queued` waits in Slurm.
    """
    read_plan(folder)  # no lock is left where there is no sweep
    with _alone(folder):
        return _write_table(folder)


def _write_table(folder: Path) -> list[dict[str, Any]]:
    sweep = read_plan(folder)
    jobs = (
        _slurm_queue()
        if any((folder / p["name"]).is_dir() for p in sweep["points"]) or _uses_slurm(sweep)
        else {}
    )
    waiting = any(where == str(folder) and state == "PENDING" for state, where in (jobs or {}).values())
    rows = []
    for planned in sweep["points"]:
        run = folder / planned["name"]
        info = _seen(run, jobs, waiting)
        step, metrics = measured(run, info["state"] in DONE)
        logs = sorted(run.glob("*.log"))
        rows.append(
            {
                "name": planned["name"],
                "parameters": planned["parameters"],
                "overrides": planned["overrides"],
                "seed": _seed(run),
                "state": info["state"],
                "step": step,
                "metrics": metrics,
                "seconds": info.get("seconds"),
                "error": info.get("error"),
                "folder": str(run),
                "log": str(logs[0]) if logs else None,
            }
        )
    if sweep != (seen := {**sweep, "points": rows}):
        write_json(folder / "sweep.json", seen)
    table, text = folder / "sweep.csv", _csv(rows)
    if not table.is_file() or table.read_text(encoding="utf-8") != text:
        write_text(table, text)
    return rows


def _seen(run: Path, jobs: dict[str, tuple[str, str]] | None, queued: bool) -> dict[str, Any]:
    """`state.json` of the run in `run`, with the state that it is in now; one that stopped says how that is known."""
    info = _read(run / "state.json") or {"state": "queued" if queued else "waiting"}
    if info["state"] != "running":
        return info
    if info.get("job") and jobs is not None:
        there = jobs.get(info["job"], ("gone", ""))[0]
        state = {"PENDING": "queued", "REQUEUED": "queued", "gone": "stopped"}.get(there, "running")
        output = run.parent / ".submitit" / info["job"]
        gone = f"Slurm job {info['job']} is gone{f', its output is in {output}' if output.is_dir() else ''}"
        return {**info, "state": state} | ({"error": gone} if state == "stopped" else {})
    if info["host"] == socket.gethostname() and not info.get("job"):
        born = _born(info["pid"])
        alive = born is not None and born == info.get("born", born)
        return info if alive else {**info, "state": "stopped", "error": "its process is gone"}
    last = (run / "state.json").stat().st_mtime
    if time.time() - last < SILENT:
        return info
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last))
    return {**info, "state": "stopped", "error": f"no sign of life from {info['host']} since {when}"}


def _uses_slurm(sweep: dict[str, Any]) -> bool:
    return any("slurm" in word for launch in sweep["launches"] for word in launch["overrides"])


def _slurm_queue() -> dict[str, tuple[str, str]] | None:
    """State and comment (the sweep's folder) of the user's jobs; None where Slurm does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%k"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (FileNotFoundError, subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return None
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}


def measured(run: Path, done: bool) -> tuple[int | None, dict[str, float]]:
    """Steps and metrics of the run in `run`: its results if it is `done`, else the last value of everything logged."""
    results = _read(run / "results.json") if done else None
    return _outcome(results) if results is not None else _progress(run)


def _outcome(results: dict[str, Any]) -> tuple[int | None, dict[str, float]]:
    """Steps and metrics of a finished run."""
    numbers = results.get("metrics", results)
    return results.get("steps"), {k: v for k, v in numbers.items() if type(v) in (int, float)}


def _progress(run: Path) -> tuple[int | None, dict[str, float]]:
    """Steps done and the last value of everything logged so far, but for those that are not finite."""
    step, metrics = None, {}
    for path in sorted(run.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1])):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                numbers = {key: float(value) for key, value in row.items() if key and value}
                step = int(numbers.pop("step", -1)) + 1 or step
                numbers.pop("epoch", None)
                metrics |= numbers
    return step, {key: value for key, value in metrics.items() if math.isfinite(value)}


def _seed(run: Path) -> int | None:
    return (_read(run / "provenance.json") or {}).get("seed")


def _read(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _csv(rows: list[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row["parameters"]))
    metrics = sorted({key for row in rows for key in row["metrics"]})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "name",
            "state",
            *keys,
            *(["seed"] if "seed" not in keys else []),
            "step",
            *metrics,
            "seconds",
            "error",
            "folder",
            "log",
        ]
    )
    for row in rows:
        seed = [row["seed"]] if "seed" not in keys else []
        values = [row["parameters"].get(key) for key in keys]
        numbers = [row["metrics"].get(key) for key in metrics]
        last = [row["seconds"], row["error"], row["folder"], row["log"]]
        writer.writerow([row["name"], row["state"], *values, *seed, row["step"], *numbers, *last])
    return out.getvalue()


def summary(rows: list[dict[str, Any]]) -> str:
    """`3 finished, 1 failed`."""
    states = [row["state"] for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))


def wait(folder: Path, names: Collection[str], seconds: float = 2.0) -> list[dict[str, Any]]:
    """The table, once nobody works on the points called `names`."""
    while True:
        rows = write_table(folder)
        if not any(row["state"] in LIVE for row in rows if row["name"] in names):
            return rows
        time.sleep(seconds)
