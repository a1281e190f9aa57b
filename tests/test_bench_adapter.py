"""``motionrag bench adapter`` on a tiny backbone."""

from __future__ import annotations

import json

import pytest
from hydra import compose, initialize_config_dir

from motionrag import cli
from motionrag.bench import adapter
from motionrag.describe import backbone_on_meta
from motionrag.errors import MotionRAGError


def config(*overrides: str):
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        return compose("bench", overrides=["bench=adapter", *overrides]).bench


def test_layers_are_found_by_running_the_backbone():
    tiny = backbone_on_meta(config("backbone@bench.backbones.svd=svd_tiny").backbones.svd)
    found = adapter.layers(tiny)
    assert sum(count for _, count in found) == len(tiny.adapter_sites())
    # 9 frames of 8 x 8 latents in the outer blocks, 4 x 4 in the middle
    assert [(layer.shape, count) for layer, count in found] == [((9, 64, 32), 3), ((9, 16, 64), 1)]
    assert not any(m._forward_pre_hooks for m in tiny.denoiser.modules())


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "~bench.backbones.cogvideox",
        "~bench.backbones.dynamicrafter",
        "bench.repeats=1",
        "bench.tokens=8",
    ]
    words += ["backbone@bench.backbones.svd=svd_tiny", "hydra.run.dir=out"]
    assert cli.main(["bench", "adapter", *words]) == 0
    assert "folded_of_plain" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    *layers, whole = results["rows"]
    assert [row["layers"] for row in layers] == [3, 1] and whole["layers"] == 4
    for row in layers:
        assert min(row["layer_ms"], row["plain_ms"], row["folded_ms"]) > 0
        assert 0 < row["error"] < 2e-6
    for key in ("plain_ms", "folded_ms", "layer_ms"):
        assert whole[key] == pytest.approx(3 * layers[0][key] + layers[1][key])
    assert "of plain in svd" in results["summary"]


def test_all_backbones_are_in_the_config():
    assert set(config().backbones) == {"cogvideox", "svd", "dynamicrafter"}


@pytest.mark.parametrize(("key", "value"), [("size", "small"), ("dtype", "int8")])
def test_mistakes(key, value):
    with pytest.raises(MotionRAGError, match=f"bench adapter: {key}={value}, expected"):
        adapter.run({}, **{key: value})


def test_no_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "bench needs the name of a benchmark" in capsys.readouterr().err
