"""Parts of the token store: whole or not there, and what is read is what was written."""

import errno
import io
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from motionrag.errors import MotionRAGError
from motionrag.retrieval import bank
from motionrag.retrieval.bank import Part, PartWriter

CLIP = {"id": "a", "caption": "c", "motion_caption": "m", "source": "s"}


def add(writer, count=1, value=1.0):
    writer.add(
        [CLIP] * count,
        np.full((count, 5, 4), value),
        np.full((count, 3, 2), value),
        np.full((count, 6), value),
        [np.zeros((2, 8, 8, 3), np.uint8)] * count,
    )


@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_read_is_what_was_written(write_store, mmap):
    out, features = write_store((3, 4))
    number = 0
    for name, size in (("clips-0", 3), ("clips-1", 4)):
        part = Part(out / "parts" / name, mmap)
        part.verify()
        assert [part.array(name).dtype for name in ("motion", "appearance", "caption")] == ["f2", "f2", "f4"]
        part.array("motion")
        assert (f"{part.path}/motion.npy" in Path("/proc/self/maps").read_text()) == mmap
        assert len(part.clips) == len(part.array("motion")) == size
        for row in range(size):
            expected = features[f"c{number}"]
            for array in ("motion", "appearance", "caption"):
                np.testing.assert_array_equal(part.array(array)[row], expected[array])
            assert part.preview(row).shape == (2, 16, 24, 3)
            assert np.abs(part.preview(row).astype(int) - expected["preview"]).max() <= 2
            assert part.clips[row]["id"] == f"c{number}"
            number += 1


def test_a_clip_is_compared_with_its_checksum_at_its_first_read(write_store, monkeypatch):
    out, features = write_store((3,))
    part, compared = Part(out / "parts/clips-0"), []
    checksum = bank.checksum
    monkeypatch.setattr(bank, "checksum", lambda *values: compared.append(1) or checksum(*values))
    read = torch.empty(5, 4)
    for _ in range(2):
        for row in range(3):
            assert part.features("motion", row, out=read) is read
            np.testing.assert_array_equal(read, features[f"c{row}"]["motion"])
            read += 1  # a copy: what is read next is as it was
            part.captions([0, row]), part.preview(row)
    assert len(compared) == 3 * 3


def test_headers_keep_their_length_as_rows_grow(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(-1, 3)
    array = bank._NpyFile(tmp_path / "x.npy", rows)
    for _ in range(500):
        array.append(rows)
    array.close()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), np.tile(rows, (500, 1)))


def test_an_interrupted_part_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), PartWriter(tmp_path, "p", {}) as writer:
        add(writer)
        raise KeyboardInterrupt
    assert list((tmp_path / "parts").iterdir()) == []


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    leftover = tmp_path / "parts" / ".p.partial"
    leftover.mkdir(parents=True)
    (leftover / "motion.npy").write_bytes(b"half")
    with PartWriter(tmp_path, "p", {"preview_frames": 2}) as writer:
        add(writer, 3)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["p"]
    assert len(Part(tmp_path / "parts" / "p").array("motion")) == 3


def test_a_full_disk_is_told_as_such(tmp_path):
    class FullDisk(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error, PartWriter(tmp_path, "p", {}) as writer:
        add(writer)
        writer._arrays["motion"].file = FullDisk(tmp_path / "full", "w")
        add(writer)
    assert error.value.errno == errno.ENOSPC
    assert list((tmp_path / "parts").iterdir()) == []


def test_features_beyond_half_precision_are_refused(tmp_path):
    message = "clip a: its motion features are not finite as float16"
    with pytest.raises(MotionRAGError, match=message), PartWriter(tmp_path, "p", {}) as writer:
        add(writer, value=1e6)


def test_a_part_without_clips_is_a_part(tmp_path):
    with PartWriter(tmp_path, "p", {"skipped": ["all"]}):
        pass
    part = Part(tmp_path / "parts" / "p")
    part.verify()
    assert part.clips == []


def test_damage_is_named(write_store):
    out, _ = write_store((3,))
    path = out / "parts" / "clips-0"
    file = path / "motion.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    with pytest.raises(MotionRAGError, match=r"motion.npy is damaged: its checksum"):
        Part(path).verify()
    file.write_bytes(data[:-1])
    with pytest.raises(
        MotionRAGError, match=rf"motion.npy: {len(data) - 1} bytes, expected {len(data)} bytes"
    ):
        Part(path)
    file.unlink()
    with pytest.raises(MotionRAGError, match=r"motion.npy: missing"):
        Part(path)
    (path / "part.json").write_text("{")
    with pytest.raises(MotionRAGError, match="part.json is missing or damaged"):
        Part(path)


def test_many_parts_keep_no_file_open(tmp_path):
    """A million clips in parts of a hundred are more files than a process may have open."""
    with PartWriter(tmp_path, "p0", {"preview_frames": 2}) as writer:
        add(writer, 3)
    for i in range(1, 40):
        shutil.copytree(tmp_path / "parts/p0", tmp_path / f"parts/p{i}")
    parts = [Part(tmp_path / f"parts/p{i}") for i in range(40)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
    try:
        read = [(part.features("motion", 0), part.captions([0]), part.jpeg(0)) for part in parts]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(torch.equal(motion, read[0][0]) for motion, *_ in read)
