"""The nearest clips of every clip, as training uses them: computed once, kept up to date, stored.

A clip's neighbours are never cut from its own source, nor do they have nearly its caption, if so asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rich.progress import track

from motionrag.retrieval.index import CaptionIndex, Fetch, exact_search

#: One stored neighbour: the clip's number (-1: there is none) and its score.
NEIGHBOUR = np.dtype([("number", "<i4"), ("score", "<f4")])

#: So many clips are done in a few seconds, without a progress bar.
SHORT = 20_000


@dataclass
class Captions:
    """The caption embeddings of all clips, as neighbours are searched in.

    numbers: (n,) int64, rising. groups: (n,) int64, equal for clips of one source. near_duplicate: captions
    whose cosine reaches it count as the same, so that their clips are no neighbours; None: only sources do.
    """

    index: CaptionIndex
    fetch: Fetch
    numbers: np.ndarray
    groups: np.ndarray
    near_duplicate: float | None = None

    def group(self, numbers: np.ndarray) -> np.ndarray:
        """Groups of clip numbers, any shape."""
        return self.groups[np.searchsorted(self.numbers, numbers)]

    def banned(self, own: np.ndarray, others: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Which of ``others`` (B,c) groups with ``scores`` (B,c) are no neighbours of clips of groups ``own`` (B,)."""
        same = others == own[:, None]
        # rounding must not tell apart what is the same
        return same if self.near_duplicate is None else same | (scores >= self.near_duplicate - 1e-6)


def nearest(captions: Captions, numbers: np.ndarray, k: int) -> np.ndarray:
    """The ``k`` nearest neighbours of clips ``numbers`` (m,): NEIGHBOUR (m,k), best first, -1 where there are no more."""
    result = np.full((len(numbers), k), np.array((-1, -np.inf), NEIGHBOUR))
    blocks = range(0, len(numbers), 1024)
    for start in track(blocks, description="nearest clips", disable=len(numbers) < SHORT):
        queries = captions.fetch(numbers[start : start + 1024])
        own = captions.group(numbers[start : start + 1024])
        pending = np.arange(len(queries))
        for wanted in (2 * k + 8, 16 * k + 64):  # most clips have few of their own source around them
            if not len(pending) or wanted > len(captions.numbers):
                break
            found, scores = captions.index.search(queries[pending], wanted)
            bad = (found < 0) | captions.banned(own[pending], captions.group(found.clip(0)), scores)
            order = np.argsort(bad, axis=1, kind="stable")[:, :k]
            enough = (~bad).sum(1) >= k
            rows = start + pending[enough]
            result["number"][rows] = np.take_along_axis(found, order, 1)[enough]
            result["score"][rows] = np.take_along_axis(scores, order, 1)[enough]
            pending = pending[~enough]
        for few in np.array_split(pending, -(-len(pending) // 64)) if len(pending) else []:
            result["number"][start + few], result["score"][start + few] = exact_search(
                queries[few],
                captions.numbers,
                captions.fetch,
                k,
                lambda places, scores, own=own[few]: captions.banned(
                    own, captions.groups[places][None], scores
                ),
            )
    return result


def updated(
    captions: Captions, numbers: np.ndarray, table: np.ndarray, gone: np.ndarray, new: np.ndarray
) -> np.ndarray:
    """``table`` NEIGHBOUR (m,k) of clips ``numbers`` (m,), once clips ``gone`` (g,) have gone and ``new`` (c,) come.

    Clips that lose a neighbour are searched for again; to the others, each new clip is compared.
    """
    table = table.copy()
    hit = np.isin(table["number"], gone).any(1)
    table[hit] = nearest(captions, numbers[hit], table.shape[1])
    table[~hit] = _with_new(captions, numbers[~hit], table[~hit], new)
    return table


def _with_new(captions: Captions, numbers: np.ndarray, table: np.ndarray, new: np.ndarray) -> np.ndarray:
    k = table.shape[1]
    for at in range(0, len(new), 4096):
        block = new[at : at + 4096]
        embeddings, groups = captions.fetch(block), captions.group(block)
        for start in range(0, len(numbers), 1024):
            rows = slice(start, start + 1024)
            scores = captions.fetch(numbers[rows]) @ embeddings.T
            scores[captions.banned(captions.group(numbers[rows]), groups[None], scores)] = -np.inf
            both = np.concatenate(
                [table["number"][rows], np.where(np.isneginf(scores), -1, block).astype(np.int32)], 1
            )
            scores = np.concatenate([table["score"][rows], scores], 1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            table["number"][rows] = np.take_along_axis(both, order, 1)
            table["score"][rows] = np.take_along_axis(scores, order, 1)
    return table
