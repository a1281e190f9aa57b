"""Equal seeds give equal bits; two processes learn what one with their batches together learns, also when a run moves."""

import pytest
import torch

from motionrag import cli
from motionrag.checkpoint import read_weights


@pytest.mark.parametrize("experiment", ["smoke", "smoke_cama"])
def test_equal_seeds_equal_bits(experiment, train_files, tmp_path):
    (a, about), (b, same) = (train_files(experiment, tmp_path / name, "trainer.max_steps=2") for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [{k: v for k, v in m["about"]["metrics"].items() if "loss" in k} for m in (about, same)]
    assert losses[0] and losses[0] == losses[1]
    assert about["about"]["config_sha256"] == same["about"]["config_sha256"]
    assert about["about"]["seeds"] == {"init": 0, "data": 0, "noise": 0, "dropout": 0}


def test_each_seed_moves_its_own_part(train_config):
    def seeds(*overrides):
        cfg = train_config("stage=adapter", "run_dir=.", "shards=.", "db=.", *overrides)
        return cfg.seeds.init, cfg.data.seed, cfg.module.seed, cfg.module.dropout_seed

    assert seeds("seed=5") == (5, 5, 5, 5)
    names = ("init", "data", "noise", "dropout")
    assert [seeds(f"seeds.{name}=5") for name in names] == [
        tuple(5 * (i == j) for j in range(4)) for i in range(4)
    ]


def test_one_process_and_two(train_files, motionworld, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.chdir(tmp_path)
    whole, _ = train_files("smoke_cama", tmp_path / "whole", "data.batch_size=4")
    first = ["data.batch_size=4", "trainer.max_steps=1", "callbacks.last.every_n_train_steps=1"]
    train_files("smoke_cama", tmp_path / "parts", *first)
    moved = ["trainer=ddp_cpu", "trainer.devices=2", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    words = ["experiment=smoke_cama", "make=null", f"db={motionworld}/db", "ckpt_path=last"]
    assert cli.main(["train", *words, *moved, "hydra.run.dir=parts"]) == 0
    assert capfd.readouterr().out.count("train: 4 steps") == 1
    assert [len(list((tmp_path / "parts").glob(one))) for one in ("*.log", "results.json")] == [1, 1]
    parts, about = read_weights(tmp_path / "parts/weights/cama.safetensors")
    assert about["about"]["steps"] == 4
    for key, value in whole.items():
        torch.testing.assert_close(
            parts[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}"
        )
