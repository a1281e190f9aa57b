"""What is compared: the backbone alone, with retrieved motion, and the controls, all from the same noise."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from motionrag.backbones.base import Backbone
from motionrag.errors import MotionRAGError
from motionrag.evaluation.split import TestClips
from motionrag.generate import MotionRAG
from motionrag.modules.fusion import Fusion, fuse_references
from motionrag.retrieval.database import RetrievalDatabase, Where
from motionrag.retrieval.retrievers import OracleRetriever, Query, RandomRetriever, Retriever

CONDITIONS = (
    "backbone", "finetuned", "motionrag", "mean", "fusion", "random", "oracle", "known_only", "still",
)  # fmt: skip
#: Of reference clips: the nearest first, the farthest first, or as a number made of the test clip's id shuffles them.
ORDERS = ("nearest", "farthest", "random")
#: Stages whose time is kept; a condition's seconds per clip are the sum of those it goes through.
STAGES = ("context", "retrieval", "cama", "sampling")


class References:
    """Finds the reference clips of a test clip; never clips of its own source.

    query: field of the test clip, or column of its table, that the database is searched with. without: clips that
    the condition `known_only` leaves out (see `RetrievalDatabase.where`). Conditions on clips that the retriever has
    hold for random references too. order: how CAMA gets them, one of ORDERS; it was trained with the nearest first,
    which puts that next to the target.
    """

    def __init__(
        self,
        db: RetrievalDatabase,
        retriever: Retriever,
        k: int,
        query: str = "motion_caption",
        without: Where = None,
        order: str = "nearest",
    ):
        if order not in ORDERS:
            raise MotionRAGError(f"order={order}: choose from {', '.join(ORDERS)}")
        self.db, self.retriever, self.k, self.query, self.without = db, retriever, k, query, without
        self.order = order

    @cached_property
    def left_out(self) -> set[str]:
        """Clips that `known_only` must not find."""
        if not self.without:
            raise MotionRAGError("known_only needs without=CONDITION, the clips to leave out of the database")
        return set(self.db.where(self.without))

    @cached_property
    def _by_source(self) -> dict[str, set[str]]:
        groups: dict[str, set[str]] = {}
        for clip_id, source in zip(self.db.ids, self.db.column("source"), strict=True):
            groups.setdefault(source, set()).add(clip_id)
        return groups

    def queries(self, clips: Sequence[Mapping[str, Any]]) -> list[Query]:
        """What the database is searched with for each clip: an embedding where the retriever reads text, else the text.

        Raises MotionRAGError if a clip lacks it.
        """
        texts = [self._text(clip) for clip in clips]
        encoder = getattr(self.retriever, "encoder", None) or getattr(
            getattr(self.retriever, "text", None), "encoder", None
        )
        return list(encoder.encode(texts)) if encoder else texts

    def _text(self, clip: Mapping[str, Any]) -> str:
        text = clip.get(self.query) or clip.get("metadata", {}).get(self.query)
        if not text:
            raise MotionRAGError(
                f"test clip '{clip['id']}' has no {self.query} to search with; pack the clips with that column, or "
                "set query=motion_caption"
            )
        return str(text)

    def __call__(
        self,
        clip: Mapping[str, Any],
        condition: str,
        seed: int = 0,
        image: Tensor | None = None,
        query: Query | None = None,
    ) -> tuple[list[str], np.ndarray]:
        """Ids and scores, in `order`. image: first frame (3, H, W), for retrievers that look at it. query: one of
        `queries`, if they were made already.

        Raises MotionRAGError if the clip lacks the query or fewer than k clips are left.
        """
        own: Collection[str] = self._by_source.get(clip["source"], set())
        if condition == "random":
            where = getattr(self.retriever, "where", None)
            return RandomRetriever(self.db, seed, where).retrieve(self._text(clip), self.k, set(own))
        left_out = self.left_out if condition == "known_only" else set()
        query = self.queries([clip])[0] if query is None else query
        ids, scores = self.retriever.retrieve(query, self.k, set(own) | left_out, image)
        if self.order == "nearest":
            return ids, scores
        rows = np.arange(len(ids))[::-1]
        if self.order == "random":
            rows = np.random.default_rng(clip_seed(0, clip["id"])).permutation(len(ids))
        return [ids[row] for row in rows], scores[rows]


def clip_seed(seed: int, clip_id: str) -> int:
    """A 63-bit seed for one clip: its noise is the same in every condition, batch and process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{clip_id}".encode()).digest()[:8], "big") >> 1


class Generation:
    """Videos of a few test clips under any condition and seed.

    What conditions and seeds share (contexts, references, their tokens, what CAMA makes of them) is computed when
    first needed and kept. Its time is charged to every condition that uses it, as if each had computed it.

    fusion: how the condition of that name merges the references' features. finetuned: the backbone of the condition of
    that name; it gets the contexts of the model's own. steps, guidance, motion_scale: see `MotionRAG.generate`.
    """

    def __init__(
        self,
        model: MotionRAG,
        find: References,
        clips: TestClips,
        fusion: Fusion = "mean",
        finetuned: Backbone | None = None,
        **sampling: float,
    ):
        self.model, self.find, self.clips, self.fusion, self.sampling = model, find, clips, fusion, sampling
        self.finetuned = finetuned
        self.image = clips.truth[:, 0]
        self._kept: dict[tuple, tuple[Any, float]] = {}

    def video(self, condition: str, seed: int) -> tuple[Tensor, dict[str, float]]:
        """Videos (B, T, 3, H, W) in [-1, 1], and seconds per clip of each stage."""
        if condition == "still":
            return self.clips.truth[:, :1].expand_as(self.clips.truth), {}
        seconds = {}
        contexts, seconds["context"] = self._once(
            ("context",), lambda: self.model.encode_contexts(self.clips.captions, self.image)
        )
        seeds = [clip_seed(seed, clip_id) for clip_id in self.clips.ids]
        if condition == "finetuned":
            sampling = {key: value for key, value in self.sampling.items() if key != "motion_scale"}
            video, seconds["sampling"] = self._timed(
                lambda: self.finetuned.sample(self.image, *contexts, seeds=seeds, **sampling).cpu()
            )
            return video, seconds
        tokens = None
        if condition != "backbone":
            tokens, seconds["cama"] = self._tokens(condition, seed)
        if condition not in ("backbone", "oracle"):
            seconds["retrieval"] = self._references(condition, seed)[1]
        video, seconds["sampling"] = self._timed(
            lambda: self.model.generate(
                self.image, self.clips.captions, tokens, contexts=contexts, seeds=seeds, **self.sampling
            )
        )
        return video, seconds

    def tokens(self, condition: str, seed: int) -> Tensor:
        """The motion tokens (B, l, d) that the condition injects."""
        return self._tokens(condition, seed)[0]

    def _tokens(self, condition: str, seed: int) -> tuple[Tensor, float]:
        key = ("tokens", condition, seed if condition == "random" else None)
        if condition == "oracle":
            return self._once(key, lambda: self.output_tokens(self.clips.truth))
        found = self.references(condition, seed)
        ids = [row for row, _ in found]

        def adapt() -> Tensor:
            if condition == "fusion":
                motion = torch.stack([self.find.db.motion_features(row) for row in ids])
                distances = 1 - torch.from_numpy(np.stack([scores for _, scores in found]))
                return self.model.motion_tokens(fuse_references(motion, self.fusion, distances))
            tokens, appearance = self.model.read_references(self.find.db, ids)
            return (
                tokens.mean(1)
                if condition == "mean"
                else self.model.adapt_tokens(tokens, appearance, self.image)
            )

        return self._once(key, adapt)

    def output_tokens(self, video: Tensor) -> Tensor:
        """Motion tokens (B, l, d) of videos (B, T, 3, H, W)."""
        return self.model.motion_tokens(self.model.motion_encoder(video))

    def references(self, condition: str, seed: int) -> list[tuple[list[str], np.ndarray]]:
        """References of each clip, nearest first: ids and scores."""
        return self._references(condition, seed)[0]

    def _references(self, condition: str, seed: int) -> tuple[list[tuple[list[str], np.ndarray]], float]:
        found = condition if condition in ("random", "known_only") else "nearest"
        key = ("references", found, seed if found == "random" else None)
        records, before = self.clips.records, 0.0
        queries: Sequence[Query | None] = [None] * len(records)
        if found != "random":
            queries, before = self._once(("queries",), self._queries)
        rows = zip(records, self.image, queries, strict=True)
        result, seconds = self._once(
            key, lambda: [self.find(clip, condition, seed, image, query) for clip, image, query in rows]
        )
        return result, before + seconds

    def _queries(self) -> Sequence[Query]:
        if isinstance(self.find.retriever, OracleRetriever):
            return list(self.model.motion_encoder(self.clips.truth))
        return self.find.queries(self.clips.records)

    def _once(self, key: tuple, make: Callable[[], Any]) -> tuple[Any, float]:
        if key not in self._kept:
            self._kept[key] = self._timed(make)
        return self._kept[key]

    def _timed(self, make: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        value = make()
        if self.model.device.type == "cuda":  # else what is still at work is charged to the next stage
            torch.cuda.synchronize(self.model.device)
        return value, (time.perf_counter() - start) / len(self.clips.records)


def warm_up(generation: Generation, conditions: Collection[str]) -> None:
    """Do once what is only needed once (index, encoders' first call, null tokens), so that it is not timed.

    generation: of the first clips, one of which goes through a single step of the conditions that are timed.
    """
    clips, sampling = generation.clips, generation.sampling
    first = Generation(
        generation.model, generation.find, TestClips(clips.domain, clips.records[:1], clips.truth[:1]),
        finetuned=generation.finetuned, **sampling | {"steps": min(1, sampling["steps"])},
    )  # fmt: skip
    for condition in conditions:
        if condition in ("backbone", "finetuned", "motionrag"):
            first.video(condition, 0)
