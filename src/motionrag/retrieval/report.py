"""How well a database serves as its own references: labels, hubs, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.retrievers import OracleRetriever, Retriever

#: Cosine of two captions that say the same in nearly the same words.
ALIKE = 0.95


def assess(
    db: RetrievalDatabase,
    retriever: Retriever,
    label: str,
    k: int,
    queries: int,
    track: Callable[[Sequence[str]], Any] = iter,
) -> tuple[dict[str, Any], dict[str, tuple[list[str], np.ndarray]]]:
    """Ask for ``k`` references of clips of the database as if they were new: numbers, and what was found by id.

    A clip is asked for by its motion caption and first frame (the oracle by its motion); clips of its source are left
    out. label: column that says which clips show the same. Asked are up to ``queries`` clips, chosen by a fixed seed, whose label
    a clip of another source has too. For j up to k, over all queries:

    - ``recall@j``: share with at least one clip of their label among the first j; ``precision@j``: mean share
      of clips of their label there; ``chance``: precision of random clips.
    - ``hubness``: skewness of how often a clip is found (0: evenly; above 3 a few clips are everywhere),
      ``most_found`` and ``never_found`` (share of clips).
    - ``same_caption``: share of clips whose motion caption another clip has word for word; ``alike``: share of
      the references found with captions of cosine 0.95 or more.

    Raises :class:`MotionRAGError` for an unknown column, one that no two sources share, or too large a ``k``.
    """
    labels, sources = db.column(label), db.column("source")
    of_label = Counter(labels)
    own = Counter(zip(labels, sources, strict=True))
    of_source = Counter(sources)
    pairs = list(zip(labels, sources, strict=True))
    able = [
        row
        for row, (name, source) in enumerate(pairs)
        if name is not None and of_label[name] > own[name, source]
    ]
    if not able:
        raise MotionRAGError(
            f"label={label}: no two sources of {db.path} share a value of it; take another column"
        )
    rows = np.sort(np.random.default_rng(0).permutation(able)[:queries]).tolist()
    found: dict[str, tuple[list[str], np.ndarray]] = {}
    right = np.zeros((len(rows), k), bool)
    alike = np.zeros((len(rows), k), bool)
    for line, clip_id in enumerate(track([db.ids[row] for row in rows])):
        image = db.appearance_features([clip_id])[0]
        oracle = isinstance(retriever, OracleRetriever)
        query = db.motion_features([clip_id])[0] if oracle else db.motion_caption(clip_id)
        ids, scores = retriever.retrieve(query, k, db.same_source(clip_id), image)
        found[clip_id] = ids, scores
        right[line] = [labels[db.row(other)] == labels[rows[line]] for other in ids]
        alike[line] = db.caption_vectors(ids) @ db.caption_vectors([clip_id])[0] >= ALIKE
    chance = [(of_label[labels[row]] - own[pairs[row]]) / (len(db) - of_source[sources[row]]) for row in rows]
    counts = np.zeros(len(db))
    for ids, _ in found.values():
        counts[[db.row(clip_id) for clip_id in ids]] += 1
    spread = counts.std()
    captions = Counter(" ".join(db.motion_caption(clip_id).lower().split()) for clip_id in db.ids)
    steps = [j for j in (1, 3, 5, 9, k) if j <= k]
    numbers: dict[str, Any] = {
        "label": label,
        "clips": len(db),
        "queries": len(rows),
        "labels": len({labels[row] for row in rows}),
        **{f"recall@{j}": float(right[:, :j].any(1).mean()) for j in steps},
        **{f"precision@{j}": float(right[:, :j].mean()) for j in steps},
        "chance": float(np.mean(chance)),
        "hubness": float((((counts - counts.mean()) / spread) ** 3).mean()) if spread else 0.0,
        "most_found": db.ids[int(counts.argmax())],
        "most_found_times": int(counts.max()),
        "never_found": float((counts == 0).mean()),
        "same_caption": sum(count for count in captions.values() if count > 1) / len(db),
        "alike": float(alike.mean()),
    }
    return numbers, found
