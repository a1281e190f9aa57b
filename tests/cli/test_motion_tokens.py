"""A database of motion tokens: same training and videos as one of motion features, for the one Resampler only; and
encode in several processes."""

import csv
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from PIL import Image

from motionrag import cli
from motionrag.checkpoint import load_weights, read_weights, save_weights
from motionrag.cli.encode import _open_store
from motionrag.data.datamodule import ShardClips
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.video import read_clip
from motionrag.errors import MotionRAGError
from motionrag.retrieval import changes
from motionrag.retrieval.database import RetrievalDatabase, read_store


@pytest.fixture(scope="module")
def words(random_models):
    """Overrides by verb, for untrained encoders and weights."""
    weights = {word.split("=")[0]: word.split("=")[1] for word in random_models}
    sizes = [word for word in random_models if word.startswith(("resampler", "encoders"))]
    cama = [word for word in random_models if word.startswith(("resampler", "cama."))]
    return {
        "encode": [*sizes, "batch_size=3"],
        "train": [*cama, "stage=cama", "k=2", "data.batch_size=2", "data.val_share=0.2", "logger=csv"]
        + ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"]
        + ["data.val_batches=1", "callbacks.progress.refresh_rate=0"],
        "generate": [*random_models, "steps=2", "k=2", "image=first.png"],
        "stage1": weights["weights.adapter"],
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory, words):
    """Seven clips in three shards, databases of their features and of their motion tokens, and a picture."""
    folder = tmp_path_factory.mktemp("tokens")
    table = make_dataset(folder / "made", 7, 1, {"known": 1.0})
    pack(table, folder / "made/videos", folder / "shards", shard_size=3)
    clip = next((folder / "made/videos").glob("*.mp4"))
    Image.fromarray(read_clip(clip).frames[0]).resize((80, 64)).save(folder / "first.png")
    for db, own in (("features", []), ("tokens", [f"resampler_weights={words['stage1']}"])):
        GlobalHydra.instance().clear()
        run = [f"hydra.run.dir={folder}/runs/{db}", f"shards={folder}/shards", f"out={folder}/{db}"]
        assert cli.main(["encode", *words["encode"], *own, *run]) == 0
        own = ["near_duplicate=null"]  # captions made of few phrases
        assert cli.main(["index", f"db={folder}/{db}", *own, f"hydra.run.dir={folder}/runs/index"]) == 0
    return folder


@pytest.fixture
def run(world, words, tmp_path, monkeypatch, command):
    """Run a verb in ``tmp_path``; returns exit code, output and the error line."""
    monkeypatch.chdir(tmp_path)
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)

    def run(verb, *more, out):
        return command(verb, *words.get(verb, []), *more, f"hydra.run.dir={out}")

    return run


@pytest.fixture(scope="module")
def other_weights(words, tmp_path_factory):
    """Stage 1 weights of another Resampler."""
    state, manifest = read_weights(words["stage1"])
    state["resampler.latents"] = state["resampler.latents"] + 0.1
    return save_weights(tmp_path_factory.mktemp("other") / "other.safetensors", state, manifest.get("about"))


def losses(folder):
    rows = list(csv.DictReader(next(Path(folder).rglob("metrics.csv")).open()))
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


def test_tokens_are_what_the_resampler_makes_of_the_features(world, words):
    features, tokens = (RetrievalDatabase(world / name) for name in ("features", "tokens"))
    sizes = [word for word in words["encode"] if word.startswith("resampler")]
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        resampler = instantiate(compose("encode", overrides=[*sizes, "shards=s", "out=o"]).resampler)
    load_weights(words["stage1"], resampler=resampler)
    assert (features.resampled, tokens.resampled) == (False, True)
    assert tokens.manifest["shapes"]["motion"] == [8, 128] != features.manifest["shapes"]["motion"]
    with torch.no_grad():
        expected = resampler(features.motion_features(features.ids))
    torch.testing.assert_close(tokens.motion_tokens(tokens.ids), expected, atol=5e-3, rtol=5e-3)
    named = tokens.manifest["encoders"]["resampler"]
    assert (named["name"], named["width"], named["tokens"]) == ("adapter.safetensors", 128, 8)
    tokens.check_resampler(resampler)
    assert 0 < tokens.manifest["stored"]["error"]["motion"] < 2**-11


def test_stage_2_and_generation(run, words):
    """Both databases give the same, up to what fp16 rounds."""
    weights = f"resampler_weights={words['stage1']}"
    for db in ("features", "tokens"):
        assert run("train", f"db={db}", weights, out=f"train/{db}")[0] == 0
        code, _, error = run("generate", "a red ball", f"db={db}", out=f"video/{db}")
        assert code == 0, error
    found = {db: losses(f"train/{db}") for db in ("features", "tokens")}
    assert len(found["tokens"]) == 2
    assert found["tokens"] == pytest.approx(found["features"], rel=1e-3)
    videos = [read_clip(f"video/{db}/video.mp4").frames.astype(int) for db in ("features", "tokens")]
    assert abs(videos[0] - videos[1]).mean() < 0.5

    changes.merge("rest", ["tokens"], neighbours=1)
    rest = RetrievalDatabase("rest")
    changes.remove("rest", rest.ids[:4])
    changes.merge("first", ["tokens"], neighbours=1)
    changes.remove("first", rest.ids[4:])
    code, _, error = run("generate", "a red ball", "db=[first,rest]", out="video/both")
    assert code == 0, error
    side_by_side = read_clip("video/both/video.mp4").frames
    assert (side_by_side == videos[1]).all()


def test_other_resamplers_are_refused(run, other_weights):
    code, _, error = run("train", "db=tokens", f"resampler_weights={other_weights}", out="a")
    assert code == 2
    assert (
        "database tokens holds motion tokens of the Resampler adapter.safetensors (width 128, weights "
        in error
    )
    assert "this run's Resampler has the weights" in error
    code, _, error = run("generate", "a ball", "db=tokens", f"weights.adapter={other_weights}", out="b")
    assert code == 2 and "holds motion tokens of the Resampler adapter.safetensors" in error
    code, _, error = run(
        "encode", "shards=shards", "out=tokens", f"resampler_weights={other_weights}", out="c"
    )
    assert code == 2 and "out=tokens was encoded with the motion Resampler adapter.safetensors" in error


def test_tokens_and_features_are_not_mixed(world, tmp_path):
    stores = {name: read_store(world / name) for name in ("features", "tokens")}
    messages = {
        "tokens": r"tokens holds motion tokens of the Resampler adapter.safetensors \(.* this run makes motion features; ",
        "features": r"features holds motion features, this run makes motion tokens of the Resampler",
    }
    for name, other in (("tokens", "features"), ("features", "tokens")):
        with pytest.raises(MotionRAGError, match=messages[name] + ".*encode into a new folder"):
            _open_store(world / name, stores[other])
    with pytest.raises(
        MotionRAGError, match="encoded with precision=fp16, this run has precision=int8; use the same"
    ):
        _open_store(world / "features", stores["features"] | {"precision": "int8"})
    message = "tokens holds motion tokens of .*both motion features; encode its shards again without resampler_weights"
    with pytest.raises(MotionRAGError, match=message):
        changes.merge(tmp_path / "both", [world / "features", world / "tokens"])
    with pytest.raises(MotionRAGError, match="the motion features before it are needed here"):
        ShardClips(world / "shards", 9, 32, 32, db=world / "tokens")
    db = RetrievalDatabase(world / "features")
    with pytest.raises(
        MotionRAGError, match="holds motion features, no motion tokens; encode with resampler_weights"
    ):
        db.motion_tokens(db.ids)


def test_many_processes_write_the_same_store(run, world):
    """Two processes of one run, and the tasks of a job array one after the other."""

    def contents(folder):
        return {
            str(f.relative_to(folder)): f.read_bytes() for f in (folder / "parts").rglob("*") if f.is_file()
        }

    code, out, error = run("encode", "shards=shards", "out=two", "trainer=ddp_cpu", out="run")
    assert code == 0, error
    assert "7 clips in 3 part(s) -> two; 0 part(s) were there already" in out
    for task, clips, parts in ((1, 3, 1), (0, 4, 2)):
        code, out, _ = run("encode", "shards=shards", "out=array", f"array={task}/2", out=f"task{task}")
        assert code == 0
        assert f"{clips} clips in {parts} part(s) of array={task}/2 -> array" in out
    for name in ("two", "array"):
        assert contents(Path(name)) == contents(world / "features")
        assert read_store(Path(name)) == read_store(world / "features")
    for array in ("2/2", "1", "a/b"):
        code, _, error = run("encode", "shards=shards", "out=x", f"array={array}", out="bad")
        assert code == 2 and f"array={array}: expected I/N with I from 0 to N-1" in error
    code, _, error = run("encode", "shards=shards", "out=x", "precision=fp8", out="bad")
    assert code == 2 and "precision=fp8: choose from fp16, bf16, int8" in error
    code, _, error = run("encode", "shards=shards", "out=x", "batch_size=0", out="bad")
    assert code == 2 and "batch_size=0: expected at least 1 clip" in error
    code, _, error = run("encode", "shards=shards", "out=x", "max_bad=2", out="bad")
    assert code == 2 and "max_bad=2: expected a share from 0 to 1" in error
