"""Checkpoints are written while training goes on; what goes wrong there is not lost."""

import errno
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from motionrag.cli.mistakes import user_message
from motionrag.lit import checkpoint_io
from motionrag.lit.checkpoint_io import BackgroundCheckpointIO


def test_training_does_not_wait_for_the_disk(cama_module, fit, interrupt, tmp_path, monkeypatch):
    """The disk is stuck until step 4 has ended; what arrives then is step 2."""
    write, steps, go, written = checkpoint_io._write, interrupt(), threading.Event(), []

    def slow(checkpoint, path):
        assert go.wait(60)
        written.append((checkpoint["global_step"], max(steps.values)))
        write(checkpoint, path)

    class Go(type(steps)):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                assert not (tmp_path / "last.ckpt").exists()
                go.set()

    monkeypatch.setattr(checkpoint_io, "_write", slow)
    module = cama_module()
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=2, enable_version_counter=False)
    states = {}
    keep.on_save_checkpoint = lambda trainer, module, checkpoint: states.setdefault(
        trainer.global_step, {k: v.clone() for k, v in checkpoint["state_dict"].items()}
    )
    fit(module, 5, steps, Go(), keep, plugins=[BackgroundCheckpointIO()])
    assert [step for step, _ in written] == [2, 4] and written[0][1] >= 4
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4  # on disk when training is over
    assert all(torch.equal(saved["state_dict"][key], value) for key, value in states[4].items())
    assert not torch.equal(module.cama.sos, saved["state_dict"]["cama.sos"])
    assert [path.name for path in tmp_path.glob("*.ckpt*")] == ["last.ckpt"]


def test_a_full_disk_ends_the_run(cama_module, fit, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "atomic_path", lambda path: nullcontext(Path("/dev/full")))
    keep = ModelCheckpoint(tmp_path, "last", every_n_train_steps=1)
    with pytest.raises(OSError) as error:
        fit(cama_module(), 3, keep, plugins=[BackgroundCheckpointIO()])
    assert error.value.errno == errno.ENOSPC
    assert f"no space left on the device while writing {tmp_path}" in user_message(error.value)
    with pytest.raises(OSError, match="No space left"):  # too much for a buffer: torch says something else
        checkpoint_io._write({"x": torch.zeros(10**6)}, tmp_path / "last.ckpt")
