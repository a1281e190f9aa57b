"""motionrag train: every shipped config composes, the small ones run, mistakes get one line."""

import csv
import math
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from motionrag import cli
from motionrag.checkpoint import read_weights
from motionrag.cli import train
from motionrag.errors import MotionRAGError

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TRAINING = [
    name
    for name in EXPERIMENTS
    if (text := (CONF / "experiment" / f"{name}.yaml").read_text()) and "/stage" in text
]
QUIET = ["callbacks.progress.refresh_rate=0", "logger=csv"]


def config(*overrides):
    """The composed config of `motionrag train`."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("train", overrides=list(overrides))


@pytest.fixture
def world(motionworld):
    """Overrides that name shards and database of 20 synthetic clips, encoded with the shipped encoders."""
    return ["make=null", f"shards={motionworld}/shards", f"db={motionworld}/db"]


def losses(run_dir, name="train/loss"):
    """Logged values by step, of all CSV files of a run."""
    rows = []
    for path in sorted(Path(run_dir).rglob("metrics.csv")):
        rows += list(csv.DictReader(path.open()))
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


@pytest.mark.parametrize("experiment", TRAINING)
def test_every_experiment_composes_and_resolves(experiment):
    cfg = config(f"experiment={experiment}", "run_dir=RUN")
    for key in ("shards", "db", "resampler_weights"):  # what only the user knows
        if key in cfg and OmegaConf.is_missing(cfg, key):
            cfg[key] = "given"
    OmegaConf.resolve(cfg)
    with torch.device("meta"):
        resampler = instantiate(cfg.resampler)
        cama = instantiate(cfg.cama)
    if cfg.stage_name != "adapter":
        assert (resampler.tokens, resampler.output_dim) == (cama.tokens, cama.width)
        assert (cfg.k + 1) * cama.tokens <= cfg.cama.max_positions


@pytest.mark.parametrize(
    "group", ["trainer", "logger", "callbacks", "motion_adapter", "resampler", "cama", "encoders", "backbone"]
)
def test_every_choice_composes(group):
    for path in (CONF / group).glob("*.yaml"):
        cfg = config(f"{group}={path.stem}", "run_dir=RUN", "shards=S", "db=D")
        OmegaConf.resolve(cfg)
        assert "_target_" in cfg[group] or all("_target_" in part for part in cfg[group].values())


@pytest.mark.parametrize("experiment", [name for name in TRAINING if not name.startswith("cogvideox")])
def test_small_experiments_run_a_step(experiment, world, tmp_path):
    extra = {"cama": ["k=3", "resampler_weights=null"], "joint": ["k=3"]}.get(experiment.split("_")[-1], [])
    names = [name for name in world if not (experiment.endswith("cama") and name.startswith("shards"))]
    sizes = ["trainer.max_steps=2", "data.batch_size=2", "data.val_batches=1", "trainer.val_check_interval=2"]
    cfg = config(f"experiment={experiment}", f"run_dir={tmp_path}", *names, *extra, *sizes, *QUIET)
    cfg.trainer.log_every_n_steps = 1
    cfg.data.val_share = 0.2
    results = train.run(cfg)
    assert results["steps"] == 2 and len(losses(tmp_path)) == 2
    assert all(math.isfinite(value) for value in results["metrics"].values())
    state, manifest = read_weights(results["weights"])
    trained = {"adapter": {"resampler", "motion_adapter"}, "cama": {"cama"}}
    trained["joint"] = trained["adapter"] | trained["cama"]
    assert {k.split(".")[0] for k in state} == trained[cfg.stage_name]
    assert manifest["about"]["encoders"]["motion"]["width"] == 96
    assert results["trainable_parameters"] == sum(v.numel() for v in state.values())


def smoke(world, run_dir, *overrides):
    """The smoke experiment on ready data."""
    return train.run(config("experiment=smoke", f"run_dir={run_dir}", *world, *QUIET, *overrides))


def test_continuing_a_run_gives_the_same_losses(world, tmp_path):
    smoke(world, tmp_path / "whole")
    smoke(world, tmp_path / "parts", "trainer.max_steps=2")
    smoke(world, tmp_path / "parts", "ckpt_path=last")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    validated = losses(tmp_path / "whole", "val/loss")
    assert list(validated) == [1, 3] and losses(tmp_path / "parts", "val/loss") == pytest.approx(
        validated, rel=1e-5
    )


def test_the_best_checkpoint_is_a_weights_file_and_goes_on(world, tmp_path):
    smoke(world, tmp_path / "run")
    best, last = (tmp_path / "run/checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    step = torch.load(best, weights_only=True)["global_step"]
    smoke(world, tmp_path / "more", f"ckpt_path={best}", f"trainer.max_steps={step + 1}")
    assert list(losses(tmp_path / "more")) == [step]

    state, manifest = read_weights(last)
    expected, whole = read_weights(tmp_path / "run/weights/adapter.safetensors")
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    metrics = whole["about"].pop("metrics")
    assert metrics and manifest["about"] == whole["about"]

    held = torch.load(last, weights_only=True)
    held["about"]["database_sha256"] = "0"
    torch.save(held, tmp_path / "of_another.ckpt")
    with pytest.warns(UserWarning, match="the database is not as it was"):
        smoke(
            world,
            tmp_path / "again",
            f"ckpt_path={tmp_path}/of_another.ckpt",
            f"trainer.max_steps={step + 1}",
        )


def test_wandb_offline(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = train.wandb_logger(save_dir=str(tmp_path), project="motionrag", group="test")
    assert logger._offline


def test_mistakes_get_one_line(world, tmp_path):
    run = f"run_dir={tmp_path / 'run'}"
    with pytest.raises(MotionRAGError, match="no such checkpoint"):
        smoke(world, tmp_path, "ckpt_path=none.ckpt")
    with pytest.raises(MotionRAGError, match="motion features of width 96, this configuration expects 768"):
        cama = ["experiment=smoke_cama", *(name for name in world if not name.startswith("shards"))]
        train.run(config(*cama, run, *QUIET, "resampler.embedding_dim=768"))
    with pytest.raises(MotionRAGError, match="neighbours of a single database; .* motionrag index merge"):
        train.run(config(*cama, run, "db=[a,b]"))
    with pytest.raises(MotionRAGError, match="trainer: .*devices.*trainer.devices=N"):
        smoke(world, tmp_path, "trainer.devices=two")
    with pytest.raises(MotionRAGError, match="999 processes wanted"):  # before any data is made
        train.run(config("experiment=smoke", run, "trainer.devices=999", f"make.out={tmp_path}/made"))
    assert not (tmp_path / "made").exists()
    (tmp_path / "bad.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(MotionRAGError, match="bad.ckpt is not a whole checkpoint .*: get it again, or start"):
        smoke(world, tmp_path, f"ckpt_path={tmp_path}/bad.ckpt")
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(
        MotionRAGError, match="other.ckpt is no checkpoint of motionrag train: expected a .ckpt"
    ):
        smoke(world, tmp_path, f"ckpt_path={tmp_path}/other.ckpt")
    smoke(world, tmp_path / "run")
    with pytest.raises(
        MotionRAGError, match=r"of another size: resampler.latents \(1, 8, 128\) instead of \(1, 8, 64\)"
    ):
        smoke(
            world, tmp_path / "other", f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt", "resampler.dim=64"
        )


def test_an_option_of_another_backbone_is_named(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "experiment=tiny_adapter",
        "backbone=svd_tiny",
        "+backbone.min_timestep=400",
        "+backbone.text_dropout=0.6",
        *world,
        "logger=csv",
        "hydra.run.dir=run",
    ]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "svd.SVD.tiny takes no min_timestep: leave it out with ~backbone.min_timestep" in line
    assert cli.main([*words, "~backbone.min_timestep"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "~backbone.text_dropout" in line


def test_data_is_made_once(world, capsys):
    folder = Path(world[1].removeprefix("shards=")).parent
    before = (folder / "recipe.json").stat().st_mtime_ns
    train.make_motionworld(str(folder), 20, 0, {"known": 1.0}, OmegaConf.create())
    assert (folder / "recipe.json").stat().st_mtime_ns == before
    with pytest.raises(MotionRAGError, match="clips of another recipe"):
        train.make_motionworld(str(folder), 21, 0, {"known": 1.0}, OmegaConf.create())
