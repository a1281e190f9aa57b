"""The token store: features of every clip on disk, one folder per shard, read by memory mapping.

``DB/parts/<shard>/`` holds, for ``n`` clips, ``motion.npy`` (n,N,D) and ``appearance.npy`` (n,M,E) float16,
``caption.npy`` (n,W) float32 of length 1 (of the motion captions), ``preview.bin`` with one JPEG strip of
frames per clip and ``preview_ends.npy`` (n,) int64 with where each ends, ``clips.json`` (what is known about
each clip, in the same order) and ``part.json`` (where it all came from, and checksums). A part is written
beside its place and renamed in one step: what is there is whole.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from motionrag.errors import MotionRAGError
from motionrag.io import read_json, sha256, write_json

PARTS = "parts"
PART_FILE = "part.json"
LOCK = ".lock"


@contextmanager
def writer_lock(db: str | Path) -> Iterator[None]:
    """Be the only one who changes the database ``db`` (a folder that is there) while the block runs.

    The operating system gives the lock back when the process ends, however it does. Raises
    :class:`MotionRAGError` at once if another process holds it.
    """
    with (Path(db) / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise MotionRAGError(
                f"db={db} is being changed by another process ({file.read().strip() or 'unknown'}); wait until "
                "it has ended and try again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


class PartWriter:
    """Write one part; a context manager that renames it into place at the end, or leaves nothing.

    db: the database folder. name: of the part, its shard's. about: JSON-able dict kept in ``part.json``.
    """

    def __init__(self, db: str | Path, name: str, about: Mapping[str, Any]) -> None:
        self.target = Path(db) / PARTS / name
        self.partial = self.target.with_name(f".{name}.partial")
        self.about = dict(about)
        self.clips: list[dict[str, Any]] = []
        self._arrays: dict[str, _NpyFile] = {}
        self._preview_end = 0

    def __enter__(self) -> PartWriter:
        shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
        self.partial.mkdir(parents=True)
        self._previews = (self.partial / "preview.bin").open("wb")
        return self

    def add(
        self,
        clips: Sequence[Mapping[str, Any]],
        motion: np.ndarray,
        appearance: np.ndarray,
        caption: np.ndarray,
        previews: Sequence[np.ndarray],
    ) -> None:
        """Append ``b`` clips: records with at least id, caption, motion_caption and source; motion (b,N,D),
        appearance (b,M,E), caption (b,W); previews, each uint8 (P,h,w,3).

        Raises :class:`MotionRAGError` for features that float16 cannot hold.
        """
        for name, values, dtype in (
            ("motion", motion, np.float16),
            ("appearance", appearance, np.float16),
            ("caption", caption, np.float32),
        ):
            with np.errstate(over="ignore"):
                values = np.asarray(values).astype(dtype)
            finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
            if not finite.all():
                raise MotionRAGError(
                    f"clip {clips[int(np.argmin(finite))]['id']}: its {name} features are not finite as "
                    f"{np.dtype(dtype).name}; check the encoder's weights"
                )
            self._append(name, values)
        ends = []
        for preview in previews:
            self._preview_end += self._previews.write(_jpeg_strip(preview))
            ends.append(self._preview_end)
        self._append("preview_ends", np.asarray(ends, dtype=np.int64))
        self.clips += [dict(clip) for clip in clips]

    def copy(self, part: Part, rows: np.ndarray) -> None:
        """Append clips ``rows`` (r,) of another part as they are."""
        for row in rows.tolist():
            for name in ("motion", "appearance", "caption"):
                self._append(name, np.asarray(getattr(part, name)[row : row + 1]))
            self._preview_end += self._previews.write(part.jpeg(row))
            self._append("preview_ends", np.asarray([self._preview_end], dtype=np.int64))
            self.clips.append(part.clips[row])

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._arrays:
            self._arrays[name] = _NpyFile(self.partial / f"{name}.npy", values)
        self._arrays[name].append(values)

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self._previews.close()
            for array in self._arrays.values():
                array.close()
            if kind is None:
                write_json(self.partial / "clips.json", self.clips)
                files = {
                    path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                    for path in sorted(self.partial.iterdir())
                }
                write_json(self.partial / PART_FILE, {**self.about, "clips": len(self.clips), "files": files})
                self.partial.rename(self.target)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)


class Part:
    """Read one part; its arrays and records are opened when first needed.

    mmap: map the arrays into memory (many readers share one copy) instead of loading them.
    Raises :class:`MotionRAGError` if a file is missing or of another size than written.
    """

    def __init__(self, path: str | Path, mmap: bool = True) -> None:
        self.path = Path(path)
        self.about = read_about(self.path)
        for name, file in self.about["files"].items():
            size = (self.path / name).stat().st_size if (self.path / name).is_file() else None
            if size != file["bytes"]:
                raise MotionRAGError(
                    f"{self.path / name}: {'missing' if size is None else f'{size} bytes'}, expected "
                    f"{file['bytes']} bytes; copy the database again or delete {self.path.name} and encode again"
                )
        self._mmap = mmap

    def __len__(self) -> int:
        return self.about["clips"]

    @cached_property
    def clips(self) -> list[dict[str, Any]]:
        """The records, read when first needed."""
        return read_json(self.path / "clips.json")

    @cached_property
    def motion(self) -> np.ndarray:
        """(n,N,D) float16."""
        return self._array("motion")

    @cached_property
    def appearance(self) -> np.ndarray:
        """(n,M,E) float16."""
        return self._array("appearance")

    @cached_property
    def caption(self) -> np.ndarray:
        """(n,W) float32."""
        return self._array("caption")

    @cached_property
    def preview_ends(self) -> np.ndarray:
        """Where each preview strip ends, (n,) int64."""
        return self._array("preview_ends")

    @cached_property
    def _previews(self) -> np.ndarray:
        file = self.path / "preview.bin"
        return np.memmap(file, np.uint8, "r") if self._mmap else np.fromfile(file, np.uint8)

    def _array(self, name: str) -> np.ndarray:
        file = self.path / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r" if self._mmap else None)
        except ValueError as error:
            raise MotionRAGError(f"{file} is damaged ({error}); motionrag index verify says more") from error

    def jpeg(self, row: int) -> bytes:
        """The preview strip of one clip as it is stored."""
        start = int(self.preview_ends[row - 1]) if row else 0
        return self._previews[start : int(self.preview_ends[row])].tobytes()

    def preview(self, row: int) -> np.ndarray:
        """Preview frames of one clip, uint8 (P,h,w,3)."""
        strip = np.asarray(Image.open(io.BytesIO(self.jpeg(row))))
        frames = self.about["preview_frames"]
        return strip.reshape(strip.shape[0], frames, -1, 3).transpose(1, 0, 2, 3)

    def verify(self) -> None:
        """Compare every file's checksum; raises :class:`MotionRAGError` naming the damaged one."""
        for name, file in self.about["files"].items():
            if sha256(self.path / name) != file["sha256"]:
                raise MotionRAGError(
                    f"{self.path / name} is damaged: its checksum is not the one in {PART_FILE}; delete the "
                    f"folder {self.path} and run motionrag encode again"
                )


def read_about(path: Path) -> dict[str, Any]:
    """``part.json`` of a part; raises :class:`MotionRAGError` if it is not there or not readable."""
    try:
        return read_json(path / PART_FILE)
    except (FileNotFoundError, ValueError) as error:
        raise MotionRAGError(
            f"{path / PART_FILE} is missing or damaged; delete the folder {path} and run motionrag encode again"
        ) from error


class _NpyFile:
    """A .npy file that grows row by row: the number of rows goes into the header at the end.

    Written through ``write`` (``np.save`` on a full disk raises an error that does not say so).
    """

    def __init__(self, path: Path, like: np.ndarray) -> None:
        self.shape, self.dtype, self.rows = like.shape[1:], like.dtype, 0
        self.file = path.open("wb")
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow
        header = np.lib.format.header_data_from_array_1_0(np.empty((0, *self.shape), self.dtype))
        np.lib.format.write_array_header_1_0(self.file, header | {"shape": (self.rows, *self.shape)})

    def append(self, values: np.ndarray) -> None:
        if values.shape[1:] != self.shape or values.dtype != self.dtype:
            raise ValueError(
                f"expected rows {self.shape} {self.dtype}, got {values.shape[1:]} {values.dtype}"
            )
        self.file.write(np.ascontiguousarray(values).tobytes())
        self.rows += len(values)

    def close(self) -> None:
        with self.file:
            self.file.seek(0)
            self._header()


def write_npy(path: Path, values: np.ndarray) -> None:
    """Write an array that says so when the disk is full."""
    file = _NpyFile(path, values)
    file.append(values)
    file.close()


def _jpeg_strip(frames: np.ndarray) -> bytes:
    """Frames (P,h,w,3) side by side as one JPEG."""
    count, height, width, _ = frames.shape
    strip = frames.transpose(1, 0, 2, 3).reshape(height, count * width, 3)
    data = io.BytesIO()
    Image.fromarray(strip).save(data, "JPEG", quality=92, subsampling=0)
    return data.getvalue()
