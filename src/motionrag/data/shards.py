"""Clips packed into WebDataset tar shards: the bytes of every video beside what is known about it.

A folder of shards holds ``clips-000000.tar`` ..., ``clips.arrow`` (where every clip lies, see
:mod:`motionrag.data.members`) and ``index.json``; :mod:`motionrag.data.packing` writes it. In a tar, the clip ``a b`` is
two members, ``a b.mp4`` (bytes as found, or encoded again) and ``a b.json`` (:class:`ClipRecord`); ids that tar
members or WebDataset cannot carry are percent-encoded in member names and whole in the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import webdataset as wds

from motionrag.errors import MotionRAGError
from motionrag.io import read_json, sha256

SCHEMA = "motionrag.shards/1"
INDEX = "index.json"


@dataclass(frozen=True)
class ClipRecord:
    """What the shards say about one clip.

    id: unique name. video: path as in the table (of an absolute one the name). source: clips of one source
    never serve as reference for one another. action: label of the motion, if the table has one. start_sec,
    end_sec: the span used, in seconds after the first frame (None: the whole file). fps, frames, width, height,
    duration: as measured by decoding. note: what is not as it should be. metadata: the table's other columns,
    and ``split``, ``motion_caption_by``, ``cut_from`` where packing made a split, a caption, a cut.
    """

    id: str
    video: str
    caption: str
    motion_caption: str
    source: str
    fps: float
    frames: int
    width: int
    height: int
    duration: float
    action: str | None = None
    start_sec: float | None = None
    end_sec: float | None = None
    note: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, data: bytes | str) -> ClipRecord:
        return cls(**json.loads(data))

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards: its ``index.json``, and access to the clips.

    Raises :class:`MotionRAGError` when the folder is not what ``motionrag pack`` writes.
    """

    path: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> ShardIndex:
        if "://" in str(path) or str(path).startswith("pipe:"):
            raise MotionRAGError(
                f"{path}: training streams shards, here they are read from a folder: copy them first"
            )
        path = Path(path)
        if not (path / INDEX).is_file():
            raise MotionRAGError(f"{path}: no {INDEX} there; expected a folder written by motionrag pack")
        try:
            index = read_json(path / INDEX)
        except ValueError as error:
            raise MotionRAGError(f"{path / INDEX}: damaged ({error}); pack the clips again") from error
        if not isinstance(index, dict) or index.get("schema") != SCHEMA:
            raise MotionRAGError(f"{path / INDEX}: expected schema {SCHEMA}; pack the clips again")
        return cls(path, index)

    def __len__(self) -> int:
        """Clips in all shards."""
        return self.index["clips"]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """One dict per shard: file, clips, bytes, sha256."""
        return self.index["shards"]

    @property
    def files(self) -> list[Path]:
        """The shards' paths."""
        return [self.path / shard["file"] for shard in self.shards]

    def verify(self, shard: Mapping[str, Any]) -> Path:
        """The path of a shard whose bytes are those that were packed; raises :class:`MotionRAGError` else."""
        path = self.path / shard["file"]
        if not path.is_file():
            raise MotionRAGError(f"shard {path} is missing; copy it again or pack the clips again")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise MotionRAGError(
                f"shard {path} has {size} bytes, {shard['bytes']} were packed; copy it again or pack again"
            )
        if sha256(path) != shard["sha256"]:
            raise MotionRAGError(
                f"shard {path} is damaged: its checksum is not the one in {INDEX}; copy it again"
            )
        return path

    def records(self) -> Iterator[ClipRecord]:
        """What is known about every clip, in packing order; reads the shards through."""
        for file in self.files:
            for record, _ in read_shard(file):
                yield record


def read_shard(path: str | Path) -> Iterator[tuple[ClipRecord, bytes]]:
    """The clips of one shard in order: record, and the bytes of the video file.

    Raises :class:`MotionRAGError` naming the shard if it cannot be read or holds no clip.
    """
    path = Path(path)
    # A list: WebDataset would expand braces in a lone string.
    samples = wds.DataPipeline(wds.SimpleShardList([str(path)]), wds.tarfile_to_samples())
    count = 0
    try:
        for sample in samples:
            yield split_sample(sample)
            count += 1
    except (OSError, ValueError, KeyError, EOFError, wds.tariterators.tarfile.TarError) as error:
        raise MotionRAGError(f"shard {path} cannot be read ({error}); copy it again or pack again") from error
    if not count:
        raise MotionRAGError(f"shard {path} holds no clip; pack again")


def split_sample(sample: Mapping[str, Any]) -> tuple[ClipRecord, bytes]:
    """Record and video bytes of one raw WebDataset sample; ``KeyError`` if it is not one of ours."""
    videos = [name for name in sample if name != "json" and not name.startswith("__")]
    if "json" not in sample or len(videos) != 1:
        raise KeyError(f"member {sample.get('__key__')}: expected one video and one json")
    return ClipRecord.from_json(sample["json"]), sample[videos[0]]
