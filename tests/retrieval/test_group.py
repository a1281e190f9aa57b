"""Databases side by side find and read what one merged database does."""

import pickle

import numpy as np
import pytest

from motionrag.errors import MotionRAGError
from motionrag.retrieval import changes
from motionrag.retrieval.database import FEW, RetrievalDatabase
from motionrag.retrieval.group import open_database


@pytest.mark.parametrize("few", [FEW, 0])
def test_a_group_is_what_a_merged_database_is(write_database, tmp_path, monkeypatch, few):
    monkeypatch.setattr("motionrag.retrieval.database.FEW", few)  # 0: filters go through the indexes
    one, features = write_database((3, 4), "one", paired=True, extra=lambda n: {"action": f"a{n % 2}"})
    two, more = write_database(
        (5,), "two", prefix="t", seed=1, extra=lambda n: {"metadata": {"split": "test"}}
    )
    changes.remove(one, ["c6", "c1"])
    changes.merge(tmp_path / "merged", [one, two])
    merged, group = RetrievalDatabase(tmp_path / "merged"), open_database([one, two])
    assert group.ids == merged.ids and len(group) == 10
    features |= more
    for clip_id in group.ids:
        query = features[clip_id]["caption"]
        for options in (
            {"k": 10},
            {"k": 3, "exclude": {"c0", "t0", "unknown"}},
            {"k": 2, "where": "action=a0"},
            {"k": 3, "where": ["split=test", "id!=t1"], "exclude": {"t2"}},
        ):
            expected, found = merged.search(query, **options)[0], group.search(query, **options)[0]
            assert found[0] == expected[0], options
            np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
        assert group.clip(clip_id) == merged.clip(clip_id)
        assert group.same_source(clip_id) == merged.same_source(clip_id)
        np.testing.assert_array_equal(group.preview(clip_id), merged.preview(clip_id))
    for read in ("motion_features", "appearance_features", "class_tokens", "caption_vectors"):
        np.testing.assert_array_equal(getattr(group, read)(group.ids), getattr(merged, read)(group.ids))
    assert pickle.loads(pickle.dumps(group)).ids == group.ids
    with pytest.raises(MotionRAGError, match="motionrag index merge makes one of them"):
        group.neighbours("c0", 1)


def test_what_does_not_go_together(write_database, tmp_path):
    one, _ = write_database((3,), "one")
    twin, _ = write_database((2,), "twin")
    big = {"name": "big", "width": 9, "weights": "1" * 64}
    other, _ = write_database((2,), "other", prefix="o", motion_encoder=big)
    assert type(open_database(one)) is type(open_database([str(one)])) is RetrievalDatabase
    with pytest.raises(MotionRAGError, match="clip 'c0' is in 2 of the databases .*one . .*twin"):
        open_database([one, twin])
    with pytest.raises(MotionRAGError, match=r"encoder big \(width 9.* holds features of fake \(width 6"):
        open_database([one, other])
    with pytest.raises(MotionRAGError, match="expected a retrieval database, or several"):
        open_database([])
