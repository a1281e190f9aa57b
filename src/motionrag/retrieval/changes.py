"""Changes to a database that is there: add, replace and remove clips, merge databases, and check one.

All changes keep the index (nothing is trained again) and recompute only the neighbours that they touch. A
change that is killed leaves the database as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motionrag.errors import MotionRAGError
from motionrag.io import put_in_place, sha256, write_json
from motionrag.retrieval.bank import PART_FILE, PARTS, Part, PartWriter, writer_lock
from motionrag.retrieval.building import Contents, Entry, build_locked, publish, read_entries
from motionrag.retrieval.database import (
    FILES,
    MANIFEST,
    RESAMPLER,
    STORE,
    RetrievalDatabase,
    about_encoder,
    about_motion,
    compare,
    difference,
    read_manifest,
    read_store,
    role_name,
)
from motionrag.retrieval.index import CaptionIndex
from motionrag.retrieval.neighbours import nearest, updated

ADDED = "added-"  # parts that no shard of the store stands for


def add(path: str | Path, others: Iterable[str | Path], replace: bool = False) -> dict[str, Any]:
    """Copy the clips of other databases or token stores into the database ``path``; returns the new manifest.

    replace: a clip whose id is there already takes its place. Raises :class:`MotionRAGError` for an id that is
    there otherwise, features of other encoders, or another process that writes.
    """
    path = Path(path)
    with writer_lock(path), _Change(path) as change:
        for other in map(Path, others):
            change.add(other, replace)
        return change.publish()


def remove(path: str | Path, ids: Collection[str]) -> dict[str, Any]:
    """Remove clips from the database ``path``; returns the new manifest.

    Their features are not found any more; the disk space comes back with the change that follows when all clips of
    a part that was added are gone, or with :func:`merge`. Raises :class:`MotionRAGError` for unknown ids, all ids or
    another process that writes.
    """
    path = Path(path)
    with writer_lock(path), _Change(path) as change:
        change.remove(ids)
        return change.publish()


def merge(path: str | Path, others: Sequence[str | Path], **settings: Any) -> dict[str, Any]:
    """Make a new database ``path`` of all clips of others; returns its manifest.

    settings: of :func:`motionrag.retrieval.building.build`. Raises :class:`MotionRAGError` if ``path`` is
    there, clips share ids or encoders differ; nothing is then left at ``path``.
    """
    path = Path(path)
    if not others:
        raise MotionRAGError("others=[]: expected the databases to merge, others=[A,B]")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise MotionRAGError(
            f"db={path} is there already; merge into a new folder, or use motionrag index add"
        )
    first = read_store(Path(others[0]))
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with writer_lock(partial):
        for found in partial.iterdir():  # of a run that was killed
            shutil.rmtree(found, ignore_errors=True)
        try:
            entries = []
            for other in map(Path, others):
                check_same_encoders(path, first, other, read_store(other))
                entries += [entry for entry in read_entries(other) if len(entry.rows)]
            Contents(entries).check(path)
            parts = [_copy(entry, partial, f"merged-{n:06d}") for n, entry in enumerate(entries)]
            shards = [{"file": part.path.name, "clips": len(part)} for part in parts]
            write_json(partial / STORE, {**first, "shards": shards})
            build_locked(partial, **settings)
            if path.exists():
                path.rmdir()
            put_in_place(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return read_manifest(path)


def verify(path: str | Path) -> dict[str, int]:
    """Compare every file of a database with its checksum; returns counts: clips, files, bytes.

    Raises :class:`MotionRAGError` naming the first damaged file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    named = {path / manifest[role]["file"]: manifest[role]["sha256"] for role in FILES if role in manifest}
    if "store" in manifest:
        named[path / STORE] = manifest["store"]
    for part in manifest["parts"]:
        folder = path / PARTS / part["name"]
        if "about" in part:
            named[folder / PART_FILE] = part["about"]
        named |= {folder / name: file["sha256"] for name, file in part["files"].items()}
    for file, checksum in named.items():
        if not file.is_file() or sha256(file) != checksum:
            in_store = file.parent != path
            raise MotionRAGError(
                f"{file} is {'damaged: its checksum is not the one in ' + MANIFEST if file.is_file() else 'missing'}; "
                + (f"copy it again, or delete {file.parent} and " if in_store else "copy it again, or ")
                + (
                    f"run motionrag encode and index db={path}"
                    if in_store
                    else f"run motionrag index db={path}"
                )
            )
    db = RetrievalDatabase(path)
    if len(db.index) != len(db):
        raise MotionRAGError(
            f"{path}: {len(db.index)} clips in its index, {len(db)} in {MANIFEST}; run motionrag index db={path}"
        )
    return {"clips": len(db), "files": len(named), "bytes": sum(file.stat().st_size for file in named)}


def check_same_encoders(path: Path, store: dict[str, Any], other: Path, given: dict[str, Any]) -> None:
    """Raise :class:`MotionRAGError` unless the features of two stores were made alike; names both encoders."""
    if any(
        RESAMPLER in a["encoders"] and RESAMPLER not in b["encoders"]
        for a, b in ((store, given), (given, store))
    ):
        raise MotionRAGError(
            f"{other} holds {about_motion(given['encoders'])}, {path} {about_motion(store['encoders'])}; encode its shards "
            f"again {'with that resampler_weights' if RESAMPLER in store['encoders'] else 'without resampler_weights'}"
        )
    for role, identity in store["encoders"].items():
        if key := difference(identity, given["encoders"][role]):
            raise MotionRAGError(
                f"{other} was encoded with the {role_name(role)} {about_encoder(given['encoders'][role])}, {path} holds "
                f"features of {about_encoder(identity)}: they differ in {key}; encode its shards again with the same"
            )
    if store["sampling"] != given["sampling"]:
        raise MotionRAGError(
            f"{other} samples its clips as {given['sampling']}, {path} as {store['sampling']}; encode its shards again"
        )


class _Change:
    """A database that is being changed; forgets the parts it copied unless it is published."""

    def __init__(self, path: Path) -> None:
        self.path, self.manifest, self.store = path, read_manifest(path), read_store(path)
        if "catalog" not in self.manifest:
            raise MotionRAGError(
                f"db={path} was indexed by an older version; run motionrag index db={path} first"
            )
        self.entries = [
            Entry(Part(path / PARTS / part["name"], about=part.get("about")), part["start"], part["removed"])
            for part in self.manifest["parts"]
        ]
        self.numbers = {clip["id"]: number for entry in self.entries for number, clip in entry.clips()}
        self.before = np.array(sorted(self.numbers.values()), np.int64)
        self.gone: list[int] = []
        self.copied: list[Path] = []

    def __enter__(self) -> _Change:
        known = {part["name"] for part in self.manifest["parts"]}
        for folder in (self.path / PARTS).glob(f"{ADDED}*"):  # of a change that was killed, or emptied by one
            if folder.name not in known:
                shutil.rmtree(folder)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            for folder in self.copied:
                shutil.rmtree(folder, ignore_errors=True)

    def add(self, other: Path, replace: bool) -> None:
        """Copy all parts of another store or database."""
        check_same_encoders(self.path, self.store, other, read_store(other))
        for entry in read_entries(other):
            clips = [clip for _, clip in entry.clips()]
            twice = [clip["id"] for clip in clips if clip["id"] in self.numbers]
            if twice and not replace:
                raise MotionRAGError(
                    f"{len(twice)} clips of {other} are in {self.path} already, e.g. '{twice[0]}'; replace=true "
                    "takes the new ones"
                )
            if not clips:
                continue
            if twice:
                self.remove(twice)
            last = self.entries[-1]
            used = [int(e.part.path.name.removeprefix(ADDED)) for e in self.entries if _added(e)]
            part = _copy(entry, self.path, f"{ADDED}{max(used, default=-1) + 1:06d}")
            self.copied.append(part.path)
            new = Entry(part, last.start + len(last.part))
            self.entries.append(new)
            self.numbers |= {clip["id"]: number for number, clip in new.clips()}

    def remove(self, ids: Collection[str]) -> None:
        """Mark clips as removed."""
        unknown = [clip_id for clip_id in ids if clip_id not in self.numbers]
        if unknown:
            raise MotionRAGError(
                f"{self.path}: no clip '{unknown[0]}' among its {len(self.numbers)} clips"
                f"{f' ({len(unknown)} such ids)' if len(unknown) > 1 else ''}"
            )
        starts = np.array([entry.start for entry in self.entries])
        for clip_id in dict.fromkeys(ids):
            number = self.numbers.pop(clip_id)
            entry = self.entries[int(np.searchsorted(starts, number, side="right")) - 1]
            entry.removed = sorted([*entry.removed, number - entry.start])
            self.gone.append(number)

    def publish(self) -> dict[str, Any]:
        """Update index and neighbours and write the new manifest."""
        if not self.numbers:
            raise MotionRAGError(f"db={self.path} would have no clip left; delete the folder instead")
        for role in ("index", "neighbours"):  # else damage would get a checksum of its own
            file = self.path / self.manifest[role]["file"]
            compare(file, file, self.manifest[role]["sha256"])
        about, table = self.manifest["index"], np.load(self.path / self.manifest["neighbours"]["file"])
        empty = [entry for entry in self.entries if _added(entry) and not len(entry.rows)]
        # the last part stays: the next number follows from it
        self.entries = [e for e in self.entries if e not in empty or e is self.entries[-1]]
        contents = Contents(self.entries)
        index = CaptionIndex.load(self.path / about["file"], mmap=False, fetch=contents.fetch)
        now = np.array(sorted(self.numbers.values()), np.int64)
        gone, new = np.setdiff1d(self.before, now), np.setdiff1d(now, self.before)
        if len(gone):
            index.remove(gone)
        for start in range(0, len(new), 8192):
            index.add(contents.fetch(new[start : start + 8192]), new[start : start + 8192])
        captions = contents.captions(index, self.manifest["neighbours"].get("near_duplicate"))
        stay = np.isin(self.before, now)
        table = updated(captions, self.before[stay], table[stay], gone, new)
        table = np.concatenate([table, nearest(captions, new, table.shape[1])])
        about = {key: value for key, value in about.items() if key not in ("file", "sha256")}
        near_duplicate = self.manifest["neighbours"].get("near_duplicate")
        # a part that the manifest does not name any more goes with the next change: readers may have it open
        return publish(self.path, contents, index, about, table, near_duplicate)


def _added(entry: Entry) -> bool:
    return entry.part.path.name.startswith(ADDED)


def _copy(entry: Entry, db: Path, name: str) -> Part:
    """Copy a part's clips, without those removed, into ``db``; the checksums of what is copied are compared."""
    entry.part.verify()
    if len(entry.rows) == len(entry.part):
        partial = db / PARTS / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for file in entry.part.path.iterdir():
                shutil.copy(file, partial)
            put_in_place(partial, db / PARTS / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    else:
        about = {key: value for key, value in entry.part.about.items() if key not in ("clips", "files")}
        with PartWriter(db, name, about) as writer:
            writer.copy(entry.part, entry.rows)
    return Part(db / PARTS / name)
