"""Where clips come from: tables of captions, the places of their video files, and which clips belong together.

A table is CSV, parquet or JSON lines, one row per clip. Videos are files in folders or members of zip archives,
read in place; an archive may be cut into parts as ``split`` does it (``NAME_partaa``, ``NAME_partab``, ...).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from motionrag.data.video import UnreadableVideo
from motionrag.errors import MotionRAGError

REQUIRED_COLUMNS = ("video", "caption", "motion_caption")
OPTIONAL_COLUMNS = ("start_sec", "end_sec", "id", "source", "action")

#: Why a clip whose video is nowhere cannot be used.
MISSING = "missing file"

#: Parts of an archive that was cut with ``split``, as OpenVid-1M publishes those above 50 GB.
_PART = re.compile(r"(?P<whole>.+?)(\.zip)?[._-]part[a-z]{2}")


# ---------------------------------------------------------------- tables


def read_frame(path: str | Path, texts: Iterable[str] | None = None) -> pd.DataFrame:
    """A CSV (UTF-8), parquet or JSON lines file (by its suffix) as a data frame.

    texts: columns of a CSV that stay text whatever they look like; None: all of them. Words such as "None" or
    "NA" are never missing values. Raises :class:`MotionRAGError` for a file that is none of these.
    """
    path = Path(path)
    if not path.is_file():
        raise MotionRAGError(f"table={path}: no such file; expected a CSV, parquet or JSON lines (.jsonl)")
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            return pd.read_parquet(path)
        if path.suffix.lower() in (".jsonl", ".ndjson"):
            return pd.read_json(path, lines=True, dtype=False, convert_dates=False, encoding="utf-8")
        types = str if texts is None else dict.fromkeys(texts, str)
        return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
    except (ValueError, OSError, pd.errors.ParserError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise MotionRAGError(
            f"{path.name}: not a readable CSV (UTF-8), parquet or JSON lines table: {error}"
        ) from error


def read_table(
    path: str | Path,
    columns: Mapping[str, str | None],
    source_pattern: str | None = None,
    required: Iterable[str] = REQUIRED_COLUMNS,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a table as dicts under our column names, and which column became what.

    columns: our name -> the table's; None: the table has none of it. source_pattern: see :func:`source_of`.
    required: ours that must be there, besides those that ``columns`` renames. Missing values are None; columns
    that are not ours are gathered under ``metadata``. ``id`` defaults to the stem of the video path. A row that
    repeats an earlier one (same id, video and span) has ``repeats``, that row's number. Raises
    :class:`MotionRAGError` for an unreadable or empty table, a missing column, an id given to two clips.
    """
    path = Path(path)
    known = {name: columns.get(name, name) for name in REQUIRED_COLUMNS + OPTIONAL_COLUMNS}
    texts = [column for name, column in known.items() if column and not name.endswith("_sec")]
    frame = read_frame(path, texts)
    for column in texts:
        if column in frame:
            frame[column] = frame[column].map(lambda value: value if _missing(value) else str(value))
    missing = {
        name: column or name
        for name, column in known.items()
        if (name in required or column not in (name, None)) and column not in frame
    }
    if missing:
        lacks = ", ".join(f"'{column}' for {name}" for name, column in missing.items())
        hint = "; motionrag caption writes motion captions" if "motion_caption" in missing else ""
        raise MotionRAGError(
            f"{path.name}: no column {lacks}; it has {', '.join(map(str, frame))}; "
            f"name the right one with {' '.join(f'columns.{name}=NAME' for name in missing)}{hint}"
        )
    if not len(frame):
        raise MotionRAGError(f"{path.name}: the table has no rows; expected one per clip")
    present = {name: column for name, column in known.items() if column in frame}
    others = [column for column in frame if column not in present.values()]
    rows = []
    for record in frame.to_dict("records"):
        row = dict.fromkeys(known) | {name: _plain(record[column]) for name, column in present.items()}
        row["metadata"] = {str(column): _plain(record[column]) for column in others}
        if row["video"] is not None:
            row["id"] = row["id"] or Path(row["video"]).stem
            row["source"] = row["source"] or source_of(row["video"], source_pattern)
        rows.append(row)
    _mark_repeats(path, rows)
    return rows, present | {"metadata": [str(column) for column in others]}


def recorded(video: str) -> str:
    """A video's path as shards tell it: absolute ones mean nothing on another machine."""
    return Path(video).name if Path(video).is_absolute() else video


def check_pattern(pattern: str) -> None:
    """Raise :class:`MotionRAGError` unless ``pattern`` is a regular expression with a group ``source``."""
    try:
        found = "source" in re.compile(pattern).groupindex
        reason = "it has no group 'source'"
    except re.error as error:
        found, reason = False, str(error)
    if not found:
        raise MotionRAGError(
            f"source_pattern={pattern}: expected a regular expression such as '(?P<source>.+)_\\d+', {reason}"
        )


def source_of(video: str, pattern: str | None) -> str:
    """The source video that a clip was cut from: what is the same for clips that must stay together.

    pattern: a regular expression for the whole stem of the clip's file name whose group ``source`` is the answer;
    None or no match: the clip is its own source.
    """
    if pattern is None:
        return recorded(video)
    stem = PurePosixPath(video).stem
    match = re.fullmatch(pattern, stem)
    return match["source"] if match else stem


def sources_in(path: str | Path, columns: Mapping[str, str | None], pattern: str | None) -> set[str]:
    """The source videos that a table names, as :func:`read_table` tells them; it needs nothing but video paths."""
    video, source = (columns.get(name, name) or name for name in ("video", "source"))
    frame = read_frame(path, (video, source))
    if video not in frame:
        raise MotionRAGError(
            f"{Path(path).name}: no column '{video}' for video; it has {', '.join(map(str, frame))}"
        )
    named = frame[source] if source in frame else [None] * len(frame)
    return {
        source_of(str(clip), pattern) if _missing(own) else str(own)
        for clip, own in zip(frame[video], named, strict=True)
        if not _missing(clip)
    }


def _mark_repeats(path: Path, rows: list[dict[str, Any]]) -> None:
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        first = seen.setdefault(row["id"], number) if row["id"] is not None else number
        if first == number:
            continue
        if any(row[key] != rows[first][key] for key in ("video", "start_sec", "end_sec")):
            raise MotionRAGError(
                f"{path.name}: rows {first} and {number} have the same id '{row['id']}'; ids must be unique "
                "(without an id column the name of the video file is the id): add one with columns.id=NAME"
            )
        row["repeats"] = first


def _missing(value: Any) -> bool:
    return (
        value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and math.isnan(value))
    )


def _plain(value: Any) -> Any:
    """A value of a table as JSON knows it; missing ones are None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if _missing(value):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str, list, dict)) else str(value)


# ---------------------------------------------------------------- splits


def check_shares(shares: Mapping[str, float]) -> None:
    """Raise :class:`MotionRAGError` unless ``shares`` (split -> part of all sources) are positive and sum to 1."""
    bad = [name for name in shares if not re.fullmatch(r"[\w-]+", str(name))]
    if bad or any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise MotionRAGError(
            f"splits={dict(shares)}: expected names and shares above 0 that sum to 1, e.g. "
            "'splits={train:0.98,test:0.02}'"
        )


def check_max_bad(max_bad: float) -> None:
    """Raise :class:`MotionRAGError` unless ``max_bad`` is a share (0..1)."""
    if not 0 <= max_bad <= 1:
        raise MotionRAGError(f"max_bad={max_bad:g}: expected a share from 0 to 1, such as 0.1")


def split_of(source: str, shares: Mapping[str, float], seed: int) -> str:
    """The split of all clips of one source video: by a hash of seed and source, so that neither other clips nor
    their order matter. shares: split -> part of all sources, in order; they sum to 1."""
    digest = hashlib.sha256(f"{seed}\0{source}".encode("utf-8", "surrogatepass")).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    for name, end in zip(shares, itertools.accumulate(shares.values()), strict=True):
        if place < end:
            return name
    return name  # the shares sum to a little less than 1


# ---------------------------------------------------------------- videos


@dataclass(frozen=True)
class Place:
    """Where a video's bytes lie: in a file, or in the ``member`` of the zip archive that ``files`` are, in order."""

    files: tuple[str, ...]
    member: str | None = None

    def read(self) -> bytes:
        """The whole video file; :class:`UnreadableVideo` if its archive does not give it."""
        if self.member is None:
            return Path(self.files[0]).read_bytes()
        try:
            stamp = tuple(os.stat(file).st_mtime_ns for file in self.files)
            return _archive(self.files, stamp).read(self.member)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            name = PurePosixPath(self.member).name
            raise UnreadableVideo(name, f"damaged in {Path(self.files[0]).name} ({error})") from error


class VideoFolder:
    """The videos below a folder, found by what a table calls them.

    folder: where relative paths start. by_name: a path that is not there is looked for by its file name, anywhere
    below the folder and inside the zip archives there. Raises :class:`MotionRAGError` for a missing folder and,
    naming it, for an archive that cannot be opened.
    """

    def __init__(self, folder: str | Path, by_name: bool = False) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise MotionRAGError(
                f"videos={folder}: no such folder; give the folder that the table's paths start from"
            )
        # file name -> (path below the folder, where it lies, size and checksum of an archive's member)
        self._named: dict[str, list[tuple[str, Place, Any]]] = {}
        if by_name:
            self._list()

    def find(self, video: str) -> Place:
        """Where the table's ``video`` lies; :class:`UnreadableVideo` if it is missing or there are several."""
        path = self.folder / video
        if path.is_file():
            return Place((str(path),))
        if path.exists():
            raise UnreadableVideo(video, "not a file")
        wanted = PurePosixPath(video)
        found = [] if wanted.is_absolute() else self._named.get(wanted.name, [])
        # Of several, those in folders of the table's names; of those, files before members of archives.
        found = [item for item in found if item[0].endswith(f"/{video}")] or found
        found = [item for item in found if item[1].member is None] or found
        if not found:
            raise UnreadableVideo(video, MISSING)
        path, place, content = found[0]
        for other_path, _, other_content in found[1:]:
            if content is None or other_content != content:
                raise UnreadableVideo(video, f"there are several: {path} and {other_path}")
        return place

    def _list(self) -> None:
        archives: dict[str, list[str]] = {}
        seen = {os.path.realpath(self.folder)}
        for root, folders, files in os.walk(self.folder, followlinks=True):
            real = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders)}
            folders[:] = [
                name for name, place in real.items() if place not in seen
            ]  # links may lead in circles
            seen.update(real.values())
            for name in sorted(files):
                path = os.path.join(root, name)
                part = _PART.fullmatch(name)
                if part and f"{part['whole']}.zip" not in files:
                    archives.setdefault(os.path.join(root, part["whole"]), []).append(path)
                elif name.lower().endswith(".zip"):
                    archives[path] = [path]
                elif not part:
                    self._add(os.path.relpath(path, self.folder), Place((path,)), None)
        for name, files in archives.items():
            with _open_archive(tuple(files)) as archive:
                members = archive.infolist()
            for info in members:
                if not info.is_dir():
                    below = f"{os.path.relpath(name, self.folder)}/{info.filename}"
                    self._add(below, Place(tuple(files), info.filename), (info.file_size, info.CRC))

    def _add(self, path: str, place: Place, content: Any) -> None:
        self._named.setdefault(PurePosixPath(path).name, []).append((f"/{path}", place, content))


@lru_cache(maxsize=8)  # their directories are held in memory: half a kilobyte for each member
def _archive(files: tuple[str, ...], stamp: tuple[int, ...]) -> zipfile.ZipFile:
    """An open archive; stamp: when its files changed, so that no old one is read."""
    return _open_archive(files)


def _open_archive(files: tuple[str, ...]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(files[0] if len(files) == 1 else io.BufferedReader(_Joined(files)))
    except zipfile.BadZipFile as error:
        which = files[0] if len(files) == 1 else f"{files[0]} ... {Path(files[-1]).name} ({len(files)} parts)"
        raise MotionRAGError(
            f"{which}: not a whole zip archive ({error}); download it again, or all of its parts, or move it away"
        ) from error


class _Joined(io.RawIOBase):
    """Several files read as one, as ``cat`` would join them."""

    def __init__(self, files: Iterable[str]) -> None:
        self._files = [open(file, "rb") for file in files]  # noqa: SIM115 - closed with this file
        self._ends = list(itertools.accumulate(os.fstat(file.fileno()).st_size for file in self._files))
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ends[-1]}[whence]
        if start + offset < 0:
            raise OSError("seek before the beginning")  # as a file does; zipfile tries it
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        for file, end, start in zip(self._files, self._ends, [0, *self._ends], strict=False):
            if self._at < end:
                file.seek(self._at - start)
                count = file.readinto(memoryview(buffer)[: end - self._at])
                self._at += count
                return count
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
