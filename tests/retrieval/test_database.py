"""The database as one folder: complete, portable, strict about what it is asked."""

import json
import os
import pickle
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.errors import MotionRAGError
from motionrag.io import sha256
from motionrag.retrieval import changes, database
from motionrag.retrieval.building import build
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.group import open_database


class FakeCaptions:
    """A caption encoder that knows one text."""

    def __init__(self, embedding, **identity):
        self.embedding = torch.as_tensor(embedding)
        self.identity = {"name": "fake", "width": 6, "weights": "0" * 64} | identity

    def encode(self, texts):
        return self.embedding[None].expand(len(texts), -1)


# ---------------------------------------------------------------- reading


def test_features_come_by_id_and_in_order(write_database):
    path, features = write_database((3, 4))
    db = RetrievalDatabase(path)
    assert len(db) == 7
    assert db.ids == list(features)
    assert "c3" in db
    assert "x" not in db
    ids = ["c5", "c0", "c5"]
    for name, found in (("motion", db.motion_features(ids)), ("appearance", db.appearance_features(ids))):
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found, np.stack([features[i][name] for i in ids]).astype(np.float32))
    np.testing.assert_array_equal(db.caption_embeddings, np.stack([f["caption"] for f in features.values()]))
    assert (db.caption("c4"), db.motion_caption("c4")) == ("caption 4", "motion 4")
    assert db.preview("c6").mean() == pytest.approx(54, abs=2)
    with pytest.raises(MotionRAGError, match="no clip 'x' among its 7 clips"):
        db.motion_features(["x"])


def test_neighbours_leave_out_the_own_source(write_database):
    path, features = write_database((6,), paired=True, neighbours=4)
    db = RetrievalDatabase(path)
    embeddings = np.stack([f["caption"] for f in features.values()])
    for row, clip_id in enumerate(db.ids):
        order = np.argsort(-(embeddings @ embeddings[row]))
        assert db.neighbours(clip_id, 3) == [db.ids[other] for other in order if other // 2 != row // 2][:3]
    assert db.same_source("c2") == {"c2", "c3"}
    with pytest.raises(MotionRAGError, match=r"k=5, but .* keeps 4 neighbours per clip; .*neighbours=5"):
        db.neighbours("c0", 5)
    build(path, 6)
    with pytest.raises(MotionRAGError, match="only 4 clips of other sources than 'c0'"):
        RetrievalDatabase(path).neighbours("c0", 5)


def test_the_folder_can_be_moved_and_is_not_written_to(write_database, tmp_path):
    path, features = write_database()
    moved = tmp_path / "elsewhere" / "other name"
    moved.parent.mkdir()
    shutil.move(path, moved)
    assert not [file for file in moved.rglob("*.json") if str(tmp_path) in file.read_text()]
    files = {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in moved.rglob("*") if file.is_file()
    }
    for file in [*moved.rglob("*"), moved]:
        os.chmod(file, 0o555 if file.is_dir() else 0o444)
    db = RetrievalDatabase(moved)
    query = features["c2"]["caption"]
    assert db.search(query, 1)[0][0] == ["c2"]
    assert db.neighbours("c2", 2)
    assert not db._part(0).array("motion").flags.writeable
    db.motion_features(["c2"]).add_(1)  # a copy
    assert files == {
        file: (file.stat().st_mtime_ns, file.read_bytes()) for file in moved.rglob("*") if file.is_file()
    }
    for file in [*moved.rglob("*"), moved]:
        os.chmod(file, 0o755)


def test_workers_get_the_path_not_the_features(write_database):
    path, _ = write_database((50,))
    db = RetrievalDatabase(path)
    _ = db.caption_embeddings, db.index
    data = pickle.dumps(db)
    assert len(data) < 500
    torch.testing.assert_close(pickle.loads(data).motion_features(["c7"]), db.motion_features(["c7"]))


# ---------------------------------------------------------------- building


def test_an_index_of_the_same_store_is_the_same(write_store):
    path, _ = write_store()
    build(path)
    first = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    assert len(first) == 6  # store, manifest, clip table, index, neighbours, lock
    build(path)
    assert first == {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


def test_incomplete_and_damaged_stores_are_refused(write_store):
    path, _ = write_store()
    with pytest.raises(MotionRAGError, match=r"no manifest.json there; run motionrag index"):
        RetrievalDatabase(path)
    file = path / "parts" / "clips-1" / "caption.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 255]))
    with pytest.raises(MotionRAGError, match=r"caption.npy is damaged"):
        build(path)
    shutil.rmtree(path / "parts" / "clips-1")
    with pytest.raises(MotionRAGError, match="1 of 2 shards are not encoded yet, the first is clips-1"):
        build(path)
    assert not (path / "manifest.json").exists()


def test_no_clips_and_clips_that_come_twice_are_refused(write_store):
    empty, _ = write_store((0,), "empty")
    with pytest.raises(MotionRAGError, match="no clip in any of its 1 parts"):
        build(empty)
    path, _ = write_store((2, 2), "twice")
    shutil.rmtree(path / "parts" / "clips-1")
    shutil.copytree(path / "parts" / "clips-0", path / "parts" / "clips-1")
    with pytest.raises(MotionRAGError, match="clip 'c0' is in the store twice"):
        build(path)


def test_an_empty_part_is_no_obstacle(write_database):
    path, _ = write_database((0, 3))
    db = RetrievalDatabase(path)
    assert db.ids == ["c0", "c1", "c2"]
    assert db.motion_features(["c1"]).shape == (1, 5, 4)


def test_other_folders_are_no_databases(write_database, tmp_path):
    with pytest.raises(MotionRAGError, match="nowhere: no such folder"):
        RetrievalDatabase(tmp_path / "nowhere")
    with pytest.raises(MotionRAGError, match="expected a retrieval database"):
        RetrievalDatabase(tmp_path)
    with pytest.raises(MotionRAGError, match="no token store there; run motionrag encode"):
        build(tmp_path)
    path, _ = write_database()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(unsigned(manifest) | {"clips": 99}))
    with pytest.raises(MotionRAGError, match=r"7 clips in its parts, 99 in manifest.json"):
        RetrievalDatabase(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(MotionRAGError, match="damaged"):
        RetrievalDatabase(path)


def test_other_encoders_are_refused_by_both_names(write_database):
    db = RetrievalDatabase(write_database()[0])
    db.check_encoders({"caption": FakeCaptions([0.0], name="a copy under another name")})
    with pytest.raises(
        MotionRAGError, match=r"caption encoder fake \(width 6.*uses big \(width 9.*differ in width"
    ):
        db.check_encoders({"caption": FakeCaptions([0.0], name="big", width=9)})
    with pytest.raises(MotionRAGError, match="differ in weights"):
        db.check_encoders({"motion": FakeCaptions([0.0], weights="1" * 64)})


# ---------------------------------------------------------------- damage


def unsigned(manifest):
    return {key: value for key, value in manifest.items() if key != "checksum"}


def everything(path, query):
    db = RetrievalDatabase(path)
    read = (db.motion_features, db.appearance_features, db.class_tokens, db.caption_vectors)
    return repr(
        [
            *[[np.asarray(values([i])).tolist() for values in read] for i in db.ids],
            *[[db.neighbours(i, 3), db.clip(i), db.same_source(i), db.preview(i).tolist()] for i in db.ids],
            [(ids, scores.tolist()) for ids, scores in db.search(query, 4)],
            db.search(query, 2, where="action=jump")[0][0],
        ]
    )


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_flipped_bit_is_never_used(write_database, precision):
    """Whatever file it is in: what is read is as it was, or an error of one line that says what to do."""
    path, features = write_database((4,), extra=described, precision=precision)
    query = features["c1"]["caption"]
    expected, rng, refused = everything(path, query), np.random.default_rng(0), Counter()
    for file in sorted(path.rglob("*")):
        if not file.is_file() or file.name in (".lock", "store.json"):  # readers do not look at these
            continue
        data = file.read_bytes()
        for at in [*rng.integers(0, min(len(data), 100), 5), *rng.integers(0, len(data), 5), len(data) - 1]:
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1 :])
            try:
                assert everything(path, query) == expected, (file, at)
            except MotionRAGError as error:
                assert "\n" not in str(error)
                assert re.search("motionrag (index|encode)|copy ", str(error)), error
                refused[file.name] += 1
        file.write_bytes(data)
    assert len(refused) == (13 if precision == "int8" else 11)  # clips.json is read by index alone
    assert min(refused.values()) >= 4  # the padding of a .npy header means nothing


def test_damage_is_named(write_database):
    path, _ = write_database((4,))
    file = path / "parts/clips-0/motion.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    db = RetrievalDatabase(path)
    db.motion_features(["c0", "c1", "c2"])
    with pytest.raises(
        MotionRAGError, match=r"motion.npy is damaged at clip 'c3'.* motionrag index verify .* encode"
    ):
        db.motion_features(["c3"])


def test_numbers_that_no_clip_has_are_refused(write_database):
    path, _ = write_database((4,))
    db = RetrievalDatabase(path)
    db._neighbours = np.full((4, 4), 2**20)
    with pytest.raises(MotionRAGError, match="name clips that it does not have; run motionrag index db="):
        db.neighbours("c0", 3)


# ---------------------------------------------------------------- filters


def described(number):
    return {
        "action": ("jump", "run", None)[number % 3],
        "metadata": {
            "split": "train" if number < 4 else "test",
            "views": number / 2,
            "tags": ["a", f"t{number}"],
        },
    }


def test_clips_are_chosen_by_their_columns(write_database):
    path, features = write_database((3, 4), extra=described)
    db = RetrievalDatabase(path)
    for condition, expected in {
        "action=jump": "036",
        "action!=jump": "1245",  # also those without an action
        "split=test": "456",
        "source=c-source2": "2",
        "views=1": "2",
        "views=1.0": "2",
        "views=0.5": "1",
        "tags=t5": "5",
        "tags!=a": "",
        "caption=caption 3": "3",
        ("split=test", "action!=jump"): "45",
    }.items():
        assert db.where(condition) == [f"c{number}" for number in expected], condition
    assert db.where(None) == db.ids
    assert db.column("split") == ["train"] * 4 + ["test"] * 3
    assert db.value("c1", "action") == "run"
    query = features["c4"]["caption"]
    ids, scores = db.search(query, 2, {"c4"}, "split=test")[0]
    assert set(ids) == {"c5", "c6"} and scores[0] >= scores[1]
    with pytest.raises(MotionRAGError, match=r"k=3 .* 7 clips \(5 of them excluded\)"):
        db.search(query, 3, {"c4"}, "split=test")
    with pytest.raises(
        MotionRAGError, match="where=speed=1: no column 'speed'; the clips have action, caption"
    ):
        db.where("speed=1")
    with pytest.raises(MotionRAGError, match="where=action: expected column=value or column!=value"):
        db.where(["split=test", "action"])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("few", [0, 10_000])
def test_a_filtered_search_is_that_of_brute_force(write_database, monkeypatch, few, several):
    """Through the index's mask (few=0) and without the index; clips have gone, so numbers are no rows."""
    monkeypatch.setattr(database, "FEW", few)
    extra = lambda n: {"action": f"a{n % 3}", "metadata": {"split": "test" if n % 4 else "train"}}  # noqa: E731
    path, features = write_database((7, 13), extra=extra)
    changes.remove(path, gone := ["c0", "c8", "c19"])
    paths = [path]
    if several:
        other, more = write_database((9,), "other", prefix="o", seed=1, extra=extra)
        paths, features = [path, other], features | more
    db = open_database(paths)
    tags = {i: extra(int(i[1:])) for i in features if i not in gone}
    met = {
        "action=a1": lambda tag: tag["action"] == "a1",
        "action!=a2": lambda tag: tag["action"] != "a2",
        "split=train": lambda tag: tag["metadata"]["split"] == "train",
    }

    @settings(max_examples=40, deadline=None)
    @given(
        where=st.lists(st.sampled_from(sorted(met)), unique=True),
        exclude=st.sets(st.sampled_from([*tags, "c0", "nobody"]), max_size=6),
        k=st.integers(1, 8),
        seed=st.integers(0, 99),
    )
    def check(where, exclude, k, seed):
        query = np.random.default_rng(seed).normal(size=6).astype("f4")
        scores = {
            i: features[i]["caption"] @ query for i, tag in tags.items() if all(met[c](tag) for c in where)
        }
        best = sorted(scores.keys() - exclude, key=lambda i: -scores[i])
        if len(best) < k:
            with pytest.raises(MotionRAGError, match=f"k={k} is more than the database .* has"):
                db.search(query, k, exclude, where)
            return
        ids, found = db.search(query, k, exclude, where)[0]
        assert ids == best[:k]
        np.testing.assert_allclose(found, [scores[i] for i in ids], rtol=1e-5, atol=1e-6)

    check()


def test_near_duplicate_captions_are_no_neighbours(write_store):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(12, 6)).astype("f4")
    embeddings[1], embeddings[2] = (
        embeddings[0],
        embeddings[0] + 0.01,
    )  # the same caption, nearly the same one
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    path, _ = write_store((12,), embeddings=embeddings)
    build(path, 3)
    assert set(RetrievalDatabase(path).neighbours("c0", 2)) == {"c1", "c2"}
    manifest = build(path, 3, near_duplicate=0.99)
    assert manifest["neighbours"]["near_duplicate"] == 0.99
    db = RetrievalDatabase(path)
    similar = embeddings @ embeddings.T
    for row in range(12):
        expected = sorted((similar[row, i] for i in range(12) if similar[row, i] < 0.99), reverse=True)[:3]
        found = [similar[row, db.row(i)] for i in db.neighbours(f"c{row}", 3)]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    build(path, 3, near_duplicate=0.01)
    with pytest.raises(MotionRAGError, match="whose captions are less alike than near_duplicate=0.01"):
        RetrievalDatabase(path).neighbours("c0", 3) and RetrievalDatabase(path).neighbours("c1", 3)
    with pytest.raises(MotionRAGError, match="near_duplicate=2: expected a cosine"):
        build(path, 3, near_duplicate=2)


def test_databases_of_earlier_versions_open(write_database):
    """Without a clip table and numbers, neighbours as bare rows, files under fixed names."""
    path, _ = write_database((3, 4), paired=True)
    new = RetrievalDatabase(path)
    expected = {i: (new.neighbours(i, 3), new.clip(i), new.same_source(i)) for i in new.ids}
    motion = new.motion_features(["c4"])
    manifest = json.loads((path / "manifest.json").read_text())
    table = np.load(path / manifest["neighbours"]["file"])["number"]
    np.save(path / "neighbours.npy", table.astype(np.int32))
    (path / manifest["index"]["file"]).rename(path / "index.faiss")
    manifest["index"]["file"], manifest["neighbours"]["file"] = "index.faiss", "neighbours.npy"
    manifest["neighbours"]["sha256"] = sha256(path / "neighbours.npy")
    del manifest["catalog"], manifest["store"], manifest["neighbours"]["near_duplicate"]
    for part in manifest["parts"]:
        del part["start"], part["removed"], part["about"], part["files"]["sums.npy"]
        about = json.loads((path / "parts" / part["name"] / "part.json").read_text())
        del about["files"]["sums.npy"]
        (path / "parts" / part["name"] / "part.json").write_text(json.dumps(about))
        (path / "parts" / part["name"] / "sums.npy").unlink()
    (path / "manifest.json").write_text(json.dumps(unsigned(manifest)))
    old = RetrievalDatabase(path)
    assert {i: (old.neighbours(i, 3), old.clip(i), old.same_source(i)) for i in old.ids} == expected
    torch.testing.assert_close(old.motion_features(["c4"]), motion)
    with pytest.raises(MotionRAGError, match="was indexed by an older version; run motionrag index db="):
        changes.remove(path, ["c0"])
    build(path)
    changes.remove(path, ["c0"])
