"""Exact nearest neighbours of caption embeddings by inner product, with FAISS.

Search in the main process only: FAISS can hang in forked workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path


class CaptionIndex:
    """Embeddings (n,W) float32 of length 1, numbered 0..n-1."""

    def __init__(self, index: faiss.Index) -> None:
        self.index = index

    @classmethod
    def build(cls, embeddings: np.ndarray) -> CaptionIndex:
        """Index the rows of ``embeddings`` (n,W)."""
        # Ids of its own: rows can be left out of a search, and removed, without renumbering the others.
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(embeddings.shape[1]))
        index.add_with_ids(np.ascontiguousarray(embeddings, np.float32), np.arange(len(embeddings)))
        return cls(index)

    def save(self, path: str | Path) -> None:
        """Write the index in one step."""
        with atomic_path(path) as temporary:
            faiss.write_index(self.index, str(temporary))

    @classmethod
    def load(cls, path: str | Path, mmap: bool = True) -> CaptionIndex:
        """Read an index; with ``mmap`` without loading it. Raises :class:`MotionRAGError` if it cannot be."""
        flags = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if mmap else 0
        try:
            return cls(faiss.read_index(str(path), flags))
        except RuntimeError as error:
            raise MotionRAGError(
                f"{path}: missing or not a FAISS index; run motionrag index db={Path(path).parent}"
            ) from error

    def __len__(self) -> int:
        return self.index.ntotal

    @property
    def width(self) -> int:
        """``W``."""
        return self.index.d

    def search(
        self, queries: np.ndarray, k: int, excluded: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers (B,k) int64 and scores (B,k) float32, best first, of ``queries`` (B,W).

        excluded: rows that must not be found. Where fewer than k rows are left, the number is -1.
        """
        params = None
        if len(excluded):
            rows = np.asarray(list(excluded), dtype=np.int64)
            params = faiss.SearchParameters(sel=faiss.IDSelectorNot(faiss.IDSelectorBatch(rows)))
        scores, rows = self.index.search(np.ascontiguousarray(queries, np.float32), k, params=params)
        return rows, scores

    def neighbours(self, embeddings: np.ndarray, sources: Sequence[str], k: int) -> np.ndarray:
        """For every indexed clip the ``k`` nearest ones from other sources: (n,k) int32, best first.

        embeddings: (n,W), the indexed ones; sources: n names. -1 where fewer than k are left.
        """
        _, group = np.unique(np.asarray(sources), return_inverse=True)
        # No more than a whole group has to be dropped from any result.
        wanted = min(len(self), k + int(np.bincount(group).max()))
        result = np.full((len(self), k), -1, dtype=np.int32)
        for start in range(0, len(self), 1024):
            rows, _ = self.search(embeddings[start : start + 1024], wanted)
            same = group[rows] == group[start : start + len(rows), None]
            order = np.argsort(same, axis=1, kind="stable")[:, :k]  # others first, nearest first
            found = np.where(np.take_along_axis(same, order, 1), -1, np.take_along_axis(rows, order, 1))
            result[start : start + len(rows), : found.shape[1]] = found
        return result
