"""Exact search and neighbours, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.errors import MotionRAGError
from motionrag.retrieval.index import CaptionIndex


def vectors(n, width=5, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 50), seed=st.integers(0, 10**6), data=st.data())
def test_search_is_exact(n, k, seed, data):
    embeddings, query = vectors(n, seed=seed), vectors(1, seed=seed + 1)
    excluded = data.draw(st.sets(st.integers(0, n - 1)))
    rows, scores = CaptionIndex.build(embeddings).search(query, k, sorted(excluded))
    similar = embeddings @ query[0]
    expected = [row for row in np.argsort(-similar) if row not in excluded][:k]
    assert rows.shape == scores.shape == (1, k)
    assert rows[0].tolist() == expected + [-1] * (k - len(expected))
    np.testing.assert_allclose(scores[0][: len(expected)], similar[expected], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(sources=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), k=st.integers(1, 20))
def test_neighbours_are_the_nearest_of_other_sources(sources, k):
    embeddings = vectors(len(sources), seed=len(sources))
    found = CaptionIndex.build(embeddings).neighbours(embeddings, sources, k)
    assert found.dtype == np.int32
    for row, line in enumerate(found):
        order = np.argsort(-(embeddings @ embeddings[row]))
        expected = [other for other in order if sources[other] != sources[row]][:k]
        assert line.tolist() == expected + [-1] * (k - len(expected))


@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_finds_the_same(tmp_path, mmap):
    index = CaptionIndex.build(vectors(30))
    index.save(tmp_path / "index.faiss")
    loaded = CaptionIndex.load(tmp_path / "index.faiss", mmap)
    assert (len(loaded), loaded.width) == (30, 5)
    for expected, found in zip(
        index.search(vectors(4, seed=1), 7, [3, 4]), loaded.search(vectors(4, seed=1), 7, [3, 4]), strict=True
    ):
        np.testing.assert_array_equal(expected, found)


def test_a_missing_or_broken_index_is_named(tmp_path):
    (tmp_path / "broken.faiss").write_bytes(b"words")
    for name in ("nowhere.faiss", "broken.faiss"):
        with pytest.raises(
            MotionRAGError, match=rf"{name}: missing or not a FAISS index; run motionrag index"
        ):
            CaptionIndex.load(tmp_path / name)
