"""trainer=fsdp on two processes of the CPU: what is dealt out trains, saves and resumes as if it were whole."""

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from motionrag.checkpoint import read_weights
from motionrag.cli import conf_dir, train

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
# momentum: steps as large as the gradients, where AdamW's would only show their sign, and a state to save
SGD = [
    "module.optimizer._target_=torch.optim.SGD",
    "module.optimizer.lr=0.1",
    "+module.optimizer.momentum=0.9",
]


def config(*overrides):
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("train", overrides=["logger=csv", "callbacks.progress.refresh_rate=0", *overrides])


@pytest.fixture
def world(motionworld):
    """Experiment -> overrides that name shards and database of a few clips."""
    return {
        "smoke": [f"shards={motionworld}/shards", f"db={motionworld}/db"],
        "smoke_cama": [f"db={motionworld}/db"],
    }


def run(world, experiment, run_dir, *overrides):
    """Train; returns the weights."""
    words = [f"experiment={experiment}", "make=null", f"run_dir={run_dir}", *world[experiment], *SGD]
    return read_weights(train.run(config(*words, *overrides))["weights"])


def start(*words):
    """Weights before the first step, of all experiments with these words."""
    L.seed_everything(0, verbose=False)
    module = instantiate(config(*words, "run_dir=.", "shards=.", "db=.").module)
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(found, expected, before):
    """All weights moved alike, by a thousandth of what they moved."""
    assert found.keys() == expected.keys() == before.keys()
    for key, value in expected.items():
        moved = (value - before[key]).norm().item()
        assert (found[key] - value).norm().item() <= 1e-3 * moved + 1e-7, key
    assert sum((value - before[key]).norm().item() for key, value in expected.items()) > 0.01


def test_cama_learns_what_one_process_learns(world, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    before = start("experiment=smoke_cama")
    whole, _ = run(world, "smoke_cama", tmp_path / "whole", "data.batch_size=4")
    run(world, "smoke_cama", tmp_path / "parts", *FSDP, "data.batch_size=2", "trainer.max_steps=2")
    parts, about = run(world, "smoke_cama", tmp_path / "parts", *FSDP, "data.batch_size=2", "ckpt_path=last")
    assert about["about"]["steps"] == 4
    same(parts, whole, before)
    files = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "parts")]
    saved = [torch.load(file, weights_only=True) for file in files]  # one file, as one process writes it
    same(saved[1]["state_dict"], saved[0]["state_dict"], before)
    moved = [one["optimizer_states"][0]["state"] for one in saved]
    assert [[*m] for m in moved[0].values()] == [[*m] for m in moved[1].values()]


def test_the_adapter_learns_what_one_process_and_ddp_learn(world, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    options = ["motion_adapter=reference", "module.gradient_checkpointing=true", "module.optimizer.lr=1"]
    before = start("experiment=smoke", *options)
    options += ["trainer.max_steps=2"]
    expected, _ = run(world, "smoke", tmp_path / "whole", "data.batch_size=4", *options)
    options += ["data.batch_size=2"]
    same(run(world, "smoke", tmp_path / "ddp", "trainer=ddp_cpu", *options)[0], expected, before)
    found, about = run(world, "smoke", tmp_path / "fsdp", *FSDP, *options)
    same(found, expected, before)
    assert about["about"]["metrics"]["val/loss"] != about["about"]["metrics"]["val/loss_null"]
