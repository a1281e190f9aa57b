"""Searches: Optuna chooses the points, prunes, goes on where it stopped; the same space as a sweep of W&B."""

from __future__ import annotations

import json

import pytest
import yaml

from motionrag import cli
from motionrag.cli import train
from motionrag.errors import MotionRAGError


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Run `motionrag train ... sweeper=search -m` with a training that only computes `run(cfg)`; `seen` lists configs."""
    monkeypatch.chdir(tmp_path)

    def main(*words, run=lambda cfg: abs(cfg.k - 4), sweeper="search"):
        def record(cfg):
            main.seen.append((cfg.k, cfg.module.optimizer.lr))
            return {"summary": "ok", "steps": 1, "metrics": {"val/loss": float(run(cfg))}}

        monkeypatch.setattr(train, "run", record)
        return cli.main(
            ["train", "stage=cama", *WORDS, *words, f"sweeper={sweeper}", "-m", "hydra.sweep.dir=S"]
        )

    main.seen = []
    main.folder = tmp_path / "S"
    return main


WORDS = ["db=D", "resampler_weights=null", "logger=csv"]
SPACE = ["k=int(interval(1,9))", "module.optimizer.lr=tag(log,interval(1e-5,1e-2))"]


def states(folder) -> list[str]:
    return [row["state"] for row in json.loads((folder / "sweep.json").read_text())["points"]]


def errors(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_search_goes_on_where_it_stopped(search, capsys):
    assert search(*SPACE, "sweeper.trials=4") == 0
    assert "best of 4: val/loss" in capsys.readouterr().out
    assert all(type(k) is int and 1 <= k <= 9 and 1e-5 <= lr <= 1e-2 for k, lr in search.seen)
    assert states(search.folder) == ["finished"] * 4 == ["finished"] * len(set(search.seen))
    assert search(*SPACE, "sweeper.trials=6", "sweeper.at_once=2") == 0
    assert len(search.seen) == len(set(search.seen)) == 6
    best = min(abs(k - 4) for k, _ in search.seen)
    assert f"best of 6: val/loss {best}" in capsys.readouterr().out


def test_a_failed_point_is_run_again(search, capsys):
    def run(cfg):
        if len(search.seen) == 2:
            raise MotionRAGError("no such thing")
        return cfg.k

    assert search(*SPACE, "sweeper.trials=3", run=run) == 2
    assert "1 of 3 points failed" in (line := errors(capsys)) and "no such thing" in line
    assert search(*SPACE, "sweeper.trials=3", run=run) == 0
    assert search.seen[3:] == [search.seen[1]] and states(search.folder) == ["finished"] * 3


def test_a_point_that_is_chosen_twice_runs_once(search):
    assert search("k=1,3", "sweeper.trials=6") == 0
    assert sorted(k for k, _ in search.seen) == [1, 3]


def test_mistakes_get_one_line(search, capsys):
    for words, expected in (
        (["sweeper.trials=2"], "a search needs something to choose: key=interval(LOW,HIGH)"),
        (["kk=1,2"], "unknown config key 'kk'"),
        (
            ["k=1,2", "sweeper.monitor=fvd"],
            "has no metric fvd, only val/loss: choose another hydra.sweeper",
        ),
        (["k=1,2", "sweeper.trails=2"], "unknown config key 'hydra.sweeper.trails'"),
    ):
        assert search(*words) == 2
        assert expected in errors(capsys)


def test_a_sweep_of_wandb(search):
    words = ["seed=3", "k=1,3", "data.batch_size=int(interval(2,8))", SPACE[1]]
    assert search(*words, sweeper="wandb") == 0
    described = yaml.safe_load((search.folder / "wandb_sweep.yaml").read_text())
    assert not search.seen
    assert described == {
        "project": "motionrag",
        "method": "bayes",
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {
            "k": {"values": ["1", "3"]},
            "data.batch_size": {"distribution": "int_uniform", "min": 2, "max": 8},
            "module.optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        },
        "command": ["motionrag", "train", "stage=cama", *WORDS, "seed=3", "${args_no_hyphens}"],
    }


def test_a_real_search_prunes(tmp_path, monkeypatch, capsys, motionworld):
    """Three trainings; the one whose learning rate is absurd ends at its first validation."""
    monkeypatch.chdir(tmp_path)
    words = "experiment=smoke_cama make=null logger=csv sweeper=search callbacks=pruning".split()
    words += [f"db={motionworld}/db"]
    words += [
        "module.optimizer.lr=1e-4,1e-3,10",
        "sweeper.trials=3",
        "callbacks.pruning.pruner.n_startup_trials=1",
    ]
    words += ["sweeper.sampler={_target_: optuna.samplers.RandomSampler, seed: 28}"]
    assert cli.main(["train", *words, "-m", "hydra.sweep.dir=S"]) == 0, capsys.readouterr().err
    rows = {row["name"]: row for row in json.loads((tmp_path / "S/sweep.json").read_text())["points"]}
    pruned = rows.pop("module.optimizer.lr=10")
    assert (pruned["state"], pruned["step"]) == ("pruned", 2)
    assert [(row["state"], row["step"]) for row in rows.values()] == [("finished", 4)] * 2
    assert "(1 pruned)" in capsys.readouterr().out


def test_trainings_of_a_search_at_the_same_time(tmp_path, motionrag, motionworld):
    words = "experiment=smoke_cama make=null logger=csv trainer.max_steps=2 launcher=joblib launcher.n_jobs=2".split()
    words += f"sweeper=search sweeper.trials=2 sweeper.at_once=2 db={motionworld}/db".split()
    done = motionrag("train", *words, "module.optimizer.lr=interval(1e-4,1e-3)", "-m", "hydra.sweep.dir=S")
    assert done.returncode == 0, done.stderr
    runs = [
        (row["state"], row["step"], json.loads((tmp_path / "S" / row["name"] / "state.json").read_text()))
        for row in json.loads((tmp_path / "S/sweep.json").read_text())["points"]
    ]
    assert [(state, step) for state, step, _ in runs] == [("finished", 2)] * 2
    (one, another) = (info for *_, info in runs)
    assert one["pid"] != another["pid"]
    assert abs(one["started"] - another["started"]) < min(one["seconds"], another["seconds"])  # side by side
