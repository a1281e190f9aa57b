"""Packing: what goes into the shards, what is left out, and errors that name the cause."""

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pytest

from motionrag.data import members
from motionrag.data.packing import pack
from motionrag.data.shards import ClipRecord, ShardIndex, read_shard
from motionrag.data.sources import Place, read_table
from motionrag.data.video import read_clip, write_mp4
from motionrag.errors import MotionRAGError


def moving_square(step=2, frames=9, side=32):
    clip = np.full((frames, side, side, 3), 40, np.uint8)
    for t in range(frames):
        clip[t, 8:16, (step * t) % 24 : (step * t) % 24 + 8] = 220
    return clip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with five good clips, a black one, a still one and a file that is no video."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(5):
        write_mp4(folder / f"clip{i}.mp4", moving_square(i + 1), 8)
    write_mp4(folder / "black.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    write_mp4(folder / "one.mp4", moving_square(frames=1), 8)
    (folder / "words.mp4").write_text("no pictures here " * 20)
    return folder


@pytest.fixture
def table(tmp_path):
    """Write rows (dicts) to clips.csv, captions filled in."""

    def write(rows, name="clips.csv"):
        rows = [{"caption": "a square moves", "motion_caption": "moves right", **row} for row in rows]
        pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
        return tmp_path / name

    return write


def good(count=5, **more):
    return [{"video": f"clip{i}.mp4", **more} for i in range(count)]


def test_clips_come_back_as_they_went_in(videos, table, tmp_path):
    rows = [dict(row, action="slide", seed=i, place="NA") for i, row in enumerate(good())]
    index = pack(table(rows), videos, tmp_path / "out", shard_size=2)
    assert [shard["clips"] for shard in index["shards"]] == [2, 2, 1]
    shards = ShardIndex.open(tmp_path / "out")
    assert len(shards) == 5
    found = [item for shard in shards.shards for item in read_shard(shards.verify(shard))]
    for i, (record, data) in enumerate(found):
        assert data == (videos / f"clip{i}.mp4").read_bytes()
        assert record == ClipRecord(
            id=f"clip{i}",
            video=f"clip{i}.mp4",
            caption="a square moves",
            motion_caption="moves right",
            source=f"clip{i}.mp4",
            fps=8.0,
            frames=9,
            width=32,
            height=32,
            duration=1.125,
            action="slide",
            metadata={"seed": i, "place": "NA"},
        )
    assert [record.id for record in shards.records()] == [record.id for record, _ in found]
    assert index["columns"]["metadata"] == ["seed", "place"]


def test_same_input_same_bytes(videos, table, tmp_path):
    path = table(good())
    for name in "ab":
        pack(path, videos, tmp_path / name, shard_size=3)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_parquet_and_renamed_columns(videos, tmp_path):
    frame = pd.DataFrame(
        {"file": ["clip0.mp4"], "text": ["t"], "move": ["m"], "name": ["seven"], "end_sec": [0.5]}
    )
    frame.to_parquet(tmp_path / "clips.parquet")
    names = {"video": "file", "caption": "text", "motion_caption": "move", "id": "name"}
    pack(tmp_path / "clips.parquet", videos, tmp_path / "out", columns=names)
    [record] = ShardIndex.open(tmp_path / "out").records()
    assert (record.id, record.caption, record.motion_caption, record.frames) == ("seven", "t", "m", 4)


def test_text_stays_text(table):
    rows, _ = read_table(table([{"video": "007.mp4", "id": "007", "action": "1e5", "caption": "None"}]), {})
    assert (rows[0]["id"], rows[0]["action"], rows[0]["caption"]) == ("007", "1e5", "None")


def test_absolute_paths_are_read_but_not_recorded(videos, table, tmp_path):
    pack(table([{"video": str(videos / "clip0.mp4")}]), videos, tmp_path / "out")
    [record] = ShardIndex.open(tmp_path / "out").records()
    assert (record.id, record.video, record.source) == ("clip0", "clip0.mp4", "clip0.mp4")


def test_any_id_makes_a_member(videos, table, tmp_path):
    ids = ["a.b.c", "a/b", "a%2Eb", "ü ñ", "x" * 180]
    rows = [dict(row, id=name) for row, name in zip(good(), ids, strict=True)]
    pack(table(rows), videos, tmp_path / "out")
    [file] = ShardIndex.open(tmp_path / "out").files
    assert [record.id for record, _ in read_shard(file)] == ids
    with tarfile.open(file) as tar:
        assert all(name.count(".") == 1 and "/" not in name for name in tar.getnames())


def test_unusable_clips_are_left_out_by_name(videos, table, tmp_path):
    bad = ["black.mp4", "one.mp4", "words.mp4", "nowhere.mp4"]
    rows = (
        good()
        + [{"video": name} for name in bad]
        + [{"video": "clip0.mp4", "id": "x", "motion_caption": " "}]
    )
    rows += [{"video": "clip1.mp4", "id": "y", "start_sec": 9}]
    spans = [{"start_sec": -5}, {"start_sec": 0.4, "end_sec": 0.4}, {"end_sec": -1}]
    rows += [{"video": "clip1.mp4", "id": f"span{i}", **span} for i, span in enumerate(spans)]
    index = pack(table(rows), videos, tmp_path / "out", max_bad=0.7)
    assert index["clips"] == 5
    reasons = [item["reason"] for item in index["skipped"]]
    assert [item["video"] for item in index["skipped"]] == [*bad, "clip0.mp4", *["clip1.mp4"] * 4]
    expected = [
        "no motion",
        "one frame only",
        "not a readable video",
        "missing file",
        "no motion_caption",
        "no frames between",
        "no span of a video: start_sec -5",
        "no span of a video: start_sec 0.4, end_sec 0.4",
        "no span of a video: end_sec -1",
    ]
    for reason, start in zip(reasons, expected, strict=True):
        assert reason.startswith(start)
    assert [record.id for record in ShardIndex.open(tmp_path / "out").records()] == [
        f"clip{i}" for i in range(5)
    ]


def test_still_clips_on_request(videos, table, tmp_path):
    index = pack(
        table([{"video": "black.mp4"}, {"video": "one.mp4"}]), videos, tmp_path / "out", keep_still=True
    )
    assert index["clips"] == 2
    assert index["noted"] == [{"id": "one", "video": "one.mp4", "note": "only 1 frame"}]


def test_too_many_bad_rows_stop_the_run_and_leave_nothing(videos, table, tmp_path):
    path = table(good(2) + [{"video": "words.mp4"}, {"video": "black.mp4"}, {"video": "clip3.mp4"}])
    with pytest.raises(
        MotionRAGError, match=r"clips.csv: 1 of the first 3 rows \(5 in all\).*max_bad=0.1.*words.mp4"
    ):
        pack(path, videos, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["clips.csv"]
    assert pack(path, videos, tmp_path / "out", max_bad=0.4)["clips"] == 3


def test_nothing_usable_is_an_error(videos, table, tmp_path):
    with pytest.raises(MotionRAGError, match=r"no usable clip; black.mp4 \(no motion"):
        pack(table([{"video": "black.mp4"}]), videos, tmp_path / "out", max_bad=1)


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        (
            "video,caption\na.mp4,x\n",
            {},
            r"no column 'motion_caption' for motion_caption; it has video, caption; .*columns.motion_caption=NAME; "
            r"motionrag caption writes motion captions",
        ),
        (
            "file,caption,motion_caption\na.mp4,x,y\n",
            {"caption": "text"},
            r"no column 'video' for video, 'text' for caption; .*columns.video=NAME columns.caption=NAME$",
        ),
        ("video,caption,motion_caption\na.mp4,x,y\n", {"id": "key"}, r"no column 'key' for id"),
        ("video,caption,motion_caption\n", {}, "the table has no rows"),
        ("", {}, "not a readable CSV"),
        (
            "video,caption,motion_caption\na/x.mp4,x,y\nb/x.mp4,x,y\n",
            {},
            r"rows 0 and 1 have the same id 'x'",
        ),
    ],
    ids=["missing", "two missing", "renamed", "no rows", "empty", "double"],
)
def test_bad_tables(tmp_path, text, columns, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MotionRAGError, match=message):
        read_table(tmp_path / "t.csv", columns)


def test_missing_table_and_folder(videos, table, tmp_path):
    with pytest.raises(MotionRAGError, match=r"nope.csv: no such file"):
        pack(tmp_path / "nope.csv", videos, tmp_path / "out")
    with pytest.raises(MotionRAGError, match=r"no such folder"):
        pack(table(good()), tmp_path / "nowhere", tmp_path / "out")


def test_what_is_there_is_not_overwritten_unasked(videos, table, tmp_path):
    path, out = table(good()), tmp_path / "out"
    pack(path, videos, out)
    with pytest.raises(MotionRAGError, match="overwrite=true"):
        pack(path, videos, out)
    assert pack(path, videos, out, shard_size=2, overwrite=True)["shard_size"] == 2
    assert len(list(out.glob("*.tar"))) == 3
    (out / "thesis.txt").write_text("not a shard")
    with pytest.raises(MotionRAGError, match="not a folder of shards"):
        pack(path, videos, out, overwrite=True)
    assert (out / "thesis.txt").exists()


def test_damaged_shards_are_named(videos, table, tmp_path):
    pack(table(good()), videos, tmp_path / "out")
    shards = ShardIndex.open(tmp_path / "out")
    [file] = shards.files
    data = file.read_bytes()
    file.write_bytes(data[:1000] + bytes([data[1000] ^ 255]) + data[1001:])
    with pytest.raises(MotionRAGError, match=r"clips-000000.tar is damaged: its checksum"):
        shards.verify(shards.shards[0])
    file.write_bytes(data[:900])
    with pytest.raises(MotionRAGError, match=r"has 900 bytes"):
        shards.verify(shards.shards[0])
    with pytest.raises(MotionRAGError, match=r"clips-000000.tar cannot be read"):
        list(read_shard(file))
    with tarfile.open(file, "w"):
        pass
    with pytest.raises(MotionRAGError, match=r"holds no clip"):
        list(read_shard(file))
    file.unlink()
    with pytest.raises(MotionRAGError, match="missing"):
        shards.verify(shards.shards[0])


def test_other_folders_are_no_shards(tmp_path):
    with pytest.raises(MotionRAGError, match="expected a folder written by motionrag pack"):
        ShardIndex.open(tmp_path)
    with pytest.raises(
        MotionRAGError, match="http://host/shards: training streams shards, here .* from a folder"
    ):
        ShardIndex.open("http://host/shards")
    (tmp_path / "index.json").write_text(json.dumps({"schema": "other"}))
    with pytest.raises(MotionRAGError, match="expected schema"):
        ShardIndex.open(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(MotionRAGError, match="damaged"):
        ShardIndex.open(tmp_path)


# ---------------------------------------------------------------- encoding again


def test_encoded_again_for_stage_2(tmp_path):
    frames = np.random.default_rng(0).integers(0, 60, (70, 64, 91, 3), np.uint8)
    for t in range(70):
        frames[t, 10:30, t : t + 20] = 220
    write_mp4(tmp_path / "big.mp4", frames, 10)
    write_mp4(tmp_path / "small.mp4", moving_square(2), 8)
    rows = [{"video": "big.mp4", "start_sec": 1, "end_sec": 6}, {"video": "small.mp4"}]
    pd.DataFrame([{"caption": "c", "motion_caption": "m", **row} for row in rows]).to_csv(tmp_path / "t.csv")
    for name in "ab":
        pack(tmp_path / "t.csv", tmp_path, tmp_path / name, short_side=48)
    assert (tmp_path / "a/clips-000000.tar").read_bytes() == (tmp_path / "b/clips-000000.tar").read_bytes()
    (big, data), (small, _) = read_shard(tmp_path / "a/clips-000000.tar")
    assert (big.video, big.frames, big.start_sec, big.end_sec) == ("big.mp4", 50, None, None)
    assert big.metadata["cut_from"] == [1, 6]
    assert (big.width, big.height) == (70, 48)  # of 69, made even
    assert (small.width, small.height) == (32, 32)  # never enlarged
    clip = read_clip(data)
    assert (clip.width, clip.height, clip.decoded, round(clip.fps, 3)) == (70, 48, 50, 10)
    true = read_clip(tmp_path / "big.mp4", 1, 6, short_side=48).frames
    assert np.abs(clip.frames[:, :, :69].astype(int) - true).mean() < 6
    with av.open(io.BytesIO(data)) as file:
        keys = [i for i, packet in enumerate(file.demux(video=0)) if packet.is_keyframe]
    assert keys[:2] == [0, 30]


def test_spans_of_one_video_read_it_once(videos, table, tmp_path, monkeypatch):
    read, places = Place.read, []
    monkeypatch.setattr(Place, "read", lambda place: places.append(Path(place.files[0]).name) or read(place))
    spans = [{"start_sec": a, "end_sec": a + 0.5} for a in (0, 0.25, 0.5)]
    rows = [
        {"video": name, "id": f"{name} {span['start_sec']}", **span}
        for name in ("clip1.mp4", "clip2.mp4")
        for span in spans
    ]
    pack(table(rows), videos, tmp_path / "together", short_side=24)
    assert places == ["clip1.mp4", "clip2.mp4"]
    pack(table(rows[::2] + rows[1::2]), videos, tmp_path / "apart", short_side=24)
    together, apart = (
        {
            (record.source, *record.metadata["cut_from"]): data
            for record, data in read_shard(tmp_path / f"{name}/clips-000000.tar")
        }
        for name in ("together", "apart")
    )
    assert len(together) == 6 and together == apart


# ---------------------------------------------------------------- faults


def clips_that_take_a_while(folder):
    """Twelve clips, the third and fourth of them long, one that is missing, and their table."""
    folder.mkdir()
    for i in range(12):
        frames = 600 if i in (2, 3) else 9
        write_mp4(folder / f"clip{i}.mp4", moving_square(i % 5 + 1, frames), 8)
    rows = [{"video": f"clip{i}.mp4", "caption": "c", "motion_caption": "m"} for i in range(12)]
    rows.insert(6, rows[0] | {"video": "gone.mp4"})
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return folder / "clips.csv"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_and_continued_by_another_number_of_workers(tmp_path, root):
    table = clips_that_take_a_while(tmp_path / "videos")
    options = {"shard_size": 1, "short_side": 24, "max_bad": 0.1}
    pack(table, tmp_path / "videos", tmp_path / "whole", **options)

    code = (
        "import sys; from motionrag.data.packing import pack\n"
        f"if __name__ == '__main__': pack(*sys.argv[1:], workers=2, **{options})"
    )
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    run = subprocess.Popen(
        [sys.executable, "-c", code, table, tmp_path / "videos", out],
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while len(list((partial / "done").glob("*.json"))) < 2:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGSTOP)  # it is in the middle of it, and stays there
        with pytest.raises(MotionRAGError, match=f"out={out} is being packed by another process"):
            pack(table, tmp_path / "videos", out, **options)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert len(children) >= 2
    finally:
        run.kill()
        run.wait()
    while any(map(alive, children)):  # workers end with the run
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not out.exists()

    finished = {path: path.stat().st_mtime_ns for path in (partial / "done").iterdir()}
    assert 2 <= len(finished) < 13
    shards = {path: path.stat().st_ino for path in (partial / "shards").glob("*.tar")}
    index = pack(table, tmp_path / "videos", out, **options)
    assert [item["video"] for item in index["skipped"]] == ["gone.mp4"]
    assert contents(out) == contents(tmp_path / "whole")  # also those that two workers made
    for path, inode in shards.items():
        done = partial / "done" / f"{path.name}.json"
        assert done not in finished or (out / path.name).stat().st_ino == inode  # not made again
    assert not partial.exists()


@contextmanager
def little_room(folder, how):
    """Let files in ``folder`` have little room; gives a function that makes more."""
    if how == "file size":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        try:
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "none", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("how", ["file system", "file size"])
def test_a_full_disk(tmp_path, how):
    """Small clips first: their shard is finished, the next one does not fit."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(2):
        write_mp4(videos / f"a{i}.mp4", moving_square(i + 1), 8)
        write_mp4(
            videos / f"b{i}.mp4", np.random.default_rng(i).integers(0, 255, (9, 96, 96, 3), np.uint8), 8
        )
    rows = [
        {"video": f"{name}.mp4", "caption": "c", "motion_caption": "m"} for name in ("a0", "a1", "b0", "b1")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    pack(tmp_path / "t.csv", videos, tmp_path / "whole", shard_size=2)
    (tmp_path / "disk").mkdir()
    with little_room(tmp_path / "disk", how) as make_room:
        out = tmp_path / "disk/out"
        with pytest.raises(MotionRAGError) as caught:
            pack(tmp_path / "t.csv", videos, out, shard_size=2)
        reason = {"file system": "No space left on device", "file size": "File too large"}[how]
        assert str(caught.value) == (
            f"out={out}: {reason}; make room and run the same command again (1 finished shard(s) are kept in .out.partial)"
        )
        left = sorted(path.name for path in (tmp_path / "disk").rglob("*") if path.is_file())
        assert left == ["clips-000000.tar", "clips-000000.tar.json", "lock", "plan.json"]
        make_room()
        pack(tmp_path / "t.csv", videos, out, shard_size=2)
        assert contents(out) == contents(tmp_path / "whole")
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_an_unfinished_pack_is_not_mixed_with_another(videos, table, tmp_path):
    path = table(good() + [{"video": "black.mp4"}])
    with pytest.raises(MotionRAGError, match=r"1 of the first 6 rows"):
        pack(path, videos, tmp_path / "out", shard_size=2, max_bad=0)
    assert len(list((tmp_path / ".out.partial/done").iterdir())) == 2
    with pytest.raises(MotionRAGError, match="holds finished shards of other rows or options for out="):
        pack(path, videos, tmp_path / "out", shard_size=3, max_bad=0.5)
    assert len(list((tmp_path / ".out.partial/done").iterdir())) == 2
    (tmp_path / ".out.partial/shards/clips-000001.tar").unlink()  # lost: made again
    assert pack(path, videos, tmp_path / "out", shard_size=2, max_bad=0.5)["clips"] == 5
    pack(path, videos, tmp_path / "other", shard_size=2, max_bad=0.5)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_videos_repaired_after_a_stop_are_read_again(table, tmp_path):
    (tmp_path / "videos").mkdir()
    for i in range(3):
        write_mp4(tmp_path / f"videos/clip{i}.mp4", moving_square(i + 1), 8)
    whole = (tmp_path / "videos/clip0.mp4").read_bytes()
    (tmp_path / "videos/clip0.mp4").write_text("no pictures here")
    (tmp_path / "videos/clip1.mp4").write_text("no pictures here")
    path, options = table(good(3)), {"shard_size": 1, "max_bad": 0.4}
    with pytest.raises(MotionRAGError, match="2 of the first 2 rows"):
        pack(path, tmp_path / "videos", tmp_path / "out", **options)
    (tmp_path / "videos/clip0.mp4").write_bytes(whole)
    index = pack(path, tmp_path / "videos", tmp_path / "out", **options)
    assert [item["video"] for item in index["skipped"]] == ["clip1.mp4"] and index["clips"] == 2


def test_leftovers_of_a_replaced_folder_are_not_in_the_way(videos, table, tmp_path):
    path = table(good(2))
    pack(path, videos, tmp_path / "out", shard_size=1)
    with pytest.raises(MotionRAGError, match="1 of the first 3 rows"):  # makes a plan that is there again
        pack(table(good(2) + [{"video": "black.mp4"}]), videos, tmp_path / "out", shard_size=1, max_bad=0,
             overwrite=True)  # fmt: skip
    (tmp_path / ".out.partial/replaced").mkdir()
    (tmp_path / ".out.partial/replaced/clips-000000.tar").write_text("killed while this was removed")
    path = table(good(2) + [{"video": "black.mp4"}])
    assert pack(path, videos, tmp_path / "out", shard_size=1, max_bad=0.5, overwrite=True)["clips"] == 2
    assert not (tmp_path / ".out.partial").exists()


def test_an_excluded_table_that_matches_nothing_is_told(videos, table, tmp_path):
    exclude = table([{"video": "elsewhere/clip0.mp4"}], "test.csv")
    index = pack(table(good(2)), videos, tmp_path / "out", exclude=exclude)
    assert index["left_out"] == {"source video in the excluded table": 0}


def test_a_clip_without_its_json_is_told(tmp_path):
    with tarfile.open(tmp_path / "clips-000000.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.mp4"))
    with pytest.raises(MotionRAGError, match=r"clips-000000.tar: a.mp4 has no JSON: pack the clips again"):
        list(members.members(tmp_path / "clips-000000.tar"))
