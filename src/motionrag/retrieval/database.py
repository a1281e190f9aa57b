"""A retrieval database: token store, caption index and manifest in one folder.

The folder can be copied, renamed and opened read-only by many processes; nothing in it is an absolute path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path, read_json, sha256, write_json
from motionrag.retrieval.bank import PARTS, Part
from motionrag.retrieval.index import CaptionIndex

SCHEMA = "motionrag.database/1"
MANIFEST = "manifest.json"
STORE = "store.json"
INDEX = "index.faiss"
NEIGHBOURS = "neighbours.npy"


class Identified(Protocol):
    """An encoder as a database knows it."""

    @property
    def identity(self) -> Mapping[str, Any]: ...


class RetrievalDatabase:
    """Read a database. Clips are asked for by id; features come as float32 tensors.

    path: the folder. mmap: map features and index into memory instead of loading them.
    Raises :class:`MotionRAGError` when the folder is not a complete database.

    Can be pickled (a worker process maps the files anew); search only in the main process.
    """

    def __init__(self, path: str | Path, mmap: bool = True) -> None:
        self.path = Path(path)
        self.mmap = mmap
        self.manifest = _read_manifest(self.path)
        self._parts = [Part(self.path / PARTS / part["name"], mmap) for part in self.manifest["parts"]]
        self._places = [
            (part, row) for part in range(len(self._parts)) for row in range(len(self._parts[part].clips))
        ]
        self.ids: list[str] = [clip["id"] for part in self._parts for clip in part.clips]
        self._rows = {clip_id: row for row, clip_id in enumerate(self.ids)}
        if len(self.ids) != self.manifest["clips"]:
            raise MotionRAGError(
                f"{self.path}: {len(self.ids)} clips in its parts, {self.manifest['clips']} in {MANIFEST}; "
                f"run motionrag index db={self.path} again"
            )

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.mmap)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._rows

    def row(self, clip_id: str) -> int:
        """Number of a clip, 0..len-1. Raises :class:`MotionRAGError` for an unknown id."""
        if clip_id not in self._rows:
            raise MotionRAGError(f"{self.path}: no clip '{clip_id}' among its {len(self)} clips")
        return self._rows[clip_id]

    def clip(self, clip_id: str) -> dict[str, Any]:
        """What the shards said about a clip: id, caption, motion_caption, source, action, duration, ..."""
        part, row = self._places[self.row(clip_id)]
        return self._parts[part].clips[row]

    def caption(self, clip_id: str) -> str:
        return self.clip(clip_id)["caption"]

    def motion_caption(self, clip_id: str) -> str:
        return self.clip(clip_id)["motion_caption"]

    def motion_features(self, ids: Sequence[str]) -> torch.Tensor:
        """Motion features (k,N,D) float32 of the clips, in the order of ``ids``."""
        return self._features("motion", ids)

    def appearance_features(self, ids: Sequence[str]) -> torch.Tensor:
        """Appearance features (k,M,E) float32 of the clips' first frames, in the order of ``ids``."""
        return self._features("appearance", ids)

    def _features(self, name: str, ids: Sequence[str]) -> torch.Tensor:
        shape = self.manifest["shapes"][name]
        values = np.empty((len(ids), *shape), dtype=np.float32)
        for slot, clip_id in enumerate(ids):
            part, row = self._places[self.row(clip_id)]
            values[slot] = getattr(self._parts[part], name)[row]
        return torch.from_numpy(values)

    @cached_property
    def caption_embeddings(self) -> np.ndarray:
        """Embeddings (n,W) float32 of the motion captions, in the order of ``ids``."""
        return np.concatenate([part.caption for part in self._parts if part.clips])

    def preview(self, clip_id: str) -> np.ndarray:
        """A few frames of the clip, uint8 (P,h,w,3), spread over its length, first and last included."""
        part, row = self._places[self.row(clip_id)]
        return self._parts[part].preview(row)

    @cached_property
    def index(self) -> CaptionIndex:
        """The caption index, opened when first needed."""
        return CaptionIndex.load(self.path / INDEX, self.mmap)

    @cached_property
    def _neighbours(self) -> np.ndarray:
        return np.load(self.path / NEIGHBOURS, mmap_mode="r" if self.mmap else None)

    def neighbours(self, clip_id: str, k: int) -> list[str]:
        """The ``k`` nearest clips of other sources by motion caption, nearest first; needs no search.

        Raises :class:`MotionRAGError` if the database has fewer, or ``index`` stored fewer.
        """
        if k > self._neighbours.shape[1]:
            raise MotionRAGError(
                f"k={k}, but {self.path} keeps {self._neighbours.shape[1]} neighbours per clip; run "
                f"motionrag index db={self.path} neighbours={k}"
            )
        rows = self._neighbours[self.row(clip_id), :k]
        found = [self.ids[row] for row in rows if row >= 0]
        if len(found) < k:
            raise MotionRAGError(
                f"k={k}, but {self.path} has only {len(found)} clips of other sources than '{clip_id}'; "
                "lower k or use a larger database"
            )
        return found

    def same_source(self, clip_id: str) -> set[str]:
        """Ids of the clips cut from the same source, the clip itself among them."""
        return set(self._by_source[self.clip(clip_id)["source"]])

    @cached_property
    def _by_source(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for clip_id in self.ids:
            groups.setdefault(self.clip(clip_id)["source"], []).append(clip_id)
        return groups

    def search(
        self, queries: np.ndarray, k: int, exclude: set[str] | frozenset[str] = frozenset()
    ) -> list[tuple[list[str], np.ndarray]]:
        """For each of ``queries`` (B,W) float32: ids of the ``k`` nearest clips and scores (k,), best first.

        exclude: ids that must not be found. Raises :class:`MotionRAGError` for queries of another width
        and for more clips than there are.
        """
        queries = np.atleast_2d(np.asarray(queries, dtype=np.float32))
        if queries.shape[1] != self.index.width:
            raise MotionRAGError(
                f"the query's embedding has width {queries.shape[1]}, the captions in {self.path} have width "
                f"{self.index.width} ({self.manifest['encoders']['caption']['name']}); use that encoder"
            )
        excluded = [self._rows[clip_id] for clip_id in exclude if clip_id in self]
        check_depth(self, k, len(excluded))
        rows, scores = self.index.search(queries, k, excluded)
        return [([self.ids[row] for row in line], values) for line, values in zip(rows, scores, strict=True)]

    def check_encoders(self, encoders: Mapping[str, Identified]) -> None:
        """Make sure that the features were made by these encoders (any of motion, appearance, caption).

        Raises :class:`MotionRAGError` naming both.
        """
        for role, encoder in encoders.items():
            stored, given = self.manifest["encoders"][role], encoder.identity
            for key in stored.keys() | given.keys():
                # another name for the same weights (a copy of a hub folder) is the same encoder
                if key != "name" and stored.get(key) != given.get(key):
                    raise MotionRAGError(
                        f"database {self.path} was built with the {role} encoder {_about(stored)}, this run "
                        f"uses {_about(given)}: they differ in {key}; choose the same encoder "
                        "(encoders=NAME) or encode the shards again"
                    )


def check_depth(db: RetrievalDatabase, k: int, excluded: int = 0) -> None:
    """Raise :class:`MotionRAGError` unless ``db`` has ``k`` >= 1 clips left besides the excluded ones."""
    if k < 1:
        raise MotionRAGError(f"k={k}: expected at least one reference clip")
    if k > len(db) - excluded:
        left = f" ({excluded} of them excluded)" if excluded else ""
        raise MotionRAGError(
            f"k={k} is more than the database {db.path} has: {len(db)} clips{left}; lower k or use a larger database"
        )


def build(path: str | Path, neighbours: int = 16) -> dict[str, Any]:
    """Turn a complete token store into a database: index, neighbours and, last, the manifest (returned).

    neighbours: how many nearest clips of other sources to keep for each clip. Checks the checksum of every
    file. Raises :class:`MotionRAGError` if shards are not encoded yet, clips appear twice or files are damaged.
    """
    path = Path(path)
    store = read_store(path)
    if neighbours < 1:
        raise MotionRAGError(f"neighbours={neighbours}: expected at least 1")
    names = [Path(shard["file"]).stem for shard in store["shards"]]
    missing = [name for name in names if not (path / PARTS / name).is_dir()]
    if missing:
        raise MotionRAGError(
            f"{path}: {len(missing)} of {len(names)} shards are not encoded yet, the first is {missing[0]}; "
            f"run motionrag encode again with out={path}, it continues where it stopped"
        )
    parts = [Part(path / PARTS / name) for name in names]
    for part in parts:
        part.verify()
    clips = [clip for part in parts for clip in part.clips]
    if not clips:
        raise MotionRAGError(
            f"{path}: no clip in any of its {len(parts)} parts; encode shards with usable clips"
        )
    ids = [clip["id"] for clip in clips]
    if len(set(ids)) < len(ids):
        twice = next(clip_id for clip_id in ids if ids.count(clip_id) > 1)
        raise MotionRAGError(
            f"{path}: clip '{twice}' is in the store twice; give the clips unique ids and pack again"
        )

    embeddings = np.concatenate([part.caption for part in parts if part.clips])
    index = CaptionIndex.build(embeddings)
    index.save(path / INDEX)
    nearest = index.neighbours(embeddings, [clip["source"] for clip in clips], neighbours)
    with atomic_path(path / NEIGHBOURS) as temporary:
        np.save(temporary, nearest)
    full = next(part for part in parts if part.clips)
    manifest = {
        "schema": SCHEMA,
        "clips": len(clips),
        "encoders": store["encoders"],
        "sampling": store["sampling"],
        "shapes": {name: list(getattr(full, name).shape[1:]) for name in ("motion", "appearance", "caption")},
        "parts": [
            {"name": part.path.name, "clips": len(part.clips), "files": part.about["files"]} for part in parts
        ],
        "skipped": sum(len(part.about["skipped"]) for part in parts),
        "index": {"kind": "flat inner product", "file": INDEX, "sha256": sha256(path / INDEX)},
        "neighbours": {"file": NEIGHBOURS, "k": neighbours, "sha256": sha256(path / NEIGHBOURS)},
    }
    write_json(path / MANIFEST, manifest)
    return manifest


def read_store(path: Path) -> dict[str, Any]:
    """``store.json``: which shards the store is made of, and by which encoders.

    Raises :class:`MotionRAGError` if the folder is no token store.
    """
    if not (path / STORE).is_file():
        raise MotionRAGError(f"{path}: no token store there; run motionrag encode shards=DIR out={path}")
    try:
        return read_json(path / STORE)
    except ValueError as error:
        raise MotionRAGError(f"{path / STORE}: damaged ({error}); encode into a new folder") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise MotionRAGError(f"db={path}: no such folder; expected a database (motionrag encode, then index)")
    if not (path / MANIFEST).is_file():
        what = (
            f"run motionrag index db={path}" if (path / STORE).is_file() else "expected a retrieval database"
        )
        raise MotionRAGError(f"db={path}: no {MANIFEST} there; {what}")
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError as error:
        raise MotionRAGError(
            f"{path / MANIFEST}: damaged ({error}); run motionrag index db={path}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise MotionRAGError(
            f"{path / MANIFEST}: expected schema {SCHEMA}; encode and index the shards again"
        )
    return manifest


def _about(identity: Mapping[str, Any]) -> str:
    size = f", size {identity['size']}" if "size" in identity else ""
    return f"{identity['name']} (width {identity['width']}{size}, weights {identity['weights'][:8]})"
