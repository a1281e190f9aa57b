"""A retrieval database: token store, caption index and manifest in one folder.

The folder can be copied, renamed and opened read-only by many processes; nothing in it is an absolute path.
Every clip has a number: its part's ``start`` plus its row there. Numbers are never given twice, so clips can
come and go without touching the others. Files that change get new names, and the manifest that names them
is written last: whenever a writer is killed, the database is the old one or the new one.
"""

from __future__ import annotations

import json
import os
import weakref
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
from motionrag.io import json_text, read_json, sha256, text_sha256
from motionrag.retrieval import catalog
from motionrag.retrieval.bank import PARTS, Part, read_npy
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
#: Filters whose clips are remembered.
CHOICES = 8
#: Bytes of an index up to which its checksum is compared before the first search: it takes about a second.
COMPARED = 2_000_000_000

Where = str | Sequence[str] | None


class Identified(Protocol):
    """An encoder as a database knows it."""

    @property
    def identity(self) -> Mapping[str, Any]: ...


class RetrievalDatabase:
    """Read a database. Clips are asked for by id; features come as float32 tensors.

    path: the folder. mmap: map features and index into memory instead of loading them.
    Raises :class:`MotionRAGError` when the folder is not a complete database.

    Opening reads the manifest and the clip table, and opens index and neighbours: a writer that replaces them does not
    disturb. What is read is compared with its checksum, a part's sizes when it is first needed; damage raises
    :class:`MotionRAGError`. Can be pickled (a worker process maps the files anew); search only in the main process.
    """

    def __init__(self, path: str | Path, mmap: bool = True) -> None:
        self.path = Path(path)
        self.mmap = mmap
        self.manifest = read_manifest(self.path)
        while True:
            try:
                self._files = {role: self._hold(role) for role in FILES if role in self.manifest}
                break
            except FileNotFoundError as error:
                before, self.manifest = self.manifest, read_manifest(self.path)
                if before == self.manifest:  # else a writer came in between
                    raise MotionRAGError(
                        f"{error.filename}: missing; copy the database again or run motionrag index db={self.path}"
                    ) from error
        there = {folder.name for folder in (self.path / PARTS).glob("*")}
        for part in self.manifest["parts"]:
            if part["name"] not in there:
                raise MotionRAGError(
                    f"{self.path / PARTS / part['name']}: missing; copy the database again, or encode and index again"
                )
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

    def _hold(self, role: str) -> str:
        """Open a file; returns a path to it that stays when a writer removes the file's name."""
        descriptor = os.open(self.path / self.manifest[role]["file"], os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return f"/dev/fd/{descriptor}"

    def _compared(self, role: str) -> tuple[str, Path]:
        """Path and name of an open file, after a look at its checksum."""
        held, about = self._files[role], self.manifest[role]
        if role != "index" or os.stat(held).st_size <= COMPARED:
            compare(held, self.path / about["file"], about["sha256"])
        return held, self.path / about["file"]

    def _read_catalog(self) -> pa.Table:
        if "catalog" in self.manifest:
            return catalog.read(*self._compared("catalog"))
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
            about = self.manifest["parts"][part]
            self._opened[part] = Part(self.path / PARTS / about["name"], self.mmap, about.get("about"))
        return self._opened[part]

    def _place(self, clip_id: str) -> tuple[Part, int]:
        """The part that holds a clip, and its row there."""
        number = int(self._numbers[self.row(clip_id)])
        part = int(self._starts.searchsorted(number, side="right")) - 1
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
            part.features(name, row, out=values[slot])
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
            Part.class_tokens,
        )

    def _fetch(self, numbers: np.ndarray) -> np.ndarray:
        return gather(self._part, self._starts, numbers, Part.captions)

    def preview(self, clip_id: str) -> np.ndarray:
        """A few frames of the clip, uint8 (P,h,w,3), spread over its length, first and last included."""
        part, row = self._place(clip_id)
        return part.preview(row)

    # ------------------------------------------------------------ neighbours and search

    @cached_property
    def index(self) -> CaptionIndex:
        """The caption index, read when first needed."""
        file, name = self._compared("index")
        return CaptionIndex.load(file, self.mmap, self._fetch, name)

    @cached_property
    def _neighbours(self) -> np.ndarray:
        file, name = self._compared("neighbours")
        table = read_npy(file, self.mmap, name)
        return table["number"] if table.dtype.names else table

    def neighbours(self, clip_id: str, k: int, exclude: Collection[str] = frozenset()) -> list[str]:
        """The ``k`` nearest clips of other sources by motion caption, nearest first; needs no search.

        exclude: ids that must not be among them. Raises :class:`MotionRAGError` if the database has fewer, or
        ``index`` stored fewer.
        """
        alike = self.manifest["neighbours"].get("near_duplicate")
        index = f"motionrag index db={self.path}{'' if alike else ' near_duplicate=null'}"
        if k > self._neighbours.shape[1]:
            raise MotionRAGError(
                f"k={k}, but {self.path} keeps {self._neighbours.shape[1]} neighbours per clip; run {index} neighbours={k}"
            )
        numbers = self._neighbours[self.row(clip_id)]
        stored = self._named(numbers[numbers >= 0])
        found = [other for other in stored if other not in exclude][:k]
        if len(found) < k <= len(stored):
            raise MotionRAGError(
                f"k={k}, but of the {len(stored)} neighbours that {self.path} keeps of '{clip_id}' only {len(found)} "
                f"may be used, the others are validation clips; run {index} "
                f"neighbours={2 * self._neighbours.shape[1]}"
            )
        if len(found) < k:
            instead = ", or index it with near_duplicate=null if captions repeat by design" if alike else ""
            raise MotionRAGError(
                f"k={k}, but {self.path} has only {len(found)} clips of other sources than '{clip_id}'"
                f"{f' whose captions are less alike than near_duplicate={alike:g}' if alike else ''}; lower k or use a "
                f"larger database{instead}"
            )
        return found

    def check_neighbours(self, k: int, exclude: Collection[str]) -> None:
        """Raise :class:`MotionRAGError` unless :meth:`neighbours` has ``k`` for every clip."""
        left_out = self._numbers[[self.row(clip_id) for clip_id in exclude]]
        usable = (self._neighbours >= 0) & ~np.isin(self._neighbours, left_out)
        for row in np.flatnonzero(usable.sum(axis=1) < k)[:1]:
            self.neighbours(self.ids[row], k, exclude)

    def _named(self, numbers: np.ndarray) -> list[str]:
        rows = np.searchsorted(self._numbers, numbers).clip(max=len(self) - 1)
        if (self._numbers[rows] != numbers).any():
            raise MotionRAGError(
                f"{self.path}: its index or its neighbours name clips that it does not have; run motionrag index "
                f"db={self.path}"
            )
        return [self.ids[row] for row in rows]

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
        excluded = self._numbers[self._known(exclude)]
        left = self.left(k, exclude, where)
        if where and left <= FEW:
            rows = self.candidates(k, exclude, where)
            numbers, scores = exact_search(queries, self._numbers[rows], self._fetch, k)
        else:
            numbers, scores = self.index.search(
                queries, k, excluded, self._chosen(where)[1] if where else None
            )
        # an approximate index may come back with less than there is
        short = np.flatnonzero((numbers < 0).any(1))
        if len(short):
            rows = self.candidates(k, exclude, where)
            numbers[short], scores[short] = exact_search(queries[short], self._numbers[rows], self._fetch, k)
        return [(self._named(line), values) for line, values in zip(numbers, scores, strict=True)]

    def candidates(self, k: int, exclude: Collection[str] = frozenset(), where: Where = None) -> np.ndarray:
        """Places in ``ids`` of the clips that a retriever may find, rising.

        Raises :class:`MotionRAGError` if they are fewer than ``k`` >= 1.
        """
        self.left(k, exclude, where)
        left = self._chosen(where)[0].copy() if where else np.ones(len(self), bool)
        left[self._known(exclude)] = False
        return np.flatnonzero(left)

    def _known(self, ids: Collection[str]) -> list[int]:
        """Places in ``ids`` of those clips that are there, each once."""
        return [self._rows[clip_id] for clip_id in set(ids) if clip_id in self]

    def left(self, k: int, exclude: Collection[str], where: Where) -> int:
        """How many clips may be found; raises :class:`MotionRAGError` if they are fewer than ``k`` >= 1."""
        known, left = self._known(exclude), len(self)
        if where:
            chosen = self._chosen(where)[0]
            left = np.count_nonzero(chosen) - np.count_nonzero(chosen[known])
        else:
            left -= len(known)
        check_depth(self, k, len(self) - left)
        return left

    def _chosen(self, where: Where) -> tuple[np.ndarray, np.ndarray]:
        """Which clips meet the conditions, (n,) bool, and the same by number; of the conditions asked for last."""
        key = (where,) if isinstance(where, str) else tuple(where)
        if key not in self._choices:
            chosen = catalog.select(self._clips, key)
            by_number = np.zeros(int(self._numbers[-1]) + 1, bool)
            by_number[self._numbers] = chosen
            if len(self._choices) == CHOICES:
                self._choices.pop(next(iter(self._choices)))
            self._choices[key] = chosen, by_number
        return self._choices[key]

    @cached_property
    def _choices(self) -> dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
        return {}

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
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        # earlier versions have none
        checksum = manifest.get("checksum") if isinstance(manifest, dict) else None
        if checksum is not None and text_sha256(text.replace(str(checksum), "", 1)) != checksum:
            raise ValueError("its checksum is another one")
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


def compare(file: str | Path, name: Path, checksum: str) -> None:
    """Raise :class:`MotionRAGError` (with ``name``) if a file of a database has another checksum than its manifest says."""
    if sha256(file) != checksum:
        raise MotionRAGError(
            f"{name} is damaged: its checksum is not the one in {MANIFEST}; copy it again, or run motionrag index "
            f"db={name.parent} (motionrag index verify looks for more)"
        )


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the checksum of its text in it, first of all."""
    return {"checksum": text_sha256(json_text({"checksum": "", **manifest})), **manifest}


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
