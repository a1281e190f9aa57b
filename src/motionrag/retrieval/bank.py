"""The token store: features of every clip on disk, one folder per shard, read by memory mapping.

``DB/parts/<shard>/`` holds, for ``n`` clips, ``motion.npy`` (n,N,D) and ``appearance.npy`` (n,M,E) in one of the
PRECISIONS (with int8 also ``motion_step.npy`` (n,N) and ``appearance_step.npy`` (n,M) float32), ``caption.npy``
(n,W) float32 of length 1 (of the motion captions), ``preview.bin`` with one JPEG strip of frames per clip and
``preview_ends.npy`` (n,) int64 with where each ends, ``clips.json`` (what is known about each clip, in the same
order) and ``part.json`` (where it all came from, precision, error, and checksums). ``motion`` are motion features, or
motion tokens if the store was encoded with a Resampler. A part is written beside its place and renamed in one step:
what is there is whole.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from motionrag.errors import MotionRAGError
from motionrag.io import only_writer, read_json, sha256, write_json
from motionrag.retrieval.precision import PRECISIONS, pack, unpack

PARTS = "parts"
PART_FILE = "part.json"
LOCK = ".lock"
FEATURES = ("motion", "appearance")


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
    precision: of what :meth:`add` is given, one of PRECISIONS. Entering raises :class:`MotionRAGError` if another
    process writes this part.
    """

    def __init__(self, db: str | Path, name: str, about: Mapping[str, Any], precision: str = "fp16") -> None:
        self.target = Path(db) / PARTS / name
        self.partial = self.target.with_name(f".{name}.partial")
        self.about = dict(about)
        self.clips: list[dict[str, Any]] = []
        self.precision = precision
        self._arrays: dict[str, _NpyFile] = {}
        self._squares: dict[
            str, tuple[float, float]
        ] = {}  # sums, of the errors that storing makes and of the values
        self._preview_end = 0

    def __enter__(self) -> PartWriter:
        with ExitStack() as stack:
            lock = self.target.with_name(f".{self.target.name}.lock")
            busy = f"{self.target} is being written by another process; wait until it has ended and try again"
            stack.enter_context(only_writer(lock, busy))
            stack.callback(lock.unlink, missing_ok=True)
            shutil.rmtree(self.partial, ignore_errors=True)  # of a run that was killed
            self.partial.mkdir(parents=True)
            self._previews = (self.partial / "preview.bin").open("wb")
            self._open = stack.pop_all()
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

        Raises :class:`MotionRAGError` for features that the precision cannot hold.
        """
        for name, values in zip(FEATURES, (motion, appearance), strict=True):
            stored, step = pack(values, self.precision)
            found = unpack(stored, step).numpy()
            self._check(clips, name, found, PRECISIONS[self.precision])
            self._append(name, stored)
            if step is not None:
                self._append(f"{name}_step", step)
            errors, squares = self._squares.get(name, (0.0, 0.0))
            exact = np.asarray(values, np.float32)
            self._squares[name] = errors + _square(found - exact), squares + _square(exact)
        caption = np.asarray(caption, np.float32)
        self._check(clips, "caption", caption, "float32")
        self._append("caption", caption)
        ends = []
        for preview in previews:
            self._preview_end += self._previews.write(_jpeg_strip(preview))
            ends.append(self._preview_end)
        self._append("preview_ends", np.asarray(ends, dtype=np.int64))
        self.clips += [dict(clip) for clip in clips]

    @staticmethod
    def _check(clips: Sequence[Mapping[str, Any]], name: str, values: np.ndarray, dtype: str) -> None:
        finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not finite.all():
            raise MotionRAGError(
                f"clip {clips[int(np.argmin(finite))]['id']}: its {name} features are not finite as {dtype}; check "
                "the encoder's weights" + ("; precision=bf16 holds larger ones" if dtype == "float16" else "")
            )

    def copy(self, part: Part, rows: np.ndarray) -> None:
        """Append clips ``rows`` (r,) of another part as they are; ``about`` says in which precision."""
        steps = [f"{name}_step" for name in FEATURES if f"{name}_step.npy" in part.about["files"]]
        for row in rows.tolist():
            for name in (*FEATURES, "caption", *steps):
                self._append(name, np.asarray(part.array(name)[row : row + 1]))
            self._preview_end += self._previews.write(part.jpeg(row))
            self._append("preview_ends", np.asarray([self._preview_end], dtype=np.int64))
            self.clips.append(part.clips[row])

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._arrays:
            self._arrays[name] = _NpyFile(self.partial / f"{name}.npy", values)
        self._arrays[name].append(values)

    def _stored(self) -> dict[str, Any]:
        """Precision, and the relative error (root mean square) that it makes; nothing for clips that were copied."""
        if not self._squares:
            return {}
        relative = {
            name: (errors / max(squares, 1e-30)) ** 0.5 for name, (errors, squares) in self._squares.items()
        }
        # not all digits: how a sum is rounded depends on the number of threads
        return {
            "precision": self.precision,
            "error": {name: float(f"{value:.2e}") for name, value in relative.items()},
        }

    def __exit__(self, kind: type | None, *_: object) -> None:
        with self._open:
            self._close(kind is None)

    def _close(self, whole: bool) -> None:
        try:
            self._previews.close()
            for array in self._arrays.values():
                array.close()
            if whole:
                write_json(self.partial / "clips.json", self.clips)
                files = {
                    path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                    for path in sorted(self.partial.iterdir())
                }
                about = {**self.about, **self._stored(), "clips": len(self.clips), "files": files}
                write_json(self.partial / PART_FILE, about)
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
        self._arrays: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.about["clips"]

    @cached_property
    def clips(self) -> list[dict[str, Any]]:
        """The records, read when first needed."""
        return read_json(self.path / "clips.json")

    def features(self, name: str, index: Any) -> torch.Tensor:
        """``motion`` (n,N,D) or ``appearance`` (n,M,E) at ``index`` into clips and tokens, as float32 (...,D)."""
        stored = self.array(name)[index]
        return unpack(stored, self.array(f"{name}_step")[index] if stored.dtype == np.int8 else None)

    @property
    def caption(self) -> np.ndarray:
        """(n,W) float32."""
        return self.array("caption")

    @cached_property
    def _previews(self) -> np.ndarray:
        file = self.path / "preview.bin"
        return np.memmap(file, np.uint8, "r") if self._mmap else np.fromfile(file, np.uint8)

    def array(self, name: str) -> np.ndarray:
        """One of the arrays as it is stored, opened when first needed."""
        if name not in self._arrays:
            file = self.path / f"{name}.npy"
            try:
                self._arrays[name] = np.load(file, mmap_mode="r" if self._mmap else None)
            except ValueError as error:
                raise MotionRAGError(
                    f"{file} is damaged ({error}); motionrag index verify says more"
                ) from error
        return self._arrays[name]

    def jpeg(self, row: int) -> bytes:
        """The preview strip of one clip as it is stored."""
        ends = self.array("preview_ends")
        start = int(ends[row - 1]) if row else 0
        return self._previews[start : int(ends[row])].tobytes()

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


def _square(values: np.ndarray) -> float:
    """Sum of squares."""
    return float(np.square(values, dtype=np.float64).sum())
