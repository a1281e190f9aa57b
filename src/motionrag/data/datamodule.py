"""Training data: an endless, exactly resumable stream of clips, in batches.

The clip at place `p` of the stream follows from (seed, p) alone, and every batch carries its places. So the order does
not depend on the number of workers or devices, and a run resumed at place `p` continues as if it had never stopped.
"""

import ctypes
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from motionrag.data.batch import MotionBatch
from motionrag.data.stream import Order, Shards
from motionrag.data.video import UnreadableVideo, Wanted, check_decoder, read_clip, read_clips
from motionrag.errors import MotionRAGError
from motionrag.retrieval import catalog
from motionrag.retrieval.database import RetrievalDatabase

_M_MMAP_THRESHOLD = -3  # of mallopt


class Clips(Protocol):
    """A set of clips that can be read one at a time."""

    ids: list[str]
    sources: list[str]  # clips of one source never end up on both sides of the split
    shards: np.ndarray | None  # number of the shard that each clip lies in; None: every clip costs the same
    buffer: int | None  # clips shuffled together if they lie in shards; None: all
    samples: int  # of each clip, at positions of the stream that follow one another

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the table."""

    def read(self, index: int, position: int = 0, samples: int = 1) -> dict[str, Any]:
        """One clip's fields of MotionBatch, without the batch dimension; UnreadableVideo if that fails.

        What is drawn at random depends on its `position` in the stream, and on how many `samples` of it there are.
        """


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


class ShardClips:
    """Clips of WebDataset shards, decoded where they are read: only the frames that are wanted. Of feature shards
    (see features.py) what they hold.

    Args:
        shards: what `motionrag pack` wrote: a folder, a URL, or "pipe:COMMAND {file}" (see stream.Shards).
        frames, height, width: size of the clips; scaled to cover it, centre crop.
        fps: frames at this rate from the clip's start, of several rates any one; None: `frames` spread evenly over it.
        samples: of each clip, at positions of the stream that follow one another and from one pass over the video:
            each begins at a random moment in its own share of the time that leaves it room, at a rate of its own.
        db: retrieval database that holds the clips' motion features; None: the training module encodes them.
        keep: hold decoded clips in memory.
        buffer: clips shuffled together (see stream.Order); None: all, for folders on a fast disk.
        seed: of what is drawn at random.
        decoder: pyav or torchcodec (see video.read_clip).
        cache, cache_gb, timeout, tries: for shards that are fetched (see stream.Shards).
    """

    def __init__(
        self,
        shards: str | Path,
        frames: int,
        height: int,
        width: int,
        fps: float | Sequence[float] | None = None,
        db: str | Path | None = None,
        keep: bool = False,
        buffer: int | None = 10_000,
        seed: int = 0,
        decoder: str = "pyav",
        cache: str | Path | None = None,
        cache_gb: float = 20.0,
        timeout: float = 30.0,
        tries: int = 3,
        samples: int = 1,
    ) -> None:
        check_decoder(decoder)  # now, not in some worker
        self.decoder = decoder
        self.stream = Shards(shards, cache, cache_gb, timeout, tries)
        self.table = self.stream.table
        self.made_by: dict[str, Any] | None = self.stream.index.get("features")  # of feature shards
        self.ids: list[str] = self.table["id"].to_pylist()
        self.sources: list[str] = self.table["source"].to_pylist()
        self.shards, self.buffer = self.stream.numbers(), buffer
        self.stream.check_room(buffer or len(self.ids))
        self.frames, self.size, self.seed = frames, (height, width), seed
        self.rates = list(fps) if isinstance(fps, Sequence) else [fps]
        self.samples = samples
        why = {
            "expected at least 1": samples < 1,
            "frames spread over the whole clip are always the same, give clips.fps": None in self.rates,
            "clips.keep=true keeps one for each clip": keep,
            "the database holds the motion of whole clips, choose db=null": bool(db),
            "features hold one for each clip": self.made_by is not None,
        }
        if samples != 1 and any(why.values()):
            raise MotionRAGError(f"clips.samples={samples}: {next(text for text in why if why[text])}")
        self.db = RetrievalDatabase(db) if db else None
        if self.db is not None:
            self.db.motion_features(())  # an error now if it holds motion tokens
            absent = set(self.ids) - set(self.db.ids)
            if absent:
                raise MotionRAGError(
                    f"{len(absent)} of {len(self.ids)} clips in {shards} are not in the database {db}, "
                    f"e.g. {min(absent)}: encode these shards into it"
                )
        self._kept: dict[tuple[int, float | None], Tensor] | None = {} if keep else None
        self._waiting: dict[tuple[int, int], Tensor] = {}  # samples of the clip that was decoded last

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the packed table."""
        return _column(self.table, column)

    def read(self, index: int, position: int = 0, samples: int = 1) -> dict[str, Any]:
        """One clip: video, its frame rate, caption, and its motion features if there is a database."""
        rate, _ = self._drawn(position)
        record = catalog.record(self.table, index)
        clip = {"clip_id": record["id"], "captions": record["caption"]}
        if self.made_by is None:
            clip["video"] = (
                self._video(index, rate) if samples == 1 else self._sample(index, position, samples)
            )
        else:
            clip |= safetensors.torch.load(self.stream.read(index))
        if rate is not None:
            clip["fps"] = torch.tensor(rate, dtype=torch.float32)
        if self.db is not None and "target_motion" not in clip:
            clip["target_motion"] = self.db.motion_features([record["id"]])[0]
        return clip

    def _drawn(self, position: int) -> tuple[float | None, float]:
        """Rate of the sample at a position, and a number in [0, 1) that says when it begins."""
        draw = np.random.default_rng((self.seed, position))
        return self.rates[draw.integers(len(self.rates))], draw.random()

    def _sample(self, index: int, position: int, samples: int) -> Tensor:
        """The clip's sample at a position; those of the positions beside it are decoded with it and wait."""
        if (index, position) not in self._waiting:
            record = catalog.record(self.table, index)
            first, wanted = position - position % samples, []
            for number in range(samples):
                rate, moment = self._drawn(first + number)
                room = max(record["duration"] - self.frames / rate, 0.0)
                start = (record["start_sec"] or 0.0) + room * (number + moment) / samples
                wanted.append(Wanted(start, record["end_sec"], self.frames, rate))
            clips = read_clips(self.stream.read(index), wanted, decoder=self.decoder)
            self._waiting = {
                (index, first + number): to_pixels(clip.frames, *self.size)
                for number, clip in enumerate(clips)
            }
        return self._waiting.pop((index, position))

    def _video(self, index: int, fps: float | None) -> Tensor:
        if self._kept is None:
            return self._decode(index, fps)
        if (index, fps) not in self._kept:
            self._kept[index, fps] = self._decode(index, fps)
        return self._kept[index, fps]

    def _decode(self, index: int, fps: float | None) -> Tensor:
        record = catalog.record(self.table, index)
        clip = read_clip(
            self.stream.read(index),
            record["start_sec"],
            record["end_sec"],
            frames=self.frames,
            fps=fps,
            decoder=self.decoder,
        )
        return to_pixels(clip.frames, *self.size)


class ReferenceClips:
    """Clips of a retrieval database with their nearest neighbours; no video is opened.

    Args:
        db: retrieval database with neighbours, as `motionrag index` leaves it.
        k: reference clips per clip; itself and its source are never among them.
    """

    samples = 1

    def __init__(self, db: str | Path, k: int = 9) -> None:
        self.db = RetrievalDatabase(db)
        self.k = k
        self.ids = self.db.ids
        self.sources = self.db.column("source")
        self.shards = self.buffer = None
        self.hold_out(())

    def hold_out(self, ids: Iterable[str]) -> None:
        """Let these clips be nobody's reference: training on a sequence learns its references' motion, too.

        Raises MotionRAGError now, not at some batch, if a clip is left with fewer than k.
        """
        self.held_out = frozenset(ids)
        self.db.neighbours(self.ids[0], self.k)
        self.db.check_neighbours(self.k, self.held_out)

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the packed table."""
        return self.db.column(column)

    def read(self, index: int, position: int = 0, samples: int = 1) -> dict[str, Any]:
        """One clip's features and those of its references, nearest first."""
        return self.features(self.ids[index])

    def features(self, clip_id: str) -> dict[str, Any]:
        """The same, by the clip's name."""
        ids = [clip_id, *self.db.neighbours(clip_id, self.k, self.held_out)]
        motion = self.db.motion_tokens(ids) if self.db.resampled else self.db.motion_features(ids)
        name, appearance = "tokens" if self.db.resampled else "motion", self.db.appearance_features(ids)
        return {
            "clip_id": clip_id,
            "captions": self.db.caption(clip_id),
            f"target_{name}": motion[0],
            "target_appearance": appearance[0],
            "reference_id": ids[1:],
            f"reference_{name}": motion[1:],
            "reference_appearance": appearance[1:],
        }


class ShardClipsWithReferences(ReferenceClips):
    """Clips of shards with the features of their nearest neighbours in a database: what Stage 3 learns from.

    Args:
        shards, frames, height, width: of ShardClips, as all `options`.
        db: retrieval database with neighbours that holds these clips.
        k: reference clips per clip; itself and its source are never among them.
    """

    def __init__(
        self,
        shards: str | Path,
        frames: int,
        height: int,
        width: int,
        db: str | Path,
        k: int = 9,
        **options: Any,
    ) -> None:
        super().__init__(db, k)
        self.clips = ShardClips(shards, frames, height, width, db=db, **options)
        self.ids, self.sources = self.clips.ids, self.clips.sources
        self.shards, self.buffer = self.clips.shards, self.clips.buffer
        self.made_by = self.clips.made_by

    def split(self, column: str) -> list[str]:
        """Each clip's value in a column of the packed table."""
        return self.clips.split(column)

    def read(self, index: int, position: int = 0, samples: int = 1) -> dict[str, Any]:
        """One clip: video, frame rate, caption, its features and those of its references, nearest first."""
        return self.features(self.ids[index]) | self.clips.read(index, position)


def _column(table: pa.Table, column: str) -> list[str]:
    if column not in catalog.columns(table):
        raise MotionRAGError(
            f"the clips have no column {column!r}, only {', '.join(sorted(catalog.columns(table)))}"
        )
    return table[column].to_pylist()


class Part(Dataset):
    """One side of the split; reads whole batches of positions in a stream of its clips.

    Args:
        clips: all of them.
        indices: which belong to this part.
        order: gives places in `indices`, each for as many positions as the clips have samples; None: one after the
            other, one sample each, from the start again at the end.
    """

    def __init__(self, clips: Clips, indices: list[int], order: Order | None = None) -> None:
        self.clips, self.indices, self.order = clips, indices, order
        self.samples = 1 if order is None else clips.samples

    def __len__(self) -> int:
        return len(self.indices)

    def index(self, position: int) -> int:
        """Which clip comes at a position."""
        place = position % len(self) if self.order is None else self.order[position // self.samples]
        return self.indices[place]

    def __getitems__(self, positions: list[int]) -> MotionBatch:
        """Batches keep their size, which DDP needs: an unreadable clip gives way to the one that follows it in the
        stream (which is seen again there), and the batch says so."""
        rows, skipped = [], []
        for position in positions:
            for ahead in range(position, position + len(self) * self.samples, self.samples):
                index = self.index(ahead)
                try:
                    rows.append(self.clips.read(index, position, self.samples))
                    break
                except UnreadableVideo as error:
                    skipped.append(f"{self.clips.ids[index]}: {error.reason}")
            else:
                raise MotionRAGError(f"none of the {len(self)} clips can be read, the first: {skipped[0]}")
        batch = batch_of(rows, list(positions))
        batch.skipped = list(dict.fromkeys(skipped))
        return batch


def batch_of(rows: list[dict[str, Any]], positions: list[int]) -> MotionBatch:
    """What `read` gave for several clips, together."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    # default_collate makes a worker's tensors in shared memory at once
    fields = {k: default_collate(v) if isinstance(v[0], Tensor) else v for k, v in columns.items()}
    return MotionBatch(**fields, position=positions).check()


class ClipStream(Sampler[list[int]]):
    """Endless batches of positions, consecutive over all ranks: two processes of batch n see what one of 2n sees."""

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1, start: int = 0) -> None:
        self.batch_size, self.step, self.first = batch_size, batch_size * world, start + rank * batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for first in itertools.count(self.first, self.step):
            yield list(range(first, first + self.batch_size))


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
        if not isinstance(batch_size, int) or batch_size < 1:
            raise MotionRAGError(f"data.batch_size={batch_size}: expected at least 1 clip for a step")
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
        train = [i for i, val in enumerate(held_out) if not val]
        if not train:
            raise MotionRAGError(
                f"no training clips among {len(clips.ids)}: lower val_share or check split_column"
            )
        if isinstance(clips, ReferenceClips):
            clips.hold_out(clips.ids[i] for i, val in enumerate(held_out) if val)
        shards = None if clips.shards is None else clips.shards[train]
        self.train_part = Part(clips, train, Order(len(train), seed, shards, clips.buffer))
        self.val_part = Part(clips, [i for i, val in enumerate(held_out) if val])
        self._resumed = {"clips": 0, "batches": 0}

    def train_dataloader(self) -> DataLoader:
        """Endless; starts where a resumed run stopped."""
        stream = ClipStream(
            self.batch_size, self.trainer.global_rank, self.trainer.world_size, self._resumed["clips"]
        )
        return self._loader(self.train_part, stream)

    def val_dataloader(self) -> DataLoader | list:
        """The same clips every time, dealt to the ranks in turn; nothing if no clip is held out."""
        size, world = self.batch_size, self.trainer.world_size
        # whole rounds only: every rank has the same number of batches
        rounds = min(self.val_batches, -(-len(self.val_part) // (size * world)))
        places = range(rounds * size * world)
        first = self.trainer.global_rank * size
        batches = [list(places[i : i + size]) for i in range(first, len(places), size * world)]
        return self._loader(self.val_part, batches) if batches else []

    def _loader(self, part: Part, batches: Any) -> DataLoader:
        # its own generator: workers' seeds must not be drawn from the one that networks are initialised with
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            part,
            batch_sampler=batches,
            collate_fn=_as_is,
            generator=generator,
            worker_init_fn=_give_back_memory,
            **self.loader,
        )

    @cached_property
    def order(self) -> str:
        """A checksum of the stream's order: of equal ones a place in them means the same clips."""
        part = self.train_part
        shards = None if self.clips.shards is None else self.clips.shards[part.indices].tolist()
        told = [self.seed, self.clips.buffer, shards, [self.clips.ids[index] for index in part.indices]]
        if part.samples > 1:  # earlier checkpoints do not say
            told.append(part.samples)
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Place in the stream, in clips over all processes, at the last optimizer step."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        batches -= batches % self.trainer.accumulate_grad_batches
        step = self.batch_size * self.trainer.world_size
        return {
            "clips": self._resumed["clips"] + (batches - self._resumed["batches"]) * step,
            "batches": batches,
            "order": self.order,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue there, with any batch size and number of processes.

        Raises MotionRAGError if the clips, or their order, are not those of the run that is continued.
        """
        if state_dict.get("order", self.order) != self.order:  # earlier versions did not say
            raise MotionRAGError(
                "the checkpoint's place is one among other training clips, or in another order of them (clips added or "
                "removed, seeds.data, clips.buffer, clips.samples, data.val_share): continue with those, or start anew from the "
                "weights alone, module.weights=CHECKPOINT"
            )
        self._resumed = {name: state_dict[name] for name in ("clips", "batches")}


def _share(text: str) -> float:
    """A fixed number in [0, 1) for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _give_back_memory(worker: int) -> None:
    """Let a worker return the memory of large tensors when they are freed.

    glibc would soon take them from its heap, whose aligned pieces it cannot use again for tensors of the same size: a
    worker grew by the size of every clip that it read.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _as_is(batch: MotionBatch) -> MotionBatch:
    """Part already makes batches."""
    return batch
