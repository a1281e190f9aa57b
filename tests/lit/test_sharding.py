"""trainer=fsdp on two processes of the CPU: what is dealt out trains, saves and resumes as if it were whole."""

import lightning as L
import pytest
import torch
from hydra.utils import instantiate

FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
# momentum: steps as large as the gradients, where AdamW's would only show their sign, and a state to save
SGD = [
    "module.optimizer._target_=torch.optim.SGD",
    "module.optimizer.lr=0.1",
    "+module.optimizer.momentum=0.9",
]


@pytest.fixture
def run(train_files):
    """As `train_files`, with SGD."""
    return lambda experiment, run_dir, *overrides: train_files(experiment, run_dir, *SGD, *overrides)


@pytest.fixture
def start(train_config):
    """Weights before the first step, of all experiments with these words."""

    def make(*words):
        L.seed_everything(0, verbose=False)
        module = instantiate(train_config(*words, "run_dir=.", "shards=.", "db=.").module)
        return {key: value.clone() for key, value in module.state_dict().items()}

    return make


def same(found, expected, before):
    """All weights moved alike, by a thousandth of what they moved."""
    assert found.keys() == expected.keys() == before.keys()
    for key, value in expected.items():
        moved = (value - before[key]).norm().item()
        assert (found[key] - value).norm().item() <= 1e-3 * moved + 1e-7, key
    assert sum((value - before[key]).norm().item() for key, value in expected.items()) > 0.01


def test_cama_learns_what_one_process_learns(run, start, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    before = start("experiment=smoke_cama")
    whole, _ = run("smoke_cama", tmp_path / "whole", "data.batch_size=4")
    run("smoke_cama", tmp_path / "parts", *FSDP, "data.batch_size=2", "trainer.max_steps=2")
    accumulated = ["data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    parts, about = run("smoke_cama", tmp_path / "parts", *FSDP, *accumulated, "ckpt_path=last")
    assert about["about"]["steps"] == 4
    same(parts, whole, before)
    files = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "parts")]
    saved = [torch.load(file, weights_only=True) for file in files]  # one file, as one process writes it
    same(saved[1]["state_dict"], saved[0]["state_dict"], before)
    moved = [one["optimizer_states"][0]["state"] for one in saved]
    assert [[*m] for m in moved[0].values()] == [[*m] for m in moved[1].values()]


def test_the_adapter_learns_what_one_process_and_ddp_learn(run, start, tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    options = ["motion_adapter=reference", "module.gradient_checkpointing=true", "module.optimizer.lr=1"]
    before = start("experiment=smoke", *options)
    options += ["trainer.max_steps=2"]
    expected, _ = run("smoke", tmp_path / "whole", "data.batch_size=4", *options)
    options += ["data.batch_size=2"]
    same(run("smoke", tmp_path / "ddp", "trainer=ddp_cpu", *options)[0], expected, before)
    found, about = run("smoke", tmp_path / "fsdp", *FSDP, *options)
    same(found, expected, before)
    assert about["about"]["metrics"]["val/loss"] != about["about"]["metrics"]["val/loss_null"]
