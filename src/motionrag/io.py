"""Files that are either whole or not there: atomic writes, checksums, one writer at a time."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motionrag.errors import MotionRAGError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` when the block ends well.

    The temporary name keeps the suffix of ``path`` (writers choose formats by it) and starts with a dot.
    Missing parent folders are made. When the block raises, the temporary file is removed and whatever was
    at ``path`` before stays untouched. For files, not folders.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def put_in_place(made: str | Path, path: str | Path) -> None:
    """Rename ``made``, a file or a folder with all that is in it, to ``path`` once it is on the disk.

    Without that a machine that loses power may have the name and not the content.
    """
    made, path = Path(made), Path(path)
    for place in (made, *made.rglob("*")) if made.is_dir() else (made,):
        _settle(place)
    os.replace(made, path)
    _settle(path.parent)


def _settle(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, obj: Any) -> Path:
    """Write ``obj`` as indented JSON in one step. NaN and infinity raise ``ValueError``: they are not JSON."""
    return write_text(path, json_text(obj))


def json_text(obj: Any) -> str:
    """What :func:`write_json` writes."""
    return json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> Any:
    """Read a JSON file; the standard exceptions for missing and malformed files pass through."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """Hexadecimal SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def only_writer(lock: str | Path, busy: str) -> Iterator[None]:
    """Hold the file ``lock`` (made if missing, with its folder; never removed here) while the block runs.

    The operating system gives it back when the process ends, however it does. Raises :class:`MotionRAGError` with
    the message ``busy`` at once if another process holds it.
    """
    while True:
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        with Path(lock).open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MotionRAGError(busy) from None
            # The last holder may have removed the file between our open and our lock.
            if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                yield
                return
