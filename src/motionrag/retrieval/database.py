"""A retrieval database: token store, caption index and manifest in one folder.

The folder can be copied, renamed and opened read-only by many processes; nothing in it is an absolute path.
Every clip has a number: its part's ``start`` plus its row there. Numbers are never given twice, so clips can
come and go without touching the others. Files that change get new names, and the manifest that names them
is written last: whenever a writer is killed, the database is the old one or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from motionrag.encoders import fingerprint
from motionrag.errors import MotionRAGError
from motionrag.io import read_json
from motionrag.retrieval import catalog
from motionrag.retrieval.bank import PARTS, Part
from motionrag.retrieval.index import CaptionIndex, exact_search

SCHEMA = "motionrag.database/1"
MANIFEST = "manifest.json"
STORE = "store.json"
#: Role of the motion Resampler among the encoders of a store that holds motion tokens.
RESAMPLER = "resampler"
#: Files that the manifest names; a checksum goes between name and suffix.
FILES = {"catalog": "clips.arrow", "index": "index.faiss", "neighbours": "neighbours.npy"}
#: A filter that leaves no more clips than this is searched clip by clip: exact, and as fast.
FEW = 10_000

Where = str | Sequence[str] | None


class Identified(Protocol):
    """An encoder as a database knows it."""

    @property
    def identity(self) -> Mapping[str, Any]: ...


class RetrievalDatabase:
    """Read a database. Clips are asked for by id; features come as float32 tensors.

    path: the folder. mmap: map features and index into memory instead of loading them.
    Raises :class:`MotionRAGError` when the folder is not a complete database.

    Opening reads the manifest and the sizes of the files; everything else is read when first needed. Can be
    pickled (a worker process maps the files anew); search only in the main process.
    """

    def __init__(self, path: str | Path, mmap: bool = True) -> None:
        self.path = Path(path)
        self.mmap = mmap
        self.manifest = read_manifest(self.path)
        for part in self.manifest["parts"]:
            _check_sizes(self.path / PARTS / part["name"], part["files"])
        sizes = [part["clips"] for part in self.manifest["parts"]]
        cumulated = np.cumsum([0, *sizes[:-1]])  # of databases older than starts
        self._starts = np.array(
            [part.get("start", start) for part, start in zip(self.manifest["parts"], cumulated, strict=True)]
        )
        self._opened: dict[int, Part] = {}
        self._clips = self._read_catalog()
        self._numbers = self._clips[catalog.NUMBER].to_numpy()
        if len(self) != self.manifest["clips"]:
            raise MotionRAGError(
                f"{self.path}: {len(self)} clips in its parts, {self.manifest['clips']} in {MANIFEST}; "
                f"run motionrag index db={self.path} again"
            )

    def _read_catalog(self) -> pa.Table:
        if "catalog" in self.manifest:
            return catalog.read(self.path / self.manifest["catalog"]["file"])
        parts = range(len(self.manifest["parts"]))
        return catalog.table(
            (int(self._starts[part]) + row, clip)
            for part in parts
            for row, clip in enumerate(self._part(part).clips)
        )

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.mmap)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, clip_id: str) -> bool:
        return clip_id in self._rows

    @cached_property
    def ids(self) -> list[str]:
        """All clips."""
        return self.column("id")

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {clip_id: row for row, clip_id in enumerate(self.ids)}

    def row(self, clip_id: str) -> int:
        """Place of a clip in ``ids``. Raises :class:`MotionRAGError` for an unknown id."""
        if clip_id not in self._rows:
            raise MotionRAGError(f"{self.path}: no clip '{clip_id}' among its {len(self)} clips")
        return self._rows[clip_id]

    def _part(self, part: int) -> Part:
        if part not in self._opened:
            path = self.path / PARTS / self.manifest["parts"][part]["name"]
            self._opened[part] = Part(path, self.mmap)
        return self._opened[part]

    def _place(self, clip_id: str) -> tuple[Part, int]:
        """The part that holds a clip, and its row there."""
        number = int(self._numbers[self.row(clip_id)])
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._part(part), number - int(self._starts[part])

    # ------------------------------------------------------------ what is known about clips

    def clip(self, clip_id: str) -> dict[str, Any]:
        """What the shards said about a clip: id, caption, motion_caption, source, action, duration, ..."""
        return catalog.record(self._clips, self.row(clip_id))

    def caption(self, clip_id: str) -> str:
        return self.clip(clip_id)["caption"]

    def motion_caption(self, clip_id: str) -> str:
        return self.clip(clip_id)["motion_caption"]

    @property
    def columns(self) -> list[str]:
        """Names of the fields and columns of metadata that the clips have."""
        return catalog.columns(self._clips)

    def column(self, name: str) -> list[str | None]:
        """One field or column of metadata of all clips, as text, in the order of ``ids``.

        Raises :class:`MotionRAGError` if no clip has it.
        """
        if name not in self.columns:
            raise MotionRAGError(
                f"{self.path}: no column '{name}'; the clips have {', '.join(sorted(self.columns))}"
            )
        return self._clips[name].to_pylist()

    def value(self, clip_id: str, column: str) -> str | None:
        """One clip's value in a column, as text."""
        return self._clips[column][self.row(clip_id)].as_py()

    def where(self, condition: Where) -> list[str]:
        """Ids of the clips that meet ``column=value`` or ``column!=value``, or all of a list of such conditions."""
        return [self.ids[row] for row in np.flatnonzero(catalog.select(self._clips, condition or []))]

    def same_source(self, clip_id: str) -> set[str]:
        """Ids of the clips cut from the same source, the clip itself among them."""
        return set(self._by_source[self._clips["source"][self.row(clip_id)].as_py()])

    @cached_property
    def _by_source(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for clip_id, source in zip(self.ids, self.column("source"), strict=True):
            groups.setdefault(source, []).append(clip_id)
        return groups

    # ------------------------------------------------------------ features

    def motion_features(self, ids: Sequence[str]) -> torch.Tensor:
        """Motion features (k,N,D) float32 of the clips, in the order of ``ids``.

        Raises :class:`MotionRAGError` if motion tokens are stored instead.
        """
        if self.resampled:
            raise MotionRAGError(
                f"database {self.path} holds {about_motion(self.manifest['encoders'])}, the motion features before it are "
                "needed here; encode the shards into another folder without resampler_weights"
            )
        return self._features("motion", ids)

    @property
    def resampled(self) -> bool:
        """Whether motion tokens are stored in place of motion features."""
        return RESAMPLER in self.manifest["encoders"]

    def motion_tokens(self, ids: Sequence[str]) -> torch.Tensor:
        """Motion tokens (k,l,d) float32 of the clips, in the order of ``ids``; see :meth:`check_resampler`.

        Raises :class:`MotionRAGError` if motion features are stored instead.
        """
        if not self.resampled:
            raise MotionRAGError(
                f"database {self.path} holds motion features, no motion tokens; encode with resampler_weights=FILE"
            )
        return self._features("motion", ids)

    def appearance_features(self, ids: Sequence[str]) -> torch.Tensor:
        """Appearance features (k,M,E) float32 of the clips' first frames, in the order of ``ids``."""
        return self._features("appearance", ids)

    def _features(self, name: str, ids: Sequence[str]) -> torch.Tensor:
        values = torch.empty(len(ids), *self.manifest["shapes"][name])
        for slot, clip_id in enumerate(ids):
            part, row = self._place(clip_id)
            values[slot] = part.features(name, row)
        return values

    @cached_property
    def caption_embeddings(self) -> np.ndarray:
        """Embeddings (n,W) float32 of the motion captions, in the order of ``ids``; all of them in memory."""
        return self._fetch(self._numbers)

    def caption_vectors(self, ids: Sequence[str]) -> np.ndarray:
        """Embeddings (k,W) float32 of the clips' motion captions, in the order of ``ids``."""
        return self._fetch(self._numbers[[self.row(clip_id) for clip_id in ids]])

    def class_tokens(self, ids: Sequence[str]) -> np.ndarray:
        """The appearance encoder's class tokens (k,E) float32 of the clips' first frames, in the order of ``ids``."""
        numbers = self._numbers[[self.row(clip_id) for clip_id in ids]]
        return gather(
            self._part,
            self._starts,
            numbers,
            lambda part, rows: part.features("appearance", (rows, 0)).numpy(),
        )

    def _fetch(self, numbers: np.ndarray) -> np.ndarray:
        return gather(self._part, self._starts, numbers, captions_of)

    def preview(self, clip_id: str) -> np.ndarray:
        """A few frames of the clip, uint8 (P,h,w,3), spread over its length, first and last included."""
        part, row = self._place(clip_id)
        return part.preview(row)

    # ------------------------------------------------------------ neighbours and search

    @cached_property
    def index(self) -> CaptionIndex:
        """The caption index, opened when first needed."""
        return CaptionIndex.load(self.path / self.manifest["index"]["file"], self.mmap, self._fetch)

    @cached_property
    def _neighbours(self) -> np.ndarray:
        file = self.path / self.manifest["neighbours"]["file"]
        table = np.load(file, mmap_mode="r" if self.mmap else None)
        return table["number"] if table.dtype.names else table

    def neighbours(self, clip_id: str, k: int, exclude: Collection[str] = frozenset()) -> list[str]:
        """The ``k`` nearest clips of other sources by motion caption, nearest first; needs no search.

        exclude: ids that must not be among them. Raises :class:`MotionRAGError` if the database has fewer, or
        ``index`` stored fewer.
        """
        if k > self._neighbours.shape[1]:
            raise MotionRAGError(
                f"k={k}, but {self.path} keeps {self._neighbours.shape[1]} neighbours per clip; run "
                f"motionrag index db={self.path} neighbours={k}"
            )
        numbers = self._neighbours[self.row(clip_id)]
        stored = self._named(numbers[numbers >= 0])
        found = [other for other in stored if other not in exclude][:k]
        if len(found) < k <= len(stored):
            raise MotionRAGError(
                f"k={k}, but of the {len(stored)} neighbours that {self.path} keeps of '{clip_id}' only {len(found)} "
                f"may be used, the others are validation clips; run motionrag index db={self.path} "
                f"neighbours={2 * self._neighbours.shape[1]}"
            )
        if len(found) < k:
            alike = self.manifest["neighbours"].get("near_duplicate")
            raise MotionRAGError(
                f"k={k}, but {self.path} has only {len(found)} clips of other sources than '{clip_id}'"
                f"{f' whose captions are less alike than near_duplicate={alike:g}' if alike else ''}; "
                "lower k or use a larger database"
            )
        return found

    def check_neighbours(self, k: int, exclude: Collection[str]) -> None:
        """Raise :class:`MotionRAGError` unless :meth:`neighbours` has ``k`` for every clip."""
        left_out = self._numbers[[self.row(clip_id) for clip_id in exclude]]
        usable = (self._neighbours >= 0) & ~np.isin(self._neighbours, left_out)
        for row in np.flatnonzero(usable.sum(axis=1) < k)[:1]:
            self.neighbours(self.ids[row], k, exclude)

    def _named(self, numbers: np.ndarray) -> list[str]:
        return [self.ids[row] for row in np.searchsorted(self._numbers, numbers)]

    def search(
        self, queries: np.ndarray, k: int, exclude: Collection[str] = frozenset(), where: Where = None
    ) -> list[tuple[list[str], np.ndarray]]:
        """For each of ``queries`` (B,W) float32: ids of the ``k`` nearest clips and scores (k,), best first.

        exclude: ids that must not be found; unknown ones are fine. where: conditions that what is found must
        meet (see :meth:`where`). Raises :class:`MotionRAGError` if fewer than ``k`` clips are left.
        """
        queries = np.atleast_2d(np.asarray(queries, dtype=np.float32))
        width = self.manifest["shapes"]["caption"][0]
        if queries.shape[1] != width:
            raise MotionRAGError(
                f"the query's embedding has width {queries.shape[1]}, the captions of {self.path} have width "
                f"{width} ({self.manifest['encoders']['caption']['name']}); use the database's caption encoder"
            )
        rows = self.candidates(k, exclude, where)
        if where and len(rows) <= FEW:
            numbers, scores = exact_search(queries, self._numbers[rows], self._fetch, k)
        else:
            mask = excluded = None
            if where:
                mask = np.zeros(int(self._numbers[-1]) + 1, bool)
                mask[self._numbers[rows]] = True
            elif exclude:
                excluded = self._numbers[[self._rows[clip_id] for clip_id in exclude if clip_id in self]]
            numbers, scores = self.index.search(queries, k, excluded, mask)
        # an approximate index may come back with less than there is
        short = np.flatnonzero((numbers < 0).any(1))
        if len(short):
            numbers[short], scores[short] = exact_search(queries[short], self._numbers[rows], self._fetch, k)
        return [(self._named(line), values) for line, values in zip(numbers, scores, strict=True)]

    def candidates(self, k: int, exclude: Collection[str] = frozenset(), where: Where = None) -> np.ndarray:
        """Places in ``ids`` of the clips that a retriever may find, rising.

        Raises :class:`MotionRAGError` if they are fewer than ``k`` >= 1.
        """
        left = catalog.select(self._clips, where or [])
        left[[self._rows[clip_id] for clip_id in exclude if clip_id in self]] = False
        rows = np.flatnonzero(left)
        check_depth(self, k, len(self) - len(rows))
        return rows

    def check_encoders(self, encoders: Mapping[str, Identified]) -> None:
        """Make sure that the features were made by these encoders (any of motion, appearance, caption).

        Raises :class:`MotionRAGError` naming both.
        """
        for role, encoder in encoders.items():
            stored, given = self.manifest["encoders"][role], encoder.identity
            if key := difference(stored, given):
                raise MotionRAGError(
                    f"database {self.path} was built with the {role} encoder {about_encoder(stored)}, this run "
                    f"uses {about_encoder(given)}: they differ in {key}; choose the same encoder "
                    "(encoders=NAME) or encode the shards again"
                )

    def check_resampler(self, resampler: nn.Module) -> None:
        """Where motion tokens are stored: make sure that this Resampler (float32) makes them.

        Raises :class:`MotionRAGError` naming both.
        """
        stored = self.manifest["encoders"].get(RESAMPLER)
        if stored and stored["weights"] != (given := fingerprint(resampler)):
            raise MotionRAGError(
                f"database {self.path} holds {about_motion(self.manifest['encoders'])}, this run's Resampler has the "
                f"weights {given[:8]}; use the Stage 1 weights that the database was encoded with, or encode the "
                "shards again"
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


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a database; raises :class:`MotionRAGError` if the folder is none."""
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
            f"{path / MANIFEST}: damaged ({error}); copy the database again, or delete this file and run "
            f"motionrag index db={path} (clips that were added later are then lost)"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise MotionRAGError(
            f"{path / MANIFEST}: expected schema {SCHEMA}; encode and index the shards again"
        )
    return manifest


def difference(stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """What two encoders differ in; another name for the same weights (a copy of a hub folder) is no difference."""
    keys = sorted(stored.keys() | given.keys())
    return next((key for key in keys if key != "name" and stored.get(key) != given.get(key)), None)


def about_encoder(identity: Mapping[str, Any]) -> str:
    """An encoder in words."""
    size = f", size {identity['size']}" if "size" in identity else ""
    return f"{identity['name']} (width {identity['width']}{size}, weights {identity['weights'][:8]})"


def role_name(role: str) -> str:
    """What a role among a store's encoders is called."""
    return "motion Resampler" if role == RESAMPLER else f"{role} encoder"


def about_motion(encoders: Mapping[str, Any]) -> str:
    """What a store with these encoders holds of the clips' motion, in words."""
    if RESAMPLER not in encoders:
        return "motion features"
    return f"motion tokens of the Resampler {about_encoder(encoders[RESAMPLER])}"


def _check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Every file there and of the size written? Contents are for ``motionrag index verify``."""
    for name, file in files.items():
        try:
            size = os.stat(f"{folder}/{name}").st_size
        except OSError:
            size = None
        if size != file["bytes"]:
            raise MotionRAGError(
                f"{folder / name}: {'missing' if size is None else f'{size} bytes'}, expected {file['bytes']} "
                f"bytes; copy the database again, or delete {folder.name}, encode and index again"
            )


def gather(
    part: Callable[[int], Part],
    starts: np.ndarray,
    numbers: np.ndarray,
    read: Callable[[Part, Any], np.ndarray],
) -> np.ndarray:
    """What ``read`` gives for rows of a part, for clip numbers (m,) of many parts in any order."""
    where = np.searchsorted(starts, numbers, side="right") - 1
    found = None
    for index in np.unique(where):
        mine = np.flatnonzero(where == index)
        rows = numbers[mine] - starts[index]
        run = rows[-1] - rows[0] + 1 == len(rows) and (np.diff(rows) == 1).all()
        values = read(part(int(index)), slice(int(rows[0]), int(rows[-1]) + 1) if run else rows)
        if found is None:
            found = np.empty((len(numbers), *values.shape[1:]), values.dtype)
        found[mine] = values
    return np.empty((0, 0), np.float32) if found is None else found


def captions_of(part: Part, rows: Any) -> np.ndarray:
    """Caption embeddings of rows of a part."""
    return part.caption[rows]
