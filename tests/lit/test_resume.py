"""A killed run that continues gives the losses of one that was never killed; what a checkpoint holds."""

import multiprocessing
import os
import signal
from collections import Counter
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from motionrag.data.datamodule import MotionDataModule, ShardClips
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.lit.callbacks import Preemption, SaveWeights, SkippedClips


@pytest.mark.parametrize("stage", ["adapter_module", "cama_module", "joint_module"])
def test_kill_and_resume(stage, request, fit, interrupt, tmp_path):
    # the cache is empty again after a resume, which must not matter
    options = {} if stage == "cama_module" else {"cache": True}
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
    place = saved["MotionDataModule"]
    assert (place["clips"], place["batches"]) == (8, 2) and len(place["order"]) == 64
    assert saved["optimizer_states"][0]["state"]


# --- kill -9, with clips in shards, loader workers and several ranks ---------------------------------------------------


class Sees(L.LightningModule):
    """Writes down the clips of each step that it has finished; kills itself without warning in step `kill`."""

    def __init__(self, folder, kill=None):
        super().__init__()
        self.folder, self.kill, self.weight = folder, kill, torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, idx):
        self.ids = batch.clip_id
        if self.global_step + 1 == self.kill and self.global_rank == self.trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (self.weight * batch.video.mean((1, 2, 3, 4))).mean()

    def on_train_batch_end(self, *_):
        with (self.folder / f"seen-{self.global_rank}").open("a") as file:
            file.write(f"{self.global_step} {' '.join(self.ids)}\n")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train_shards(folder, shards, ranks, workers, steps, kill=None, resume=False, max_share=1.0, **options):
    """The exit code of a process that trains, in as many more as there are ranks."""

    def train():
        torch.set_num_threads(1)  # a forked process must not use threads that it does not have
        clips = ShardClips(shards, frames=2, height=32, width=32, buffer=5, **options)
        data = MotionDataModule(clips, batch_size=4 // ranks, val_share=0, workers=workers)
        keep = ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False)
        devices = {"strategy": "ddp_fork", "devices": ranks} if ranks > 1 else {"devices": 1}
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            callbacks=[keep, SkippedClips(max_share)],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **devices,
        )
        ckpt = folder / "last.ckpt" if resume else None
        trainer.fit(Sees(folder, kill), data, ckpt_path=ckpt, weights_only=True)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def seen(folder, ranks):
    """Step -> clips, of all ranks in their order."""
    steps = [
        {int(step): ids for step, *ids in map(str.split, (folder / f"seen-{r}").read_text().splitlines())}
        for r in range(ranks)
    ]
    return {step: [i for rank in steps for i in rank[step]] for step in steps[-1]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Ten clips in shards of three."""
    folder = tmp_path_factory.mktemp("clips")
    pack(make_dataset(folder, 10, seed=0), folder / "videos", folder / "shards", shard_size=3)
    return folder / "shards"


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 2)])
def test_after_kill_9_it_goes_on_with_what_it_has_not_seen(shards, tmp_path, ranks, workers):
    """Ten steps of four clips are four passes over ten; killed in the middle of the second, and again later."""
    train = partial(train_shards, tmp_path, shards, ranks, workers)
    assert train(10, kill=4) != 0
    before = seen(tmp_path, ranks)
    assert list(before) == [1, 2, 3]
    assert train(10, resume=True) == 0
    after = seen(tmp_path, ranks)
    assert list(after) == list(range(1, 11)) and {step: after[step] for step in before} == before
    passes = [clip for ids in after.values() for clip in ids]
    assert all(Counter(passes[i : i + 10]).most_common(1)[0][1] == 1 for i in range(0, 40, 10))


def test_after_kill_9_it_goes_on_with_the_samples_that_it_has_not_seen(shards, tmp_path):
    """Ten steps of four samples are one pass and a third over three of each of ten clips."""
    train = partial(train_shards, tmp_path, shards, 2, 1, samples=3, fps=8)
    assert train(10, kill=4) != 0
    before = seen(tmp_path, 2)
    assert list(before) == [1, 2, 3]
    assert train(10, resume=True) == 0
    after = seen(tmp_path, 2)
    assert list(after) == list(range(1, 11)) and {step: after[step] for step in before} == before
    clips = [clip for ids in after.values() for clip in ids]
    assert set(Counter(clips[:30]).values()) == {3} and all(
        len(set(clips[i : i + 3])) == 1 for i in range(0, 39, 3)
    )


def test_too_many_unreadable_clips_on_one_rank_end_all(shards, tmp_path):
    broken = tmp_path / "shards"
    broken.mkdir()
    for path in shards.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "clips-000001.tar").unlink()
    assert train_shards(tmp_path, broken, 2, 1, 50, max_share=0.05) == 1
    assert len(seen(tmp_path, 2)) < 10
