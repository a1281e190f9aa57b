"""Processes that torchrun started make one run: one folder, one log, one run of W&B."""

import os
import socket
import subprocess
import sys

import torch


def test_two_processes_of_torchrun_are_one_run(motionworld, root, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = f"--nproc-per-node=2 --master-addr=127.0.0.1 --master-port={port} -m motionrag.cli train".split()
    words += ["experiment=smoke_cama", "make=null", f"db={motionworld}/db", "logger=wandb"]
    words += ["trainer=ddp_cpu", "trainer.max_steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs" / "train").iterdir()
    for one in ("*.log", "wandb/offline-run-*", "csv/version_*", "weights/*.safetensors", "results.json"):
        assert len(list(run.glob(one))) == 1, one
    assert done.stdout.count("train: 2 steps") == 1
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["MotionDataModule"]["clips"] == 2 * 2 * 4  # steps, processes, clips of each
