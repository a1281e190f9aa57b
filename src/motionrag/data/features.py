"""Feature shards: what the frozen networks of Stage 1 make of each clip, packed as clips are.

Same tars, table and index as `motionrag pack` writes, with `ID.safetensors` (fields of MotionBatch, without the batch
dimension) in place of the video, and `features` in the index to say which networks and which frames they are of. So
they are streamed, shuffled, checked and resumed by the same code.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import webdataset as wds
from rich.progress import track
from torch import Tensor

from motionrag.data.batch import MotionBatch
from motionrag.data.datamodule import ShardClips, batch_of
from motionrag.data.members import write_table
from motionrag.data.shards import INDEX, ClipRecord
from motionrag.data.stream import Shards, locked
from motionrag.data.video import UnreadableVideo
from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path, put_in_place, read_json, sha256, write_json
from motionrag.retrieval import catalog


def shards_fingerprint(shards: Shards) -> str:
    """A short name for the contents of shards, the same wherever they lie."""
    digest = hashlib.sha256()
    for shard in shards.shards.values():
        digest.update(shard["sha256"].encode())
    return digest.hexdigest()[:16]


def write_features(
    out: str | Path,
    clips: ShardClips,
    encode: Callable[[MotionBatch], Mapping[str, Tensor]],
    about: Mapping[str, Any],
    batch_size: int = 8,
    max_bad: float = 0.1,
) -> dict[str, Any]:
    """Write the features of all clips, a shard for each of theirs, and return the index; continues where a killed run
    on the same clips with the same `about` stopped, redoing at most one shard.

    Args:
        out: folder that is to be.
        clips: what is encoded.
        encode: batch -> fields of MotionBatch.
        about: JSON-able; kept in the index under `features`, with the clips' `shards_fingerprint` as `shards`.
        batch_size: clips encoded together.
        max_bad: share of clips that may be unreadable before it stops with an error.

    Raises MotionRAGError for several frame rates or samples (which one is drawn in training), an `out` that is in the
    way, and too many unreadable clips.
    """
    out = Path(out)
    if len(clips.rates) > 1:
        raise MotionRAGError(
            f"features hold one frame rate, clips.fps has {len(clips.rates)}: choose one of them"
        )
    if clips.samples > 1:
        raise MotionRAGError(f"features hold one sample of each clip, not clips.samples={clips.samples}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock")):  # of several processes the others wait for the first
        if (out / INDEX).is_file():
            return read_json(out / INDEX)
        return _write_all(out, clips, encode, dict(about), batch_size, max_bad)


def _write_all(
    out: Path,
    clips: ShardClips,
    encode: Callable[[MotionBatch], Mapping[str, Tensor]],
    about: dict[str, Any],
    batch_size: int,
    max_bad: float,
) -> dict[str, Any]:
    if out.exists():
        raise MotionRAGError(f"features={out} is there and holds no {INDEX}: choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    # finished shards are kept only of the same clips, too
    plan = {"about": about, "clips": [shard["sha256"] for shard in clips.stream.shards.values()]}
    if not (partial / "plan.json").is_file() or read_json(partial / "plan.json") != plan:
        shutil.rmtree(partial, ignore_errors=True)
    (partial / "done").mkdir(parents=True, exist_ok=True)
    write_json(partial / "plan.json", plan)
    numbers, skipped, shards = clips.stream.numbers(), [], []
    for number, file in enumerate(track(clips.stream.shards, description="features")):
        done = partial / "done" / f"{file}.json"
        if not done.is_file():
            bad: list[dict[str, str]] = []
            with atomic_path(partial / "out" / file) as tar:
                count = _write(
                    tar, clips, [i for i, n in enumerate(numbers) if n == number], encode, batch_size, bad
                )
            path = partial / "out" / file
            about_shard = {"file": file, "clips": count, "bytes": path.stat().st_size, "sha256": sha256(path)}
            write_json(done, {"shard": about_shard, "skipped": bad})
        result = read_json(done)
        skipped += result["skipped"]
        if len(skipped) > max_bad * len(clips.ids):
            raise MotionRAGError(
                f"{len(skipped)} of {len(clips.ids)} clips cannot be read, more than max_bad={max_bad:g} allows, the "
                f"first: {skipped[0]['id']}: {skipped[0]['reason']}"
            )
        if result["shard"]["clips"]:
            shards.append(result["shard"])
        else:
            (partial / "out" / file).unlink(missing_ok=True)
    index = {
        **clips.stream.index,
        "clips": sum(shard["clips"] for shard in shards),
        "shards": shards,
        "table": write_table(partial / "out", [shard["file"] for shard in shards]),
        "skipped": skipped,
        "features": about | {"shards": shards_fingerprint(clips.stream)},
    }
    write_json(partial / "out" / INDEX, index)
    put_in_place(partial / "out", out)
    shutil.rmtree(partial)
    return index


def _write(
    tar: Path,
    clips: ShardClips,
    rows: list[int],
    encode: Callable[[MotionBatch], Mapping[str, Tensor]],
    batch_size: int,
    bad: list[dict[str, str]],
) -> int:
    """Write one shard and return how many clips it holds; unreadable ones go to `bad`."""
    count = 0
    names = {field.name for field in fields(ClipRecord)}
    with wds.TarWriter(str(tar), mtime=0, format="PAX_FORMAT") as writer:
        for start in range(0, len(rows), batch_size):
            read, records = [], []
            for row in rows[start : start + batch_size]:
                try:
                    read.append(clips.read(row))
                    records.append(catalog.record(clips.table, row))
                except UnreadableVideo as error:
                    bad.append({"id": clips.ids[row], "reason": error.reason})
            if not read:
                continue
            with torch.no_grad():
                encoded = {k: v.cpu() for k, v in encode(batch_of(read, list(range(len(read))))).items()}
            for place, record in enumerate(records):
                own = {name: value[place].clone().contiguous() for name, value in encoded.items()}
                told = ClipRecord(**{name: value for name, value in record.items() if name in names})
                key = record["member"].partition(".")[0]
                writer.write(
                    {"__key__": key, "safetensors": safetensors.torch.save(own), "json": told.to_json()}
                )
            count += len(records)
    return count
