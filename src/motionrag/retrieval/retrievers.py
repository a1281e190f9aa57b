"""Ways to choose reference clips: by text, at random, or by the true motion (an upper bound).

All answer ``retrieve(query, k, exclude)`` with ids, nearest first, and scores (k,) float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from motionrag.encoders import CaptionEncoder
from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase, check_depth

Query = str | np.ndarray | torch.Tensor


class Retriever(Protocol):
    """``retrieve`` raises :class:`MotionRAGError` if fewer than ``k`` clips are left: never a blank."""

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset()
    ) -> tuple[list[str], np.ndarray]: ...


class TextRetriever:
    """The clips whose motion captions are nearest to the query in meaning.

    query: a text, or its embedding (W,) of length 1; scores are cosines. Raises :class:`MotionRAGError` if
    the database was indexed with another caption encoder.
    """

    def __init__(self, db: RetrievalDatabase, encoder: CaptionEncoder) -> None:
        db.check_encoders({"caption": encoder})
        self.db, self.encoder = db, encoder

    def retrieve(self, query: Query, k: int, exclude: Set[str] = frozenset()) -> tuple[list[str], np.ndarray]:
        embedding = self.encoder.encode([query])[0] if isinstance(query, str) else query
        return self.db.search(_array(embedding), k, exclude)[0]


class RandomRetriever:
    """Any clips: what references are worth that have nothing to do with the query.

    The same query and seed give the same clips. Scores are 0.
    """

    def __init__(self, db: RetrievalDatabase, seed: int = 0) -> None:
        self.db, self.seed = db, seed

    def retrieve(self, query: Query, k: int, exclude: Set[str] = frozenset()) -> tuple[list[str], np.ndarray]:
        check_depth(self.db, k, sum(clip_id in self.db for clip_id in exclude))
        data = query.encode() if isinstance(query, str) else _array(query).tobytes()
        words = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint32).tolist()
        left = [clip_id for clip_id in self.db.ids if clip_id not in exclude]
        chosen = np.random.default_rng([self.seed, *words]).permutation(len(left))[:k]
        return [left[i] for i in chosen], np.zeros(k, dtype=np.float32)


class OracleRetriever:
    """The clips that truly move most alike: what retrieval could do if captions said everything.

    query: motion features (N,D) of the true clip, which no user has. Scores are cosines of features averaged
    over tokens, after the database's mean is taken off.
    """

    def __init__(self, db: RetrievalDatabase) -> None:
        self.db = db

    @cached_property
    def _pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) over the database, and every clip's direction from it (n,D)."""
        pooled = np.stack([self.db.motion_features([clip_id])[0].mean(0).numpy() for clip_id in self.db.ids])
        mean = pooled.mean(0)
        return mean, _directions(pooled - mean)

    def retrieve(self, query: Query, k: int, exclude: Set[str] = frozenset()) -> tuple[list[str], np.ndarray]:
        features = None if isinstance(query, str) else _array(query)
        if features is None or list(features.shape) != self.db.manifest["shapes"]["motion"]:
            got = "a text" if features is None else str(features.shape)
            raise MotionRAGError(
                f"the oracle retriever is asked with motion features {self.db.manifest['shapes']['motion']} of "
                f"the true clip, got {got}"
            )
        check_depth(self.db, k, sum(clip_id in self.db for clip_id in exclude))
        mean, directions = self._pooled
        scores = directions @ _directions(features.mean(0) - mean)
        order = [row for row in np.argsort(-scores, kind="stable") if self.db.ids[row] not in exclude][:k]
        return [self.db.ids[row] for row in order], scores[order].astype(np.float32)


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return torch.as_tensor(values).detach().float().cpu().numpy()


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
