"""import and export through the command line; what import writes is what generate takes."""

import json

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from motionrag.checkpoint import read_weights
from motionrag.data.video import read_clip, write_mp4

SITES = "sites={transformer_blocks.0.attn1:160,transformer_blocks.1.attn1:160}"
SIZES = [
    "resampler=tiny",
    "cama=tiny",
    "resampler.embedding_dim=24",
    "cama.appearance_resampler.embedding_dim=24",
]


@pytest.fixture
def run(tmp_path, monkeypatch, command):
    """Run a verb inside ``tmp_path``; returns exit code, standard output and the error line."""
    monkeypatch.chdir(tmp_path)

    def run(verb, *words):
        GlobalHydra.instance().clear()
        return command(verb, *words, f"hydra.run.dir=runs/{verb}")

    return run


@pytest.fixture
def weights(random_models):
    """The folder of tiny untrained weights."""
    return (
        next(word for word in random_models if word.startswith("weights.adapter="))
        .split("=")[1]
        .rsplit("/", 1)[0]
    )


def test_the_imported_folder_generates_what_the_weights_did(run, tmp_path, random_models, weights):
    code, out, _ = run("export", "release=cogvideox", f"path={weights}", "out=theirs")
    assert code == 0 and "wrote motion_transformer.ckpt: " in out
    assert "export: 3 files of cogvideox -> theirs" in out
    code, out, _ = run("import", "release=cogvideox", "path=theirs", "out=ours", SITES, *SIZES)
    assert code == 0
    assert "read Motion-Adapter.ckpt: 35 tensors" in out and "float32" in out
    assert "missing 17_frames.ckpt: the backbone keeps its own weights" in out
    assert "generate --config-dir ours +release=cogvideox image=FILE" in out
    results = json.loads((tmp_path / "runs/import/results.json").read_text())
    assert results["filled"] == [] and results["missing"] == ["17_frames.ckpt"]
    for stage in ("adapter", "cama"):
        before, after = (read_weights(f"{folder}/{stage}.safetensors")[0] for folder in (weights, "ours"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)

    # The fine-tune of q, k and v, random and strong enough to be seen.
    torch.manual_seed(0)
    tune = {
        f"transformer.transformer_blocks.{i}.attn1.to_{x}.{kind}": 0.2 * torch.randn(shape)
        for i in range(2)
        for x in "qkv"
        for kind, shape in (("weight", (160, 160)), ("bias", (160,)))
    }
    torch.save({"state_dict": tune}, "theirs/17_frames.ckpt")
    assert run("import", "release=cogvideox", "path=theirs", "out=tuned", SITES, *SIZES)[0] == 0

    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save("first.png")
    write_mp4("reference.mp4", rng.integers(0, 255, (9, 32, 32, 3), np.uint8), 8)
    words = ["image=first.png", "prompt=a ball rolls", "references=[reference.mp4]", "steps=1", "guidance=1"]
    models = [word for word in random_models if not word.startswith(("weights.", "resampler.", "cama."))]
    tiny = ["backbone=cogvideox_tiny", "encoders=tiny", *models]
    assert run("generate", *words, *random_models, "out=direct.mp4")[0] == 0
    for folder in ("ours", "tuned"):
        package = ["--config-dir", folder, "+release=cogvideox"]
        assert run("generate", *package, *words, *tiny, f"out={folder}.mp4")[0] == 0
    assert run("generate", *words, *random_models, "out=bare.mp4", "motion_scale=0")[0] == 0
    direct, ours, tuned, bare = (read_clip(f"{x}.mp4").frames for x in ("direct", "ours", "tuned", "bare"))
    assert np.array_equal(direct, ours)
    assert not np.array_equal(direct, tuned) and not np.array_equal(direct, bare)


def test_mistakes_are_one_line(run, tmp_path, weights):
    code, _, error = run("import", "release=cogvideox")
    assert (
        code == 2 and "import needs path=... out=...: motionrag import release=NAME path=DIR out=DIR" in error
    )
    code, _, error = run("import", "release=svd", "path=none", "out=ours")
    assert code == 2 and "path=none has no Motion-Adapter.ckpt: give the folder with svd's" in error
    code, _, error = run("export", "release=wan", f"path={weights}", "out=theirs")
    assert code == 2 and "release=wan: expected one of cogvideox, svd, dynamicrafter" in error
    code, _, error = run("export", "release=dynamicrafter", f"path={weights}", "out=theirs")
    assert code == 2 and "dynamicrafter has no adapter site transformer_blocks.0.attn1" in error
    assert run("export", "release=cogvideox", f"path={weights}", "out=theirs")[0] == 0
    code, _, error = run("import", "release=cogvideox", "path=theirs", "out=ours", *SIZES)
    assert (
        code == 2 and "transformer.transformer_blocks.2.attn1.processor" in error and "is missing (" in error
    )
    code, _, error = run("import", "release=cogvideox", "path=theirs", "out=ours", SITES)
    assert code == 2 and "action_proj_model" in error and "expected" in error
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "runs"}


@pytest.mark.parametrize("sites", ["[a,b]", "3", "{a:wide}", "{a:-1}", "{}"])
def test_sites_that_are_none(run, tmp_path, sites):
    code, _, error = run("import", "release=cogvideox", "path=theirs", "out=ours", f"sites={sites}", *SIZES)
    assert code != 0 and "expected the width of each adapter site, such as {transformer_blocks.0" in error
    assert not (tmp_path / "ours").exists()
