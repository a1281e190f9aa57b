"""40 real clips and 24 broken or awkward files, kept outside the repository (their rights are not ours).

The folder is named by MOTIONRAG_CLIPS_DIR, by default ../shared/clips beside the repository.
"""

import csv
import os
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from motionrag.cli.encode import encode
from motionrag.data.packing import pack
from motionrag.data.shards import ShardIndex, read_shard
from motionrag.data.video import UnreadableVideo, read_clip
from motionrag.encoders import AppearanceEncoder, CaptionEncoder, MotionEncoder
from motionrag.errors import MotionRAGError
from motionrag.retrieval.building import build
from motionrag.retrieval.database import RetrievalDatabase

CLIPS = Path(os.environ.get("MOTIONRAG_CLIPS_DIR", Path(__file__).parents[2] / "shared" / "clips"))

if not (CLIPS / "clips.csv").is_file():
    message = f"NO REAL CLIPS at {CLIPS}: the tests of real video files did not run (set MOTIONRAG_CLIPS_DIR)"
    warnings.warn(message, stacklevel=1)
    pytest.skip(message, allow_module_level=True)


def rows(name):
    with (CLIPS / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "shards"
    pack(CLIPS / "clips.csv", CLIPS, out, shard_size=16)
    return ShardIndex.open(out)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    out = tmp_path_factory.mktemp("broken") / "shards"
    columns = {"caption": "description", "motion_caption": "kind"}
    index = pack(CLIPS / "broken/broken.csv", CLIPS / "broken", out, columns=columns, max_bad=0.5)
    return index, {
        record.video: (record, data)
        for file in ShardIndex.open(out).files
        for record, data in read_shard(file)
    }


# ---------------------------------------------------------------- the 40 clips


def test_none_is_lost_and_all_measures_are_true(packed):
    assert packed.index["skipped"] == packed.index["noted"] == []
    records = {record.id: record for record in packed.records()}
    assert list(records) == [row["id"] for row in rows("clips.csv")]
    for row in rows("clips.csv"):
        record = records[row["id"]]
        assert (record.width, record.height) == (int(row["width"]), int(row["height"])), row["id"]
        # Frame delays of some gifs alternate: over part of the clip the rate is a little another one.
        assert record.fps == pytest.approx(float(row["fps"]), rel=3e-3), row["id"]
        # The span ends before the file does in three of them.
        whole = float(row["end_sec"]) >= int(row["frames"]) / float(row["fps"]) - 0.02
        frames = int(row["frames"]) if whole else round(float(row["end_sec"]) * float(row["fps"]))
        assert record.frames == pytest.approx(frames, abs=0 if whole else 1), row["id"]
        assert record.action == row["action"]


def test_unordered_time_stamps_do_not_swap_frames():
    frames = read_clip(CLIPS / "videos/apply_eye_makeup.avi", short_side=64).frames.astype(float)
    near, far = (np.abs(frames[step:] - frames[:-step]).mean((1, 2, 3)) for step in (1, 2))
    # Swapped neighbours would be nearer to the frame after next than to the next.
    assert (near[:-1] <= far).mean() > 0.9


def test_the_nearest_clip_mostly_shows_the_same_action(packed, tmp_path, random_encoders, capsys):
    encoders = {
        "motion": MotionEncoder(random_encoders["motion"], size=32),
        "appearance": AppearanceEncoder(random_encoders["appearance"], size=32),
        "caption": CaptionEncoder(),
    }
    counts = encode(packed, tmp_path / "db", encoders, batch_size=8, max_bad=0)
    assert counts["clips"] == 40
    build(tmp_path / "db")
    db = RetrievalDatabase(tmp_path / "db")
    action = {clip_id: db.clip(clip_id)["action"] for clip_id in db.ids}
    shared = [action[db.neighbours(clip_id, 1)[0]] == action[clip_id] for clip_id in db.ids]
    possible = sum(list(action.values()).count(label) > 1 for label in action.values())
    with capsys.disabled():
        print(
            f"\nreal clips: the nearest other clip shares the action for {sum(shared)} of {len(db)} ({possible} can)"
        )
    assert sum(shared) > len(db) / 2
    for clip_id in db.ids:  # decoded once, kept for the contact sheet
        assert db.preview(clip_id).std() > 5


@pytest.mark.skipif(
    find_spec("torchcodec") is None,
    reason="torchcodec is not installed (pip install 'motionrag[torchcodec]')",
)
def test_torchcodec_reads_what_pyav_reads(capsys):
    files = [CLIPS / "videos" / Path(row["video"]).name for row in rows("clips.csv")]
    files += [CLIPS / "broken" / row["video"] for row in rows("broken/broken.csv")]
    same = 0
    for file in files:
        results = []
        for decoder in ("pyav", "torchcodec"):
            try:
                results.append(read_clip(file, start_sec=0.2, frames=16, fps=8, decoder=decoder))
            except UnreadableVideo as error:
                results.append(str(error))
        if isinstance(results[0], str) or isinstance(results[1], str):
            assert results[0] == results[1]
            same += 1
            continue
        ours, other = results
        assert replace(ours, frames=None) == replace(other, frames=None), file.name
        difference = np.abs(ours.frames.astype(int) - other.frames)
        # pictures of ten bits are rounded in another way, and FFmpeg's versions differ a little
        assert difference.mean() < 1, file.name
        same += not difference.any()
    with capsys.disabled():
        print(f"\ntorchcodec: the same pictures or the same error for {same} of {len(files)} files")
    assert same > 0.9 * len(files)


# ---------------------------------------------------------------- the 24 others


@pytest.mark.parametrize("row", rows("broken/broken.csv"), ids=lambda row: row["video"])
def test_each_awkward_file_is_handled_as_it_should_be(broken, row):
    index, used = broken
    skipped = {item["video"]: item["reason"] for item in index["skipped"]}
    notes = {item["video"]: item["note"] for item in index["noted"]}
    video = row["video"]
    if row["usable"] in ("no", "no motion"):
        reason = {
            "truncated": "not a readable video",
            "empty": "empty file",
            "no video stream": "sound only",
            "missing file": "missing file",
            "too short": "one frame only",
            "no content": "no motion",
            "no motion": "no motion",
            "wrong type": "a still picture" if video.startswith("image") else "not a readable video",
        }[row["kind"]]
        assert skipped[video].startswith(reason)
        assert video not in used
        return
    assert video not in skipped
    record, data = used[video]
    assert record.frames == int(row["decoded_frames"])
    assert data == (CLIPS / "broken" / video).read_bytes()
    assert (video in notes) == (row["usable"] == "partly")
    if "too short" in row["kind"]:
        assert notes[video] == f"only {record.frames} frames"
    elif row["usable"] == "partly":
        announced = row["announced_frames"]
        assert notes[video] == f"stops after {record.frames} of {announced} frames: damaged data"


@pytest.mark.parametrize(
    ("video", "size"),
    [
        ("rotated_90.mp4", (240, 426)),
        ("phone_rotated.mov", (320, 568)),
        ("odd_size_37x53.mp4", (37, 53)),
        ("wide_1024x64.mp4", (1024, 64)),
    ],
)
def test_sizes_are_upright(broken, video, size):
    record, data = broken[1][video]
    assert (record.width, record.height) == size
    assert read_clip(data, frames=1).frames.shape[1:] == (size[1], size[0], 3)


def test_the_rotated_man_stands_as_in_the_clip_he_was_made_from():
    upright = read_clip(CLIPS / "videos/talk_selfie_portrait.mp4", frames=1, short_side=60).frames[0, :106]
    turned = read_clip(CLIPS / "broken/rotated_90.mp4", frames=1, short_side=60).frames[0, :106]
    likeness = np.corrcoef(upright.ravel(), turned.ravel())[0, 1]
    upside_down = np.corrcoef(upright.ravel(), turned[::-1, ::-1].ravel())[0, 1]
    assert likeness > 0.9 > upside_down


def test_time_is_measured_not_stated(broken):
    used = broken[1]
    assert used["variable_frame_rate.mp4"][0].duration > 72 / 24
    assert used["late_start.mp4"][0].duration == pytest.approx(2, abs=0.05)


def test_too_many_bad_files_stop_the_run(tmp_path):
    columns = {"caption": "description", "motion_caption": "kind"}
    with pytest.raises(MotionRAGError, match=r"broken.csv: 3 of the first 4 rows .* max_bad=0.1"):
        pack(CLIPS / "broken/broken.csv", CLIPS / "broken", tmp_path / "out", columns=columns)
    assert list(tmp_path.iterdir()) == []
