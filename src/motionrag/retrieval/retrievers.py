"""Ways to choose reference clips: by text, by picture, by both, at random, or by the true motion (an upper bound).

All answer ``retrieve(query, k, exclude, image)`` with ids, nearest first, and scores (k,) float32, falling. All
take ``where``, conditions that reference clips must meet (see ``RetrievalDatabase.where``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import normalize

from motionrag.encoders import AppearanceEncoder, CaptionEncoder
from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase, Where
from motionrag.retrieval.index import exact_search

Query = str | np.ndarray | torch.Tensor
#: For each clip asked for, so many are weighed against one another for diversity.
WEIGHED = 5
#: Captions whose words a late-interaction retriever remembers (about 15 kB each with MiniLM).
REMEMBERED = 10_000


class Retriever(Protocol):
    """query: the wanted motion as a text or its embedding (W,). image: the input picture (3,H,W) or (1,3,H,W) in
    [-1, 1], or its appearance features (M,E); those who do not look at it ignore it. exclude: ids not to find.

    ``retrieve`` raises :class:`MotionRAGError` if fewer than ``k`` clips are left: never a blank.
    """

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]: ...


class TextRetriever:
    """The clips whose motion captions are nearest to the query in meaning.

    query: a text, or its embedding (W,) of length 1; scores are cosines. diversity: 0..1; above 0, clips like
    those already chosen give way to others (maximal marginal relevance, Carbonell and Goldstein 1998: the next
    clip has the largest (1 - diversity) * score - diversity * likeness to the chosen ones). Raises
    :class:`MotionRAGError` if the database was indexed with another caption encoder.
    """

    def __init__(
        self, db: RetrievalDatabase, encoder: CaptionEncoder, where: Where = None, diversity: float = 0.0
    ) -> None:
        db.check_encoders({"caption": encoder})
        if not 0 <= diversity <= 1:
            raise MotionRAGError(f"diversity={diversity}: expected a number from 0 (none) to 1")
        self.db, self.encoder, self.where, self.diversity = db, encoder, where, diversity

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]:
        embedding = _array(self.encoder.encode([query])[0] if isinstance(query, str) else query)
        if not self.diversity:
            return self.db.search(embedding, k, exclude, self.where)[0]
        count = min(WEIGHED * k, self.db.left(k, exclude, self.where))
        ids, scores = self.db.search(embedding, count, exclude, self.where)[0]
        rows = diverse(self.db.caption_vectors(ids), scores, k, self.diversity)
        return [ids[row] for row in rows], scores[rows]


class LateInteractionRetriever:
    """Of the ``pool`` clips nearest in meaning, those whose motion captions hold each word of the query best.

    One embedding of a sentence hardly tells "to the left" from "to the right"; those of its words, read in context,
    do. The score is the mean over the query's words of the largest cosine with a word of the caption (late
    interaction, Khattab and Zaharia 2020, with the words of an encoder that was not trained for it: so the pool's
    mean word is taken off first). query: a text. Words of captions are encoded when first met and remembered. A pool
    smaller than ``k`` is one of ``k``. Raises :class:`MotionRAGError` as :class:`TextRetriever`, and if asked with
    an embedding or a text without words.
    """

    def __init__(
        self, db: RetrievalDatabase, encoder: CaptionEncoder, pool: int = 100, where: Where = None
    ) -> None:
        self.nearest, self.words = TextRetriever(db, encoder, where), encoder.words
        self.db, self.pool, self.where = db, pool, where
        self._known: dict[str, torch.Tensor] = {}

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]:
        words = self.words([query])[0] if isinstance(query, str) else ()
        if not len(words):
            got = "one without words" if isinstance(query, str) else "an embedding"
            raise MotionRAGError(f"late interaction compares words: expected a text as query, got {got}")
        count = min(max(self.pool, k), self.db.left(k, exclude, self.where))
        ids, _ = self.nearest.retrieve(query, count, exclude)
        captions = [self.db.motion_caption(clip_id) for clip_id in ids]
        distinct = list(dict.fromkeys(captions))
        alike = dict(zip(distinct, _late_interaction(words, self._read(distinct)), strict=True))
        scores = np.array([alike[caption] for caption in captions], dtype=np.float32)
        order = np.argsort(-scores, kind="stable")[:k]
        return [ids[row] for row in order], scores[order]

    def _read(self, captions: list[str]) -> list[torch.Tensor]:
        if len(self._known) > REMEMBERED:
            self._known.clear()
        if new := [caption for caption in captions if caption not in self._known]:
            self._known.update(zip(new, self.words(new), strict=True))
        return [self._known[caption] for caption in captions]


class ImageRetriever:
    """The clips whose first frames look most like the image; the query is ignored.

    Scores are cosines of the appearance encoder's class tokens, those of all clips being kept in memory (4 kB
    each at full size). Raises :class:`MotionRAGError` if the database was encoded by another appearance encoder.
    """

    def __init__(self, db: RetrievalDatabase, appearance: AppearanceEncoder, where: Where = None) -> None:
        db.check_encoders({"appearance": appearance})
        self.db, self.appearance, self.where = db, appearance, where

    @cached_property
    def _looks(self) -> np.ndarray:
        return _directions(self.db.class_tokens(self.db.ids))

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]:
        rows = self.db.candidates(k, exclude, self.where)
        look = class_token(self.appearance, image)
        found, scores = exact_search(look, rows, lambda block: self._looks[block], k)
        return [self.db.ids[row] for row in found[0]], scores[0]


class TextImageRetriever:
    """Of the ``pool`` clips nearest in meaning, those whose first frames look most like the image.

    Scores are the looks' (see :class:`ImageRetriever`). A pool smaller than ``k`` is one of ``k``.
    """

    def __init__(
        self,
        db: RetrievalDatabase,
        encoder: CaptionEncoder,
        appearance: AppearanceEncoder,
        pool: int = 50,
        where: Where = None,
    ) -> None:
        db.check_encoders({"appearance": appearance})
        self.db, self.appearance, self.pool, self.where = db, appearance, pool, where
        self.text = TextRetriever(db, encoder, where)

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]:
        look = class_token(self.appearance, image)
        count = min(max(self.pool, k), self.db.left(k, exclude, self.where))
        ids, _ = self.text.retrieve(query, count, exclude)
        scores = _directions(self.db.class_tokens(ids)) @ look
        order = np.argsort(-scores, kind="stable")[:k]
        return [ids[row] for row in order], scores[order].astype(np.float32)


class RandomRetriever:
    """Any clips: what references are worth that have nothing to do with the query.

    The same query and seed give the same clips. Scores are 0.
    """

    def __init__(self, db: RetrievalDatabase, seed: int = 0, where: Where = None) -> None:
        self.db, self.seed, self.where = db, seed, where

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]:
        rows = self.db.candidates(k, exclude, self.where)
        data = query.encode() if isinstance(query, str) else _array(query).tobytes()
        words = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.uint32).tolist()
        chosen = np.random.default_rng([self.seed, *words]).permutation(len(rows))[:k]
        return [self.db.ids[rows[i]] for i in chosen], np.zeros(k, dtype=np.float32)


class OracleRetriever:
    """The clips that truly move most alike: what retrieval could do if captions said everything.

    query: motion features (N,D) of the true clip, which no user has. Scores are cosines of features averaged
    over tokens, after the database's mean is taken off.
    """

    def __init__(self, db: RetrievalDatabase, where: Where = None) -> None:
        self.db, self.where = db, where

    @cached_property
    def _pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) over the database, and every clip's direction from it (n,D)."""
        pooled = np.stack([self.db.motion_features([clip_id])[0].mean(0).numpy() for clip_id in self.db.ids])
        mean = pooled.mean(0)
        return mean, _directions(pooled - mean)

    def retrieve(
        self, query: Query, k: int, exclude: Set[str] = frozenset(), image: torch.Tensor | None = None
    ) -> tuple[list[str], np.ndarray]:
        features = None if isinstance(query, str) else _array(query)
        if features is None or list(features.shape) != self.db.manifest["shapes"]["motion"]:
            got = "a text" if features is None else str(features.shape)
            raise MotionRAGError(
                f"the oracle retriever is asked with motion features {self.db.manifest['shapes']['motion']} of "
                f"the true clip, got {got}; it serves evaluate, and the report "
                "(motionrag retrieve db=DB label=COLUMN)"
            )
        rows = self.db.candidates(k, exclude, self.where)
        mean, directions = self._pooled
        query_direction = _directions(features.mean(0) - mean)
        found, scores = exact_search(query_direction, rows, lambda block: directions[block], k)
        return [self.db.ids[row] for row in found[0]], scores[0]


def class_token(encoder: AppearanceEncoder, image: torch.Tensor | None) -> np.ndarray:
    """Direction (E,) of an image's class token; the image as a picture or as features (M,E), see :class:`Retriever`.

    Raises :class:`MotionRAGError` if there is none.
    """
    if image is None:
        raise MotionRAGError("this retriever looks at the input picture and got none; give image=FILE")
    features = image if image.ndim == 2 else encoder(image.reshape(1, *image.shape[-3:]))[0]
    return _directions(_array(features)[0])


def _late_interaction(query: torch.Tensor, captions: list[torch.Tensor]) -> list[float]:
    """For each caption, words (L,D), the mean over the query's words (Q,D) of the largest cosine, without the mean word;
    -1 for a caption without words."""
    lengths = [len(words) for words in captions]
    words = torch.cat(captions)
    mean = words.mean(0)
    likeness = normalize(query - mean, dim=1) @ normalize(words - mean, dim=1).T
    return [float(part.amax(1).mean()) if part.shape[1] else -1.0 for part in likeness.split(lengths, dim=1)]


def diverse(embeddings: np.ndarray, scores: np.ndarray, k: int, diversity: float) -> list[int]:
    """Which ``k`` of candidates to take by maximal marginal relevance, in falling order of score.

    embeddings: (c,W) of length 1; scores: (c,), falling.
    """
    chosen = [0]
    likeness = embeddings @ embeddings[0]
    while len(chosen) < k:
        gain = (1 - diversity) * scores - diversity * likeness
        gain[chosen] = -np.inf
        chosen.append(int(np.argmax(gain)))
        likeness = np.maximum(likeness, embeddings @ embeddings[chosen[-1]])
    return sorted(chosen)


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return torch.as_tensor(values).detach().float().cpu().numpy()


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
