"""Processes that torchrun started make one run: one folder, one log, one run of W&B; told to stop, they save and go on."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

STOP = """
import os, signal, time
import lightning as L

class Stop(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun alone, as a pod's first process
        if trainer.global_step >= 2:
            time.sleep(0.2)  # until it is told

class Vanish(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            open("vanished", "w").close()
            for process in (os.getppid(), os.getpid()):  # torchrun and its rank: a machine without power
                os.kill(process, signal.SIGKILL)
"""


@pytest.fixture
def torchrun(motionworld, root, tmp_path):
    """Train Stage 2 with two processes, on one node or two (a torchrun each); returns codes and output of the nodes."""
    (tmp_path / "stop.py").write_text(STOP)
    path = os.pathsep.join([str(root / "src"), str(tmp_path)])

    def run(nodes, *words):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        devices = 2 // nodes
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += f"--nnodes={nodes} --nproc-per-node={devices} --master-addr=127.0.0.1 --master-port={port}".split()
        train = "-m motionrag.cli train experiment=smoke_cama make=null logger=wandb trainer=ddp_cpu".split()
        train += [f"trainer.num_nodes={nodes}", f"trainer.devices={devices}", f"db={motionworld}/db"]
        started = [
            subprocess.Popen(
                [*command, f"--node-rank={node}", *train, "ckpt_path=last", *words],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for node in range(nodes)
        ]
        try:
            said = [process.communicate(timeout=300)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        return [process.returncode for process in started], "".join(said)

    return run


def test_processes_of_torchrun_are_one_run_that_survives_sigterm(torchrun, tmp_path):
    """One of two nodes is told to stop, the run goes on with both processes on one."""
    codes, said = torchrun(2, "trainer.max_steps=200", "+callbacks.stop._target_=stop.Stop")
    assert 0 not in codes, said
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    last = run / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert 2 <= step < 200
    assert f"asked to stop: saved step {step} to {last}" in said
    for one in ("*.log", "wandb/offline-run-*", "csv/version_*"):
        assert len(list(run.glob(one))) == 1, one

    end = step + 2 + step % 2  # the experiment saves every other step
    codes, said = torchrun(1, f"trainer.max_steps={end}", f"hydra.run.dir={run}")
    assert codes == [0], said
    assert said.count(f"train: {end} steps") == 1
    for one in ("*.log", "weights/*.safetensors", "results.json"):
        assert len(list(run.glob(one))) == 1, one
    ids = {path.name.split("-")[-1] for path in run.glob("wandb/offline-run-*")}
    assert ids == {(run / "wandb.id").read_text().strip()}
    rows = [row for path in sorted(run.glob("csv/*/metrics.csv")) for row in csv.DictReader(path.open())]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(end))
    saved = torch.load(last, weights_only=True)
    assert saved["MotionDataModule"]["clips"] == end * 2 * 4  # steps, processes, clips of each


def test_a_node_that_vanishes_ends_the_others(torchrun, tmp_path):
    codes, said = torchrun(2, "trainer.max_steps=200", "+callbacks.vanish._target_=stop.Vanish")
    assert time.time() - (tmp_path / "vanished").stat().st_mtime < 60
    assert codes[0] not in (0, None) and codes[1] == -signal.SIGKILL, said
    assert "Connection closed by peer" in said or "Connection reset by peer" in said, said
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not (run / "results.json").exists()


def test_a_sweep_runs_as_if_torchrun_were_not_there(torchrun, tmp_path):
    codes, said = torchrun(1, "trainer.max_steps=2", "seed=1,2", "-m", "hydra.sweep.dir=S")
    assert codes == [0], said
    runs = sorted(path for path in (tmp_path / "S").iterdir() if path.is_dir())
    assert [run.name for run in runs] == ["seed=1", "seed=2"] and not (tmp_path / "outputs/train").exists()
    for run in runs:
        for one in ("*.log", "wandb/offline-run-*", "csv/version_*", "results.json"):
            assert len(list(run.glob(one))) == 1, one
        saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["MotionDataModule"]["clips"] == 2 * 2 * 4  # steps, processes, clips of each
