"""From a token store to a retrieval database: clip table, caption index, neighbours and, last, the manifest."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from motionrag.errors import MotionRAGError
from motionrag.io import put_in_place, sha256, write_json
from motionrag.retrieval import catalog
from motionrag.retrieval.bank import FEATURES, PART_FILE, PARTS, Part, write_npy, writer_lock
from motionrag.retrieval.database import (
    FILES,
    MANIFEST,
    SCHEMA,
    STORE,
    gather,
    read_manifest,
    read_store,
    signed,
)
from motionrag.retrieval.index import CaptionIndex, build_index
from motionrag.retrieval.neighbours import Captions, nearest


@dataclass
class Entry:
    """A part of a database that is being written: its first number, and the rows that were removed from it."""

    part: Part
    start: int
    removed: list[int] = field(default_factory=list)

    @property
    def rows(self) -> np.ndarray:
        """Rows of the clips that are there."""
        return np.setdiff1d(np.arange(len(self.part)), self.removed)

    def clips(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers and records of the clips that are there."""
        clips = self.part.read_clips()  # read every time: a million of them fill the memory
        for row in self.rows.tolist():
            yield self.start + row, clips[row]


@dataclass
class Contents:
    """All parts of a database that is being written."""

    entries: list[Entry]

    def clips(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers and records of the clips that are there, numbers rising."""
        for entry in self.entries:
            yield from entry.clips()

    def fetch(self, numbers: np.ndarray) -> np.ndarray:
        """Caption embeddings (m,W) of clip numbers (m,)."""
        starts = np.array([entry.start for entry in self.entries])
        return gather(lambda index: self.entries[index].part, starts, numbers, Part.captions)

    def captions(self, index: CaptionIndex, near_duplicate: float | None) -> Captions:
        """What neighbours are searched in."""
        numbers, sources = [], []
        for number, clip in self.clips():
            numbers.append(number)
            sources.append(clip["source"])
        _, groups = np.unique(np.array(sources), return_inverse=True)
        return Captions(index, self.fetch, np.array(numbers, np.int64), groups, near_duplicate)

    def check(self, path: Path) -> None:
        """Raise :class:`MotionRAGError` if there is no clip, or one that comes twice."""
        seen: set[str] = set()
        for _, clip in self.clips():
            if clip["id"] in seen:
                raise MotionRAGError(
                    f"{path}: clip '{clip['id']}' is in the store twice; give the clips unique ids and pack again"
                )
            seen.add(clip["id"])
        if not seen:
            raise MotionRAGError(
                f"{path}: no clip in any of its {len(self.entries)} parts; encode shards with usable clips"
            )


def build(
    path: str | Path,
    neighbours: int = 16,
    kind: str = "auto",
    memory_gb: float = 4.0,
    recall: float = 0.99,
    near_duplicate: float | None = None,
) -> dict[str, Any]:
    """Turn a complete token store into a database: clip table, index, neighbours and, last, the manifest (returned).

    neighbours: how many nearest clips of other sources to keep for each clip. kind: of index, or auto (see
    ``choose_kind``, which memory_gb is for). recall: share of the true 9 nearest captions (0..1) that an
    approximate index has to find, measured on captions of the database. near_duplicate: captions whose cosine
    reaches it are no neighbours of one another; None: only clips of one source are not.

    Clips added or removed since stay so. Checks the checksum of every file. Raises :class:`MotionRAGError` if
    shards are not encoded yet, clips appear twice, files are damaged, or another process writes.
    """
    read_store(Path(path))
    with writer_lock(path):
        return build_locked(Path(path), neighbours, kind, memory_gb, recall, near_duplicate)


def build_locked(
    path: Path,
    neighbours: int = 16,
    kind: str = "auto",
    memory_gb: float = 4.0,
    recall: float = 0.99,
    near_duplicate: float | None = None,
) -> dict[str, Any]:
    """:func:`build`, by who holds the writer's lock."""
    if neighbours < 1:
        raise MotionRAGError(f"neighbours={neighbours}: expected at least 1")
    if near_duplicate is not None and not 0 < near_duplicate <= 1:
        raise MotionRAGError(f"near_duplicate={near_duplicate}: expected a cosine above 0, up to 1, or null")
    contents = Contents(read_entries(path))
    for entry in contents.entries:
        entry.part.verify()
    contents.check(path)
    numbers = np.concatenate([entry.start + entry.rows for entry in contents.entries])
    index, about = build_index(numbers, contents.fetch, kind, memory_gb, recall)
    captions = contents.captions(index, near_duplicate)
    table = nearest(captions, captions.numbers, neighbours)
    return publish(path, contents, index, about, table, near_duplicate)


def read_entries(path: Path) -> list[Entry]:
    """The parts of a store (all its shards) and of the database it is already (what was added or removed)."""
    store = read_store(path)
    names = [Path(shard["file"]).stem for shard in store["shards"]]
    missing = [name for name in names if not (path / PARTS / name).is_dir()]
    if missing:
        raise MotionRAGError(
            f"{path}: {len(missing)} of {len(names)} shards are not encoded yet, the first is {missing[0]}; "
            f"run motionrag encode again with out={path}, it continues where it stopped"
        )
    before = read_manifest(path)["parts"] if (path / MANIFEST).is_file() else []
    removed = {part["name"]: part for part in before}
    entries, start = [], 0
    for name in dict.fromkeys([*names, *removed]):
        part = Part(path / PARTS / name)
        old = removed.get(name, {})
        same = old.get("files") == part.about["files"]  # else it was encoded anew since
        entries.append(Entry(part, start, list(old.get("removed", [])) if same else []))
        start += len(part)
    return entries


def publish(
    path: Path,
    contents: Contents,
    index: CaptionIndex,
    about_index: Mapping[str, Any],
    table: np.ndarray,
    near_duplicate: float | None,
) -> dict[str, Any]:
    """Write clip table, index and neighbours under new names, the manifest that names them, and remove the old.

    table: NEIGHBOUR (n,k), a line for each clip. The caller holds the writer's lock.
    """
    store = read_store(path)
    full = next(entry.part for entry in contents.entries if len(entry.part))
    columns = catalog.schema(clip for _, clip in contents.clips())
    manifest = signed(
        {
            "schema": SCHEMA,
            "clips": len(table),
            "encoders": store["encoders"],
            "sampling": store["sampling"],
            "shapes": {name: list(full.array(name).shape[1:]) for name in (*FEATURES, "caption")},
            "stored": _stored([entry.part for entry in contents.entries]),
            "parts": [
                {
                    "name": entry.part.path.name,
                    "clips": len(entry.part),
                    "start": entry.start,
                    "removed": [int(row) for row in entry.removed],
                    "about": sha256(entry.part.path / PART_FILE),
                    "files": entry.part.about["files"],
                }
                for entry in contents.entries
            ],
            "skipped": sum(len(entry.part.about["skipped"]) for entry in contents.entries),
            "store": sha256(path / STORE),
            "catalog": _put(path, "catalog", lambda file: catalog.write(file, contents.clips(), columns)),
            "index": {**about_index, **_put(path, "index", index.save)},
            "neighbours": {
                "k": table.shape[1],
                "near_duplicate": near_duplicate,
                **_put(path, "neighbours", lambda file: write_npy(file, table)),
            },
        }
    )
    write_json(path / MANIFEST, manifest)
    kept = {manifest[role]["file"] for role in FILES}
    for name in FILES.values():  # what earlier manifests named, and what killed writers left
        stem, suffix = Path(name).stem, Path(name).suffix
        for file in [*path.glob(f"{stem}*{suffix}"), *path.glob(f".{stem}*{suffix}")]:
            if file.name not in kept:
                file.unlink()
    return manifest


def _stored(parts: Sequence[Part]) -> dict[str, Any]:
    """In which precisions features are stored, and the relative error (root mean square over clips) that this makes."""
    told = [part.about for part in parts if "error" in part.about]  # not of parts of earlier versions
    clips = sum(about["clips"] for about in told)
    error = {
        name: float(f"{(sum(a['clips'] * a['error'][name] ** 2 for a in told) / clips) ** 0.5:.2e}")
        for name in FEATURES
        if clips
    }
    precisions = {part.about.get("precision", "fp16") for part in parts if len(part)}
    return {"precision": sorted(precisions), "error": error}


def _put(path: Path, role: str, write: Callable[[Path], None]) -> dict[str, str]:
    """Write a file under a name that holds its checksum; returns both."""
    stem, suffix = Path(FILES[role]).stem, Path(FILES[role]).suffix
    temporary = path / f".{stem}-{secrets.token_hex(4)}{suffix}"
    try:
        write(temporary)
        checksum = sha256(temporary)
        put_in_place(temporary, path / f"{stem}-{checksum[:12]}{suffix}")
    finally:
        temporary.unlink(missing_ok=True)
    return {"file": f"{stem}-{checksum[:12]}{suffix}", "sha256": checksum}
