"""Clips packed into WebDataset tar shards: the original bytes of every video beside what is known about it.

A folder of shards holds ``clips-000000.tar`` ..., ``clips.arrow`` (:mod:`motionrag.data.members`) and ``index.json``. In a tar, the clip ``a b`` is two
members, ``a b.mp4`` (bytes as found) and ``a b.json`` (:class:`ClipRecord`); ids that tar members or
WebDataset cannot carry are percent-encoded in member names and whole in the JSON.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import webdataset as wds
from rich.progress import track

from motionrag.data.video import Clip, UnreadableVideo, read_clip
from motionrag.errors import MotionRAGError
from motionrag.io import read_json, sha256, write_json

SCHEMA = "motionrag.shards/1"
INDEX = "index.json"

REQUIRED_COLUMNS = ("video", "caption", "motion_caption")
OPTIONAL_COLUMNS = ("start_sec", "end_sec", "id", "source", "action")

#: Frames that differ nowhere by more than this (of 255, at 64 pixels) show one picture: compression noise.
_NOISE = 8


@dataclass(frozen=True)
class ClipRecord:
    """What the shards say about one clip.

    id: unique name. video: path as in the table (of an absolute one the name). source: clips of one source never serve as reference for
    one another. action: label of the motion, if the table has one. start_sec, end_sec: the span used, in
    seconds after the first frame (None: the whole file). fps, frames, width, height, duration: as measured
    by decoding. note: what is not as it should be. metadata: the table's other columns.
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


# ---------------------------------------------------------------- writing


def pack(
    table: str | Path,
    videos: str | Path,
    out: str | Path,
    columns: Mapping[str, str] | None = None,
    shard_size: int = 100,
    max_bad: float = 0.1,
    keep_still: bool = False,
    few_frames: int = 8,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack the clips of ``table`` (CSV or parquet) into shards and return the index that was written.

    Every clip is decoded first. Unusable ones (missing, empty, no video, damaged from the start, one frame,
    no motion) are left out and listed with the reason; partly readable ones and those of fewer than
    ``few_frames`` frames are used and listed with a note. The same input gives the same bytes.

    columns: names in the table for ``video caption motion_caption start_sec end_sec id source action``.
    shard_size: clips in a shard. max_bad: largest share (0..1) of rows that may be unusable. keep_still:
    keep clips without motion. overwrite: replace an earlier folder of shards.

    Raises :class:`MotionRAGError` for a bad table, too many unusable rows, or an ``out`` that is in the way;
    nothing is then left at ``out``.
    """
    from motionrag.data.members import write_table  # which reads what is written here

    if shard_size < 1:
        raise MotionRAGError(f"shard_size={shard_size}: expected at least 1 clip in a shard")
    out, videos = Path(out), Path(videos)
    _check_out(out, overwrite)
    if not videos.is_dir():
        raise MotionRAGError(
            f"videos={videos}: no such folder; give the folder that the table's paths start from"
        )
    rows, names = read_table(table, columns or {})

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards, skipped, noted = [], [], []
        writer, count = None, 0
        for number, row in enumerate(track(rows, description="packing", total=len(rows))):
            try:
                data, record = _probe(row, videos, keep_still, few_frames)
            except UnreadableVideo as error:
                skipped.append({"row": number, "video": row["video"], "reason": error.reason})
                if len(skipped) > max_bad * len(rows):
                    raise MotionRAGError(_too_many(table, skipped, number + 1, len(rows), max_bad)) from error
                continue
            if record.note:
                noted.append({"id": record.id, "video": record.video, "note": record.note})
            if count % shard_size == 0:
                if writer:
                    writer.close()
                shards.append({"file": f"clips-{len(shards):06d}.tar", "clips": 0})
                # a fixed time: the same clips give the same bytes; PAX: names of any length
                writer = wds.TarWriter(str(partial / shards[-1]["file"]), mtime=0, format="PAX_FORMAT")
            writer.write({"__key__": _key(record.id), _suffix(record.video): data, "json": record.to_json()})
            shards[-1]["clips"] += 1
            count += 1
        if writer:
            writer.close()
        if not count:
            raise MotionRAGError(f"{table}: no usable clip; {_list(skipped)}")
        for shard in shards:
            file = partial / shard["file"]
            shard |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
        index = {
            "schema": SCHEMA,
            "columns": names,
            "rows": len(rows),
            "clips": count,
            "shard_size": shard_size,
            "shards": shards,
            "table": write_table(partial, [shard["file"] for shard in shards]),
            "skipped": skipped,
            "noted": noted,
        }
        write_json(partial / INDEX, index)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def read_table(path: str | Path, columns: Mapping[str, str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a CSV or parquet as dicts under our column names, and which column became what.

    Missing values are None; columns that are not ours are gathered under ``metadata``. ``id`` defaults to
    the stem of the video path, ``source`` to the video path. Raises :class:`MotionRAGError` for an
    unreadable or empty table, a missing column, a missing or double id.
    """
    path = Path(path)
    known = {name: columns.get(name, name) for name in REQUIRED_COLUMNS + OPTIONAL_COLUMNS}
    frame = _read_frame(path, known)
    for name, column in known.items():
        asked_for = name in REQUIRED_COLUMNS or column != name
        if asked_for and column not in frame:
            raise MotionRAGError(
                f"{path.name}: no column '{column}' for {name}; it has {', '.join(map(str, frame))}; "
                f"name the right one with columns.{name}=NAME"
            )
    if not len(frame):
        raise MotionRAGError(f"{path.name}: the table has no rows; expected one per clip")
    present = {name: column for name, column in known.items() if column in frame}
    others = [column for column in frame if column not in present.values()]
    rows = []
    for record in frame.to_dict("records"):
        row = {name: _plain(record[column]) for name, column in present.items()}
        row = dict.fromkeys(known) | row
        row["metadata"] = {str(column): _plain(record[column]) for column in others}
        if row["video"] is not None:
            row["id"] = row["id"] or Path(row["video"]).stem
            row["source"] = row["source"] or _recorded(row["video"])
        rows.append(row)
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        first = seen.setdefault(row["id"], number) if row["id"] is not None else number
        if first != number:
            raise MotionRAGError(
                f"{path.name}: rows {first} and {number} have the same id '{row['id']}'; ids must be unique "
                "(without an id column the name of the video file is the id): add one with columns.id=NAME"
            )
    return rows, present | {"metadata": [str(column) for column in others]}


def _read_frame(path: Path, known: Mapping[str, str]) -> pd.DataFrame:
    if not path.is_file():
        raise MotionRAGError(f"table={path}: no such file; expected a CSV or parquet")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:
            # Words such as "None" or "NA" are captions, and "007" is a name.
            texts = {column: str for name, column in known.items() if not name.endswith("_sec")}
            frame = pd.read_csv(
                path, dtype=texts, keep_default_na=False, na_values=[""], encoding="utf-8-sig"
            )
    except (ValueError, OSError, pd.errors.ParserError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise MotionRAGError(f"{path.name}: not a readable CSV (UTF-8) or parquet table: {error}") from error
    for name, column in known.items():
        if column in frame and not name.endswith("_sec"):
            frame[column] = frame[column].map(lambda value: value if pd.isna(value) else str(value))
    return frame


def _plain(value: Any) -> Any:
    """A value of a table as JSON knows it; missing ones are None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str, list, dict)) else str(value)


def _probe(row: dict[str, Any], videos: Path, keep_still: bool, few_frames: int) -> tuple[bytes, ClipRecord]:
    """The bytes of a row's video and its record; :class:`UnreadableVideo` with the reason if it is unusable."""
    name = row["video"]
    if name is None:
        raise UnreadableVideo("row", "no video named")
    for column in ("caption", "motion_caption"):
        if not (row[column] or "").strip():
            raise UnreadableVideo(name, f"no {column}")
    span = {}
    for column in ("start_sec", "end_sec"):
        try:
            span[column] = None if row[column] is None else float(row[column])
        except ValueError:
            raise UnreadableVideo(name, f"{column} is not a number: {row[column]}") from None
    path = videos / name
    if not path.exists():
        raise UnreadableVideo(name, "missing file")
    if not path.is_file():
        raise UnreadableVideo(name, "not a file")
    data = path.read_bytes()
    clip = read_clip(data, **span, frames=16, short_side=64)
    if not keep_still and clip.decoded == 1:
        raise UnreadableVideo(name, "one frame only, no motion (keep_still=true keeps it)")
    if not keep_still and not _moves(clip):
        raise UnreadableVideo(name, "no motion: all frames are the same picture (keep_still=true keeps it)")
    notes = [clip.note] if clip.note else []
    if clip.decoded < few_frames:
        notes.append(f"only {clip.decoded} frame{'s' * (clip.decoded > 1)}")
    record = ClipRecord(
        **{column: row[column] for column in ("id", "caption", "motion_caption", "source", "action")},
        **span,
        video=_recorded(name),
        fps=round(clip.fps, 6),
        frames=clip.decoded,
        width=clip.width,
        height=clip.height,
        duration=round(clip.duration, 6),
        note="; ".join(notes),
        metadata=row["metadata"],
    )
    return data, record


def _recorded(video: str) -> str:
    """A video's path as shards tell it: absolute ones mean nothing on another machine."""
    return Path(video).name if Path(video).is_absolute() else video


def _moves(clip: Clip) -> bool:
    differences = np.abs(clip.frames.astype(np.int16) - clip.frames[:1])
    return bool(differences.max() > _NOISE)


def _key(clip_id: str) -> str:
    """A member name without dots (WebDataset splits at the first) and slashes, one for each id."""
    return quote(clip_id, safe=" ").replace(".", "%2E")


def _suffix(video: str) -> str:
    suffix = Path(video).suffix.lstrip(".").lower()
    return suffix if suffix.isalnum() and suffix != "json" else "video"


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = (out / INDEX).is_file() and not [
        p for p in out.iterdir() if p.name not in (INDEX, "clips.arrow") and p.suffix != ".tar"
    ]
    if not ours:
        raise MotionRAGError(f"out={out} is there and is not a folder of shards; choose another place")
    if not overwrite:
        raise MotionRAGError(f"out={out} holds shards already; choose another folder or add overwrite=true")


def _too_many(table: str | Path, skipped: list[dict], seen: int, rows: int, max_bad: float) -> str:
    return (
        f"{Path(table).name}: {len(skipped)} of the first {seen} rows ({rows} in all) are unusable, more than "
        f"max_bad={max_bad:g} of all rows allows: {_list(skipped)}; repair them or raise max_bad"
    )


def _list(skipped: list[dict], limit: int = 5) -> str:
    shown = ", ".join(f"{item['video']} ({item['reason']})" for item in skipped[:limit])
    return shown + (f" and {len(skipped) - limit} more" if len(skipped) > limit else "")


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class ShardIndex:
    """A folder of shards: its ``index.json``, and access to the clips.

    Raises :class:`MotionRAGError` when the folder is not what ``motionrag pack`` writes.
    """

    path: Path
    index: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> ShardIndex:
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
