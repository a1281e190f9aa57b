"""The token store: features of every clip on disk, one folder per shard, read by memory mapping.

``DB/parts/<shard>/`` holds, for ``n`` clips, ``motion.npy`` (n,N,D) and ``appearance.npy`` (n,M,E) in one of the
PRECISIONS (with int8 also ``motion_step.npy`` (n,N) and ``appearance_step.npy`` (n,M) float32), ``caption.npy``
(n,W) float32 of length 1 (of the motion captions), ``preview.bin`` with one JPEG strip of frames per clip and
``preview_ends.npy`` (n,) int64 with where each ends, ``sums.npy`` (n,) with the checksums of each clip's values (see
SUMS; earlier versions wrote none), ``clips.json`` (what is known about each clip, in the same order) and ``part.json``
(where it all came from, precision, error, and checksums). ``motion`` are motion features, or motion tokens if the store
was encoded with a Resampler. A part is written beside its place and renamed in one step: what is there is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from motionrag.errors import MotionRAGError
from motionrag.io import only_writer, put_in_place, sha256, write_json
from motionrag.retrieval.precision import PRECISIONS, pack, unpack

PARTS = "parts"
PART_FILE = "part.json"
LOCK = ".lock"
FEATURES = ("motion", "appearance")
#: Checksums of one clip, see :func:`checksum`: of its features (with their steps), of the first token of appearance, ...
SUMS = np.dtype([(name, "<u4") for name in (*FEATURES, "class_token", "caption", "preview")])


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
        self.sums: list[tuple[int, ...]] = []
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
        kept: dict[str, list[np.ndarray]] = {}
        for name, values in zip(FEATURES, (motion, appearance), strict=True):
            stored, step = pack(values, self.precision)
            found = unpack(stored, step).numpy()
            self._check(clips, name, found, PRECISIONS[self.precision])
            kept[name] = [stored] if step is None else [stored, step]
            errors, squares = self._squares.get(name, (0.0, 0.0))
            exact = np.asarray(values, np.float32)
            self._squares[name] = errors + _square(found - exact), squares + _square(exact)
        caption = np.asarray(caption, np.float32)
        self._check(clips, "caption", caption, "float32")
        for row, (clip, preview) in enumerate(zip(clips, previews, strict=True)):
            features = {name: [values[row] for values in kept[name]] for name in FEATURES}
            self._append(clip, features, caption[row], _jpeg_strip(preview))

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
        for row in rows.tolist():
            features = {name: part.stored(name, row) for name in FEATURES}
            self._append(part.clips[row], features, part.captions([row])[0], part.jpeg(row))

    def _append(
        self, clip: Mapping[str, Any], features: dict[str, list[np.ndarray]], caption: np.ndarray, jpeg: bytes
    ) -> None:
        self._preview_end += self._previews.write(jpeg)
        arrays = {name: values[0] for name, values in features.items()}
        arrays |= {f"{name}_step": values[1] for name, values in features.items() if values[1:]}
        arrays |= {"caption": caption, "preview_ends": np.array(self._preview_end, np.int64)}
        for name, values in arrays.items():
            if name not in self._arrays:
                self._arrays[name] = _NpyFile(self.partial / f"{name}.npy", values[None])
            self._arrays[name].append(values[None])
        tokens = [values[0] for values in features["appearance"]]
        groups = (
            features["motion"],
            features["appearance"],
            tokens,
            [caption],
            [np.frombuffer(jpeg, np.uint8)],
        )
        self.sums.append(tuple(checksum(*group) for group in groups))
        self.clips.append(dict(clip))

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
                write_npy(self.partial / "sums.npy", np.array(self.sums, SUMS))
                files = {
                    path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
                    for path in sorted(self.partial.iterdir())
                }
                about = {**self.about, **self._stored(), "clips": len(self.clips), "files": files}
                write_json(self.partial / PART_FILE, about)
                put_in_place(self.partial, self.target)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)


class Part:
    """Read one part; its arrays and records are opened when first needed.

    mmap: map the arrays into memory (many readers share one copy) instead of loading them. about: expected checksum of
    ``part.json``, if it is known. What is read of a clip is compared with its checksum at the first read; all methods
    raise :class:`MotionRAGError` for damaged files.
    Raises :class:`MotionRAGError` if a file is missing or of another size than written.
    """

    def __init__(self, path: str | Path, mmap: bool = True, about: str | None = None) -> None:
        self.path = Path(path)
        self.about = read_about(self.path, about)
        for name, file in self.about["files"].items():
            try:
                size = os.stat(f"{self.path}/{name}").st_size
            except OSError:
                size = None
            if size != file["bytes"]:
                raise MotionRAGError(
                    f"{self.path / name}: {'missing' if size is None else f'{size} bytes'}, expected "
                    f"{file['bytes']} bytes; copy the database again or delete {self.path.name}, encode and index again"
                )
        self._mmap = mmap
        self._arrays: dict[str, np.ndarray] = {}
        self._compared: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.about["clips"]

    @cached_property
    def clips(self) -> list[dict[str, Any]]:
        """The records, read when first needed."""
        return self.read_clips()

    def read_clips(self) -> list[dict[str, Any]]:
        """The records, read anew."""
        data = (self.path / "clips.json").read_bytes()
        if hashlib.sha256(data).hexdigest() != self.about["files"]["clips.json"]["sha256"]:
            raise MotionRAGError(self._damaged("clips.json"))
        return json.loads(data)

    def features(self, name: str, row: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """``motion`` (N,D) or ``appearance`` (M,E) of a clip, float32, written into ``out`` if given."""
        return unpack(*self.stored(name, row), out=out)

    def stored(self, name: str, row: int) -> list[np.ndarray]:
        """The same as it is stored: the values, and for int8 their steps (N,) or (M,)."""
        values = [array[row] for array in self._with_steps(name)]
        self._compare(name, row, *values)
        return values

    def class_tokens(self, rows: Any) -> np.ndarray:
        """The first token of appearance (r,E) of clips ``rows``, float32."""
        values = [array[rows, 0] for array in self._with_steps("appearance")]
        self._compare_all("class_token", rows, *values)
        return unpack(*values).numpy()

    def captions(self, rows: Any) -> np.ndarray:
        """Embeddings (r,W) float32 of the motion captions of clips ``rows``."""
        values = self.array("caption")[rows]
        self._compare_all("caption", rows, values)
        return values

    def _with_steps(self, name: str) -> list[np.ndarray]:
        return [self._array(n) for n in (name, f"{name}_step") if f"{n}.npy" in self.about["files"]]

    def _compare(self, name: str, row: int, *values: np.ndarray) -> None:
        if name not in self._compared:
            self._compared[name] = np.zeros(len(self), bool)
        if self._compared[name][row]:
            return
        if "sums.npy" in self.about["files"] and checksum(*values) != self._array("sums")[name][row]:
            file = {"class_token": "appearance.npy", "preview": "preview.bin"}.get(name, f"{name}.npy")
            raise MotionRAGError(self._damaged(file, f" at clip '{self.clips[row]['id']}'"))
        self._compared[name][row] = True

    def _compare_all(self, name: str, rows: Any, *values: np.ndarray) -> None:
        places = np.arange(len(self))[rows]
        for at in np.flatnonzero(~self._compared.get(name, np.zeros(len(self), bool))[places]).tolist():
            self._compare(name, int(places[at]), *(stored[at] for stored in values))

    @cached_property
    def _previews(self) -> np.ndarray:
        file = self.path / "preview.bin"
        return mapped(file) if self._mmap else np.fromfile(file, np.uint8)

    def array(self, name: str) -> np.ndarray:
        """One of the arrays as it is stored, read-only, opened when first needed."""
        values = self._array(name).view()
        values.flags.writeable = False
        return values

    def _array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            found = read_npy(self.path / f"{name}.npy", self._mmap)
            if len(found) != len(self) or (name == "sums" and found.dtype != SUMS):
                raise MotionRAGError(self._damaged(f"{name}.npy"))
            self._arrays[name] = found
        return self._arrays[name]

    def jpeg(self, row: int) -> bytes:
        """The preview strip of one clip as it is stored."""
        ends = self.array("preview_ends")
        start = int(ends[row - 1]) if row else 0
        data = self._previews[start : int(ends[row])].tobytes()
        self._compare("preview", row, np.frombuffer(data, np.uint8))
        return data

    def preview(self, row: int) -> np.ndarray:
        """Preview frames of one clip, uint8 (P,h,w,3)."""
        strip = np.asarray(Image.open(io.BytesIO(self.jpeg(row))))
        frames = self.about["preview_frames"]
        return strip.reshape(strip.shape[0], frames, -1, 3).transpose(1, 0, 2, 3)

    def _damaged(self, name: str, where: str = "") -> str:
        return (
            f"{self.path / name} is damaged{where}: its checksum is another one; motionrag index verify looks for more; "
            f"copy it again, or delete the folder {self.path}, encode and index again"
        )

    def verify(self) -> None:
        """Compare every file's checksum; raises :class:`MotionRAGError` naming the damaged one."""
        for name, file in self.about["files"].items():
            if sha256(self.path / name) != file["sha256"]:
                raise MotionRAGError(self._damaged(name))


def read_about(path: Path, checksum: str | None = None) -> dict[str, Any]:
    """``part.json`` of a part; raises :class:`MotionRAGError` if it is missing, not readable or has another checksum."""
    try:
        data = (path / PART_FILE).read_bytes()
        about = json.loads(data)
    except (FileNotFoundError, ValueError) as error:
        raise MotionRAGError(
            f"{path / PART_FILE} is missing or damaged; delete the folder {path} and run motionrag encode again"
        ) from error
    if checksum is not None and hashlib.sha256(data).hexdigest() != checksum:
        raise MotionRAGError(
            f"{path / PART_FILE} is not the one that was indexed: damaged, or encoded again since; copy the database "
            f"again, or run motionrag index db={path.parent.parent}"
        )
    return about


def read_npy(file: str | Path, mmap: bool, name: Path | None = None) -> np.ndarray:
    """A .npy file, mapped into memory or loaded; raises :class:`MotionRAGError` (with ``name``) if it is damaged."""
    try:
        if not mmap:
            return np.load(file)
        with open(file, "rb") as opened:
            version = np.lib.format.read_magic(opened)
            header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = header(opened)
            values = mapped(file)[opened.tell() :].view(dtype)
        return values[: math.prod(shape)].reshape(shape, order="F" if fortran else "C")
    except OSError:
        raise
    except Exception as error:  # the header is a Python expression: a flipped byte there may raise anything
        said = " ".join(str(error).split())
        raise MotionRAGError(
            f"{name or file} is damaged ({said}); motionrag index verify says more"
        ) from error


def mapped(file: str | Path) -> np.ndarray:
    """The bytes of a file that is not empty, mapped into memory; the file cannot be changed through them.

    By torch, whose mappings keep no file open, as NumPy's do: a database of thousands of parts would use up all that a
    process may have open.
    """
    size = os.stat(file).st_size
    storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def checksum(*values: np.ndarray) -> int:
    """CRC-32 of arrays: their types, shapes and bytes. It sees any flipped bits that lie within 32 bits."""
    total = 0
    for value in values:
        total = zlib.crc32(f"{value.dtype.str}{value.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(value), total)
    return total


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
