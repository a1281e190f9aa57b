"""Real Slurm, two nodes on one machine: a sweep as a job array of two tasks each, a failing job, one run over both nodes,
preemption.

Needs root and Debian's slurm-wlm and munge; where they are missing, or do not run, the tests are skipped and say so.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from motionrag.cli import conf_dir, train

MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
REASON = "SLURM IS NOT TESTED HERE: "
if os.geteuid() != 0:
    REASON += "starting a cluster needs root"
elif MISSING:
    REASON += f"{', '.join(MISSING)} missing (apt-get install slurm-wlm munge)"
pytestmark = pytest.mark.skipif(REASON[-2:] != ": ", reason=REASON)
STEPS = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Environment with a running Slurm; skips, saying why, where none comes up."""
    folder = tmp_path_factory.mktemp("slurm")
    script, log = Path(__file__).parent / "cluster.sh", folder / "up.log"
    with log.open("w") as file:  # not a pipe: the daemons would hold it open
        up = subprocess.run([script, "up", folder], stdout=file, stderr=file)
    if up.returncode:
        pytest.skip(
            f"{REASON}no cluster comes up on this machine: {' '.join(log.read_text().split())[-500:]}"
        )
    try:
        # elsewhere the nodes' names can be looked up
        yield {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}
    finally:
        subprocess.run([script, "down", folder], check=True)


def config(*overrides):
    """The composed config of `motionrag train`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("train", overrides=list(overrides))


@pytest.fixture(scope="module")
def data(motionworld) -> dict[str, list[str]]:
    """Experiment -> overrides that run it on a few synthetic clips."""
    words = ["logger=csv", "make=null", f"db={motionworld}/db"]
    return {
        "smoke": ["experiment=smoke", *words, f"shards={motionworld}/shards"],
        "smoke_cama": ["experiment=smoke_cama", *words],
    }


def rows(folder: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads((folder / "sweep.json").read_text())["points"]}


def losses(run: Path) -> list[tuple[int, float]]:
    """Every logged training loss, of all starts of a run, in order."""
    found = []
    for path in sorted(run.glob("csv/version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            if row.get("train/loss"):
                found.append((int(row["step"]), float(row["train/loss"])))
    return found


def test_a_job_array_in_which_one_job_fails(cluster, data, motionrag, tmp_path):
    words = [
        "train",
        *data["smoke_cama"],
        "trainer=ddp_cpu",  # two tasks on one node for each point
        "ckpt_path=null,none.ckpt",
        "launcher=slurm",
        "-m",
        "hydra.sweep.dir=S",
    ]
    done = motionrag(*words, **cluster)
    assert done.returncode == 2, done.stderr
    assert "1 of 2 points failed, the first ckpt_path=none.ckpt: ckpt_path=none.ckpt: no such" in done.stderr
    states = {name: row["state"] for name, row in rows(tmp_path / "S").items()}
    assert states == {"ckpt_path=null": "finished", "ckpt_path=none.ckpt": "failed"}
    run = tmp_path / "S" / "ckpt_path=null"
    assert [len(list(run.glob(one))) for one in ("*.log", "csv/version_*")] == [1, 1]
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["MotionDataModule"]["clips"] == 4 * 2 * 4  # steps, tasks, clips of each
    (array,) = {path.name.split("_")[0] for path in (tmp_path / "S/.submitit").glob("[0-9]*")}
    command = ["scontrol", "--oneliner", "show", "job", array]

    def job_states():
        shown = subprocess.run(command, env={**os.environ, **cluster}, capture_output=True, text=True).stdout
        return sorted(word for word in shown.split() if word.startswith("JobState="))

    ended = {"JobState=COMPLETED", "JobState=FAILED"}
    wait(lambda: set(job_states()) <= ended, seconds=30)  # the last one is about to leave
    assert job_states() == sorted(ended)  # one job for each point, as the sweep's table says

    before = (tmp_path / "S/ckpt_path=null/results.json").stat().st_mtime_ns
    (tmp_path / "none.ckpt").write_bytes(b"no checkpoint")  # another mistake: the point did run again
    done = motionrag("sweep", "retry", "S", **cluster)
    assert done.returncode == 2 and "1 of 2 points are not finished" in done.stderr, done.stderr
    assert "is not a whole checkpoint" in rows(tmp_path / "S")["ckpt_path=none.ckpt"]["error"]
    assert (tmp_path / "S/ckpt_path=null/results.json").stat().st_mtime_ns == before


def test_a_preempted_run_on_two_nodes_continues(cluster, data, tmp_path):
    words = [*data["smoke"], "trainer=ddp_cpu", f"trainer.max_steps={STEPS}", "data.batch_size=2"]
    words += [f"trainer.val_check_interval={STEPS}", f"callbacks.last.every_n_train_steps={STEPS}"]
    train.run(config(*words, f"run_dir={tmp_path}/whole"))
    expected = losses(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(STEPS))

    environment = {**os.environ, **cluster, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "motionrag.cli", "train", *words]
    sweep = subprocess.Popen(
        [*command, "launcher=slurm", "trainer.devices=1", "trainer.num_nodes=2", "hydra.sweep.dir=S"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (run,) = [tmp_path / "S" / "point"]
    try:
        wait(lambda: len(losses(run)) >= 3, sweep)
        nodes = ["squeue", "--me", "--noheader", "--states=RUNNING", "--format=%N"]
        assert subprocess.run(nodes, env=environment, capture_output=True, text=True).stdout == "node[1-2]\n"
        hold = [
            "sbatch",
            "--partition=hi",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap=sleep 1",
        ]
        subprocess.run(hold, env=environment, check=True, capture_output=True)
        out, _ = sweep.communicate(timeout=900)
    finally:
        sweep.kill()
    assert sweep.returncode == 0, out
    found = losses(run)
    versions = [
        len(losses_of) for losses_of in (list(path.open()) for path in run.glob("csv/version_*/metrics.csv"))
    ]
    assert len(versions) == 2, "it was not started twice"
    assert found == expected  # every step once, each loss to the last bit
    state = json.loads((run / "state.json").read_text())
    assert state["state"] == "finished"


def wait(condition, process=None, seconds=600):
    """Until `condition()` holds, while `process` runs, if there is one."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
