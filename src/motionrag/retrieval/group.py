"""Several databases side by side: searched and read as one, nothing copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from motionrag.errors import MotionRAGError
from motionrag.retrieval import catalog
from motionrag.retrieval.bank import Part
from motionrag.retrieval.changes import check_same_encoders
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.index import CaptionIndex


def open_database(db: str | Path | Sequence[str | Path], mmap: bool = True) -> RetrievalDatabase:
    """A database, or a group of those named in a list. Raises :class:`MotionRAGError`."""
    paths = [str(path) for path in db] if isinstance(db, Sequence) and not isinstance(db, str) else [str(db)]
    if not paths:
        raise MotionRAGError("db=[]: expected a retrieval database, or several: db=[A,B]")
    return DatabaseGroup(paths, mmap) if len(paths) > 1 else RetrievalDatabase(paths[0], mmap)


class DatabaseGroup(RetrievalDatabase):
    """Databases made with the same encoders, whose clips have different ids.

    Has no neighbours: to train, merge them (``motionrag index merge``). Raises :class:`MotionRAGError` if encoders
    differ or an id comes twice.
    """

    def __init__(self, paths: Sequence[str | Path], mmap: bool = True) -> None:
        self.members = [RetrievalDatabase(path, mmap) for path in paths]
        first = self.members[0]
        for other in self.members[1:]:
            check_same_encoders(first.path, first.manifest, other.path, other.manifest)
        self.paths, self.mmap = list(paths), mmap
        self.path = Path(" + ".join(str(path) for path in paths))  # for messages
        parts = [part for member in self.members for part in member.manifest["parts"]]
        self.manifest = {**first.manifest, "parts": parts, "clips": sum(map(len, self.members))}
        ends = [int(member._numbers[-1]) + 1 for member in self.members]
        self._offsets = np.cumsum([0, *ends[:-1]])
        pairs = list(zip(self.members, self._offsets, strict=True))
        self._starts = np.concatenate([member._starts + offset for member, offset in pairs])
        self._places = [(m, part) for m in self.members for part in range(len(m._starts))]
        self._clips = pa.concat_tables(
            [m._clips.set_column(0, catalog.NUMBER, pa.array(m._numbers + offset)) for m, offset in pairs],
            promote_options="default",
        )
        self._numbers = self._clips[catalog.NUMBER].to_numpy()
        twice, count = Counter(self.ids).most_common(1)[0]
        if count > 1:
            raise MotionRAGError(
                f"clip '{twice}' is in {count} of the databases {self.path}; use one of them"
            )

    def __reduce__(self) -> tuple:
        return type(self), (self.paths, self.mmap)

    def _part(self, part: int) -> Part:
        member, own = self._places[part]
        return member._part(own)

    @cached_property
    def index(self) -> _JointIndex:
        """The members' indexes."""
        return _JointIndex([member.index for member in self.members], self._offsets)

    def neighbours(self, clip_id: str, k: int) -> list[str]:
        raise MotionRAGError(
            f"{self.path}: databases side by side keep no neighbours; motionrag index merge makes one of them"
        )


class _JointIndex:
    """Searches every index and keeps the best; member ``i`` has the numbers from ``offsets[i]`` on."""

    def __init__(self, members: Sequence[CaptionIndex], offsets: np.ndarray) -> None:
        self.members, self.offsets = members, offsets

    def search(
        self,
        queries: np.ndarray,
        k: int,
        excluded: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`CaptionIndex.search`."""
        found, best = [], []
        for i, member in enumerate(self.members):
            start = self.offsets[i]
            end = self.offsets[i + 1] if i + 1 < len(self.members) else np.iinfo(np.int64).max
            own = None if excluded is None else excluded[(excluded >= start) & (excluded < end)] - start
            may = None if allowed is None else allowed[start:end]
            numbers, scores = member.search(queries, k, own, may)
            found.append(np.where(numbers < 0, -1, numbers + start))
            best.append(np.where(numbers < 0, -np.inf, scores).astype(np.float32))
        numbers, scores = np.concatenate(found, 1), np.concatenate(best, 1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(numbers, order, 1), np.take_along_axis(scores, order, 1)
