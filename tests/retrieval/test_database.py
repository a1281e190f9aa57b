"""The database as one folder: complete, portable, strict about what it is asked; and the retrievers."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase, build
from motionrag.retrieval.retrievers import OracleRetriever, RandomRetriever, TextRetriever


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
    assert not db._parts[0].motion.flags.writeable
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
    names = ("manifest.json", "index.faiss", "neighbours.npy")
    build(path)
    first = [(path / name).read_bytes() for name in names]
    build(path)
    assert first == [(path / name).read_bytes() for name in names]


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
    (path / "manifest.json").write_text(json.dumps(manifest | {"clips": 99}))
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


# ---------------------------------------------------------------- retrievers


def test_text_retrieval_by_words_and_by_embedding(write_database):
    path, features = write_database()
    db = RetrievalDatabase(path)
    query = features["c3"]["caption"]
    retriever = TextRetriever(db, FakeCaptions(query))
    order = sorted(db.ids, key=lambda i: -float(features[i]["caption"] @ query))
    for form in ("motion 3", query, torch.from_numpy(query)):
        ids, scores = retriever.retrieve(form, 4)
        assert ids == order[:4]
        np.testing.assert_allclose(scores, [features[i]["caption"] @ query for i in ids], atol=1e-6)
    ids, _ = retriever.retrieve("motion 3", 3, exclude={"c3", order[1], "unknown"})
    assert ids == order[2:5]
    with pytest.raises(MotionRAGError, match=r"embedding has width 4, the captions .* have width 6 \(fake\)"):
        retriever.retrieve(query[:4], 1)
    with pytest.raises(MotionRAGError, match="differ in width"):
        TextRetriever(db, FakeCaptions(query, width=9))


def test_random_retrieval_is_even_and_repeats(write_database):
    db = RetrievalDatabase(write_database()[0])
    retriever = RandomRetriever(db, seed=3)
    assert retriever.retrieve("x", 4) == (
        RandomRetriever(db, seed=3).retrieve("x", 4)[0],
        pytest.approx([0] * 4),
    )
    assert retriever.retrieve("x", 7)[0] != RandomRetriever(db, seed=4).retrieve("x", 7)[0]
    firsts = [retriever.retrieve(f"query {i}", 1, exclude={"c0"})[0][0] for i in range(600)]
    counts = [firsts.count(clip_id) for clip_id in db.ids]
    assert counts[0] == 0
    assert min(counts[1:]) > 60  # 100 expected


def test_the_oracle_finds_the_motion_itself(write_database):
    path, features = write_database((30,))
    oracle = OracleRetriever(RetrievalDatabase(path))
    ids, scores = oracle.retrieve(features["c11"]["motion"], 5)
    assert ids[0] == "c11"
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert np.all(np.diff(scores) <= 0)
    assert "c11" not in oracle.retrieve(features["c11"]["motion"], 5, exclude={"c11"})[0]
    for query, got in (("words", "got a text"), (np.zeros((5, 3)), r"got \(5, 3\)")):
        with pytest.raises(MotionRAGError, match=got):
            oracle.retrieve(query, 1)


@pytest.mark.parametrize("kind", ["text", "random", "oracle"])
def test_more_than_there_is_is_an_error(write_database, kind):
    path, features = write_database()
    db, clip = RetrievalDatabase(path), features["c1"]
    retriever, query = {
        "text": (TextRetriever(db, FakeCaptions(clip["caption"])), "words"),
        "random": (RandomRetriever(db), "words"),
        "oracle": (OracleRetriever(db), clip["motion"]),
    }[kind]
    assert len(retriever.retrieve(query, 7)[0]) == 7
    with pytest.raises(MotionRAGError, match=r"k=8 is more than the database .* has: 7 clips; lower k"):
        retriever.retrieve(query, 8)
    with pytest.raises(MotionRAGError, match=r"k=7 .* 7 clips \(1 of them excluded\)"):
        retriever.retrieve(query, 7, exclude={"c1"})
    with pytest.raises(MotionRAGError, match="k=0: expected at least one"):
        retriever.retrieve(query, 0)
