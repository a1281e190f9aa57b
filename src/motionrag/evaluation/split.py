"""Test clips out of shards, a few at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from motionrag.backbones.base import Backbone
from motionrag.data.shards import ClipRecord, ShardIndex, read_shard
from motionrag.data.stream import Shards
from motionrag.data.video import UnreadableVideo, read_clip
from motionrag.errors import MotionRAGError
from motionrag.generate import fit, to_float
from motionrag.retrieval import catalog


@dataclass
class TestClips:
    """B test clips of one domain.

    records: what the shards say about each (id, caption, motion_caption, source, action, ..., metadata).
    truth: the clips themselves, (B, T, 3, H, W) in [-1, 1], at the backbone's size and rate.
    notes: "id: note" of clips that are damaged or too short, of which frames repeat.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    domain: str
    records: list[dict[str, Any]]
    truth: Tensor
    notes: list[str] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        return [record["id"] for record in self.records]

    @property
    def captions(self) -> list[str]:
        return [record["caption"] for record in self.records]


def count_split(shards: str | Path, limit: int | None) -> Counter[str]:
    """Domain -> how many clips `read_split` gives of it, from the clip table alone."""
    table = Shards(shards).table
    counts = Counter(_domain(catalog.record(table, row)["metadata"]) for row in range(len(table)))
    return counts if limit is None else Counter({name: min(n, limit) for name, n in counts.items()})


def read_split(
    shards: str | Path, backbone: Backbone, limit: int | None, batch_size: int
) -> Iterator[TestClips]:
    """Batches of at most `batch_size` clips of one domain ("all" where the table had no such column).

    limit: clips of each domain; None: all. Only a batch is ever in memory. Raises MotionRAGError if the folder holds
    no shards or no clip, a shard is not as it was packed, or a clip cannot be read.
    """
    waiting: dict[str, list[tuple[ClipRecord, Tensor, str]]] = {}
    counts: dict[str, int] = {}
    index = ShardIndex.open(shards)
    for shard in index.shards:
        for record, data in read_shard(index.verify(shard)):
            domain = _domain(record.metadata)
            if limit is not None and counts.get(domain, 0) >= limit:
                continue
            counts[domain] = counts.get(domain, 0) + 1
            try:
                clip = read_clip(
                    data, record.start_sec, record.end_sec, frames=backbone.frames, fps=backbone.fps
                )
            except UnreadableVideo as error:
                raise MotionRAGError(f"test clip {record.id} of {shards}: {error.reason}") from error
            video = fit(to_float(clip.frames), backbone.height, backbone.width)
            waiting.setdefault(domain, []).append((record, video, clip.note))
            if len(waiting[domain]) == batch_size:
                yield _batch(domain, waiting[domain])
                waiting[domain] = []
    if not counts:
        raise MotionRAGError(f"shards={shards}: no test clips there; pack some with motionrag pack")
    for domain, rest in waiting.items():
        if rest:
            yield _batch(domain, rest)


def _domain(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("domain") or "all")


def _batch(domain: str, clips: list[tuple[ClipRecord, Tensor, str]]) -> TestClips:
    records = [{**asdict(record), "domain": domain} for record, *_ in clips]
    notes = [f"{record.id}: {note}" for record, _, note in clips if note]
    return TestClips(domain, records, torch.stack([video for _, video, _ in clips]), notes)
