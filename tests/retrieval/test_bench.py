"""``motionrag bench index`` and ``bench store`` at toy size."""

import json
import sys

import pytest

from motionrag import cli
from motionrag.bench import index, store
from motionrag.errors import MotionRAGError


def test_index(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["bench.clips=2000", "bench.width=32", "bench.queries=20", "bench.kinds=[flat,ivf_flat,hnsw]"]
    assert cli.main(["bench", "index", *words, "hydra.run.dir=out"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    exact, flat, whole, *almost = results["rows"]
    assert exact["recall"] == flat["recall"] == whole["recall"] == exact["of_numpy"] == 1
    ours = [tuple(row["method"].split(", ")[:2]) for row in (flat, whole, *almost)]
    assert ours == [(by, kind) for kind in ("flat", "ivf_flat", "hnsw") for by in ("motionrag", "db.search")]
    assert [row["recall"] for row in almost[::2]] == [row["recall"] for row in almost[1::2]]
    for row in almost:
        assert row["recall"] > 0.9 and row["of_lancedb"] is None
        assert row["cpu_ms"] > 0 and 0 < row["p50_ms"] <= row["p90_ms"]
    assert "x NumPy; db.search " in results["summary"]


def test_lancedb_is_asked_for_and_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(MotionRAGError, match="LanceDB is not installed: pip install lancedb"):
        index.run(clips=100, width=8, queries=1, lancedb=True)


def test_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["bench.clips=[40,100]", "bench.part=30", "bench.width=8", "bench.reads=5"]
    words += ["bench.appearance=[20,8]", "bench.appearance_up_to=50"]
    assert cli.main(["bench", "store", *words, "hydra.run.dir=out"]) == 0
    small, large = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert (small["clips"], large["clips"]) == (40, 100)
    assert large["disk_gb"] > 100 * 25 * 8 * 2 / 1e9
    assert min(large[key] for key in ("open_ms", "first_id_ms", "read_ms", "warm_ms")) > 0
    assert min(small[key] for key in ("both_read_ms", "both_warm_ms")) > 0
    assert large["both_read_ms"] is large["both_warm_ms"] is None
    assert "; 40, with appearance: " in json.loads((tmp_path / "out/results.json").read_text())["summary"]
    assert not list((tmp_path / "out").rglob("*.npy"))  # nothing stays
    with pytest.raises(MotionRAGError, match=r"clips take .* GB and .* has less free"):
        store.run(clips=[10**12], folder=str(tmp_path))
