"""From a table and videos to shards: every clip looked at, what cannot be used told, the same bytes every time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np
import webdataset as wds
from rich.progress import Progress

from motionrag.data.captions import rule_caption
from motionrag.data.members import CLIPS, write_table
from motionrag.data.shards import INDEX, SCHEMA, ClipRecord
from motionrag.data.sources import (
    MISSING,
    REQUIRED_COLUMNS,
    Place,
    VideoFolder,
    check_max_bad,
    check_pattern,
    check_shares,
    read_table,
    recorded,
    sources_in,
    split_of,
)
from motionrag.data.video import Clip, UnreadableVideo, read_clip, write_mp4
from motionrag.encoders import uniform_indices
from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path, only_writer, put_in_place, read_json, sha256, write_json

EXCLUDED = "source video in the excluded table"

#: Frames that differ nowhere by more than this (of 255, at 64 pixels) show one picture: compression noise.
_NOISE = 8


def pack(
    table: str | Path,
    videos: str | Path,
    out: str | Path,
    columns: Mapping[str, str | None] | None = None,
    by_name: bool = False,
    source_pattern: str | None = None,
    rule_captions: bool = False,
    missing_ok: bool = False,
    exclude: str | Path | None = None,
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
    short_side: int | None = None,
    shard_size: int = 100,
    max_bad: float = 0.1,
    keep_still: bool = False,
    few_frames: int = 8,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Pack the clips of ``table`` (CSV, parquet or JSON lines) into shards and return the index.

    Every clip is decoded first. Unusable ones (missing, empty, no video, damaged from the start, one frame,
    no motion) are left out and listed with the reason; partly readable ones and those of fewer than
    ``few_frames`` frames are used and listed with a note. The same input gives the same bytes, whatever the
    number of workers, and also when the run was killed and started again: finished shards stay in
    ``.OUT.partial`` until all are there.

    columns: names in the table for ``video caption motion_caption start_sec end_sec id source action``.
    by_name: find videos by file name in folders and zip archives (:class:`VideoFolder`). source_pattern: tells
    the source video from a clip's name (:func:`source_of`). rule_captions: make a motion caption by rules where
    the table has none. missing_ok: leave rows without a video file out without calling them unusable. exclude:
    a table (same columns) whose source videos are left out. splits: split -> share of the source videos, each
    split a folder of shards ``OUT/SPLIT``; seed: chooses who is where. short_side: encode again, cut to the span
    and scaled to this many pixels (H.264, a key frame every 30, no sound); None: the bytes as they are.
    shard_size: rows for a shard. max_bad: largest share (0..1) of rows that may be unusable. keep_still: keep
    clips without motion. workers: processes. overwrite: replace an earlier folder of shards.

    Returns the index that was written, or with splits one of all shards under ``SPLIT/FILE``, and the sizes of
    the splits under ``splits``. Raises :class:`MotionRAGError` for a bad table, too many unusable rows, a full
    disk, another run that writes to the same ``out``, or an ``out`` that is in the way; ``out`` is then as it
    was before.
    """
    if shard_size < 1 or workers < 1:
        raise MotionRAGError(f"shard_size={shard_size}, workers={workers}: expected at least 1 of each")
    check_max_bad(max_bad)
    if short_side is not None and (not isinstance(short_side, int) or short_side < 16):
        raise MotionRAGError(
            f"short_side={short_side}: expected at least 16 pixels, or null for the bytes as found"
        )
    if splits is not None:
        check_shares(splits)
    if source_pattern is not None:
        check_pattern(source_pattern)
    out = Path(out)
    _check_out(out, overwrite)
    folder = VideoFolder(videos, by_name)
    rows, names = read_table(
        table, columns or {}, source_pattern, REQUIRED_COLUMNS[: 2 if rule_captions else 3]
    )
    for number, row in enumerate(rows):
        _prepare(number, row, folder, rule_captions)
    rows, left_out = _leave_out(
        rows, sources_in(exclude, columns or {}, source_pattern) if exclude else set(), missing_ok
    )
    if not rows:
        raise MotionRAGError(
            f"{Path(table).name}: no row is left to pack ({_counts(left_out)}); look at videos={videos} and exclude"
        )
    about = {
        "schema": SCHEMA,
        "columns": names,
        "left_out": left_out,
        "rule_captions": sum(row["metadata"].get("motion_caption_by") == "rules" for row in rows),
        "seed": seed,
        "short_side": short_side,
        "shard_size": shard_size,
    }
    options = {"short_side": short_side, "keep_still": keep_still, "few_frames": few_frames}

    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    busy = f"out={out} is being packed by another process; wait until it has ended or choose another folder"
    with only_writer(partial / "lock", busy), _room_in(partial, out):
        try:
            _check_out(out, overwrite)  # another process may just have ended
            jobs = _jobs(partial, rows, splits, seed, shard_size, int(max_bad * len(rows)), options)
            done = _begin(partial, jobs, options | {"splits": splits, "seed": seed}, out, overwrite)
            results = _run(jobs, done, workers, f"{Path(table).name}", max_bad)
            index = _write_indexes(partial / "shards", jobs, results, about, splits)
            if out.exists():
                # of a run that was killed while it removed it
                shutil.rmtree(partial / "replaced", ignore_errors=True)
                out.rename(partial / "replaced")
            put_in_place(partial / "shards", out)
            shutil.rmtree(partial / "done")
        finally:
            if not any((partial / "done").glob("*.json")):
                shutil.rmtree(partial, ignore_errors=True)
    return index


@dataclass(frozen=True)
class _Job:
    """One shard to be: its path below ``partial/shards``, its rows, and what to do with them."""

    partial: Path
    file: str
    rows: list[dict[str, Any]]
    allowed: int  # unusable rows
    options: dict[str, Any]

    @property
    def result(self) -> Path:
        """What became of it; written when its tar is whole."""
        return self.partial / "done" / f"{self.file.replace('/', '-')}.json"


class _NoShardError(Exception):
    """Nothing is to be written: too many unusable rows, or no usable one."""


def _prepare(number: int, row: dict[str, Any], folder: VideoFolder, rule_captions: bool) -> None:
    """Add a row's number, where its video lies or why it is not there, and the motion caption if it is missing."""
    row["number"] = number
    if rule_captions and (row["caption"] or "").strip() and not (row["motion_caption"] or "").strip():
        row["motion_caption"] = rule_caption(row["caption"])
        row["metadata"]["motion_caption_by"] = "rules"
    if row["video"] is None:
        return
    if "repeats" in row:
        row["bad"] = f"repeats row {row['repeats']}"
        return
    try:
        row["place"] = folder.find(row["video"])
    except UnreadableVideo as error:
        row["bad"] = error.reason


def _leave_out(
    rows: list[dict[str, Any]], sources: set[str], missing_ok: bool
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows to pack, and how many others there are by reason."""
    left_out: Counter[str] = Counter({EXCLUDED: 0} if sources else {})  # that none matched is worth knowing
    kept = []
    for row in rows:
        if row["source"] in sources:
            left_out[EXCLUDED] += 1
        elif missing_ok and row.get("bad") == MISSING:
            left_out[MISSING] += 1
        else:
            kept.append(row)
    return kept, dict(left_out)


def _jobs(
    partial: Path,
    rows: list[dict[str, Any]],
    splits: Mapping[str, float] | None,
    seed: int,
    size: int,
    allowed: int,
    options: dict[str, Any],
) -> list[_Job]:
    """The shards, split after split, every ``size`` rows one: what is in a shard depends on no other shard."""
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in splits or [""]}
    for row in rows:
        name = split_of(str(row["source"]), splits, seed) if splits else ""
        if splits:
            row["metadata"]["split"] = name
        parts[name].append(row)
    for name, part in parts.items():
        if not part:
            raise MotionRAGError(
                f"split '{name}' gets no clip: {len({row['source'] for row in rows})} source videos are too few for "
                f"splits={dict(splits)}; choose other shares or another seed"
            )
    return [
        _Job(
            partial,
            f"{name}{'/' if name else ''}clips-{start // size:06d}.tar",
            part[start : start + size],
            allowed,
            options,
        )
        for name, part in parts.items()
        for start in range(0, len(part), size)
    ]


def _begin(
    partial: Path, jobs: list[_Job], plan: dict[str, Any], out: Path, overwrite: bool
) -> dict[str, dict[str, Any]]:
    """Results of the shards that an earlier, killed run of the same plan has finished; leftovers go."""
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode())
    for job in jobs:
        rows = [{key: value for key, value in row.items() if key != "place"} for row in job.rows]
        digest.update(json.dumps([job.file, rows], sort_keys=True).encode())
    plan_file = partial / "plan.json"
    same = plan_file.is_file() and read_json(plan_file) == digest.hexdigest()
    if not same and not overwrite and any((partial / "done").glob("*.json")):
        raise MotionRAGError(
            f"{partial} holds finished shards of other rows or options for out={out}; run that command again, choose "
            "another out, or throw them away with overwrite=true"
        )
    for path in partial.iterdir():
        if path.name != "lock" and not (same and path.name in ("plan.json", "done", "shards", "replaced")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in (partial / "shards").rglob(".*"):
        path.unlink()
    (partial / "done").mkdir(exist_ok=True)
    for job in jobs:
        (partial / "shards" / job.file).parent.mkdir(parents=True, exist_ok=True)
    write_json(plan_file, digest.hexdigest())
    done = {job.file: read_json(job.result) for job in jobs if job.result.is_file()}
    return {
        job.file: done[job.file]
        for job in jobs
        if job.file in done
        and done[job.file].get("videos") == _stamp(job)
        and _whole(partial / "shards" / job.file, done[job.file])
    }


def _stamp(job: _Job) -> str:
    """Sizes and times of change of the files that hold a job's videos: repaired ones are read again."""
    files = dict.fromkeys(file for row in job.rows if "place" in row for file in row["place"].files)
    stats = [(stat.st_size, stat.st_mtime_ns) for stat in map(os.stat, files)]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def _whole(tar: Path, result: Mapping[str, Any]) -> bool:
    return not result["clips"] or (tar.is_file() and tar.stat().st_size == result["bytes"])


def _run(
    jobs: list[_Job], done: Mapping[str, dict[str, Any]], workers: int, table: str, max_bad: float
) -> list[dict[str, Any]]:
    """The results of all jobs, in order; those that are not done are done now."""
    todo = [job for job in jobs if job.file not in done]
    total = sum(len(job.rows) for job in jobs)
    results: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with _map(min(workers, len(todo)), todo) as produced, Progress() as progress:
        task = progress.add_task("packing", total=total)
        seen = 0
        for job in jobs:
            result = done.get(job.file) or next(produced)
            numbers = [row["number"] for row in job.rows]
            for item in result["skipped"]:
                skipped.append(item)
                if len(skipped) > max_bad * total:
                    rows = seen + numbers.index(item["row"]) + 1
                    raise MotionRAGError(_too_many(table, skipped, rows, total, max_bad))
            results.append(result)
            seen += len(job.rows)
            progress.advance(task, len(job.rows))
    return results


@contextmanager
def _map(workers: int, jobs: list[_Job]) -> Iterator[Iterator[dict[str, Any]]]:
    """The jobs' results, in order, made by ``workers`` processes or, up to one, by this one."""
    if workers < 2:
        yield map(_write_shard, jobs)
        return
    # Spawned: a fork could inherit a lock that a library's thread holds.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        try:
            yield pool.map(_write_shard, jobs)
        except BrokenProcessPool as error:
            raise MotionRAGError(
                "a process that packs was killed (for want of memory?); finished shards are kept: run the same command "
                "again, with fewer workers"
            ) from error
        except KeyboardInterrupt:  # now, not when the shards in work are done
            for process in active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """End with the main process, however it ends, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _write_shard(job: _Job) -> dict[str, Any]:
    """Write one shard and its result: file, clips, bytes, sha256, skipped, noted, videos. Without a usable clip there is no
    file; with more unusable ones than all shards together may have, it stops and writes nothing."""
    skipped: list[dict[str, Any]] = []
    noted: list[dict[str, Any]] = []
    result: dict[str, Any] = {"file": job.file, "clips": 0, "skipped": skipped, "noted": noted}
    result["videos"] = _stamp(job)  # before they are read
    last: dict[Place, bytes] = {}

    def read(place: Place) -> bytes:
        """A video's bytes; of rows that follow one another and are spans of one video only the first reads it."""
        if place not in last:
            last.clear()
            last[place] = place.read()
        return last[place]

    try:
        with atomic_path(job.partial / "shards" / job.file) as temporary:
            with (
                temporary.open("wb") as file,
                # a fixed time: the same clips give the same bytes; PAX: names of any length
                wds.TarWriter(file, mtime=0, format="PAX_FORMAT") as tar,
            ):
                for row in job.rows:
                    try:
                        data, record = _clip(row, read, job.partial, **job.options)
                    except UnreadableVideo as error:
                        skipped.append({"row": row["number"], "video": row["video"], "reason": error.reason})
                        if len(skipped) > job.allowed:
                            raise _NoShardError from error
                        continue
                    if record.note:
                        noted.append({"id": record.id, "video": record.video, "note": record.note})
                    tar.write(
                        {"__key__": _key(record.id), _suffix(record.video): data, "json": record.to_json()}
                    )
                    result["clips"] += 1
            if not result["clips"]:
                raise _NoShardError
            result |= {"bytes": temporary.stat().st_size, "sha256": sha256(temporary)}
    except _NoShardError:
        result["clips"] = 0
        (job.partial / "shards" / job.file).unlink(missing_ok=True)  # of videos that have changed since
    if len(skipped) <= job.allowed:
        write_json(job.result, result)
    return result


def _clip(
    row: dict[str, Any],
    read: Callable[[Place], bytes],
    scratch: Path,
    short_side: int | None,
    keep_still: bool,
    few_frames: int,
) -> tuple[bytes, ClipRecord]:
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
    start, end = (0.0 if span["start_sec"] is None else span["start_sec"]), span["end_sec"]
    if start < 0 or (end is not None and end <= start):
        told = ", ".join(f"{column} {value:g}" for column, value in span.items() if value is not None)
        raise UnreadableVideo(name, f"no span of a video: {told}")
    if "bad" in row:
        raise UnreadableVideo(name, row["bad"])
    data = read(row["place"])
    if short_side is None:
        clip = read_clip(data, **span, frames=16, short_side=64)
    else:
        clip = read_clip(data, **span, short_side=short_side)
        if min(clip.width, clip.height) < short_side:  # never enlarge
            clip = read_clip(data, **span)
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
        video=recorded(name),
        fps=round(clip.fps, 6),
        frames=clip.decoded,
        width=clip.width,
        height=clip.height,
        duration=round(clip.duration, 6),
        note="; ".join(notes),
        metadata=row["metadata"],
    )
    return (data, record) if short_side is None else _encoded(record, clip, scratch)


def _encoded(record: ClipRecord, clip: Clip, scratch: Path) -> tuple[bytes, ClipRecord]:
    """The clip's frames as mp4, and the record of that: the span has become the whole file."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        data = write_mp4(Path(folder) / "clip.mp4", clip.frames, clip.fps or 1).read_bytes()
    height, width = (side + side % 2 for side in clip.frames.shape[1:3])  # as write_mp4 pads
    metadata = dict(record.metadata)
    if record.start_sec is not None or record.end_sec is not None:
        metadata["cut_from"] = [record.start_sec, record.end_sec]
    video = str(PurePosixPath(record.video).with_suffix(".mp4"))
    return data, replace(
        record, video=video, width=width, height=height, start_sec=None, end_sec=None, metadata=metadata
    )


def _write_indexes(
    folder: Path,
    jobs: list[_Job],
    results: list[dict[str, Any]],
    about: dict[str, Any],
    splits: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Write ``index.json`` and the clip table of every split and return the index of all."""
    indexes = {}
    for name in splits or [""]:
        prefix = f"{name}/" if name else ""
        ours = [pair for pair in zip(jobs, results, strict=True) if pair[0].file.startswith(prefix)]
        shards = [
            {key: result[key] for key in ("file", "clips", "bytes", "sha256")}
            for _, result in ours
            if result["clips"]
        ]
        index = about | {
            "rows": sum(len(job.rows) for job, _ in ours),
            "clips": sum(shard["clips"] for shard in shards),
            "shards": shards,
            **{key: [item for _, result in ours for item in result[key]] for key in ("skipped", "noted")},
        }
        if not shards:
            of = f" of split '{name}'" if name else ""
            raise MotionRAGError(f"no usable clip{of}; {_list(index['skipped'])}")
        indexes[name] = index
        own = [shard | {"file": shard["file"].removeprefix(prefix)} for shard in shards]
        table = write_table(folder / name, [shard["file"] for shard in own])
        own_part = {"shards": own, "table": table} | ({"split": name} if name else {})
        write_json(folder / name / INDEX, index | own_part)
    if not splits:
        return indexes[""]
    merged = dict(about)
    for key, start in {"rows": 0, "clips": 0, "shards": [], "skipped": [], "noted": []}.items():
        merged[key] = sum((index[key] for index in indexes.values()), start=start)
    return merged | {
        "splits": {name: {key: index[key] for key in ("rows", "clips")} for name, index in indexes.items()}
    }


@contextmanager
def _room_in(partial: Path, out: Path) -> Iterator[None]:
    """Say in one line that the disk is full, and what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        kept = len(list((partial / "done").glob("*.json")))
        told = f" ({kept} finished shard(s) are kept in {partial.name})" if kept else ""
        raise MotionRAGError(
            f"out={out}: {error.strerror or os.strerror(error.errno)}; make room and run the same command again{told}"
        ) from error


def _moves(clip: Clip) -> bool:
    """Whether any of 16 frames differs from the first by more than noise, at 64 pixels."""
    frames = clip.frames[uniform_indices(len(clip.frames), min(16, len(clip.frames)))]
    count, height, width, _ = frames.shape
    block = max(1, min(height, width) // 64)  # means of blocks: the noise of single pixels is larger
    rows, columns = height // block, width // block
    frames = frames[:, : rows * block, : columns * block].reshape(count, rows, block, columns, block, 3)
    small = frames.mean((2, 4), dtype=np.float32)
    return bool(np.abs(small - small[:1]).max() > _NOISE)


def _key(clip_id: str) -> str:
    """A member name without dots (WebDataset splits at the first) and slashes, one for each id."""
    return quote(clip_id, safe=" ").replace(".", "%2E")


def _suffix(video: str) -> str:
    suffix = Path(video).suffix.lstrip(".").lower()
    return suffix if suffix.isalnum() and suffix != "json" else "video"


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise unless ``out`` is free, or holds nothing but shards and may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (_only_shards(out) or (out.is_dir() and all(_only_shards(path) for path in out.iterdir()))):
        raise MotionRAGError(f"out={out} is there and is not a folder of shards; choose another place")
    if not overwrite:
        raise MotionRAGError(f"out={out} holds shards already; choose another folder or add overwrite=true")


def _only_shards(folder: Path) -> bool:
    return (folder / INDEX).is_file() and all(
        path.name in (INDEX, CLIPS) or path.suffix == ".tar" for path in folder.iterdir()
    )


def _too_many(table: str, skipped: list[dict], seen: int, rows: int, max_bad: float) -> str:
    return (
        f"{table}: {len(skipped)} of the first {seen} rows ({rows} in all) are unusable, more than "
        f"max_bad={max_bad:g} of all rows allows: {_list(skipped)}; repair them or raise max_bad"
    )


def _list(skipped: list[dict], limit: int = 5) -> str:
    shown = ", ".join(f"{item['video']} ({item['reason']})" for item in skipped[:limit])
    return shown + (f" and {len(skipped) - limit} more" if len(skipped) > limit else "")


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in left_out.items())
