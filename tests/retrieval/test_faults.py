"""kill -9 and a full disk while a store or a database is written: whole, or not there, and the next run goes on."""

import multiprocessing
import os
import resource
import signal
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest

from motionrag.cli.mistakes import user_message
from motionrag.errors import MotionRAGError
from motionrag.retrieval import bank, building, changes
from motionrag.retrieval.bank import Part, PartWriter
from motionrag.retrieval.building import build
from motionrag.retrieval.database import RetrievalDatabase

FORK = multiprocessing.get_context("fork")


def contents(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in folder.rglob("*")
        if f.is_file() and f.name != ".lock"
    }


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work):
    """Run ``work``, which kills itself, in a process of its own."""
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def write_part(folder):
    rng = np.random.default_rng(0)
    with PartWriter(folder, "p", {"skipped": [], "preview_frames": 1}, "int8") as writer:
        for i in range(3):
            clip = {"id": f"c{i}", "caption": "c", "motion_caption": "m", "source": f"s{i}", "metadata": {}}
            arrays = rng.normal(size=(1, 5, 4)), rng.normal(size=(1, 3, 2)), rng.normal(size=(1, 6))
            writer.add([clip], *arrays, [np.zeros((1, 8, 8, 3), np.uint8)])


@pytest.mark.parametrize("step", ["add", "records", "checksums", "about", "rename"])
def test_a_killed_encode_leaves_no_part(tmp_path, step):
    write_part(tmp_path / "whole")

    def work():
        if step == "add":
            append, calls = bank._NpyFile.append, []
            bank._NpyFile.append = lambda *args: (
                kill() if len(calls) > 8 else (calls.append(1), append(*args))
            )
        elif step == "checksums":
            bank.sha256 = kill
        elif step == "rename":
            bank.put_in_place = kill
        else:
            write, name = bank.write_json, {"records": "clips.json", "about": "part.json"}[step]
            bank.write_json = lambda path, value: kill() if path.name == name else write(path, value)
        write_part(tmp_path / "db")

    killed(work)
    assert [path.name for path in (tmp_path / "db/parts").iterdir() if path.name[0] != "."] == []
    write_part(tmp_path / "db")  # what is left does not lock the part, nor get into it
    assert contents(tmp_path / "db") == contents(tmp_path / "whole")
    Part(tmp_path / "db/parts/p").verify()


def test_two_processes_do_not_write_one_part(tmp_path):
    with PartWriter(tmp_path, "p", {}):
        inode = (tmp_path / "parts/.p.partial").stat().st_ino
        with (
            pytest.raises(MotionRAGError, match="parts/p is being written by another process; wait"),
            PartWriter(tmp_path, "p", {}),
        ):
            pass
        assert (tmp_path / "parts/.p.partial").stat().st_ino == inode
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["p"]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("step", ["catalog", "index", "neighbours", "manifest"])
def test_a_killed_index_is_the_old_one_or_none(write_store, step, again):
    path, features = write_store((3, 4))
    other, _ = write_store((3, 4), "other")
    build(other, 3)
    if again:
        build(path, 2)

    def work():
        put = building._put
        if step == "manifest":
            building.write_json = kill
        else:
            building._put = lambda path, role, write: put(
                path, role, (lambda file: (write(file), kill())) if role == step else write
            )
        build(path, 3)

    killed(work)
    if again:
        changes.verify(path)
        assert RetrievalDatabase(path).manifest["neighbours"]["k"] == 2
    else:
        with pytest.raises(MotionRAGError, match=r"no manifest.json there; run motionrag index"):
            RetrievalDatabase(path)
    build(path, 3)
    assert contents(path) == contents(other)
    db = RetrievalDatabase(path)
    np.testing.assert_array_equal(
        db.motion_features(["c5"])[0].numpy(), features["c5"]["motion"].astype("f4")
    )


@contextmanager
def little_room(folder, how):
    """Gives a function that sets the size of the file system in ``folder``, or of any file, in bytes."""
    if how == "file size":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def used_in(folder) -> int:
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    ("how", "reason", "small"),
    [("file system", "No space left on device", 100_000), ("file size", "File too large", 20_000)],
)
def test_a_full_disk(write_store, tmp_path, how, reason, small):
    """Encoding: the part that does not fit is not there. Indexing: the store stays, and there is no database."""
    (tmp_path / "disk").mkdir()
    with little_room(tmp_path / "disk", how) as resize:
        resize(small)
        with pytest.raises(OSError, match=reason):
            write_store((2, 400), "disk/db")
        parts = tmp_path / "disk/db/parts"
        assert [path.name for path in parts.iterdir()] == ["clips-0"]
        Part(parts / "clips-0").verify()

        resize(9_000_000)
        path, _ = write_store((300,), "disk/other")
        before = contents(path)
        resize(used_in(tmp_path / "disk") + 3 * 4096 if how == "file system" else 3000)
        with pytest.raises(OSError, match=reason):
            build(path, 16)
        assert {name: data for name, data in contents(path).items() if name in before} == before
        with pytest.raises(MotionRAGError, match=r"no manifest.json there"):
            RetrievalDatabase(path)
        resize(9_000_000)
        build(path, 16)
        assert changes.verify(path)["clips"] == 300

        resize(9_000_000)
        other, _ = write_store((300,), "disk/more", prefix="o")
        before = contents(path)
        resize(used_in(tmp_path / "disk") + 40 * 4096 if how == "file system" else 20_000)
        for change in (
            lambda: changes.add(path, [other]),
            lambda: changes.merge(tmp_path / "disk/new", [path, other]),
        ):
            with pytest.raises(OSError, match=reason) as error:
                change()
            assert "disk" in user_message(error.value) and "free some" in user_message(error.value)
            assert contents(path) == before and not list((tmp_path / "disk").glob("*new*"))
        resize(9_000_000)
        changes.add(path, [other])
        assert changes.verify(path)["clips"] == 600


def test_more_parts_than_file_descriptors(write_store):
    """A million clips in shards of a hundred are ten thousand parts, and a process often has 1024 descriptors."""
    path, features = write_store((1,) * 30, precision="int8")
    limits, there = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * there + 40, limits[1]))
    try:
        build(path, 3)
        changes.verify(path)
        db = RetrievalDatabase(path)
        for _ in range(2):
            read = [(db.motion_features([i]), db.appearance_features([i]), db.preview(i)) for i in db.ids]
            assert np.array_equal(db.caption_embeddings, [own["caption"] for own in features.values()])
            assert len(db.search(features["c7"]["caption"], 30)[0][0]) == 30
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    again = RetrievalDatabase(path)
    for clip_id, (motion, appearance, preview) in zip(db.ids, read, strict=True):
        assert motion.equal(again.motion_features([clip_id]))
        assert appearance.equal(again.appearance_features([clip_id]))
        assert np.array_equal(preview, again.preview(clip_id))
