"""train, generate and evaluate on the command line with the backbones whose weights do not ship: random ones."""

import json

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from motionrag import cli
from motionrag.checkpoint import read_weights
from motionrag.cli.train import make_motionworld
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.video import read_clip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards and database of eight clips, encoded by the shipped encoders; shards of two test clips; a picture."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("world")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        encoders = compose("encode", overrides=["shards=x", "out=y"]).encoders
    make_motionworld(folder / "made", 8, 1, {"known": 1.0}, encoders)
    test = make_dataset(folder / "test", 2, 2, {"known": 1.0}, held_out=True, prefix="test")
    pack(test, folder / "test/videos", folder / "shards")
    Image.fromarray(read_clip(folder / "test/videos/test-00000.mp4").frames[0]).save(folder / "first.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run a verb inside ``tmp_path``; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(verb, *words):
        code = cli.main([verb, *words, f"hydra.run.dir=runs/{verb}"])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out

    return run


def first_steps(backbone, world, *words):
    """Words for two training steps of an experiment that was made for the shipped backbone."""
    sizes = ["trainer.max_steps=2", "data.batch_size=2", "data.val_share=0.2", "data.val_batches=1"]
    quiet = ["callbacks.progress.refresh_rate=0", "logger=csv", "trainer.log_every_n_steps=1"]
    made = [f"shards={world}/made/shards", f"db={world}/made/db", "trainer.val_check_interval=2"]
    return ["experiment=tiny_adapter", f"backbone={backbone}", "make=null", *made, *sizes, *quiet, *words]


@pytest.mark.parametrize("backbone", ["svd_tiny", "dynamicrafter_tiny"])
def test_train_generate_evaluate(backbone, world, run, tmp_path, capfd):
    said = f"backbone {backbone} has random weights"
    out = run("train", *first_steps(backbone, world, "motion_adapter.init=reference"))
    assert said in out and "2 steps, train/loss" in out
    weights = tmp_path / "runs/train/weights/adapter.safetensors"
    assert read_weights(weights)[1]["about"]["backbone"] == backbone

    model = [f"backbone={backbone}", f"weights.adapter={weights}", "steps=2", f"db={world}/made/db", "k=2"]
    picture = [f"image={world}/first.png", "prompt=a circle moves"]
    other = {"svd_tiny": "output"}.get(backbone, "hidden")  # than it was trained with
    assert cli.main(["generate", *model, *picture, f"motion_adapter.query={other}", "hydra.run.dir=no"]) == 2
    assert f"adapter asks with {other}: set backbone.adapter_query=" in capfd.readouterr().err
    assert said in run("generate", *model, *picture)
    video = read_clip(tmp_path / "runs/generate/video.mp4")
    assert video.frames.shape == (9, 32, 32, 3)
    run("generate", *model, *picture, "motion_scale=0", "out=bare.mp4")
    assert (tmp_path / "bare.mp4").read_bytes() != (tmp_path / "runs/generate/video.mp4").read_bytes()

    words = [f"shards={world}/shards", "conditions=[backbone,motionrag]", "save_clips=1", "out=scores"]
    assert said in run("evaluate", *model, *words)
    result = json.loads((tmp_path / "scores/metrics.json").read_text())
    assert [row["known"]["n"] for row in result["conditions"].values()] == [2, 2]
    assert said in result["notes"][0] and result["settings"]["backbone"] == backbone


def test_weights_of_another_backbone_are_one_line(world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [f"image={world}/first.png", "prompt=x", f"db={world}/made/db", "k=1", "hydra.run.dir=run"]
    assert cli.main(["generate", "backbone=svd_tiny", *words]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert "missing: motion_adapter.down_blocks/0" in error and "transformer_blocks/0/attn1" in error
