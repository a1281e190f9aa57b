"""index add, remove, merge, inspect, verify and the report of retrieve, as they are typed."""

import json

import numpy as np
import pytest
from PIL import Image

from motionrag import cli
from motionrag.errors import MotionRAGError
from motionrag.retrieval.database import RetrievalDatabase


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a verb inside ``tmp_path``; returns exit code, standard output and the error line."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main([*words, "hydra.run.dir=run"])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0), err
        return code, out, (errors or [""])[0]

    return run


def extra(number):
    return {"action": f"a{number % 2}"}


def test_a_database_from_build_to_verify(run, write_store, tmp_path):
    write_store((3, 4), "db", extra=extra)
    write_store((2,), "more", prefix="m", seed=1, extra=extra)
    assert "index: 7 clips, 16 neighbours each -> db" in run("index", "db=db")[1]
    assert "9 clips, 16 neighbours each" in run("index", "add", "db=db", "others=more")[1]
    assert "7 clips" in run("index", "remove", "db=db", "clips=[c0,m1]")[1]
    assert "3 clips" in run("index", "remove", "db=db", "where=action=a0")[1]
    assert (
        "no clip meets where=action=a0, nothing is removed"
        in run("index", "remove", "db=db", "where=action=a0")[2]
    )
    assert RetrievalDatabase("db").ids == ["c1", "c3", "c5"]
    assert "5 clips, 2 neighbours" in run("index", "merge", "db=both", "others=[db,more]", "neighbours=2")[1]
    assert RetrievalDatabase("both").ids == ["c1", "c3", "c5", "m0", "m1"]
    code, _, error = run("index", "merge", "db=both", "others=[db,more]")
    assert code == 2 and "both is there already" in error


def test_mistakes(run, write_store):
    write_store((3,), "db")
    for words, message in {
        ("grow", "db=db"): "what=grow: expected build, add, remove, merge, inspect, verify",
        ("add", "db=db"): "motionrag index add needs others=[DB,DB]",
        ("remove", "db=db"): "motionrag index remove needs clips=[ID,ID] or where=column=value",
        ("verify", "db=db"): "no manifest.json there; run motionrag index db=db",
        ("add", "db=db", "others=db"): "no manifest.json there",
        (): "index needs db=...",
    }.items():
        code, _, error = run("index", *words)
        assert code == 2 and message in error, error


def test_inspect_and_verify(run, write_store, tmp_path):
    write_store((3, 4), "db", extra=extra)
    run("index", "db=db")
    run("index", "remove", "db=db", "clips=c2")
    code, out, _ = run("index", "inspect", "db=db")
    assert code == 0
    assert "6 of 6 sources in 2 parts; 1 removed, 0 skipped" in out
    assert "fake (width 6" in out and "kind flat" in out and "action" in out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["clips"], results["removed"], results["index"]["kind"]) == (6, 1, "flat")
    assert "db is whole: 20 files" in run("index", "verify", "db=db")[1]
    file = tmp_path / "db/parts/clips-1/motion.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, _, error = run("index", "verify", "db=db")
    assert code == 2 and "clips-1/motion.npy is damaged" in error


def test_the_report(run, write_store, tmp_path):
    write_store((8, 4), "db", extra=extra)
    run("index", "db=db")
    code, out, error = run("retrieve", "db=db", "label=action", "k=3", "retriever=random")
    assert code == 0, error
    assert "retrieve: action: recall@3" in out and "precision@3" in out and "12 queries" in out
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert len(report["found"]) == 12
    assert report["chance"] == pytest.approx(5 / 11)
    assert Image.open(tmp_path / "run/report.png").height > 8 * 4 * 16
    for words in ((), ("",)):  # of an empty variable of the shell
        code, _, error = run("retrieve", *words, "db=db")
        assert code == 2 and 'needs a prompt (motionrag retrieve "PROMPT" db=DB)' in error
    code, out, error = run(
        "retrieve", "anything", "db=db", "k=2", "retriever=random", "retriever.where=action=a1"
    )
    assert code == 0, error
    references = json.loads((tmp_path / "run/references.json").read_text())["references"]
    assert [reference["action"] for reference in references] == ["a1", "a1"]


def test_copies_of_a_caption_are_found_but_not_learnt_from(run, write_store):
    captions = np.eye(6, dtype=np.float32)[[0, 0, 1, 1, 2, 3]]
    captions[1] = (0.96, 0.28, 0, 0, 0, 0)  # nearly the caption of clip 0
    path, _ = write_store((6,), "db", embeddings=captions)
    for words, neighbours in {
        (): {"c2", "c3", "c4", "c5"},
        ("near_duplicate=null",): set("c1 c2 c3 c4 c5".split()),
    }.items():
        assert run("index", "db=db", *words)[0] == 0
        db = RetrievalDatabase(path)
        assert set(db.neighbours("c0", len(neighbours))) == neighbours
        assert db.search(captions[0], 2)[0][0] == ["c0", "c1"]  # and by whoever asks with that caption
    run("index", "db=db")
    with pytest.raises(
        MotionRAGError, match="near_duplicate=0.95; lower k or .*near_duplicate=null if captions repeat"
    ):
        RetrievalDatabase(path).neighbours("c0", 5)


def test_the_oracle_asks_with_motion(run, write_store, tmp_path):
    _, features = write_store((8, 4), "db", extra=extra)
    run("index", "db=db")
    code, _, error = run("retrieve", "db=db", "label=action", "k=2", "retriever=oracle")
    assert code == 0, error
    found = json.loads((tmp_path / "run/report.json").read_text())["found"]
    pooled = {i: own["motion"].astype("f4").mean(0) for i, own in features.items()}
    mean = np.mean(list(pooled.values()), 0)
    unit = {i: (own - mean) / np.linalg.norm(own - mean) for i, own in pooled.items()}
    for clip_id, own in found.items():
        nearest = sorted(unit.keys() - {clip_id}, key=lambda i, clip_id=clip_id: -unit[i] @ unit[clip_id])
        assert own["ids"] == nearest[:2]
    code, _, error = run("retrieve", "a prompt", "db=db", "k=2", "retriever=oracle")
    assert code == 2 and "got a text; it serves evaluate, and the report" in error
