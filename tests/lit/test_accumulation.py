"""Accumulated gradients: a step over several batches is a step over one larger batch, wherever steps are counted."""

import csv
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from motionrag.lit.callbacks import Progress

STEPS = 5


def logged(folder, name):
    """Step -> value, of all starts of a run."""
    rows = [row for path in sorted(folder.rglob("metrics.csv")) for row in csv.DictReader(path.open())]
    return [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]


class SaveIn(L.Callback):
    """Saves a checkpoint at the end of a batch, and ends training there."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, idx):
        if idx == self.batch:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.fixture
def run(fit, tmp_path, interrupt):
    """Train in steps of four clips, in `accumulate` batches; returns the trained weights and the trainer."""

    def start(make, name, accumulate, *callbacks, **options):
        # not AdamW, which makes a step of a gradient that is zero but for rounding (of the keys' bias in attention)
        module = make(scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=STEPS))
        module._make_optimizer = partial(torch.optim.SGD, lr=0.1)
        _, trainer = fit(
            module,
            STEPS,
            interrupt(stop=99),
            *callbacks,
            batch_size=4 // accumulate,
            accumulate_grad_batches=accumulate,
            val_check_interval=2 * accumulate,
            gradient_clip_val=0.25,
            logger=CSVLogger(tmp_path / name, name="csv", flush_logs_every_n_steps=1),
            log_every_n_steps=2,
            **options,
        )
        return {key: value.clone() for key, value in module.state_dict().items()}, trainer

    return start


@pytest.mark.parametrize("stage", ["adapter_module", "cama_module"])
def test_it_is_a_larger_batch(stage, request, run, tmp_path):
    make = request.getfixturevalue(stage)
    whole, one = run(make, "whole", 1)
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=2, save_top_k=-1)
    parts, two = run(make, "parts", 2, keep)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert two.global_step == STEPS
    assert two.optimizers[0].param_groups[0]["lr"] == one.optimizers[0].param_groups[0]["lr"]
    assert [step for step, _ in logged(tmp_path / "parts", "train/loss")] == [1, 3]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    validated = [dict(logged(tmp_path / name, "val/loss")) for name in ("whole", "parts")]
    assert list(validated[1]) == [1, 3] and validated[1] == pytest.approx(validated[0], rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("batch", [5, 6])  # of 2: the last of step 3, the first of step 4
def test_it_continues_at_a_whole_step(batch, accumulate, cama_module, run, tmp_path):
    whole, _ = run(cama_module, "whole", 1)
    run(cama_module, "parts", 2, SaveIn(tmp_path / "last.ckpt", batch))
    again = {"ckpt_path": tmp_path / "last.ckpt", "enable_progress_bar": True}
    parts, trainer = run(cama_module, "parts", accumulate, Progress(), **again)
    assert trainer.global_step == STEPS
    bar = trainer.progress_bar_callback.train_progress_bar
    assert (bar.n, bar.total) == (STEPS * accumulate, STEPS * accumulate)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert [step for step, _ in logged(tmp_path / "parts", "train/loss")] == [1, 3]
    assert [step for step, _ in logged(tmp_path / "parts", "val/loss")] == [1, 3]


def test_steps_of_the_configuration_are_those_of_the_optimizer(train_files, tmp_path):
    words = ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=2"]
    words += [
        "callbacks=keep",
        "callbacks.kept.every_n_train_steps=1",
        "callbacks.throughput.every_n_steps=1",
    ]
    _, manifest = train_files("smoke_cama", tmp_path, *words)
    assert manifest["about"]["steps"] == 4
    for name in (
        "train/loss",
        "val/loss",
        "clips_per_second",
    ):  # experiment=smoke_cama validates every two steps
        assert [step for step, _ in logged(tmp_path, name)] == [1, 3], name
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best.ckpt", "last.ckpt", *(f"step={step:06d}.ckpt" for step in (2, 3, 4))]
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 4 and last["MotionDataModule"]["clips"] == 16
