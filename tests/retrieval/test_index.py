"""The index against brute force, whatever its kind; and neighbours against brute force."""

import errno
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.errors import MotionRAGError
from motionrag.retrieval import catalog
from motionrag.retrieval import index as module
from motionrag.retrieval.bank import write_npy
from motionrag.retrieval.index import CaptionIndex, cell_count, choose_kind, exact_search
from motionrag.retrieval.neighbours import NEIGHBOUR, Captions, nearest, updated

APPROXIMATE = ("ivf_flat", "ivf_pq", "hnsw")


def vectors(n, width=5, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clusters(n, width=32, seed=0):
    """As captions are: some alike."""
    rng = np.random.default_rng(seed)
    x = vectors(n // 20, width, seed + 1)[rng.integers(0, n // 20, n)] + rng.normal(size=(n, width)) * 0.1
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def index_of(embeddings, kind="flat", numbers=None):
    numbers = np.arange(len(embeddings)) if numbers is None else numbers
    places = np.full(numbers.max() + 1, -1)
    places[numbers] = np.arange(len(numbers))
    index = CaptionIndex.empty(kind, embeddings, len(embeddings), lambda wanted: embeddings[places[wanted]])
    index.add(embeddings, numbers)
    return index


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 50), seed=st.integers(0, 10**6), data=st.data())
def test_search_is_exact(n, k, seed, data):
    embeddings, query = vectors(n, seed=seed), vectors(1, seed=seed + 1)
    excluded = data.draw(st.sets(st.integers(0, n - 1)))
    allowed = data.draw(st.sets(st.integers(0, n - 1)) | st.none())
    similar = embeddings @ query[0]
    may = set(range(n)) if allowed is None else allowed
    expected = [row for row in np.argsort(-similar) if row in may - excluded][:k]
    mask = None if allowed is None else np.isin(np.arange(n), sorted(allowed))
    searched = index_of(embeddings).search(query, k, np.array(sorted(excluded), int), mask)
    by_hand = exact_search(
        query, np.array(sorted(may - excluded), int), lambda numbers: embeddings[numbers], k
    )
    for rows, scores in (searched, by_hand):
        assert rows.shape == scores.shape == (1, k)
        assert rows[0].tolist() == expected + [-1] * (k - len(expected))
        np.testing.assert_allclose(scores[0][: len(expected)], similar[expected], atol=1e-6)


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_recall_against_brute_force(kind, tmp_path):
    embeddings, queries = clusters(3000), clusters(100, seed=5)
    numbers = np.arange(3000) * 2 + 7  # any numbers will do
    index = index_of(embeddings, kind, numbers)
    exact = np.sort(queries @ embeddings.T, 1)[:, ::-1][:, :9]
    reached = index.tune(queries, exact, 0.99)
    assert reached >= 0.99
    found, scores = index.search(queries, 9)
    truth = np.argsort(-(queries @ embeddings.T), axis=1)[:, :9] * 2 + 7
    recall = np.mean([len(set(f) & set(t)) / 9 for f, t in zip(found.tolist(), truth.tolist(), strict=True)])
    assert recall >= 0.98
    # scores are true ones, best first, also those of ivf_pq
    np.testing.assert_allclose(scores, (queries[:, None] * embeddings[(found - 7) // 2]).sum(-1), atol=1e-5)
    assert (np.diff(scores) <= 0).all()
    # and all of it holds for what is read from disk
    index.save(tmp_path / "i")
    for mmap in (True, False):
        loaded = CaptionIndex.load(tmp_path / "i", mmap, index.fetch)
        assert (loaded.kind, loaded.effort, len(loaded)) == (kind, index.effort, 3000)
        for expected, again in zip((found, scores), loaded.search(queries, 9), strict=True):
            np.testing.assert_array_equal(expected, again)


@pytest.mark.parametrize("needed, taken", [(1, 4), (5, 5), (7, 7), (21, 22), (50, 52), (66, 68), (99, 68)])
def test_tuning_takes_about_the_least_effort(needed, taken, monkeypatch):
    index, exact = index_of(clusters(1156), "ivf_flat"), np.ones((2, 9), np.float32)  # 68 cells

    def search(queries, k):
        return None, exact * (index.effort >= needed)

    monkeypatch.setattr(index, "search", search)
    assert index.tune(exact, exact, 0.99) == (taken >= needed)
    assert index.effort == taken


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_fine_cells_of_many_clips(kind, tmp_path, monkeypatch):
    """Above MANY clips: a cell for every 64, found by codes; saved, changed and searched as any other."""
    monkeypatch.setattr(module, "MANY", 5000)
    embeddings = clusters(6000)
    queries = embeddings[::60] + 0.05 * vectors(100, 32, seed=5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    fetch = embeddings.__getitem__
    assert cell_count(5000) == 141 and cell_count(6400) == 100
    index, about = module.build_index(np.arange(6000), fetch, kind)
    assert about["recall"] >= 0.99 and about["effort"] <= 16
    index.save(tmp_path / "i")
    truth = np.argsort(-(queries @ embeddings.T), axis=1)[:, :9]
    for mmap in (True, False):
        loaded = CaptionIndex.load(tmp_path / "i", mmap, fetch)
        found, scores = loaded.search(queries, 9)
        recall = np.mean(
            [len(set(f) & set(t)) / 9 for f, t in zip(found.tolist(), truth.tolist(), strict=True)]
        )
        assert (loaded.kind, loaded.effort) == (kind, about["effort"]) and recall >= 0.98
        np.testing.assert_allclose(scores, (queries[:, None] * embeddings[found]).sum(-1), atol=1e-5)
    gone = np.unique(truth[:, 0])
    loaded.remove(gone)
    assert len(loaded) == 6000 - len(gone) and not np.isin(loaded.search(queries, 9)[0], gone).any()
    again, _ = module.build_index(np.arange(6000), fetch, kind)
    np.testing.assert_array_equal(found, again.search(queries, 9)[0])  # seeded


@pytest.mark.parametrize("kind", ("flat", *APPROXIMATE))
def test_excluded_and_disallowed_clips_are_not_found(kind):
    embeddings, queries = clusters(1200), clusters(40, seed=5)
    index = index_of(embeddings, kind)
    index.effort = 10_000 if kind == "hnsw" else cell_count(1200)
    odd = np.arange(1200) % 2 == 1
    first, _ = index.search(queries, 5)
    gone = np.unique(first)
    found, scores = index.search(queries, 5, gone, odd)
    assert odd[found].all() and not np.isin(found, gone).any()
    best = queries @ embeddings.T
    best[:, gone] = best[:, ~odd] = -1
    np.testing.assert_allclose(scores, np.sort(best, 1)[:, ::-1][:, :5], atol=1e-5)


@pytest.mark.parametrize("kind", ("flat", "ivf_flat", "ivf_pq"))
def test_a_gpu_is_used_for_training_and_many_queries(kind, monkeypatch, tmp_path):
    """Told that there is one: copies are made of the right things at the right time, and the answers are the same."""
    embeddings, numbers = clusters(1500), np.arange(1500) * 2
    plain = index_of(embeddings, kind, numbers)
    copied = []

    def index_cpu_to_gpu(resources, device, index, options):
        assert (resources, device, options.allowCpuCoarseQuantizer) == ("resources", 0, True)
        copied.append((type(index).__name__, index.ntotal))
        return faiss.clone_index(index)

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", index_cpu_to_gpu, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", SimpleNamespace, raising=False)
    index = index_of(embeddings, kind, numbers)
    trained = [] if kind == "flat" else [("IndexFlatIP", 0)]
    assert copied == trained
    large = {"flat": "IndexFlatIP", "ivf_flat": "IndexIVFFlat"}.get(kind)
    for count in (1500, 1490):
        copied.clear()
        few, many = embeddings[:255], embeddings[:256]
        assert (index.search(few, 9)[0] == plain.search(few, 9)[0]).all() and not copied
        index.search(many, 9, excluded=numbers[:1])  # filters are for the CPU
        index.search(many, 3000)
        assert not copied
        expected = [
            np.concatenate(parts)
            for parts in zip(plain.search(many[:99], 9), plain.search(many[99:], 9), strict=True)
        ]
        for _ in range(2):
            for found, wanted in zip(index.search(many, 9), expected, strict=True):
                np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert copied == ([(large, count)] if large else [])
        index.remove(numbers[:10])
        plain.remove(numbers[:10])
    index.save(tmp_path / "i")  # is as one that never saw a GPU
    plain.save(tmp_path / "plain")
    assert (tmp_path / "i").read_bytes() == (tmp_path / "plain").read_bytes()


def test_k_means_in_two_levels_uses_a_gpu(monkeypatch):
    used = []

    class Kmeans(faiss.Kmeans):
        def __init__(self, *args, gpu, **options):
            used.append(gpu)
            super().__init__(*args, **options)

    monkeypatch.setattr(faiss, "Kmeans", Kmeans)
    plain = module.two_level_centres(clusters(1000), 16)
    assert used and not any(used)
    used.clear()
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    np.testing.assert_array_equal(module.two_level_centres(clusters(1000), 16), plain)
    assert used and all(used)


@pytest.mark.parametrize("kind", ("flat", *APPROXIMATE))
def test_clips_come_and_go_without_training(kind, tmp_path):
    embeddings = clusters(1200)
    index = index_of(embeddings[:1000], kind)
    index.fetch = lambda numbers: embeddings[numbers]
    index.effort = cell_count(1000)
    index.remove(np.arange(50))
    index.remove(np.arange(50, 100))
    index.add(embeddings[1000:], np.arange(1000, 1200))
    index.save(tmp_path / "i")
    for kept in (index, *(CaptionIndex.load(tmp_path / "i", mmap, index.fetch) for mmap in (True, False))):
        assert len(kept) == 1100
        found, _ = kept.search(embeddings, 1)
        assert (found[100:, 0] == np.arange(100, 1200)).mean() > 0.99  # twins apart
        assert not np.isin(found, np.arange(100)).any()
        for excluded, allowed in ((np.arange(100, 300), None), (np.arange(100, 300), np.arange(1200) != 999)):
            found, _ = kept.search(embeddings[::10], 9, excluded, allowed)
            assert (found >= 300).all() and (allowed is None or allowed[found].all())


def test_hnsw_finds_as_well_when_most_is_removed(tmp_path):
    embeddings, queries = clusters(3000), clusters(100, seed=5)
    index = index_of(embeddings, "hnsw")
    gone = np.random.default_rng(0).permutation(3000)[:2000]
    index.remove(gone)
    left = np.setdiff1d(np.arange(3000), gone)
    truth = left[np.argsort(-(queries @ embeddings[left].T), axis=1)[:, :9]]
    found, _ = index.search(queries, 9)
    assert np.isin(found, left).all()
    recall = np.mean([len(set(f) & set(t)) / 9 for f, t in zip(found.tolist(), truth.tolist(), strict=True)])
    assert recall >= 0.97


def test_what_auto_means():
    assert choose_kind(10_000, 768, 4) == "flat"
    assert choose_kind(100_000, 768, 4) == "ivf_flat"
    assert choose_kind(5_000_000, 768, 4) == "ivf_pq"
    assert choose_kind(900, 100_000, 4) == "flat"  # too few to train on


def test_kinds_that_are_not_there_or_too_large():
    with pytest.raises(MotionRAGError, match="kind=best: unknown index; choose auto, flat, ivf_flat"):
        CaptionIndex.empty("best", vectors(3), 3)
    with pytest.raises(
        MotionRAGError, match="kind=ivf_pq needs at least 1000 clips, here are 30; use kind=flat"
    ):
        CaptionIndex.empty("ivf_pq", vectors(30), 30)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_saved_index_finds_the_same(tmp_path, mmap):
    index = index_of(vectors(30))
    index.save(tmp_path / "index.faiss")
    loaded = CaptionIndex.load(tmp_path / "index.faiss", mmap)
    assert (len(loaded), loaded.width, loaded.kind) == (30, 5, "flat")
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


def _search_in_child(index, queue):
    try:
        index.search(vectors(1), 1)
    except MotionRAGError as error:
        queue.put(str(error))


def test_a_forked_worker_is_refused():
    index = index_of(vectors(30))
    index.search(vectors(1), 1)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    child = fork.Process(target=_search_in_child, args=(index, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get().startswith("a search inside a forked worker can hang")


# ---------------------------------------------------------------- neighbours


def captions_of(embeddings, sources, near_duplicate=None, kind="flat"):
    _, groups = np.unique(sources, return_inverse=True)
    fetch = embeddings.__getitem__
    return Captions(index_of(embeddings, kind), fetch, np.arange(len(embeddings)), groups, near_duplicate)


def by_brute_force(embeddings, sources, k, near_duplicate=None):
    similar = embeddings @ embeddings.T
    lines = []
    for row in range(len(embeddings)):
        order = [
            other
            for other in np.argsort(-similar[row], kind="stable")
            if sources[other] != sources[row]
            and (near_duplicate is None or similar[row, other] < near_duplicate)
        ]
        lines.append(order[:k] + [-1] * (k - len(order[:k])))
    return lines


@settings(max_examples=50, deadline=None)
@given(
    sources=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60),
    k=st.integers(1, 20),
    near_duplicate=st.sampled_from([None, 0.8, 0.3]),
)
def test_neighbours_are_the_nearest_of_other_sources_and_captions(sources, k, near_duplicate):
    embeddings = vectors(len(sources), seed=len(sources))
    captions = captions_of(embeddings, sources, near_duplicate)
    table = nearest(captions, captions.numbers, k)
    assert table.dtype == NEIGHBOUR
    assert table["number"].tolist() == by_brute_force(embeddings, sources, k, near_duplicate)
    there = table["number"] >= 0
    scores = np.take_along_axis(embeddings @ embeddings.T, table["number"].clip(0).astype(int), 1)
    np.testing.assert_allclose(table["score"][there], scores[there], atol=1e-6)


def test_a_source_with_most_clips_hides_no_neighbour():
    """More clips of the own source around than an index is first asked for."""
    embeddings, sources = clusters(1500), ["a"] * 1400 + [f"b{i}" for i in range(100)]
    captions = captions_of(embeddings, sources, kind="ivf_flat")
    table = nearest(captions, captions.numbers, 4)
    assert (table["number"] >= 0).all()
    assert (table["number"][:1400] >= 1400).all()
    expected = np.sort(embeddings[:1400] @ embeddings[1400:].T, 1)[:, ::-1][:, :4]
    # the clips of "a" take what the index finds for them; where that is too little the search is exact
    assert (table["score"][:1400] >= expected - 1e-5).mean() > 0.9


def test_neighbours_follow_clips_that_come_and_go():
    rng = np.random.default_rng(0)
    embeddings, sources = vectors(80), [f"s{i}" for i in rng.integers(0, 30, 80)]
    before = captions_of(embeddings[:60], sources[:60], 0.9)
    table = nearest(before, before.numbers, 6)
    gone, stay = np.array([3, 40]), np.setdiff1d(np.arange(80), [3, 40])
    after = captions_of(embeddings, sources, 0.9)
    after.index.remove(gone)
    after = Captions(after.index, after.fetch, stay, after.groups[stay], 0.9)
    kept, new = stay[stay < 60], stay[stay >= 60]
    table = np.concatenate([updated(after, kept, table[kept], gone, new), nearest(after, new, 6)])
    expected = by_brute_force(embeddings[stay], [sources[i] for i in stay], 6, 0.9)
    assert table["number"].tolist() == [[int(stay[i]) if i >= 0 else -1 for i in line] for line in expected]


def test_a_full_disk_is_told_as_such():
    clips = [(0, {"id": "a", "source": "s", "metadata": {}})]
    for write in (
        lambda: index_of(vectors(3000)).save("/dev/full"),
        lambda: catalog.write("/dev/full", clips, catalog.schema(clip for _, clip in clips)),
        lambda: write_npy(Path("/dev/full"), vectors(3000)),
    ):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert error.value.errno == errno.ENOSPC
