"""A killed run that continues gives the losses of one that was never killed; what a checkpoint holds."""

import os
import signal
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from motionrag.lit.callbacks import Preemption, SaveWeights


@pytest.mark.parametrize("stage", ["adapter_module", "cama_module"])
def test_kill_and_resume(stage, request, fit, interrupt, tmp_path):
    # the cache is empty again after a resume, which must not matter
    options = {"cache": True} if stage == "adapter_module" else {}
    make = partial(request.getfixturevalue(stage), **options)
    validation = {"val_check_interval": 3, "limit_val_batches": 1}
    whole, _ = fit(make(), 9, **validation)

    every = {
        "dirpath": tmp_path,
        "filename": "last",
        "every_n_train_steps": 2,
        "enable_version_counter": False,
    }
    killed, _ = fit(make(), 9, interrupt(stop=5), ModelCheckpoint(**every), **validation)
    resumed, _ = fit(make(), 9, ckpt_path=tmp_path / "last.ckpt", **validation)

    assert list(killed) == [1, 2, 3, 4, 5] and list(resumed) == [5, 6, 7, 8, 9]
    # Not bit by bit: the emptied cache encodes clips in other batches, which moves the last digit.
    assert killed | resumed == pytest.approx(whole, rel=1e-5)


class Signal(L.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_told_to_stop_it_saves_the_step_and_ends(number, cama_module, fit, interrupt, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    whole, _ = fit(cama_module(), 6)
    before = signal.getsignal(number)
    losses = interrupt(stop=99)
    stopped, _ = fit(cama_module(), 6, losses, Signal(number, 3), Preemption(tmp_path / "last.ckpt"))
    assert signal.getsignal(number) == before
    resumed, _ = fit(cama_module(), 6, ckpt_path=tmp_path / "last.ckpt")
    assert list(stopped) == [1, 2, 3] and list(resumed) == [4, 5, 6]
    assert stopped | resumed == whole


def test_in_slurm_a_signal_before_the_end_requeues_the_job(
    cama_module, fit, interrupt, tmp_path, monkeypatch
):
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {asked}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "8", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    callback = Preemption(tmp_path / "last.ckpt")
    steps, _ = fit(cama_module(), 4, Signal(signal.SIGTERM, 2), callback)
    # Slurm alone knows whether a SIGTERM is the end: saved, and on
    assert len(steps) == 4 and not asked.exists() and (tmp_path / "last.ckpt").is_file()
    steps, _ = fit(cama_module(), 4, interrupt(stop=99), Signal(signal.SIGUSR2, 2), callback)
    assert len(steps) == 2 and asked.read_text() == "requeue 7_1\n"


def test_what_a_checkpoint_holds(adapter_module, fit, tmp_path):
    about = {"config_sha256": "c", "git": None, "database_sha256": "d"}
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", every_n_train_steps=2)
    fit(adapter_module(), 2, keep, SaveWeights(tmp_path / "w.safetensors", about))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in saved["state_dict"]} == {"resampler", "motion_adapter"}
    assert saved["about"] == about and saved["global_step"] == 2
    assert saved["MotionDataModule"] == {"clips": 8, "batches": 2}
    assert saved["optimizer_states"][0]["state"]
