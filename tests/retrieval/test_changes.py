"""Databases that grow, shrink and merge: what is found stays right, whoever is killed and whatever is damaged."""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest

from motionrag.errors import MotionRAGError
from motionrag.retrieval import building, changes, database
from motionrag.retrieval.bank import writer_lock
from motionrag.retrieval.building import build
from motionrag.retrieval.database import RetrievalDatabase

FORK = multiprocessing.get_context("fork")  # nothing is searched in these processes


def embeddings_of(*features):
    merged = {}
    for some in features:
        merged |= some
    return merged


def check(path, features, k=3):
    """A database is what its clips say: ids, features, search and neighbours, all against brute force."""
    db = RetrievalDatabase(path)
    assert set(db.ids) == set(features)
    matrix = np.stack([features[i]["caption"] for i in db.ids])
    np.testing.assert_array_equal(db.caption_embeddings, matrix)
    for clip_id in db.ids:
        expected = features[clip_id]
        np.testing.assert_array_equal(db.motion_features([clip_id])[0], expected["motion"].astype("f4"))
        np.testing.assert_array_equal(
            db.appearance_features([clip_id])[0], expected["appearance"].astype("f4")
        )
        assert np.abs(db.preview(clip_id).astype(int) - expected["preview"]).max() <= 2
        order = [db.ids[i] for i in np.argsort(-(matrix @ expected["caption"]))]
        assert db.search(expected["caption"], len(db))[0][0] == order
        others = [i for i in order if db.clip(i)["source"] != db.clip(clip_id)["source"]]
        assert db.neighbours(clip_id, k) == others[:k]
    changes.verify(path)
    return db


def test_add_remove_replace(write_database, write_store, tmp_path):
    path, features = write_database((3, 4), paired=True)
    trained = (path / RetrievalDatabase(path).manifest["index"]["file"]).name
    more, more_features = write_store((2, 3), "more", prefix="m", seed=1, paired=True)
    changes.add(path, [more])  # a token store will do
    features |= more_features
    db = check(path, features)
    assert db.ids[-1] == "m4"
    assert not (path / trained).exists()

    changes.remove(path, ["c1", "m0", "m1"])  # one part that was added is empty now
    for clip_id in ("c1", "m0", "m1"):
        del features[clip_id]
    db = check(path, features)
    assert [part["name"] for part in db.manifest["parts"]] == ["clips-0", "clips-1", "added-000001"]
    with pytest.raises(MotionRAGError, match="no clip 'c1' among its 9 clips"):
        db.motion_features(["c1"])

    new, new_features = write_store((2,), "new", prefix="c", seed=2)
    build(new)
    with pytest.raises(
        MotionRAGError, match=r"1 clips of .*new are in .*db already, e.g. 'c0'; replace=true"
    ):
        changes.add(path, [new])
    check(path, features)
    assert not (
        path / "parts/added-000000"
    ).exists()  # gone with the next change: readers may have had it open
    changes.add(path, [new], replace=True)
    features |= new_features
    db = check(path, features)
    assert [db.clip(i)["id"] for i in db.ids].count("c0") == 1

    build(path, 4)  # a new index keeps what was added and removed
    check(path, features)
    assert "m0" not in RetrievalDatabase(path)
    with pytest.raises(MotionRAGError, match="no clip 'm0' among its 10 clips"):
        changes.remove(path, ["m0"])
    with pytest.raises(MotionRAGError, match="would have no clip left; delete the folder"):
        changes.remove(path, list(features))
    check(path, features)


def test_merge(write_database, write_store, tmp_path):
    one, features = write_database((3, 4), "one")
    two, more = write_store((3,), "two", prefix="t", seed=1)
    changes.remove(one, ["c0", "c5"])
    del features["c0"], features["c5"]
    features |= more
    manifest = changes.merge(tmp_path / "both", [one, two], neighbours=5)
    assert manifest["clips"] == 8
    check(tmp_path / "both", features, k=5)
    # what was removed is not in the files either
    assert sum(part["clips"] for part in manifest["parts"]) == 8
    build(tmp_path / "both", 5)
    changes.remove(tmp_path / "both", ["t0", "t1", "t2"])
    build(tmp_path / "both", 4)
    check(tmp_path / "both", {i: f for i, f in features.items() if i[0] == "c"})

    with pytest.raises(MotionRAGError, match="both is there already"):
        changes.merge(tmp_path / "both", [one, two])
    with pytest.raises(MotionRAGError, match="clip 'c1' is in the store twice"):
        changes.merge(tmp_path / "twice", [one, one])
    with pytest.raises(MotionRAGError, match="no token store there"):
        changes.merge(tmp_path / "none", [one, tmp_path])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both", "one", "two"]


def test_other_encoders_are_refused_by_both_names(write_database, write_store, tmp_path):
    path, features = write_database()
    big = {"name": "big", "width": 9, "weights": "1" * 64}
    other, _ = write_store((2,), "other", prefix="o", motion_encoder=big)
    message = r"other was encoded with the motion encoder big \(width 9.* holds features of fake \(width 6.*"
    with pytest.raises(MotionRAGError, match=message + "differ in weights"):
        changes.add(path, [other])
    with pytest.raises(MotionRAGError, match="both.* holds features of fake"):
        changes.merge(tmp_path / "both", [path, other])
    assert not (tmp_path / "both").exists()
    check(path, features)


def test_two_writers(write_database, write_store):
    path, features = write_database()
    other, _ = write_store((2,), "other", prefix="o")
    holding, ending = FORK.Event(), FORK.Event()

    def hold():
        with writer_lock(path):
            holding.set()
            ending.wait(60)

    holder = FORK.Process(target=hold)
    holder.start()
    assert holding.wait(60)
    for change in (
        lambda: build(path),
        lambda: changes.add(path, [other]),
        lambda: changes.remove(path, ["c0"]),
    ):
        with pytest.raises(
            MotionRAGError, match=rf"db=.* is being changed by another process \(process {holder.pid} on "
        ):
            change()
    check(path, features)  # readers do not mind
    holder.kill()
    holder.join()
    changes.remove(path, ["c0"])  # the lock died with its holder


STEPS = ["copy", "copied", "catalog", "index", "neighbours", "manifest"]


def killed(step, change):
    """Run `change` in a process that is killed (kill -9) at a step."""

    def run():
        def kill(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)

        put, copy, calls = building._put, changes._copy, []
        if step == "copy":
            shutil.copy = lambda source, target: ((target / source.name).touch(), kill())
        elif step == "copied":
            changes._copy = lambda *args: kill() if calls else (calls.append(1), copy(*args))[1]
        elif step == "manifest":
            building.write_json = kill
        else:
            building._put = lambda path, role, write: put(
                path, role, (lambda file: (write(file), kill())) if role == step else write
            )
        change()

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_change_never_was(write_database, write_store, step):
    """At any step: the database opens and is the old one; then the change works."""
    path, features = write_database((3, 4))
    other, more = write_store((2, 2), "other", prefix="o", seed=1)
    killed(step, lambda: changes.add(path, [other]))
    check(path, features)
    changes.add(path, [other])
    check(path, features | more)
    leftovers = [p.name for p in path.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    assert leftovers == []
    assert len(list(path.glob("index*"))) == len(list(path.glob("clips*"))) == 1
    assert len(list((path / "parts").iterdir())) == 4


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_merge_leaves_nothing_that_opens(write_database, write_store, tmp_path, step):
    one, features = write_database((3, 4))
    two, more = write_store((2, 2), "other", prefix="o", seed=1)
    path = tmp_path / "merged"
    killed(step, lambda: changes.merge(path, [one, two]))
    assert not path.exists()
    changes.merge(path, [one, two])
    check(path, features | more)
    again = tmp_path / "again"
    changes.merge(again, [one, two])
    assert {f.relative_to(path): f.read_bytes() for f in path.rglob("*") if f.is_file()} == {
        f.relative_to(again): f.read_bytes() for f in again.rglob("*") if f.is_file()
    }
    assert not list(tmp_path.glob(".*"))


def test_a_failed_change_leaves_nothing(write_database, write_store, monkeypatch):
    path, features = write_database((3, 4))
    other, _ = write_store((2, 2), "other", prefix="o", seed=1)
    before = sorted(p for p in path.rglob("*") if p.is_file())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building, "write_npy", full)
    with pytest.raises(OSError, match="No space left"):
        changes.add(path, [other])
    # files that the manifest does not name may stay until the next change; parts may not
    check(path, features)
    assert sorted(p for p in (path / "parts").rglob("*") if p.is_file()) == [
        p for p in before if "parts" in p.parts
    ]


def test_verify_finds_any_flipped_byte(write_database):
    path, _ = write_database((3, 4))
    counts = changes.verify(path)
    rng = np.random.default_rng(0)
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.name not in (".lock", "manifest.json")]
    assert len(files) == counts["files"] == 1 + 3 + 2 * 8
    assert counts["bytes"] == sum(file.stat().st_size for file in files)
    for file in files:
        data = file.read_bytes()
        at = int(rng.integers(len(data)))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(MotionRAGError, match=file.name.split("-")[0]):
            changes.verify(path)
        file.write_bytes(data)
    changes.verify(path)
    for file in files:
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(MotionRAGError, match=file.name.split("-")[0]):
            changes.verify(path)
        file.write_bytes(data)


def test_hnsw_grows_and_shrinks(write_database, write_store):
    path, features = write_database((30, 20))
    build(path, 4, kind="hnsw")
    other, more = write_store((2,), "other", prefix="o", seed=1)
    changes.add(path, [other])
    changes.remove(path, ["c0", "c31"])
    newer, replaced = write_store((2,), "newer", seed=2)
    changes.remove(path, ["o0"])
    changes.add(path, [newer], replace=True)  # c0, which was removed, and c1
    features = {**features, **more, **replaced}
    del features["c31"], features["o0"]
    assert changes.verify(path)["clips"] == 50
    db = RetrievalDatabase(path)
    assert db.manifest["index"]["kind"] == db.index.kind == "hnsw"
    for clip_id, clip in features.items():
        assert db.search(clip["caption"], 1)[0][0] == [clip_id]
    assert set(db.search(more["o1"]["caption"], 50)[0][0]) == set(features)
    assert db.search(more["o1"]["caption"], 1, exclude=["o1"])[0][0] != ["o1"]
    assert not {"c31", "o0"} & {n for clip_id in db.ids for n in db.neighbours(clip_id, 4)}


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_approximate_databases(write_store, kind):
    """Search, filter and neighbours of an approximate index that has grown and shrunk."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 6))
    embeddings = centres[rng.integers(0, 60, 1300)] + rng.normal(size=(1300, 6)) * 0.2
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype("f4")
    action = lambda number: {"action": f"a{number % 7}"}  # noqa: E731
    path, features = write_store((600, 600), embeddings=embeddings, extra=action)
    manifest = build(path, 4, kind=kind, recall=0.98)
    assert manifest["index"]["recall"] >= 0.98
    assert manifest["index"]["effort"] >= 1
    other, more = write_store((100,), "other", prefix="o", embeddings=embeddings[1200:], extra=action)
    changes.add(path, [other])
    changes.remove(path, [f"c{i}" for i in range(50)])
    features = {i: f for i, f in {**features, **more}.items() if i not in {f"c{n}" for n in range(50)}}
    db = RetrievalDatabase(path)
    assert set(db.ids) == set(features)
    matrix = db.caption_embeddings
    recall = []
    for clip_id in db.ids[::20]:
        query = features[clip_id]["caption"]
        ids, scores = db.search(query, 9)[0]
        truth = np.sort(matrix @ query)[::-1][:9]
        recall.append((scores >= truth[-1] - 1e-5).mean())
        assert (np.diff(scores) <= 0).all()
        # more than the cells looked into hold: found exactly, never fewer, never a blank
        ids, scores = db.search(query, 1000)[0]
        assert len(set(ids)) == 1000
        ids, scores = db.search(query, 9, where="action=a3")[0]
        right = [i for i in db.ids if db.clip(i)["action"] == "a3"]
        best = sorted((float(features[i]["caption"] @ query) for i in right), reverse=True)[:9]
        np.testing.assert_allclose(scores, best, atol=1e-5)
        assert set(ids) <= set(right)
    assert np.mean(recall) > 0.95
    changes.verify(path)


def test_time_to_live_readers(write_database, write_store):
    """A reader that was open keeps what it has, used before or not; one that opens later sees the change."""
    path, features = write_database((3, 4))
    for prefix in ("o", "p"):
        other, _ = write_store((2,), prefix, prefix=prefix, seed=1)
        changes.add(path, [other])
    used, unused = RetrievalDatabase(path), RetrievalDatabase(path)
    query = features["c2"]["caption"]
    expected = used.search(query, 11)[0][0]
    assert expected[0] == "c2" and used.neighbours("c2", 4)
    changes.remove(path, ["c2", "o0", "o1"])  # all of a part that was added
    for db in (used, unused):
        assert db.search(query, 11)[0][0] == expected
        assert db.neighbours("c2", 4) == used.neighbours("c2", 4)
        assert db.motion_features(["c2", "o1"]).shape == (2, 5, 4)
    assert RetrievalDatabase(path).search(query, 1)[0][0] != ["c2"]


def test_damage_does_not_get_a_checksum_of_its_own(write_database):
    path, _ = write_database((3, 4))
    for file in [*path.glob("index-*"), *path.glob("neighbours-*"), path / "parts/clips-0/clips.json"]:
        data = file.read_bytes()
        file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        with pytest.raises(MotionRAGError, match=f"{file.name} is damaged"):
            changes.remove(path, ["c1"])
        file.write_bytes(data)
    changes.remove(path, ["c1"])


def test_a_database_that_is_changed_while_it_is_opened(write_database, monkeypatch):
    path, _ = write_database((3, 4))
    old = database.read_manifest(path)
    changes.remove(path, ["c2"])
    new = [old, database.read_manifest(path)]
    monkeypatch.setattr(database, "read_manifest", lambda path: new.pop(0))
    assert "c2" not in RetrievalDatabase(path)
