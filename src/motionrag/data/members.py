"""Where every clip lies in the shards: an Arrow table beside them, with a checksum of each clip's bytes.

With it a clip is read by one seek, nothing is unpacked or searched, and a flipped byte is found before it is decoded.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from motionrag.data.shards import ClipRecord
from motionrag.errors import MotionRAGError
from motionrag.io import sha256
from motionrag.retrieval import catalog

CLIPS = "clips.arrow"


def write_table(folder: Path, shards: Sequence[str]) -> dict[str, Any]:
    """Write the table of the shards (names of files in `folder`); returns {file, bytes, sha256} for the index."""
    rows = [row for shard in shards for row in members(folder / shard, checksums=True)]
    catalog.write(folder / CLIPS, enumerate(rows), catalog.schema(rows))
    return {"file": CLIPS, "bytes": (folder / CLIPS).stat().st_size, "sha256": sha256(folder / CLIPS)}


def scan(folder: Path, shards: Sequence[str]) -> pa.Table:
    """The same in memory and without checksums, for shards packed before there was a table."""
    return catalog.table(enumerate(row for shard in shards for row in members(folder / shard)))


def members(shard: Path, checksums: bool = False) -> Iterator[dict[str, Any]]:
    """One dict per clip: the fields of its ClipRecord, and member, shard, offset, bytes, sha256 of what it holds.

    Raises MotionRAGError naming a shard that cannot be read or a clip that lacks one of its two members.
    """
    data: dict[str, dict[str, Any]] = {}
    records: dict[str, ClipRecord] = {}
    try:
        with tarfile.open(shard) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                if suffix == "json":
                    records[key] = ClipRecord.from_json(tar.extractfile(info).read())
                    continue
                data[key] = {"member": info.name, "shard": shard.name, "offset": info.offset_data}
                data[key] |= {"bytes": info.size, "sha256": None}
                if checksums:
                    data[key]["sha256"] = hashlib.file_digest(tar.extractfile(info), "sha256").hexdigest()
    except (tarfile.TarError, OSError, ValueError, TypeError) as error:
        raise MotionRAGError(f"shard {shard} cannot be read ({error}): pack the clips again") from error
    for key in data.keys() - records.keys():
        raise MotionRAGError(f"shard {shard}: {data[key]['member']} has no JSON: pack the clips again")
    for key, record in records.items():
        if key not in data:
            raise MotionRAGError(f"shard {shard}: clip {record.id} has no video: pack the clips again")
        yield asdict(record) | data[key]
