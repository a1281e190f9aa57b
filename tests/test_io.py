"""Files appear whole, and are on the disk before they have their names."""

import os

import pytest

from motionrag import io


@pytest.fixture
def calls(monkeypatch):
    """What was settled on the disk, and what was renamed, in order."""
    seen, fsync, replace = [], os.fsync, os.replace

    def settled(number):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        fsync(number)

    def renamed(made, path):
        seen.append(("renamed", os.path.basename(path)))
        replace(made, path)

    monkeypatch.setattr(os, "fsync", settled)
    monkeypatch.setattr(os, "replace", renamed)
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    with io.atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
    assert calls == [temporary.name, ("renamed", "a.json"), tmp_path.name]


def test_so_is_all_that_is_in_a_folder(tmp_path, calls):
    (tmp_path / "made/deep").mkdir(parents=True)
    (tmp_path / "made/deep/file").write_text("x")
    io.put_in_place(tmp_path / "made", tmp_path / "out")
    assert sorted(calls[:3]) == ["deep", "file", "made"]
    assert calls[3:] == [("renamed", "out"), tmp_path.name]
    assert (tmp_path / "out/deep/file").read_text() == "x"


def test_what_fails_leaves_the_old_one(tmp_path):
    io.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), io.atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
