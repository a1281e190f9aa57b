"""Nearest neighbours of embeddings by inner product: FAISS behind one class, exact or almost.

Search in the main process only: FAISS can hang in forked workers, so there it is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from motionrag.errors import MotionRAGError

KINDS = ("flat", "ivf_flat", "ivf_pq", "hnsw")
#: Numbers (clips x width) that an exact search still goes through in about a millisecond: 10 k clips of 768.
FLAT_VALUES = 8_000_000
#: Clips below which an inverted file or a product quantiser has too little to be trained on.
TRAINABLE = 1000
#: Clips for each cell that an inverted file is trained on. With 64, a group of like captions may have no clip among
#: them; its clips are then scattered over cells that no query for them looks into.
TRAINED_ON = 160
#: Clips above which an inverted file has finer cells, one for every FINE clips. With 2 sqrt(n) cells of a million clips
#: a cell holds many groups of like captions and stands for none: a quarter of all clips had to be searched.
MANY, FINE, MOST_CELLS = 200_000, 64, 65_536
#: Clips that such cells are trained on, at most.
MOST_TRAINED = 2_000_000
#: Captions whose nearest an approximate index must find. Of 64 a single one with none of its nearest found misses 0.99.
TUNED_ON = 256
#: ivf_pq: for each clip asked for, so many are taken by their codes and ordered by their embeddings.
REFINE = 30

#: With faiss-gpu and a GPU, queries from which on a search is done there, if it asks for no more clips and cells.
BULK, MOST_ON_GPU = 256, 2048

#: Gives the stored embeddings (m,W) float32 of clip numbers (m,).
Fetch = Callable[[np.ndarray], np.ndarray]

_forked = False


def _mark() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark)


def choose_kind(clips: int, width: int, memory_gb: float) -> str:
    """What ``auto`` means: flat while it is fast, then ivf_flat, or ivf_pq if the embeddings exceed the budget.

    memory_gb: what the index may take. hnsw is never chosen: what is removed from it stays in its graph.
    """
    if clips * width <= FLAT_VALUES or clips < TRAINABLE:
        return "flat"
    return "ivf_flat" if clips * width * 4 <= memory_gb * 1e9 else "ivf_pq"


class CaptionIndex:
    """Embeddings (n,W) float32 of length 1, each under a number of its own.

    index: what FAISS made or read. fetch: the embeddings themselves; only ivf_pq, which keeps codes, needs it.

    ``flat`` is exact; ``ivf_flat`` looks into the nearest cells (see :func:`cell_count`); ``ivf_pq`` does, keeps W/8
    bytes for each clip, and orders what it found by the embeddings; ``hnsw`` follows a graph. All scores are
    exact inner products. ``effort`` is the number of cells looked into, or hnsw's width of search. With faiss-gpu and a
    GPU, cells are trained there, and unfiltered searches for many queries (``flat`` and ``ivf_flat``: the neighbours of all
    clips) use a copy there.
    """

    def __init__(self, index: faiss.Index, fetch: Fetch | None = None) -> None:
        self.index, self.fetch = index, fetch
        inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap2) else index
        # IndexIVFPQ and IndexIVFFlat are no subclasses of one another; IndexHNSWFlat is no IndexFlat
        classes = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexHNSWFlat)
        self.kind = next(kind for kind, cls in zip(KINDS, classes, strict=True) if isinstance(inner, cls))
        self._inner = inner
        self._removed = int((faiss.vector_to_array(index.id_map) < 0).sum()) if self.kind == "hnsw" else 0
        self._copy: faiss.Index | None = None  # on a GPU

    @classmethod
    def empty(cls, kind: str, sample: np.ndarray, clips: int, fetch: Fetch | None = None) -> CaptionIndex:
        """An index without clips, trained on ``sample`` (s,W) of the ``clips`` that it is to hold.

        Raises :class:`MotionRAGError` for an unknown kind, or too few clips to train it on.
        """
        if kind not in KINDS:
            raise MotionRAGError(f"kind={kind}: unknown index; choose auto, {', '.join(KINDS)}")
        width = sample.shape[1]
        if kind == "flat":
            return cls(faiss.IndexIDMap2(faiss.IndexFlatIP(width)), fetch)
        if kind == "hnsw":
            graph = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efSearch = 16
            return cls(faiss.IndexIDMap2(graph), fetch)
        if clips < TRAINABLE:
            raise MotionRAGError(
                f"kind={kind} needs at least {TRAINABLE} clips, here are {clips}; use kind=flat"
            )
        cells, sample = cell_count(clips), _rows(sample)
        coarse: faiss.Index = faiss.IndexFlatIP(width)
        if clips > MANY:
            centres = two_level_centres(sample, cells)
            cells, coarse = len(centres), _coarse(centres)
        if kind == "ivf_flat":
            index = faiss.IndexIVFFlat(coarse, width, cells, faiss.METRIC_INNER_PRODUCT)
        else:
            codes = next(m for m in range(max(width // 8, 1), 0, -1) if width % m == 0)
            index = faiss.IndexIVFPQ(coarse, width, cells, codes, 8, faiss.METRIC_INNER_PRODUCT)
            index.pq.cp.min_points_per_centroid = 1  # no warning: the order is put right by the embeddings
        index.cp.spherical = True
        index.cp.min_points_per_centroid = 1
        if faiss.get_num_gpus():
            trainer = _on_gpu(faiss.IndexFlatIP(width))
            index.clustering_index = trainer  # FAISS does not hold on to it
        index.train(sample)  # not the cells, if they are there
        index.clustering_index = None
        return cls(index, fetch)

    def add(self, embeddings: np.ndarray, numbers: np.ndarray) -> None:
        """Add embeddings (m,W) under new numbers (m,) int64."""
        self._copy = None
        self.index.add_with_ids(_rows(embeddings), np.ascontiguousarray(numbers, np.int64))

    def remove(self, numbers: np.ndarray) -> None:
        """Forget these numbers. From hnsw they are not found any more, but stay in the graph, under the number -1."""
        if self.kind == "hnsw":
            ids = faiss.vector_to_array(self.index.id_map)
            gone = np.isin(ids, numbers)
            ids[gone] = -1
            faiss.copy_array_to_vector(ids, self.index.id_map)
            self._removed += int(gone.sum())
            return
        self._copy = None
        self.index.remove_ids(np.ascontiguousarray(numbers, np.int64))

    def save(self, path: str | Path) -> None:
        """Write the index; a database renames the file into place."""
        with Path(path).open("wb") as file:  # through Python's file: a full disk then says so
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))

    @classmethod
    def load(
        cls, path: str | Path, mmap: bool = True, fetch: Fetch | None = None, name: Path | None = None
    ) -> CaptionIndex:
        """Read an index; with ``mmap`` without loading it, and only to be searched.

        Raises :class:`MotionRAGError` (with ``name``, if given) if it cannot be read.
        """
        flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if mmap else 0
        try:
            return cls(faiss.read_index(str(path), flags), fetch)
        except (RuntimeError, StopIteration) as error:
            file = name or Path(path)
            raise MotionRAGError(
                f"{file}: missing or not a FAISS index; run motionrag index db={file.parent}"
            ) from error

    def __len__(self) -> int:
        return self.index.ntotal - self._removed

    @property
    def width(self) -> int:
        """``W``."""
        return self.index.d

    @property
    def effort(self) -> int:
        """How far an approximate search looks; 0: everywhere."""
        if self.kind == "flat":
            return 0
        return int(self._inner.hnsw.efSearch if self.kind == "hnsw" else self._inner.nprobe)

    @effort.setter
    def effort(self, value: int) -> None:
        self._copy = None
        if self.kind == "hnsw":
            self._inner.hnsw.efSearch = value
        elif self.kind != "flat":
            self._inner.nprobe = value

    def tune(self, queries: np.ndarray, exact: np.ndarray, recall: float) -> float:
        """Set about the least effort that finds at least ``recall`` (0..1) of the best clips of ``queries`` (B,W).

        exact: scores (B,k) of the true best ones, best first. Returns the recall reached.
        """
        most = 1 if self.kind == "flat" else 4096 if self.kind == "hnsw" else self._inner.nlist

        def reached(effort: int) -> float:
            self.effort = effort
            _, scores = self.search(queries, exact.shape[1])
            # by score: of clips with one caption any will do
            return float((scores >= exact[:, -1:] - 1e-5).mean())

        few, enough = 0, min({"flat": 1, "hnsw": 16}.get(self.kind, 4), most)
        while (found := reached(enough)) < recall and enough < most:
            few, enough = enough, min(2 * enough, most)
        while few and found >= recall and enough - few > 1 + few // 8:
            middle = (few + enough) // 2
            if (there := reached(middle)) >= recall:
                enough, found = middle, there
            else:
                few = middle
        self.effort = enough
        return found

    def search(
        self,
        queries: np.ndarray,
        k: int,
        excluded: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Numbers (B,k) int64 and scores (B,k) float32, best first, of ``queries`` (B,W).

        excluded: numbers (m,) that must not be found. allowed: bool (largest number + 1,), those that may be.
        Where fewer than k are found, the number is -1. Raises :class:`MotionRAGError` in a forked process.
        """
        if _forked:
            raise MotionRAGError(
                "a search inside a forked worker can hang: search in the main process; workers read the "
                "neighbours that motionrag index stored"
            )
        selector = None
        if self._removed and allowed is None:  # a bitmap has no place for -1
            excluded = np.append(np.empty(0, np.int64) if excluded is None else excluded, -1)
        if allowed is not None:
            if excluded is not None:
                allowed = allowed.copy()
                allowed[excluded] = False
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        elif excluded is not None and len(excluded):
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(np.asarray(excluded, dtype=np.int64)))
        queries = _rows(queries)
        if selector is None and len(queries) >= BULK and self._fits_a_gpu(k):
            return self._search_on_gpu(queries, k)
        wanted = min(REFINE * k, len(self)) if self.kind == "ivf_pq" else k
        threads = faiss.omp_get_max_threads()
        if len(queries) == 1:
            faiss.omp_set_num_threads(1)  # waking threads up costs more than they save
        try:
            scores, numbers = self.index.search(queries, wanted, params=self._parameters(selector, wanted))
        finally:
            faiss.omp_set_num_threads(threads)
        return self._refined(queries, numbers, k) if self.kind == "ivf_pq" else (numbers, scores)

    def _fits_a_gpu(self, k: int) -> bool:
        fits = self.kind in ("flat", "ivf_flat") and max(k, self.effort) <= MOST_ON_GPU
        return fits and faiss.get_num_gpus() > 0

    def _search_on_gpu(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._copy is None:
            self._copy = _on_gpu(self._inner)
        scores, numbers = self._copy.search(queries, k)
        if self.kind == "flat":  # the copy knows places only
            numbers = np.where(numbers < 0, -1, faiss.vector_to_array(self.index.id_map)[numbers])
        return numbers, scores

    def _parameters(self, selector: faiss.IDSelector | None, wanted: int) -> faiss.SearchParameters:
        if self.kind == "flat":
            return faiss.SearchParameters(sel=selector)
        if self.kind == "hnsw":
            passed = self.index.ntotal / max(len(self), 1)  # a walk goes through removed clips, too
            width = math.ceil(max(self.effort, wanted) * passed)
            return faiss.SearchParametersHNSW(sel=selector, efSearch=width)
        return faiss.SearchParametersIVF(sel=selector, nprobe=self.effort)

    def _refined(self, queries: np.ndarray, numbers: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` best of the candidates ``numbers`` (B,c) by their embeddings."""
        best = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        for row, (query, candidates) in enumerate(zip(queries, numbers, strict=True)):
            candidates = candidates[candidates >= 0]
            scores = self.fetch(candidates) @ query
            order = np.argsort(-scores, kind="stable")[:k]
            best[0][row, : len(order)], best[1][row, : len(order)] = candidates[order], scores[order]
        return best


def build_index(
    numbers: np.ndarray, fetch: Fetch, kind: str = "auto", memory_gb: float = 4.0, recall: float = 0.99
) -> tuple[CaptionIndex, dict[str, Any]]:
    """An index of the clips ``numbers`` (n,), and how it was made: kind, and recall and effort if not exact.

    kind: one of KINDS, or auto (see :func:`choose_kind`). recall: share of the true 9 nearest (0..1) that an
    approximate index has to find; measured on clips that are in it. Training and choice of clips are seeded.
    """
    if kind == "auto":
        kind = choose_kind(len(numbers), fetch(numbers[:1]).shape[1], memory_gb)
    rng = np.random.default_rng(0)
    count = min(len(numbers), TRAINED_ON * cell_count(len(numbers)), MOST_TRAINED)
    sample = np.sort(rng.choice(numbers, count, replace=False)) if kind.startswith("ivf") else numbers[:1]
    index = CaptionIndex.empty(kind, fetch(sample), len(numbers), fetch)
    for start in range(0, len(numbers), 8192):
        block = numbers[start : start + 8192]
        index.add(fetch(block), block)
    if kind == "flat":
        return index, {"kind": kind}
    queries = fetch(rng.choice(numbers, min(TUNED_ON, len(numbers)), replace=False))
    _, exact = exact_search(queries, numbers, fetch, min(9, len(numbers)))
    reached = index.tune(queries, exact, recall)
    return index, {"kind": kind, "recall": round(reached, 4), "effort": index.effort}


def exact_search(
    queries: np.ndarray,
    numbers: np.ndarray,
    fetch: Fetch,
    k: int,
    drop: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The ``k`` best of clips ``numbers`` (n,) for ``queries`` (B,W) without an index: numbers and scores (B,k).

    drop: called with positions (c,) in ``numbers`` and scores (B,c), says which not to find, bool (B,c). Where
    fewer than k are left, the number is -1 and the score -inf. Reads embeddings in blocks, not all at once.
    """
    queries = _rows(queries)
    best = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    for start in range(0, len(numbers), 8192):
        block = np.asarray(numbers[start : start + 8192], np.int64)
        scores = queries @ fetch(block).T
        if drop is not None:
            scores[drop(np.arange(start, start + len(block)), scores)] = -np.inf
        both = np.concatenate([best[0], np.broadcast_to(block, scores.shape)], 1)
        scores = np.concatenate([best[1], scores], 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(both, order, 1), np.take_along_axis(scores, order, 1)
    best[0][np.isneginf(best[1])] = -1
    return best


def cell_count(clips: int) -> int:
    """Cells of an inverted file for so many clips: 2 sqrt(n), or one for every FINE of more than MANY clips."""
    return max(1, round(2 * clips**0.5)) if clips <= MANY else min(clips // FINE, MOST_CELLS)


def two_level_centres(sample: np.ndarray, cells: int, turns: int = 2) -> np.ndarray:
    """About ``cells`` centres (c,W) of length 1 for ``sample`` (s,W): k-means within the groups of a coarse k-means.

    Costs 1/sqrt(cells) of k-means in one go. Groups cut through cells, so ``turns`` of k-means over all follow, in which
    the nearest centre is found by codes. Seeded.
    """
    options = {"spherical": True, "niter": 10, "seed": 0, "min_points_per_centroid": 1}
    options["gpu"] = faiss.get_num_gpus() > 0
    coarse = faiss.Kmeans(sample.shape[1], round(cells**0.5), max_points_per_centroid=2000, **options)
    coarse.train(sample)
    group = coarse.assign(sample)[1]
    parts = []
    for number, centre in enumerate(coarse.centroids):
        members = sample[group == number]
        share = round(cells * len(members) / len(sample))
        if share < 2:
            parts.append(centre[None])
            continue
        fine = faiss.Kmeans(sample.shape[1], share, **options)
        fine.train(members)
        parts.append(fine.centroids)
    centres = np.concatenate(parts)
    for _ in range(turns):
        nearest = _coarse(centres).search(sample, 1)[1][:, 0]
        order, (used, starts) = np.argsort(nearest), np.unique(np.sort(nearest), return_index=True)
        centres[used] = np.add.reduceat(sample[order], starts)  # a centre that is nearest to none stays
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return centres


def _coarse(centres: np.ndarray) -> faiss.Index:
    """Finds the nearest of many centres (c,W): by 4-bit codes, the best ones put in order by the centres themselves.

    Exact search would read all centres for each query; a graph (HNSW) misses cells for good where centres have little
    order among themselves.
    """
    width = centres.shape[1]
    codes = next(m for m in range(max(width // 2, 1), 0, -1) if width % m == 0)
    index = faiss.IndexRefineFlat(faiss.IndexPQFastScan(width, codes, 4, faiss.METRIC_INNER_PRODUCT))
    index.k_factor = 8
    index.train(centres)
    index.add(centres)
    return index


def _on_gpu(index: faiss.Index) -> faiss.Index:
    """A copy on the first GPU; what finds its cells may stay here."""
    options = faiss.GpuClonerOptions()
    options.allowCpuCoarseQuantizer = True
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def _rows(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.atleast_2d(values), np.float32)
