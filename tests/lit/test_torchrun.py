"""Processes that torchrun started make one run: one folder, one log, one run of W&B; told to stop, they save and go on."""

import csv
import os
import socket
import subprocess
import sys

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
            time.sleep(0.2)
"""


@pytest.fixture
def torchrun(motionworld, root, tmp_path):
    """Train Stage 2 in two processes."""
    (tmp_path / "stop.py").write_text(STOP)

    def run(*words):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command = f"-m torch.distributed.run --nproc-per-node=2 --master-addr=127.0.0.1 --master-port={port}".split()
        command += (
            "-m motionrag.cli train experiment=smoke_cama make=null logger=wandb trainer=ddp_cpu".split()
        )
        return subprocess.run(
            [sys.executable, *command, f"db={motionworld}/db", "ckpt_path=last", *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(root / "src"), str(tmp_path)]),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_two_processes_of_torchrun_are_one_run_that_survives_sigterm(torchrun, tmp_path):
    stopped = torchrun("trainer.max_steps=200", "+callbacks.stop._target_=stop.Stop")
    assert stopped.returncode != 0
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    last = run / "checkpoints" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]
    assert 2 <= step < 200
    assert f"asked to stop: saved step {step} to {last}" in stopped.stdout
    for one in ("*.log", "wandb/offline-run-*", "csv/version_*"):
        assert len(list(run.glob(one))) == 1, one

    end = step + 2 + step % 2  # the experiment saves every other step
    done = torchrun(f"trainer.max_steps={end}", f"hydra.run.dir={run}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"train: {end} steps") == 1
    for one in ("*.log", "weights/*.safetensors", "results.json"):
        assert len(list(run.glob(one))) == 1, one
    ids = {path.name.split("-")[-1] for path in run.glob("wandb/offline-run-*")}
    assert ids == {(run / "wandb.id").read_text().strip()}
    rows = [row for path in sorted(run.glob("csv/*/metrics.csv")) for row in csv.DictReader(path.open())]
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(end))
    saved = torch.load(last, weights_only=True)
    assert saved["MotionDataModule"]["clips"] == end * 2 * 4  # steps, processes, clips of each
