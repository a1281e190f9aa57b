"""generate, evaluate and demo through the command line, and what goes wrong on the way."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from motionrag import cli
from motionrag.cli.demo import make_room
from motionrag.cli.train import make_motionworld
from motionrag.data.motionworld import make_dataset
from motionrag.data.packing import pack
from motionrag.data.video import read_clip
from motionrag.errors import MotionRAGError
from motionrag.evaluation.conditions import CONDITIONS, Generation, References
from motionrag.evaluation.split import TestClips
from motionrag.report import write_report
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.retrievers import OracleRetriever


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_models):
    """A database of seven clips (db/), three test clips of two domains (shards/), and a picture."""
    folder = tmp_path_factory.mktemp("world")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("generate", overrides=["image=x", "prompt=y", *random_models])
    make_motionworld(folder / "made", 7, 1, {"known": 2.0, "new": 1.0}, cfg.encoders)
    test = {"known": 1.0, "new": 1.0}
    table = make_dataset(folder / "test", 3, 2, test, held_out=True, prefix="test")
    index = pack(table, folder / "test/videos", folder / "shards")
    assert index["clips"] == 3
    first = read_clip(folder / "test/videos/test-00000.mp4").frames[0]
    Image.fromarray(first).resize((80, 64)).save(folder / "first.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, command, random_models, world):
    """Run a verb inside ``tmp_path`` on untrained models; returns exit code, output and the error line."""
    monkeypatch.chdir(tmp_path)
    for name, target in (("db", "made/db"), ("shards", "shards"), ("first.png", "first.png")):
        (tmp_path / name).symlink_to(world / target)

    def run(verb, *words):
        models = [] if verb == "demo" else random_models
        return command(verb, *models, *words, f"hydra.run.dir=runs/{verb}")

    return run


def results(verb):
    with open(f"runs/{verb}/results.json", encoding="utf-8") as file:
        return json.load(file)


def left_behind(folder):
    """What a run wrote besides the record that it was started."""
    record = {"provenance.json", "config.yaml", "generate.log", "evaluate.log"}
    inputs = {"db", "shards", "first.png"}
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in record | inputs and ".hydra" not in path.parts
    ]


# ---------------------------------------------------------------- generate


@pytest.fixture
def generate(run):
    """Run generate with two steps; returns the mp4's bytes."""

    def generate(*words):
        code, out, error = run("generate", "image=first.png", "steps=2", *words)
        assert code == 0, error
        video = results("generate")["video"]
        assert out.splitlines()[-1].startswith("generate: 9 frames of 32x32 from ")
        read = read_clip(video)
        assert read.frames.shape == (9, 32, 32, 3) and read.fps == pytest.approx(8)
        with open(video, "rb") as file:
            return file.read()

    return generate


def test_generate_with_a_database(generate, tmp_path):
    prompt = "a red and blue circle on a sand background, which [spins], k=3"
    video = generate(prompt, "db=db", "k=3")
    assert (tmp_path / "runs/generate/video.mp4").read_bytes() == video
    db = RetrievalDatabase("db")
    references = results("generate")["references"]
    scores = [reference["score"] for reference in references]
    assert len(references) == 3 and scores == sorted(scores, reverse=True)
    for reference in references:
        assert reference["caption"] == db.caption(reference["id"])
    assert generate(prompt, "db=db", "k=3") == video
    assert generate(prompt, "db=db", "k=3", "seed=1") != video
    assert generate(prompt, "db=db", "k=2") != video
    bare = generate(prompt)
    assert results("generate")["references"] == [] and bare != video
    assert generate(prompt, "db=db", "k=3", "motion_scale=0") == bare


def test_generate_looks_at_the_picture_for_retrievers_that_do(generate):
    generate("a circle", "db=db", "k=2", "retriever=image")
    db = RetrievalDatabase("db")
    by_looks = [reference["id"] for reference in results("generate")["references"]]
    assert len(by_looks) == 2 and set(by_looks) <= set(db.ids)
    generate("a circle", "db=db", "k=2", "retriever=text_image")
    assert [
        reference["id"] for reference in results("generate")["references"]
    ] == by_looks  # the pool is all clips


def test_generate_searches_with_the_motion_prompt(generate):
    db = RetrievalDatabase("db")
    wanted = db.ids[3]
    generate("a circle", f"motion_prompt={db.motion_caption(wanted)}", "db=db", "k=1", "out=videos/x.mp4")
    (reference,) = results("generate")["references"]
    assert reference["motion_caption"] == db.motion_caption(wanted)
    assert reference["score"] == pytest.approx(1, abs=1e-3)
    assert results("generate")["video"] == "videos/x.mp4"


def test_generate_with_own_reference_clips(generate, world):
    first, second = (world / f"made/videos/clip-0000{i}.mp4" for i in (0, 1))
    videos = [generate("a circle", f"references=[{clips}]") for clips in (f"{first},{second}", first, second)]
    assert len(set(videos)) == 3
    assert results("generate")["references"] == [{"video": str(second)}]


def test_libraries_are_quiet(motionrag, random_models, world, tmp_path):
    words = [f"image={world}/first.png", "prompt=x", f"db={world}/made/db", "k=1", "steps=1"]
    # transformers says so when W&B is offline, as it is in tests
    done = motionrag("generate", *random_models, *words, "hydra.run.dir=run", WANDB_MODE="disabled")
    assert done.returncode == 0, done.stderr
    assert [line[:20] for line in done.stdout.splitlines()] == ["generate: 9 frames o"], done.stdout
    lines = [line for line in re.split(r"[\r\n]", done.stderr) if line.strip()]
    assert all(line.startswith("denoising") for line in lines), lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image=gone.png"], "image=gone.png: no such file"),
        (["image=text.png"], "image=text.png: not a readable picture"),
        (["weights.adapter=gone.safetensors"], "no weights file gone.safetensors"),
        (["weights.cama=gone.safetensors"], "no weights file gone.safetensors"),
        (["weights.cama=text.png"], "text.png is not a readable safetensors file"),
        (["cama.ff_dim=64"], "does not fit this configuration"),
        (["backbone.path=gone"], "backbone 'gone' cannot be loaded"),
        (["db=db", "k=8"], "k=8 is more than the database db has: 7 clips"),
        (["db=db", "k=0"], "k=0: expected at least one reference clip"),
        (["db=gone"], "db=gone: no such folder"),
        (
            ["db=db", "k=1", "encoders.motion.path=pkg:tiny/gone"],
            "'pkg:tiny/gone' are not in this installation",
        ),
        (["db=db", "references=[first.mp4]"], "both db and references are given"),
        (["references=[gone.mp4]"], "gone.mp4: missing file"),
        (["references=[text.png]"], "text.png: "),
        (["steps=0"], "steps=0: expected at least 1 denoising step"),
        (["out=runs"], "out=runs: expected the name of an mp4 file"),
        (["device=nonsense"], "device=nonsense: cannot be used here"),
        pytest.param(
            ["device=cuda"],
            "device=cuda: cannot be used here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="here it can"),
        ),
        (["motion_scael=1"], "unknown config key 'motion_scael', did you mean 'motion_scale'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_mistakes(run, tmp_path, words, message):
    (tmp_path / "runs").mkdir()
    (tmp_path / "text.png").write_text("no picture, no clip, no weights")
    code, _, error = run("generate", "image=first.png", "prompt=x", "steps=1", *words)
    assert code == 2
    assert message in error
    assert left_behind(tmp_path) == ["text.png"]


def test_generate_with_a_database_of_other_encoders(run, tmp_path, world):
    (tmp_path / "db").unlink()
    manifest = json.loads((world / "made/db/manifest.json").read_text())
    del manifest["checksum"]
    manifest["encoders"]["motion"] |= {"name": "big", "width": 768}
    (tmp_path / "db").mkdir()
    for path in (world / "made/db").iterdir():
        if path.name != "manifest.json":
            (tmp_path / "db" / path.name).symlink_to(path)
    (tmp_path / "db/manifest.json").write_text(json.dumps(manifest))
    code, _, error = run("generate", "image=first.png", "prompt=x", "db=db", "k=1")
    assert code == 2
    assert "was built with the motion encoder big (width 768" in error
    assert "this run uses motion-random (width 24" in error


# ---------------------------------------------------------------- evaluate

EVALUATE = ["shards=shards", "db=db", "k=2", "steps=1", "batch_size=2"]
METRICS = {"action_score", "dino_score", "trajectory_error"}


def test_evaluate(run, tmp_path, world):
    code, out, error = run(
        "evaluate", *EVALUATE, f"conditions=[{','.join(CONDITIONS)}]", "out=scores", "notes=[one]"
    )
    assert code == 0, error
    assert re.search(r"evaluate: Action Score (known|new): .* -> .* \(3 clips\) -> scores", out)

    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
    assert metrics.keys() >= {"conditions", "settings", "labels", "notes", "seconds", "spread", "differences"}
    assert metrics["notes"][0] == "one" and metrics["settings"]["k"] == 2
    assert all("no better than a still image" in note for note in metrics["notes"][1:])  # random networks
    assert list(metrics["conditions"]) == list(CONDITIONS)
    clips = {clip["id"]: clip for clip in json.loads((tmp_path / "scores/clips.json").read_text())}
    count = {d: sum(c["domain"] == d for c in clips.values()) for d in ("known", "new")}
    assert min(count.values()) >= 1 and sum(count.values()) == 3
    for domains in metrics["conditions"].values():
        assert domains.keys() == {"known", "new"}
        for domain, values in domains.items():
            assert values.keys() == METRICS | {"seconds_per_clip", "n"}
            assert values["n"] == count[domain] and np.isfinite(list(values.values())).all()
    assert results("evaluate")["conditions"] == metrics["conditions"]

    with open(tmp_path / "scores/per_clip.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["condition"]) for row in rows] == [(i, c) for i in clips for c in CONDITIONS]
    for condition, domains in metrics["conditions"].items():
        for domain, values in domains.items():
            own = [r for r in rows if r["condition"] == condition and clips[r["id"]]["domain"] == domain]
            for metric in METRICS:
                assert np.mean([float(row[metric]) for row in own]) == pytest.approx(values[metric])

    scores = {row["condition"]: row["action_score"] for row in rows}
    assert scores["finetuned"] != scores["backbone"]  # another network, from the same noise
    for clip in clips.values():
        assert clip["outputs"].keys() == clip["scores"].keys() == set(CONDITIONS)
        assert len(clip["references"]) == 2
        files = [clip["truth"], *clip["outputs"].values(), *(r["clip"] for r in clip["references"])]
        shapes = {read_clip(tmp_path / "scores" / file).frames.shape for file in files[:-2]}
        assert shapes == {(9, 160, 160, 3)}
        assert all((tmp_path / "scores" / file).is_file() for file in [*files, clip["first_frame"]])
    page = write_report([tmp_path / "scores"], tmp_path / "report.html").read_text()
    assert "mean of references, no CAMA" in page

    # the terminal: a table for each domain, no line over 80 columns
    assert {"known", "new"} <= set(re.findall(r"^(\w+), \d clips?", out, flags=re.M))
    assert max(len(line) for line in out.splitlines() if "─" in line or "↑" in line) <= 80

    # a clip's video depends on neither the other conditions nor its batch
    bare = [row["action_score"] for row in rows if row["condition"] == "backbone"]
    assert (
        run("evaluate", *EVALUATE, "conditions=[backbone]", "batch_size=1", "save_clips=0", "out=again")[0]
        == 0
    )
    with open(tmp_path / "again/per_clip.csv", encoding="utf-8", newline="") as file:
        again = [row["action_score"] for row in csv.DictReader(file)]
    assert list(map(float, again)) == pytest.approx(list(map(float, bare)), abs=0.05)
    assert not (tmp_path / "again/clips").exists()


def test_a_limit_is_per_domain(run, tmp_path):
    words = ["conditions=[still]", "limit=1", "metrics=[action_score_tiny,fid_tiny]", "save_clips=1"]
    assert run("evaluate", *EVALUATE, *words, "out=scores")[0] == 0
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
    assert {domain: values["n"] for domain, values in metrics["conditions"]["still"].items()} == {
        "known": 1,
        "new": 1,
    }
    assert "trajectory_error" not in metrics["conditions"]["still"]["known"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conditions=[backbone,magic]"], "unknown ['magic']; choose from backbone, finetuned"),
        (["conditions=[]"], "choose from backbone, finetuned"),
        (["fusion=sum"], "fusion=sum: choose from mean, weight, concat, top1"),
        (["k=8"], "k=8 is more than the database db has: 7 clips"),
        (["conditions=[finetuned]", "weights.finetuned=null"], "needs weights.finetuned=FILE"),
        (["conditions=[finetuned]", "weights.finetuned=gone.safetensors"], "gone.safetensors"),
        (
            ["conditions=[finetuned]", "weights.finetuned=pkg:tiny/cama.safetensors"],
            "does not fit this backbone",
        ),
        (["k=7", "conditions=[backbone,known_only]"], "of them excluded); lower k"),
        (["shards=gone"], "gone"),
        (["db=shards"], "db=shards"),
        (["steps=0"], "steps=0: expected at least 1"),
        (["limit=1", "metrics=[fvd_tiny]"], "FVD: needs at least 2 clips of each domain, 'known' has 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_mistakes(run, tmp_path, words, message):
    code, _, error = run("evaluate", *EVALUATE, "conditions=[backbone]", *words, "out=scores")
    assert code == 2
    assert message in error
    assert left_behind(tmp_path) == []


def test_references_never_come_from_the_clips_own_source(world):
    from motionrag.encoders import CaptionEncoder
    from motionrag.retrieval.retrievers import TextRetriever

    db = RetrievalDatabase(world / "made/db")
    retriever = TextRetriever(db, CaptionEncoder())
    find = References(db, retriever, 6, without="domain=new")
    for clip_id in db.ids:
        clip = {**db.clip(clip_id), "id": "under another name"}
        for condition in ("motionrag", "random"):
            assert sorted([*find(clip, condition)[0], clip_id]) == sorted(db.ids)
    new = {i for i in db.ids if db.clip(i)["metadata"]["domain"] == "new"}
    assert new == find.left_out and 0 < len(new) < len(db)
    few = References(db, retriever, 2, without=["domain=new"])
    other = {"id": "x", "source": "x", "motion_caption": db.motion_caption(next(iter(new)))}
    assert few(other, "motionrag")[0][0] in new
    assert not new & set(few(other, "known_only")[0])
    ids, scores = find(other, "motionrag")
    for order in ("farthest", "random"):
        turned, its = References(db, retriever, 6, order=order)(other, "motionrag")
        assert dict(zip(turned, its, strict=True)) == dict(zip(ids, scores, strict=True))
        assert turned == ids[::-1] if order == "farthest" else turned not in (ids, ids[::-1])
    with pytest.raises(MotionRAGError, match="order=far: choose from nearest"):
        References(db, retriever, 6, order="far")
    with pytest.raises(MotionRAGError, match="test clip 'x' has no action to search with"):
        References(db, retriever, 2, query="action")(other, "motionrag")


def test_the_oracle_retriever_is_asked_with_the_test_clips_own_features(world):
    db = RetrievalDatabase(world / "made/db")
    chosen = db.ids[:2]
    features = db.motion_features(chosen)
    clips = TestClips(
        "all", [{"id": f"t{i}", "source": "other"} for i in range(2)], torch.zeros(2, 9, 3, 32, 32)
    )
    encoder = lambda video: features if video is clips.truth else None  # noqa: E731
    model = SimpleNamespace(device=torch.device("cpu"), motion_encoder=encoder)
    generation = Generation(model, References(db, OracleRetriever(db), 2), clips)
    for clip_id, (ids, scores) in zip(chosen, generation.references("motionrag", 0), strict=True):
        assert ids[0] == clip_id and scores[0] == pytest.approx(1) and ids[1] in db.ids


# ---------------------------------------------------------------- demo


def test_demo(run, tmp_path):
    demo = tmp_path / "démo (1), a=b"
    smallest = [
        "db_clips=40",
        "test_clips=1",
        "k=2",
        "steps=2",
        "train_steps=2",
        "conditions=[backbone,motionrag]",
        f"out={demo}",
    ]
    code, out, error = run("demo", *smallest)
    assert code == 0, error
    assert "demo: Action Score on new motions: backbone " in out
    typed = re.findall(r"^\$ motionrag (\w+)", out, flags=re.M)
    steps = "pack pack encode index retrieve train train generate evaluate report"
    assert typed == steps.split()
    metrics = json.loads((demo / "metrics.json").read_text())
    assert list(metrics["conditions"]) == ["backbone", "motionrag"]
    for domains in metrics["conditions"].values():
        assert {domain: values["n"] for domain, values in domains.items()} == {"known": 1, "new": 1}
        assert all(np.isfinite(values["action_score"]) for values in domains.values())
    page = (demo / "report.html").read_text()
    assert "with retrieval" in page and "truth" in page and "<video" in page
    assert not re.search(r"(src|href)=.?https?:", page)
    assert {"adapter", "cama"} == {path.name for path in (demo / "train").iterdir()}
    (demo / "clips" / "mine.txt").touch()
    make_room(demo)
    assert (demo / "report.html").exists() and not (demo / "clips").exists()


def test_demo_leaves_folders_alone_that_no_demo_made(run, tmp_path):
    (tmp_path / "world").mkdir()
    code, _, error = run("demo", "out=.")
    assert code == 2 and "out=.: world, db there are not of a demo" in error
    assert (tmp_path / "db").exists()
