"""Shards wherever they are (a folder, a URL, the output of a command), and the order in which their clips come."""

from __future__ import annotations

import errno
import fcntl
import getpass
import hashlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from motionrag.data import members
from motionrag.data.shards import INDEX, ShardIndex
from motionrag.data.video import UnreadableVideo
from motionrag.errors import MotionRAGError
from motionrag.io import sha256
from motionrag.retrieval import catalog

SLOWEST = 100_000  # bytes a second: what comes more slowly has stalled
FORGIVEN = 600.0  # seconds after which a shard that could not be fetched is asked for again


class Shards:
    """Packed shards, read clip by clip.

    A folder is read in place. From anywhere else a shard is fetched whole when its first clip is wanted, into a folder
    that all processes of this machine share, checked against the index, and removed again when the folder is full and
    others were used later.

    Args:
        place: a folder; a URL that fsspec knows (https://..., s3://..., with the library that it names installed); or
            "pipe:COMMAND", a shell command that prints the file `{file}`.
        cache: where fetched shards are kept; None: a folder for this place under the system's temporary one.
        cache_gb: at most this much there.
        timeout: seconds without a byte after which an attempt has failed, or at less than SLOWEST in the end (http and
            pipe; other protocols have their own).
        tries: attempts for one file.

    Attributes: index, as `motionrag pack` wrote it; table, one row for each clip (see members.py).
    Raises MotionRAGError for a place that cannot be reached or holds no shards.
    """

    def __init__(
        self,
        place: str | Path,
        cache: str | Path | None = None,
        cache_gb: float = 20.0,
        timeout: float = 30.0,
        tries: int = 3,
    ) -> None:
        self.place, self.timeout, self.tries = str(place).rstrip("/"), timeout, tries
        self.limit = int(cache_gb * 1e9)
        self.remote = self.place.startswith("pipe:") or "://" in self.place
        if self.remote:
            root = Path(cache or Path(tempfile.gettempdir()) / f"motionrag-shards-{getpass.getuser()}")
            self.folder = root / hashlib.sha256(self.place.encode()).hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with locked(self.folder / f".{INDEX}.lock"):
                    self._fetch(INDEX, self.folder / INDEX, None)
                self.index = ShardIndex.open(self.folder).index
                if "table" not in self.index:
                    raise MotionRAGError(
                        f"shards={place} were packed without {members.CLIPS}: pack them again"
                    )
                table = self._cached(self.index["table"])
            except UnreadableVideo as error:
                raise MotionRAGError(f"shards={place}: {error.reason}") from error
        else:
            self.folder = Path(place)
            self.index = ShardIndex.open(self.folder).index
            table = self.folder / members.CLIPS
            if "table" in self.index and not (
                table.is_file() and sha256(table) == self.index["table"]["sha256"]
            ):
                raise MotionRAGError(f"{table} is missing or damaged: copy it again or pack the clips again")
        self.shards = {shard["file"]: shard for shard in self.index["shards"]}
        if "table" in self.index:
            self.table = catalog.read(table)
        else:
            self.table = members.scan(self.folder, list(self.shards))
        if len(self.table) != self.index["clips"]:
            raise MotionRAGError(
                f"shards={place}: {len(self.table)} clips in {members.CLIPS}, {self.index['clips']} in {INDEX}: pack again"
            )

    def numbers(self) -> np.ndarray:
        """For each clip which shard it lies in, (n,) int64."""
        number = {file: i for i, file in enumerate(self.shards)}
        return np.array([number[file] for file in self.table["shard"].to_pylist()], np.int64)

    def check_room(self, clips: int) -> None:
        """Raise MotionRAGError if the cache is too small for shuffling `clips` together."""
        if not self.remote:
            return
        largest = max(shard["bytes"] for shard in self.shards.values())
        together = min(-(-clips * len(self.shards) // max(len(self.table), 1)) + 3, len(self.shards))
        if largest * together > self.limit:
            raise MotionRAGError(
                f"cache_gb={self.limit / 1e9:g}: clips of {together} shards of up to {largest / 1e9:.3g} GB are shuffled "
                f"together; give at least cache_gb={largest * together / 1e9:.3g} or a smaller buffer than {clips}"
            )

    def read(self, row: int) -> bytes:
        """The bytes of one clip. Raises UnreadableVideo if its shard cannot be had or they are not those packed."""
        names = ("shard", "member", "offset", "bytes", "sha256")
        shard, member, offset, size, digest = (self.table[name][row].as_py() for name in names)
        for _ in range(3 if self.remote else 1):  # between fetching and opening, others may have made room
            path = self._cached(self.shards[shard]) if self.remote else self.folder / shard
            try:
                with path.open("rb") as file:
                    file.seek(int(offset))
                    data = file.read(int(size))
                if self.remote:
                    os.utime(path)  # used now: the last to be removed
                break
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UnreadableVideo(member, f"shard {path} cannot be read: {error.strerror}") from error
        else:
            raise UnreadableVideo(member, f"shard {path} is missing")
        if len(data) < int(size):
            raise UnreadableVideo(member, f"shard {path} is cut off before its end")
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise UnreadableVideo(member, f"{member} in shard {path} is damaged: its checksum is another one")
        return data

    # ------------------------------------------------------------ fetching

    def _cached(self, expected: Mapping[str, Any]) -> Path:
        """Where a file lies in the cache, fetched if it does not. Raises UnreadableVideo."""
        name = f"{expected['sha256'][:16]}-{expected['file']}"  # of shards packed again, not the old one
        path = self.folder / name
        if path.is_file():
            return path
        with locked(self.folder / f".{name}.lock") as failure:
            if path.is_file():
                return path
            told = failure.read_text()
            if told and time.time() - failure.stat().st_mtime < FORGIVEN:
                raise UnreadableVideo(expected["file"], told)  # another process has tried, or this one
            try:
                self._fetch(expected["file"], path, expected)
            except UnreadableVideo as error:
                failure.write_text(error.reason)
                raise
            failure.write_text("")
        self._make_room(path)
        return path

    def _fetch(self, file: str, path: Path, expected: Mapping[str, Any] | None) -> None:
        """Fetch a file whole, or raise UnreadableVideo; killed in between it leaves no file at `path`."""
        partial = path.with_name(f".{path.name}.partial")
        seconds = self.timeout + (expected["bytes"] if expected else 100 * SLOWEST) / SLOWEST
        reasons = []
        try:
            for attempt in range(self.tries):
                time.sleep(min(2.0**attempt / 4, 10.0) if attempt else 0.0)
                try:
                    if self.place.startswith("pipe:"):
                        self._run(file, partial, seconds)
                    else:
                        self._download(file, partial, seconds)
                    if expected:
                        _compare(partial, expected)
                    os.replace(partial, path)
                    return
                except ImportError as error:  # of what fsspec wants for this protocol
                    raise MotionRAGError(f"shards={self.place}: {error}") from error
                except Exception as error:  # each library has its own for a network that fails
                    if isinstance(error, OSError) and error.errno in (
                        errno.ENOSPC,
                        errno.EDQUOT,
                        errno.EFBIG,
                    ):
                        raise MotionRAGError(
                            f"clips.cache: {os.strerror(error.errno)} while writing {partial.parent}: make room, name another "
                            "folder (clips.cache=DIR) or keep less there (clips.cache_gb=N)"
                        ) from error
                    reasons.append(" ".join(str(error).split())[:200] or type(error).__name__)
        finally:
            partial.unlink(missing_ok=True)
        raise UnreadableVideo(
            file, f"{file} could not be fetched from {self.place} in {self.tries} tries: {reasons[-1]}"
        )

    def _download(self, file: str, path: Path, seconds: float) -> None:
        import fsspec

        options = {}
        if self.place.startswith("http"):
            import aiohttp

            limit = aiohttp.ClientTimeout(total=seconds, sock_connect=self.timeout, sock_read=self.timeout)
            options = {"client_kwargs": {"timeout": limit}}
        system, where = fsspec.url_to_fs(f"{self.place}/{file}", **options)
        system.get_file(where, str(path))

    def _run(self, file: str, path: Path, seconds: float) -> None:
        command = self.place.removeprefix("pipe:").replace("{file}", shlex.quote(file))
        with path.open("wb") as out, tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, shell=True, stdout=out, stderr=said, start_new_session=True)
            before, end = -1, time.monotonic() + seconds
            try:
                while True:
                    try:
                        code = process.wait(self.timeout)
                        break
                    except subprocess.TimeoutExpired:
                        size = path.stat().st_size
                        if size == before or not size:
                            raise TimeoutError(f"nothing came for {self.timeout:g} s") from None
                        before = size
                        if time.monotonic() > end:
                            raise TimeoutError(f"slower than {SLOWEST // 1000} kB/s") from None
            finally:
                if process.poll() is None:  # silent, or this process was interrupted
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if code:
                said.seek(0)
                words = said.read().decode(errors="replace").strip()
                raise OSError(f"{command} ended with {code}: {words[-150:]}")

    def _make_room(self, kept: Path) -> None:
        """Remove the shards used longest ago until the rest, with `kept`, is within the limit."""
        there = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process makes room, too
                there.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in there)
        for _, size, path in sorted(there):
            if total > self.limit and path != kept:
                path.unlink(missing_ok=True)
                total -= size


def _compare(path: Path, expected: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise OSError(f"cut off: {size} of {expected['bytes']} bytes came")
    if sha256(path) != expected["sha256"]:
        raise OSError(f"damaged on the way: its checksum is not the one in {INDEX}")


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Hold a lock that the system takes back when the process ends, however it does; wait for it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


class Order:
    """Which of `n` clips comes at a position of the endless stream: one shuffled pass over all after the other.

    A function of (seed, position) alone, so nothing has to be stored to continue anywhere. Shards come in another order
    in each pass, and a clip at a random place among the `buffer` clips that begin with its shard: so only that many
    clips' shards are in use at a time, and a new one is needed as often as an old one is done.

    Args:
        n: clips.
        seed: of the shuffling.
        shards: number (n,) of the shard of each clip; None: of no account.
        buffer: clips shuffled together; None, or n and more: all of them.
    """

    def __init__(
        self, n: int, seed: int, shards: Sequence[int] | np.ndarray | None = None, buffer: int | None = None
    ) -> None:
        self.n, self.seed, self.buffer = n, seed, buffer
        self.shards = None
        if shards is not None and buffer is not None and buffer < n:
            _, self.shards = np.unique(np.asarray(shards), return_inverse=True)
        self._pass = lru_cache(maxsize=2)(self._shuffle)  # a batch may lie in two passes

    def __getitem__(self, position: int) -> int:
        number, place = divmod(position, self.n)
        return int(self._pass(number)[place])

    def _shuffle(self, number: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, number))
        if self.shards is None:
            return rng.permutation(self.n)
        sizes = np.bincount(self.shards)
        turn = rng.permutation(len(sizes))
        starts = np.empty(len(sizes))
        starts[turn] = np.cumsum(sizes[turn]) - sizes[turn]
        return np.argsort(starts[self.shards] + rng.random(self.n) * self.buffer, kind="stable")
