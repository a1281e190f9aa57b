"""Data sets as they are published: tables, folders and zip archives, splits that do not leak."""

import json
import re
import shlex
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from motionrag import cli
from motionrag.cli.words import overrides_from_words
from motionrag.data.packing import pack
from motionrag.data.shards import ShardIndex, read_shard
from motionrag.data.sources import VideoFolder, read_table, source_of, split_of
from motionrag.data.video import UnreadableVideo, write_mp4
from motionrag.errors import MotionRAGError

NAMES = [
    "---_iRTHryQ_13_0to241.mp4",
    "---_iRTHryQ_14_0to96.mp4",
    "celebv_-_Bdf9C0SAU_0.mp4",
    "-_Bdf9C0SAU_2_5to80.mp4",
    "IIvwqskxtdE_0.mp4",
    "sunset over hills.mp4",
]
SOURCES = ["---_iRTHryQ", "---_iRTHryQ", "-_Bdf9C0SAU", "-_Bdf9C0SAU", "IIvwqskxtdE", "sunset over hills"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One mp4 for each of NAMES."""
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(NAMES):
        frames = np.full((9, 32, 32, 3), 40, np.uint8)
        for t in range(9):
            frames[t, 8:16, (i + 1) * t % 24 : (i + 1) * t % 24 + 8] = 220
        write_mp4(folder / name, frames, 8)
    return folder


def cut(path, parts):
    """A file as `split` leaves it, in equal parts."""
    data = path.read_bytes()
    size = -(-len(data) // parts)
    stem = str(path).removesuffix(".zip")
    for i in range(parts):
        with open(f"{stem}_parta{'abcdef'[i]}", "wb") as file:
            file.write(data[i * size : (i + 1) * size])
    path.unlink()


@pytest.fixture
def openvid(clips, tmp_path):
    """OpenVid-1M: a table, two archives (one of them cut in three), a folder of an archive that was unpacked."""
    folder = tmp_path / "OpenVid-1M"
    (folder / "unpacked").mkdir(parents=True)
    for number, names in ((0, NAMES[:2]), (73, NAMES[2:4])):
        with zipfile.ZipFile(folder / f"OpenVid_part{number}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in names:
                archive.write(clips / name, f"OpenVid_part{number}/{name}")
    cut(folder / "OpenVid_part73.zip", 3)
    for name in NAMES[4:]:
        shutil.copy(clips / name, folder / "unpacked")
    rows = [
        {
            "video": name,
            "caption": "The video features a woman in a red dress. She walks down a road, waving her hand.",
            "aesthetic score": 5.5,
            "motion score": 1.25,
            "temporal consistency score": 0.99,
            "camera motion": "pan_left",
            "frame": 9,
            "fps": 8.0,
            "seconds": 1.125,
        }
        for name in NAMES
    ]
    pd.DataFrame(rows).to_csv(folder / "OpenVid-1M.csv", index=False)
    return folder


def run(source, **given):
    """pack with the config that ships."""
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("pack", overrides=[f"source={source}"])
    return pack(**OmegaConf.to_container(cfg, throw_on_missing=False) | given)


def records(out):
    return [record for file in ShardIndex.open(out).files for record, _ in read_shard(file)]


# ---------------------------------------------------------------- published data sets


def test_openvid_as_published(openvid, clips, tmp_path):
    before = sorted(openvid.rglob("*"))
    index = run("openvid", table=openvid / "OpenVid-1M.csv", videos=openvid, out=tmp_path / "out")
    assert sorted(openvid.rglob("*")) == before  # read in place
    assert (index["clips"], index["skipped"], index["rule_captions"]) == (6, [], 6)
    [file] = ShardIndex.open(tmp_path / "out").files
    for (record, data), name, source in zip(read_shard(file), NAMES, SOURCES, strict=True):
        assert data == (clips / name).read_bytes()
        assert (record.id, record.video, record.source) == (name.removesuffix(".mp4"), name, source)
        assert record.motion_caption == "a person walks down a road, waving her hand"
        assert record.metadata["motion_caption_by"] == "rules"
        assert record.metadata["camera motion"] == "pan_left"
        assert record.metadata["motion score"] == 1.25


def test_cut_archives_joined_with_cat_are_the_same(openvid, tmp_path):
    with (openvid / "OpenVid_part73.zip").open("wb") as whole:
        for part in sorted(openvid.glob("*_parta?")):
            whole.write(part.read_bytes())  # the parts stay: they are not read twice
    assert (
        run("openvid", table=openvid / "OpenVid-1M.csv", videos=openvid, out=tmp_path / "out")["clips"] == 6
    )


def test_the_release_without_its_test_split(openvid, tmp_path):
    rows = [
        {
            "id": i,
            "video": f"OpenVid-1M/video/{name}",  # paths of the reference's folders
            "start_sec": 0.0,
            "end_sec": 1.0,
            "llm_caption": "a red car drives down a road",
            "motion_caption": "a car drives down",
        }
        for i, name in enumerate(NAMES)
    ]
    pd.DataFrame(rows).to_parquet(openvid / "openvid-1m.parquet")
    pd.DataFrame(rows[3:4]).to_parquet(openvid / "openvid-1k.parquet")
    where = {"videos": openvid, "out": tmp_path / "train", "exclude": openvid / "openvid-1k.parquet"}
    index = run("openvid_release", table=openvid / "openvid-1m.parquet", **where)
    # The other clip of the test clip's source video is CelebV's.
    assert index["left_out"] == {"source video in the excluded table": 2}
    found = records(tmp_path / "train")
    assert [(record.id, record.source) for record in found] == [(str(i), SOURCES[i]) for i in (0, 1, 4, 5)]
    assert (found[0].caption, found[0].motion_caption) == (
        "a red car drives down a road",
        "a car drives down",
    )
    assert (found[0].frames, found[0].end_sec) == (8, 1.0)


def test_skillvid(clips, tmp_path):
    steps = [
        {"id": i, "video": f"KS-Gen/{NAMES[4]}", "start_sec": i * 0.5, "end_sec": i * 0.5 + 0.5}
        | {"prompt": label, "llm_caption": f"someone has to {label}"}
        for i, label in enumerate(("pour milk", "stir"))
    ]
    pd.DataFrame(steps).to_parquet(tmp_path / "test.parquet")
    run("skillvid", table=tmp_path / "test.parquet", videos=clips, out=tmp_path / "out")
    assert [(r.id, r.action, r.motion_caption, r.source) for r in records(tmp_path / "out")] == [
        ("0", "pour milk", "pour milk", f"KS-Gen/{NAMES[4]}"),
        ("1", "stir", "stir", f"KS-Gen/{NAMES[4]}"),
    ]


def test_json_lines(clips, tmp_path):
    row = {"video": NAMES[4], "caption": "c", "motion_caption": "m", "id": "007", "tags": ["a", "b"], "n": 3}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    pack(tmp_path / "t.jsonl", clips, tmp_path / "out")
    [record] = records(tmp_path / "out")
    assert (record.id, record.metadata) == ("007", {"tags": ["a", "b"], "n": 3})


def test_a_part_of_a_data_set(openvid, tmp_path):
    (openvid / "OpenVid_part0.zip").unlink()
    where = {"table": openvid / "OpenVid-1M.csv", "videos": openvid, "out": tmp_path / "out"}
    with pytest.raises(
        MotionRAGError, match=r"1 of the first 1 rows .*iRTHryQ_13_0to241.mp4 \(missing file\)"
    ):
        run("openvid", **where)
    index = run("openvid", missing_ok=True, **where)
    assert (index["clips"], index["left_out"]) == (4, {"missing file": 2})
    where |= {"videos": tmp_path / "out", "out": tmp_path / "none"}
    with pytest.raises(MotionRAGError, match=r"no row is left to pack \(6 x missing file\)"):
        run("openvid", missing_ok=True, **where)


# ---------------------------------------------------------------- finding videos


def test_one_name_in_several_places(clips, tmp_path):
    for place in ("a", "b", "c"):
        (tmp_path / place).mkdir()
    for place, name in (("a", NAMES[0]), ("b", NAMES[1])):
        shutil.copy(clips / name, tmp_path / place / "same.mp4")
        with zipfile.ZipFile(tmp_path / f"{place}.zip", "w") as archive:
            archive.write(clips / NAMES[2], f"{place}/packed.mp4")
            archive.writestr("x/differs.mp4", place)
    folder = VideoFolder(tmp_path, by_name=True)
    assert folder.find("a/same.mp4").read() == (clips / NAMES[0]).read_bytes()
    with pytest.raises(UnreadableVideo, match=r"there are several: /a/same.mp4 and /b/same.mp4"):
        folder.find("same.mp4")
    with pytest.raises(
        UnreadableVideo, match=r"there are several: /a.zip/x/differs.mp4 and /b.zip/x/differs"
    ):
        folder.find("differs.mp4")
    assert folder.find("packed.mp4").read() == (clips / NAMES[2]).read_bytes()  # the same bytes twice
    shutil.copy(clips / NAMES[5], tmp_path / "c/packed.mp4")
    assert VideoFolder(tmp_path, by_name=True).find("packed.mp4").member is None  # unpacked goes first
    with pytest.raises(UnreadableVideo, match="missing file"):
        VideoFolder(tmp_path).find("same.mp4")


def test_linked_folders_are_searched_once_even_in_circles(clips, tmp_path):
    videos, here = tmp_path / "disk", tmp_path / "here"
    (videos / "part").mkdir(parents=True)
    here.mkdir()
    shutil.copy(clips / NAMES[0], videos / "part/one.mp4")
    (here / "a").symlink_to(videos)
    (here / "b").symlink_to(videos)
    (videos / "part/back").symlink_to(here)
    found = VideoFolder(here, by_name=True).find("one.mp4")
    assert found.read() == (clips / NAMES[0]).read_bytes()


def test_a_flipped_byte_in_an_archive_is_told_by_name(openvid, tmp_path):
    path = openvid / "OpenVid_part0.zip"
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    index = run(
        "openvid", table=openvid / "OpenVid-1M.csv", videos=openvid, out=tmp_path / "out", max_bad=0.2
    )
    [bad] = index["skipped"]
    assert bad["video"] == NAMES[0]
    assert bad["reason"].startswith("damaged in OpenVid_part0.zip")


def test_archives_that_are_not_whole(openvid):
    part = openvid / "OpenVid_part73_partac"
    data = part.read_bytes()
    part.unlink()
    with pytest.raises(
        MotionRAGError, match=r"OpenVid_part73_partaa ... OpenVid_part73_partab \(2 parts\): not a whole"
    ):
        VideoFolder(openvid, by_name=True)
    part.write_bytes(data)
    (openvid / "OpenVid_part0.zip").write_bytes(b"PK\x03\x04 and the rest was never sent")
    with pytest.raises(
        MotionRAGError, match=r"OpenVid_part0.zip: not a whole zip archive .*download it again"
    ):
        VideoFolder(openvid, by_name=True)


def test_repeated_rows_are_left_out(clips, tmp_path):
    row = {"video": NAMES[4], "caption": "c", "motion_caption": "m"}
    pd.DataFrame([row, row]).to_csv(tmp_path / "t.csv", index=False)
    index = pack(tmp_path / "t.csv", clips, tmp_path / "out", max_bad=0.5)
    assert index["skipped"] == [{"row": 1, "video": NAMES[4], "reason": "repeats row 0"}]
    pd.DataFrame([row, row | {"start_sec": 0.5}]).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(MotionRAGError, match="rows 0 and 1 have the same id"):
        read_table(tmp_path / "t.csv", {})


# ---------------------------------------------------------------- splits

videos = st.lists(
    st.tuples(st.text("ab-_1é", min_size=1, max_size=6), st.integers(0, 99)), min_size=1, max_size=40
)
shares = st.lists(st.floats(0.01, 1), min_size=1, max_size=4).map(
    lambda parts: {f"split{i}": part / sum(parts) for i, part in enumerate(parts)}
)


@settings(max_examples=50, deadline=None)
@given(videos, shares, st.integers(0, 2**31))
def test_clips_of_one_source_are_in_one_split(clips, shares, seed):
    pattern = r"(?P<source>.+)_\d+"
    where = {}
    for video, scene in clips:
        source = source_of(f"folder{scene}/{video}_{scene}.mp4", pattern)
        assert source == video
        split = split_of(source, shares, seed)
        assert split in shares
        assert where.setdefault(video, split) == split


def test_shares_are_kept_and_the_seed_matters():
    sources = [f"video {i}" for i in range(4000)]
    shares = {"train": 0.9, "val": 0.05, "test": 0.05}
    first, second = ([split_of(source, shares, seed) for source in sources] for seed in (0, 1))
    for name, share in shares.items():
        assert first.count(name) / len(sources) == pytest.approx(share, abs=0.015)
    assert first != second


def test_splits_are_folders_of_shards(openvid, tmp_path):
    table, splits = openvid / "OpenVid-1M.csv", {"train": 0.5, "test": 0.5}
    pattern = r"(celebv_)?(?P<source>.+?)_\d+(_\d+to\d+)?"
    options = {
        "by_name": True,
        "source_pattern": pattern,
        "rule_captions": True,
        "splits": splits,
        "shard_size": 2,
        "seed": 1,
    }
    index = pack(table, openvid, tmp_path / "out", **options)
    found = {name: records(tmp_path / "out" / name) for name in splits}
    assert {name: len(found[name]) for name in splits} == {
        name: index["splits"][name]["clips"] for name in splits
    }
    assert sum(map(len, found.values())) == index["clips"] == 6
    assert not {r.source for r in found["train"]} & {r.source for r in found["test"]}
    assert all(r.metadata["split"] == name for name in splits for r in found[name])
    for shard in index["shards"]:
        assert (tmp_path / "out" / shard["file"]).stat().st_size == shard["bytes"]
    with pytest.raises(MotionRAGError, match="holds shards already"):
        pack(table, openvid, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": 0.9, "test": 0.2}, "expected names and shares above 0 that sum to 1"),
        ({"train": 1.5, "test": -0.5}, "expected names and shares above 0 that sum to 1"),
        ({"../x": 1.0}, "expected names and shares above 0 that sum to 1"),
        ({"train": 0.9999, "test": 0.0001}, "split 'test' gets no clip: 4 source videos are too few"),
    ],
)
def test_bad_shares(openvid, tmp_path, splits, message):
    pattern = r"(celebv_)?(?P<source>.+?)_\d+(_\d+to\d+)?"
    options = {"by_name": True, "source_pattern": pattern, "rule_captions": True}
    with pytest.raises(MotionRAGError, match=message):
        pack(openvid / "OpenVid-1M.csv", openvid, tmp_path / "out", splits=splits, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["OpenVid-1M"]


@pytest.mark.parametrize(("pattern", "reason"), [("(.+", "unterminated"), (".+_[0-9]", "no group 'source'")])
def test_bad_source_patterns(tmp_path, pattern, reason):
    with pytest.raises(MotionRAGError, match=f"source_pattern=.*{reason}"):
        pack(tmp_path / "t.csv", tmp_path, tmp_path / "out", source_pattern=pattern)


def test_the_commands_of_the_docs_are_complete(root):
    blocks = re.findall(
        r"^```bash\n(.*?)^```", (root / "docs/data.md").read_text(encoding="utf-8"), flags=re.M | re.S
    )
    lines = "".join(blocks).splitlines()
    assert len(lines) > 10
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        for line in lines:
            program, verb, *words = shlex.split(line, comments=True)
            assert program == "motionrag"
            if verb in ("pack", "caption"):
                assert not cli.missing_keys(compose(verb, overrides=overrides_from_words(verb, words)))
