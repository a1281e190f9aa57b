"""``motionrag bench data`` at toy size."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from motionrag import cli
from motionrag.bench import data
from motionrag.errors import MotionRAGError


def test_bench_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = "image_size:32,patch_size:8,hidden_size:96,num_hidden_layers:1,num_attention_heads:2"
    words = [
        "bench.clips=2",
        "bench.seconds=3",
        "bench.repeats=1",
        "bench.passes=2",
        "bench.parts=[decoding,loader,memory,stage2]",
        "bench.k=2",
    ]
    words += [
        f"bench.encoders.motion={{{sizes},intermediate_size:32}}",
        f"bench.encoders.appearance={{{sizes}}}",
    ]
    words += ["resampler@bench.resampler=tiny", "cama@bench.cama=tiny", "hydra.run.dir=out"]
    assert cli.main(["bench", "data", *words]) == 0, capsys.readouterr().err
    rows = {row["what"]: row for row in json.loads((tmp_path / "out/results.json").read_text())["rows"]}
    assert len(rows) == (17 if find_spec("torchcodec") else 14)
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows.values())
    decoding = rows["decoding, the same from the middle"]
    assert decoding["gain"] == pytest.approx(decoding["peer"] / decoding["ours"])
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} <= {
        ".hydra"
    }  # nothing stays


def test_one_part_alone(tmp_path):
    results = data.run(None, None, {}, clips=2, seconds=3, repeats=1, parts=["loader"], folder=str(tmp_path))
    assert [row["what"] for row in results["rows"]] == ["loader, 1 -> 2 workers", "machine, 1 -> 2 processes"]
    assert results["summary"].startswith("two workers ")
    with pytest.raises(MotionRAGError, match=r"bench.parts=\['speed'\]: expected some of decoding, loader"):
        data.run(None, None, {}, parts=["speed"])


def test_other_pictures_are_an_error(tmp_path, monkeypatch):
    data.make_shards(tmp_path, 1, 3)
    monkeypatch.setattr(
        data, "_decode_and_convert_all", lambda *_, **__: np.zeros((16, 240, 320, 3), np.uint8)
    )
    with pytest.raises(MotionRAGError, match="16 frames over the clip: the pictures differ"):
        data._decoding(tmp_path, "16 frames over the clip", 3, 1)
