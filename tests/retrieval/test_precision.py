"""Features at 16 or 8 bits: what is stored, how far off it is, and what reads it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.errors import MotionRAGError
from motionrag.retrieval import changes
from motionrag.retrieval.bank import Part, PartWriter
from motionrag.retrieval.building import build
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.group import open_database
from motionrag.retrieval.precision import pack, unpack

#: Largest error: relative to the value (half a unit in the last place), or for int8 to the token's largest value.
WORST = {"fp16": 2**-11, "bf16": 2**-8, "int8": 0.5 / 127}


@given(
    seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 1e3]), precision=st.sampled_from(sorted(WORST))
)
@settings(max_examples=30, deadline=None)
def test_errors_are_at_most_half_a_step(seed, scale, precision):
    values = np.random.default_rng(seed).normal(0, scale, (2, 3, 8)).astype(np.float32)
    values[0, 1] = 0
    stored, step = pack(values, precision)
    assert stored.shape == values.shape and stored.itemsize == (1 if precision == "int8" else 2)
    found = unpack(stored, step).numpy()
    reference = np.abs(values).max(-1, keepdims=True) if precision == "int8" else np.abs(values)
    assert (np.abs(found - values) <= WORST[precision] * reference * (1 + 1e-4) + 1e-7).all()
    again, _ = pack(found, precision)
    np.testing.assert_array_equal(again, stored)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("precision", sorted(WORST))
def test_a_database_gives_floats_and_tells_the_error(write_store, precision, mmap):
    path, features = write_store((3, 4), precision=precision)
    manifest = build(path, 4)
    db, ids = RetrievalDatabase(path, mmap), ["c5", "c0", "c3"]
    for name, read in (("motion", db.motion_features), ("appearance", db.appearance_features)):
        found, exact = read(ids).numpy(), np.stack([features[i][name] for i in ids]).astype("f4")
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, unpack(*pack(exact, precision)).numpy())
        every, right = read(db.ids).numpy(), np.stack([features[i][name] for i in db.ids]).astype("f4")
        error = np.sqrt(np.square(every - right).sum() / np.square(right).sum())
        assert manifest["stored"]["error"][name] == pytest.approx(error, rel=0.2, abs=1e-9)
    np.testing.assert_array_equal(db.class_tokens(ids), db.appearance_features(ids)[:, 0].numpy())
    assert manifest["stored"]["precision"] == [precision]
    errors = manifest["stored"]["error"].values()
    assert not any(errors) if precision == "fp16" else all(1e-4 < e < 0.01 for e in errors)  # fp16 came in


def test_precisions_live_together(write_store, tmp_path):
    """Every part says how it is stored, so databases that differ can be merged, extended and opened side by side."""
    path, features = write_store((2,), "a", prefix="a")
    other, more = write_store((3,), "b", prefix="b", seed=1, precision="int8")
    for db in (path, other):
        build(db, 1)
    expected = {name: RetrievalDatabase(other).motion_features([name]) for name in more}
    expected |= {name: RetrievalDatabase(path).motion_features([name]) for name in features}
    changes.remove(other, ["b1"])  # its part is copied clip by clip
    del expected["b1"]
    changes.merge(tmp_path / "both", [path, other], neighbours=2)
    side_by_side = open_database([path, other])
    changes.add(path, [other])
    for db in (RetrievalDatabase(path), RetrievalDatabase(tmp_path / "both"), side_by_side):
        assert set(db.ids) == set(expected)
        for name, value in expected.items():
            assert torch.equal(db.motion_features([name]), value)
    assert RetrievalDatabase(path).manifest["stored"]["precision"] == ["fp16", "int8"]
    assert changes.verify(tmp_path / "both")["clips"] == 4


def test_what_a_precision_cannot_hold_is_refused(tmp_path):
    clip = {"id": "a", "caption": "c", "motion_caption": "m", "source": "s"}
    arrays = np.full((1, 5, 4), 1e6), np.ones((1, 3, 2)), np.ones((1, 6)), [np.zeros((1, 8, 8, 3), np.uint8)]
    with (
        pytest.raises(MotionRAGError, match="not finite as float16; .* precision=bf16 holds larger ones"),
        PartWriter(tmp_path, "p", {}) as writer,
    ):
        writer.add([clip], *arrays)
    for precision in ("bf16", "int8"):
        with PartWriter(tmp_path, precision, {"preview_frames": 1}, precision) as writer:
            writer.add([clip], *arrays)
        found = Part(tmp_path / "parts" / precision).features("motion", 0)
        torch.testing.assert_close(found, torch.full((5, 4), 1e6), rtol=2**-8, atol=0)
    arrays[0][0, 0, 0] = np.nan
    for precision in WORST:
        with (
            pytest.raises(MotionRAGError, match="clip a: its motion features are not finite"),
            PartWriter(tmp_path, "nan", {}, precision) as writer,
        ):
            writer.add([clip], *arrays)
