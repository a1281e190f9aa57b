"""Training data: an endless, exactly resumable stream of clips, in batches.

The clip at place `p` of the stream follows from (seed, p) alone, and every batch carries its places. So the order does
not depend on the number of workers or devices, and a run resumed at place `p` continues as if it had never stopped.
"""

import hashlib
import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from motionrag.data.batch import MotionBatch
from motionrag.data.shards import ClipRecord, ShardIndex
from motionrag.data.video import UnreadableVideo, read_clip
from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase


class Clips(Protocol):
    """A set of clips that can be read one at a time."""

    ids: list[str]
    sources: list[str]  # clips of one source never end up on both sides of the split

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the table."""

    def read(self, index: int) -> dict[str, Any]:
        """One clip's fields of MotionBatch, without the batch dimension; UnreadableVideo if that fails."""


def to_pixels(frames: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (T, H, W, 3) -> float32 (T, 3, height, width) in [-1, 1]: scaled to cover the size, centre crop."""
    video = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(height / video.shape[2], width / video.shape[3])
    size = [
        max(side, round(found * scale)) for side, found in zip((height, width), video.shape[2:], strict=True)
    ]
    if size != list(video.shape[2:]):
        video = F.interpolate(video, size, mode="bilinear", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return video[:, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class _Member:
    """Where a clip's bytes lie."""

    shard: Path
    offset: int
    size: int
    record: ClipRecord

    def bytes(self) -> bytes:
        """The video file."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _members(shard: Path) -> Iterator[_Member]:
    """Headers and records of a shard; the videos themselves are skipped over."""
    videos: dict[str, tarfile.TarInfo] = {}
    records: dict[str, ClipRecord] = {}
    try:
        with tarfile.open(shard) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                if suffix == "json":
                    records[key] = ClipRecord.from_json(tar.extractfile(info).read())
                else:
                    videos[key] = info
    except (tarfile.TarError, OSError) as error:
        raise MotionRAGError(f"shard {shard} cannot be read ({error}): pack the clips again") from error
    for key, record in records.items():
        if key not in videos:
            raise MotionRAGError(f"shard {shard}: clip {record.id} has no video: pack the clips again")
        yield _Member(shard, videos[key].offset_data, videos[key].size, record)


class ShardClips:
    """Clips of WebDataset shards, read by their place in the tar: any order costs the same.

    Args:
        shards: folder written by `motionrag pack`.
        frames, height, width: size of the clips; scaled to cover it, centre crop.
        fps: frames at this rate from the clip's start; None: `frames` spread evenly over the clip.
        db: retrieval database that holds the clips' motion features; None: the training module encodes them.
        keep: hold decoded clips in memory.
    """

    def __init__(
        self,
        shards: str | Path,
        frames: int,
        height: int,
        width: int,
        fps: float | None = None,
        db: str | Path | None = None,
        keep: bool = False,
    ) -> None:
        self.members = [m for shard in ShardIndex.open(shards).files for m in _members(shard)]
        self.ids = [m.record.id for m in self.members]
        self.sources = [m.record.source for m in self.members]
        self.frames, self.size, self.fps = frames, (height, width), fps
        self.db = RetrievalDatabase(db) if db else None
        if self.db is not None:
            absent = set(self.ids) - set(self.db.ids)
            if absent:
                raise MotionRAGError(
                    f"{len(absent)} of {len(self.ids)} clips in {shards} are not in the database {db}, "
                    f"e.g. {min(absent)}: encode these shards into it"
                )
        self._read = lru_cache(maxsize=None)(self._decode) if keep else self._decode

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the packed table."""
        return [_column(asdict(m.record), column) for m in self.members]

    def read(self, index: int) -> dict[str, Any]:
        """One clip: video, caption, and its motion features if there is a database."""
        member = self.members[index]
        clip = {"clip_id": member.record.id, "captions": member.record.caption, "video": self._read(index)}
        if self.db is not None:
            clip["target_motion"] = self.db.motion_features([member.record.id])[0]
        return clip

    def _decode(self, index: int) -> Tensor:
        member = self.members[index]
        clip = read_clip(
            member.bytes(), member.record.start_sec, member.record.end_sec, frames=self.frames, fps=self.fps
        )
        return to_pixels(clip.frames, *self.size)


class ReferenceClips:
    """Clips of a retrieval database with their nearest neighbours; no video is opened.

    Args:
        db: retrieval database with neighbours, as `motionrag index` leaves it.
        k: reference clips per clip; itself and its source are never among them.
    """

    def __init__(self, db: str | Path, k: int = 9) -> None:
        self.db = RetrievalDatabase(db)
        self.k = k
        self.ids = self.db.ids
        self.sources = [self.db.clip(clip_id)["source"] for clip_id in self.ids]
        self.db.neighbours(self.ids[0], k)  # too large a k should not wait for the first batch

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the packed table."""
        return [_column(self.db.clip(clip_id), column) for clip_id in self.ids]

    def read(self, index: int) -> dict[str, Any]:
        """One clip's features and those of its references, nearest first."""
        clip_id = self.ids[index]
        ids = [clip_id, *self.db.neighbours(clip_id, self.k)]
        motion, appearance = self.db.motion_features(ids), self.db.appearance_features(ids)
        return {
            "clip_id": clip_id,
            "captions": self.db.caption(clip_id),
            "target_motion": motion[0],
            "target_appearance": appearance[0],
            "reference_motion": motion[1:],
            "reference_appearance": appearance[1:],
        }


def _column(clip: dict[str, Any], column: str) -> str:
    values = {**clip.get("metadata", {}), **clip}
    if values.get(column) is None:
        raise MotionRAGError(f"clip {clip['id']} has no column {column!r}, only {', '.join(sorted(values))}")
    return str(values[column])


class Part(Dataset):
    """One side of the split; reads whole batches of (position in the stream, place in this part)."""

    def __init__(self, clips: Clips, indices: list[int]) -> None:
        self.clips, self.indices = clips, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: list[tuple[int, int]]) -> MotionBatch:
        """Batches keep their size, which DDP needs: an unreadable clip gives way to the next readable one, and
        the batch says so."""
        rows, skipped = [], []
        for _, place in keys:
            for offset in range(len(self)):
                index = self.indices[(place + offset) % len(self)]
                try:
                    rows.append(self.clips.read(index))
                    break
                except UnreadableVideo as error:
                    skipped.append(f"{self.clips.ids[index]}: {error.reason}")
            else:
                raise MotionRAGError(f"none of the {len(self)} clips can be read, the first: {skipped[0]}")
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        fields = {k: torch.stack(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}
        return MotionBatch(**fields, position=[position for position, _ in keys], skipped=skipped).check()


class ClipStream(Sampler[list[tuple[int, int]]]):
    """Endless batches of (position, place): one shuffled pass over the clips after the other.

    Positions of a step are consecutive over all ranks, so two processes of batch n see what one of 2n sees.
    """

    def __init__(
        self, clips: int, batch_size: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        self.clips, self.batch_size, self.seed = clips, batch_size, seed
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.batch_size * self.world
        order: tuple[int, np.ndarray] = (-1, np.empty(0))
        for first in itertools.count(self.start + self.rank * self.batch_size, step):
            batch = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.clips)
                if order[0] != epoch:
                    order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.clips)
                batch.append((position, int(order[1][place])))
            yield batch


class MotionDataModule(L.LightningDataModule):
    """Training and validation loaders over one set of clips.

    Args:
        clips: where the clips come from.
        batch_size: clips per step and process.
        val_share: share of the clips kept for validation, chosen by a hash of their source; used without
            `split_column`.
        split_column: table column whose value `val` marks validation clips.
        val_batches: at most this many validation batches per process, for a steady cost.
        workers: loader processes.
        seed: of the order.
        pin_memory: for loading to a GPU.
    """

    def __init__(
        self,
        clips: Clips,
        batch_size: int,
        val_share: float = 0.05,
        split_column: str | None = None,
        val_batches: int = 8,
        workers: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        super().__init__()
        self.clips, self.batch_size, self.val_batches = clips, batch_size, val_batches
        self.seed = seed
        self.loader = {"num_workers": workers, "pin_memory": pin_memory, "persistent_workers": workers > 0}
        if split_column:
            held_out = [value == "val" for value in clips.split(split_column)]
        else:
            shares = [_share(source) for source in clips.sources]
            # of very few clips none may fall below the share: then the lowest source is held out
            limit = max(val_share, min(shares) * (1 + 1e-9)) if val_share else 0.0
            held_out = [share < limit for share in shares]
        self.train_part = Part(clips, [i for i, val in enumerate(held_out) if not val])
        self.val_part = Part(clips, [i for i, val in enumerate(held_out) if val])
        if not len(self.train_part):
            raise MotionRAGError(
                f"no training clips among {len(clips.ids)}: lower val_share or check split_column"
            )
        self._resumed = {"clips": 0, "batches": 0}

    def train_dataloader(self) -> DataLoader:
        """Endless; starts where a resumed run stopped."""
        stream = ClipStream(
            len(self.train_part),
            self.batch_size,
            self.seed,
            self.trainer.global_rank,
            self.trainer.world_size,
            self._resumed["clips"],
        )
        return self._loader(self.train_part, stream)

    def val_dataloader(self) -> DataLoader | list:
        """The same clips every time, dealt to the ranks in turn; nothing if no clip is held out."""
        size, world = self.batch_size, self.trainer.world_size
        # whole rounds only: every rank has the same number of batches
        rounds = min(self.val_batches, -(-len(self.val_part) // (size * world)))
        places = range(rounds * size * world)
        dealt = [
            places[i : i + size] for i in range(self.trainer.global_rank * size, len(places), size * world)
        ]
        batches = [[(p, p % len(self.val_part)) for p in places] for places in dealt]
        return self._loader(self.val_part, batches) if batches else []

    def _loader(self, part: Part, batches: Any) -> DataLoader:
        # its own generator: workers' seeds must not be drawn from the one that networks are initialised with
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(part, batch_sampler=batches, collate_fn=_as_is, generator=generator, **self.loader)

    def state_dict(self) -> dict[str, int]:
        """Place in the stream, in clips over all processes, at the last finished batch."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        step = self.batch_size * self.trainer.world_size
        return {
            "clips": self._resumed["clips"] + (batches - self._resumed["batches"]) * step,
            "batches": batches,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue there, with any batch size and number of processes."""
        self._resumed = dict(state_dict)


def _share(text: str) -> float:
    """A fixed number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _as_is(batch: MotionBatch) -> MotionBatch:
    """Part already makes batches."""
    return batch
