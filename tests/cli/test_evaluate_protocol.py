"""evaluate: protocols, the paper's table, several seeds, anyone's videos, VBench's layout, and what goes wrong."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from motionrag import cli
from motionrag.cli.evaluate import changes, incompetent
from motionrag.cli.train import make_motionworld
from motionrag.data.shards import ClipRecord
from motionrag.data.video import read_clip, write_mp4
from motionrag.errors import MotionRAGError
from motionrag.evaluation import split
from motionrag.evaluation.conditions import Generation
from motionrag.evaluation.folders import open_folders
from motionrag.evaluation.gallery import Gallery, VBench
from motionrag.evaluation.scores import Metrics, Scores
from motionrag.evaluation.split import TestClips
from motionrag.evaluation.tables import paper_tables, write_tables
from motionrag.metrics import FVD, ActionScore, ClipBatch

WITHOUT_MODELS = ["metrics=[trajectory_error]"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, random_models):
    """Shards and database of six clips that are also the test split."""
    folder = tmp_path_factory.mktemp("world")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("generate", overrides=["image=x", "prompt=y", *random_models])
    make_motionworld(folder / "made", 6, 1, {"known": 1.0, "new": 1.0}, cfg.encoders)
    return folder / "made"


@pytest.fixture
def run(tmp_path, monkeypatch, command):
    """Run evaluate inside ``tmp_path``; returns exit code, output and the error line."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        return command("evaluate", *words, "out=scores", "hydra.run.dir=run")

    return run


def read(name):
    with open(f"scores/{name}", encoding="utf-8") as file:
        return json.load(file)


# ---------------------------------------------------------------- protocols


@pytest.mark.parametrize("name", ["openvid1k", "skillvid", "motionworld"])
def test_protocols_compose_and_fix_what_makes_numbers_comparable(name):
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("evaluate", overrides=[f"protocol={name}"])
        assert cfg.protocol == name and cfg.k == 9 and list(cfg.seeds) == [0, 1, 2]
        assert list(cfg.conditions)[:2] == ["backbone", "motionrag"]
        assert {"action_score", "dino_score", "fvd"} <= set(cfg.metrics)
        assert cfg.query == ("action" if name == "skillvid" else "motion_caption")
        if name == "motionworld":
            assert cfg.shards.startswith(cfg.make[1].out) and cfg.db.startswith(cfg.make[0].out)
            return
        assert set(cfg.needs) == {"shards", "db", "weights.adapter"} and cfg.metrics.fvd.num_features == 400
        if name == "skillvid":  # sampling is openvid1k's
            return
        for backbone, sampling in {
            "cogvideox": (25, 3.0),
            "svd": (25, 3.0),
            "dynamicrafter": (30, 2.0),
        }.items():
            cfg = compose("evaluate", overrides=[f"protocol={name}", f"backbone={backbone}"])
            assert (cfg.steps, cfg.guidance) == sampling


def test_a_release_brings_backbone_and_weights_to_a_protocol(tmp_path, monkeypatch):
    (tmp_path / "release").mkdir()
    text = "# @package _global_\ndefaults: [override /backbone: svd]\nweights: {adapter: x}\n"
    text += "backbone: {min_guidance: 2}\ncama: {depth: 7}\n"
    (tmp_path / "release/svd.yaml").write_text(text)
    words = [f"hydra.searchpath=['file://{tmp_path}']", "+release=svd", "protocol=openvid1k"]
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("evaluate", overrides=words)
        assert cfg.backbone.name == "svd" and cfg.weights.adapter == "x" and cfg.guidance == 3.0
        running = compose("evaluate", overrides=words, return_hydra_config=True)
        monkeypatch.setattr(HydraConfig.instance(), "cfg", running)  # as inside `motionrag evaluate`
        assert changes(cfg) == []
        (note,) = changes(compose("evaluate", overrides=[*words, "backbone.min_guidance=1", "cama.depth=6"]))
        assert note == "not the protocol openvid1k: changed backbone.min_guidance=1, cama.depth=6"


def test_a_changed_protocol_says_so():
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        words = ["protocol=openvid1k", "backbone=svd"]
        assert changes(compose("evaluate", overrides=words)) == []
        changed = ["shards=mine", "retriever=image", "steps=7", "seeds=[4]", "metrics=[fvd]"]
        cfg = compose("evaluate", overrides=[*words, *changed])
        assert changes(cfg) == [
            "not the protocol openvid1k: changed metrics=fvd, "
            "retriever=motionrag.retrieval.retrievers.ImageRetriever, seeds=4, shards=mine, steps=7"
        ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("backbone.sampler=dpm", "backbone.sampler=dpm"),
        ("backbone.fps=12", "backbone.fps=12"),
        ("backbone.frames=5", "backbone.frames=5"),
        ("backbone=svd_tiny", "backbone=motionrag.backbones.svd.SVD.tiny, motion_adapter.query=hidden"),
        ("encoders.motion.path=other", "encoders.motion.path=other"),
        ("metrics.fvd.num_features=9", "metrics.fvd.num_features=9"),
        ("fusion=top1", "fusion=top1"),
        ("make=[]", "make="),
        ("~cama", "cama=None"),
        ("motion_adapter=reference", "motion_adapter.init=reference"),
        ("backbone.path=mine", None),
        ("weights.adapter=mine", None),
        ("batch_size=1", None),
    ],
)
def test_whatever_changes_a_protocols_numbers_is_said(word, said):
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        notes = changes(compose("evaluate", overrides=["protocol=motionworld", word]))
    assert notes == ([f"not the protocol motionworld: changed {said}"] if said else [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["protocol=openvid1k"],
            "shards=data/openvid1k/shards is not there; pack the release's",
        ),
        (
            ["protocol=skillvid", "shards=."],
            "db=data/skillvid/db is not there; make SkillVid's",
        ),
        (
            ["protocol=openvid1k", "shards=.", "db=."],
            "weights.adapter=None is not there; import the released weights",
        ),
        (["protocol=openvid"], "unknown protocol 'openvid', did you mean 'openvid1k'?"),
        ([], "evaluate needs shards=DIR db=DIR"),
        (["clips=a"], "truth=DIR is missing"),
        (["seeds=[1,1]"], "seeds=[1, 1]: expected at least one whole number, each once"),
        (["shards=.", "db=.", "batch_size=0"], "batch_size=0: expected at least 1 clip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_before_anything_is_loaded(run, tmp_path, words, message):
    code, _, error = run(*words)
    assert code == 2 and message in error
    assert not (tmp_path / "scores").exists()


def test_a_backbone_no_better_than_a_still_image_is_named():
    still = {"known": {"action_score": 1.0, "trajectory_error": 5.0}, "new": {"action_score": 2.0}}
    base = {"known": {"action_score": 9.0, "trajectory_error": 5.5}, "new": {"action_score": 2.5}}
    (note,) = incompetent({"backbone": base, "still": still})
    assert (
        "known: the backbone alone is no better than a still image (trajectory_error 5.50 against 5.00)"
        in note
    )
    assert incompetent({"backbone": base}) == incompetent({"still": still}) == []


# ---------------------------------------------------------------- the whole way


def test_seeds_table_and_vbench(run, world, random_models, tmp_path):
    words = [f"shards={world}/shards", f"db={world}/db", "k=2", "steps=1", "limit=2", "batch_size=2"]
    words += ["conditions=[backbone,motionrag,random]", "seeds=[0,1]", "save_clips=1", "export_vbench=true"]
    words += ["metrics=[action_score_tiny,fvd_tiny,motion_arrival,trajectory_error]", "resamples=20"]
    words += ["retriever=text_image", "motion_scale=0"]
    code, out, error = run(*random_models, *words)
    assert code == 0, error

    result = read("metrics.json")
    places = [(c, d) for c, domains in result["conditions"].items() for d in domains]
    assert len(places) == 6 and all(result["conditions"][c][d]["n"] == 2 for c, d in places)
    for condition, domain in places:
        spread = result["spread"][condition][domain]
        assert spread.keys() == {"action_score", "fvd", "motion_arrival", "trajectory_error"}
        for name, entry in spread.items():
            first, second = entry["seeds"]
            assert result["conditions"][condition][domain][name] == pytest.approx((first + second) / 2)
            assert entry["standard_deviation"] == pytest.approx(abs(first - second) / 2**0.5)
            assert len(entry["interval"]) == 2
        assert spread["trajectory_error"]["seeds"][0] != spread["trajectory_error"]["seeds"][1]
        # the same noise with and without retrieval: at motion scale 0 nothing else is left
        assert spread["action_score"] == result["spread"]["backbone"][domain]["action_score"]
        seconds = result["seconds"][condition][domain]
        expected = {"context", "sampling"} | ({"retrieval", "cama"} if condition != "backbone" else set())
        assert seconds.keys() == expected and min(seconds.values()) > 0
        row = result["conditions"][condition][domain]
        assert row["seconds_per_clip"] == pytest.approx(sum(seconds.values()))
    assert result["settings"]["seeds"] == [0, 1]
    few = {"samples": 2, "features": 96}
    assert result["samples"] == {domain: {"fvd": few} for domain in ("known", "new")}
    assert "FVD: 2 samples, fewer than the 96 features" in " ".join(result["notes"])
    assert "2 clips, 2 seeds, FVD of 2 samples" in (tmp_path / "scores/table.md").read_text()
    assert "FVD of 2 samples" in re.sub(r"\s+", " ", out)

    with open("scores/per_clip.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 3 * 2 and {row["seed"] for row in rows} == {"0", "1"} and "fvd" not in rows[0]
    (entry, *_) = read("clips.json")
    mine = [float(r["action_score"]) for r in rows if (r["id"], r["condition"]) == (entry["id"], "backbone")]
    assert entry["scores"]["backbone"]["action_score"] == pytest.approx(np.mean(mine))
    assert len(entry["references"]) == 2

    for table in read("table.json"):
        base, ours, gain = table["rows"].values()
        assert list(table["rows"]) == ["cogvideox_tiny", "+ retrieval", "difference"]
        assert list(base) == ["action_score", "fvd", "trajectory_error", "seconds_per_clip"]
        assert gain["fvd"] == pytest.approx(ours["fvd"] - base["fvd"])
        assert gain["seconds_per_clip"] == pytest.approx(sum(table["overhead_seconds"].values()))
    assert "+ retrieval" in out and "overhead per clip: retrieval " in re.sub(r"\s+", " ", out)

    folder = tmp_path / "scores/vbench/motionrag"
    prompts = json.loads((folder / "prompts.json").read_text())
    videos = {path.name for path in (folder / "videos").iterdir()}
    assert videos == prompts.keys() and len(videos) == 8
    assert {re.sub(r"-\d+$", "", name.removesuffix(".mp4")) for name in videos} == {
        path.stem for path in (folder / "images").glob("*.jpg")
    }


# ---------------------------------------------------------------- anyone's videos


@pytest.fixture
def folders(tmp_path):
    """made/ and real/: clips a and b, five frames each at 8 and 12 frames per second, and prompts.csv."""
    frames = np.random.default_rng(0).integers(0, 255, (4, 5, 24, 32, 3), dtype=np.uint8)
    for i, name in enumerate(("made/a", "made/b", "real/a", "real/b")):
        write_mp4(tmp_path / f"{name}.mp4", frames[i], 12 if name.endswith("b") else 8)
    (tmp_path / "prompts.csv").write_text("video,caption,domain\na.mp4,a runs,one\nx/b.mp4,b sits,two\n")
    return tmp_path


def test_videos_by_anyone(run, folders):
    shutil.copytree(folders / "real", folders / "best")
    words = ["clips={ours: best, theirs: made}", "truth=real", "prompts=prompts.csv", "export_vbench=true"]
    code, out, error = run(*words, *WITHOUT_MODELS)
    assert code == 0, error
    table = read("metrics.json")["conditions"]
    assert table["ours"]["one"] == {"trajectory_error": 0.0, "n": 1} == table["ours"]["two"]
    assert table["theirs"]["one"]["trajectory_error"] > 0
    assert [clip["prompt"] for clip in read("clips.json")] == ["a runs", "b sits"]
    assert (folders / "scores/vbench/theirs/videos/a runs-0.mp4").is_file()
    written = [*(folders / "scores/vbench").rglob("*.mp4"), *(folders / "scores/clips").glob("*.mp4")]
    rates = {read_clip(path).fps for path in written}
    assert {round(rate) for rate in rates} == {8, 12}
    assert [row["rows"].keys() for row in read("table.json")] == [{"ours", "theirs", "difference"}] * 2
    assert "(2 clips) -> scores" in out
    assert run("clips=made", "truth=real", *WITHOUT_MODELS)[0] == 0
    assert read("metrics.json")["conditions"].keys() == {"clips"}
    code, _, error = run("clips=made", "truth=real", "metrics=[]")
    assert code == 2 and "metrics=[]: choose at least one" in error
    code, _, error = run("clips=made", "truth=real", "metrics=[motion_arrival]")
    assert code == 2 and "metric motion_arrival: MotionArrival: needs motion_tokens" in error
    code, _, error = run("clips=made", "truth=real", "prompts=prompts.csv", "metrics=[fvd_tiny]")
    assert code == 2 and "metric fvd: FVD: needs at least 2 clips of each domain, 'one' has 1" in error


def _unequal(folder):
    write_mp4(folder / "made/b.mp4", np.zeros((4, 24, 32, 3), np.uint8), 8)
    return r"made/b.mp4 has 4 frames, .*real/b.mp4 5; cut both"


def _unreadable(folder):
    (folder / "made/a.mp4").write_text("no video")
    return r"1 clips cannot be read: .*made/a.mp4: not a readable video"


def _damaged(folder):
    path = folder / "made/b.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), np.uint8)
    data = bytearray(write_mp4(path, frames, 8).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    return r"1 clips cannot be read: .*made/b.mp4: stops after \d+ of 60 frames: damaged data"


def _unmatched(folder):
    (folder / "made/a.mp4").rename(folder / "made/c.mp4")
    return r"do not match by file name: 1 only in .*made \(c\), 1 only in .*real \(a\)"


def _twice(folder):
    shutil.copy(folder / "made/a.mp4", folder / "made/a.mov")
    return r"a.mov and a.mp4 have one name"


def _no_folder(folder):
    shutil.rmtree(folder / "real")
    return r"truth=.*real: no such folder"


def _empty(folder):
    shutil.rmtree(folder / "made")
    (folder / "made").mkdir()
    return r"clips=.*made: no videos there"


def _no_caption(folder):
    (folder / "prompts.csv").write_text("video,caption\na.mp4,a runs\n")
    return r"no caption for 1 clips \(b\)"


def _no_column(folder):
    (folder / "prompts.csv").write_text("id,caption\na,a runs\n")
    return r"no column video; it has id, caption"


def _two_rows(folder):
    (folder / "prompts.csv").write_text("video,caption\na.mp4,a runs\nb.mp4,b sits\nx/a.avi,a walks\n")
    return r"1 clips have several rows \(a\); keep one of each"


def _no_table(folder):
    (folder / "prompts.csv").unlink()
    return r"prompts=.*: no such file"


@pytest.mark.parametrize(
    "spoil",
    [
        _unequal,
        _unreadable,
        _damaged,
        _unmatched,
        _twice,
        _no_folder,
        _empty,
        _no_caption,
        _no_column,
        _two_rows,
        _no_table,
    ],
)
def test_folders_that_do_not_fit(folders, spoil):
    message = spoil(folders)
    with pytest.raises(MotionRAGError, match=message) as caught:
        open_folders({"clips": folders / "made"}, folders / "real", folders / "prompts.csv")
    assert "\n" not in str(caught.value)


def test_clips_of_another_size_are_fitted(folders):
    write_mp4(folders / "real/a.mp4", np.zeros((5, 48, 48, 3), np.uint8), 8)
    found = open_folders({"clips": folders / "made"}, folders / "real", None)
    made, truth, fps = found.read("a")
    assert made["clips"].shape == truth.shape == (5, 3, 24, 32) and fps == pytest.approx(8)


def test_an_id_with_slashes_makes_no_folders(tmp_path):
    gallery, clip = Gallery(tmp_path, 8, 1), torch.zeros(1, 2, 3, 16, 16)
    record = {"id": "../a/b", "domain": "all", "caption": "a", "motion_caption": "a"}
    gallery.add("backbone", [record], clip, clip)
    gallery.write({})
    names = {"..%2Fa%2Fb_first.png", "..%2Fa%2Fb_truth.mp4", "..%2Fa%2Fb_backbone.mp4"}
    assert {path.name for path in (tmp_path / "clips").iterdir()} == names
    (entry,) = json.loads((tmp_path / "clips.json").read_text())
    assert entry["id"] == "../a/b" and (tmp_path / entry["outputs"]["backbone"]).is_file()


def test_vbench_names(tmp_path):
    prompts = ["a/b", "a b", "x" * 300, ""]
    records = [{"id": f"clip{i}", "caption": prompt} for i, prompt in enumerate(prompts)]
    video = torch.zeros(4, 2, 3, 16, 16)
    export = VBench(tmp_path, 8)
    export.add("ours", 0, records, video[:, 0], video)
    export.write()
    names = json.loads((tmp_path / "vbench/ours/prompts.json").read_text())
    assert list(names) == ["a b-0.mp4", "a b (clip1)-0.mp4", "x" * 180 + "-0.mp4", "clip3-0.mp4"]
    assert list(names.values()) == prompts


# ---------------------------------------------------------------- scores and tables


class Broken(ActionScore):
    def add(self, batch):
        raise MotionRAGError("Broken: no weights")


def batch(*ids, value=0.0):
    return ClipBatch(list(ids), torch.full((len(ids), 2, 3, 8, 8), value), torch.zeros(len(ids), 2, 3, 8, 8))


def features(video):
    """(B, 2): changes with the clip."""
    return torch.stack([video.mean((1, 2, 3, 4)) + 1, video[:, 0].mean((1, 2, 3)) - 1], 1)


def makers(**more) -> dict:
    return {"action_score": lambda: ActionScore(extractor=features), **more}


def test_a_failed_metric_fails_the_run_or_is_left_out():
    scores = Scores(Metrics(makers(broken=Broken)))
    with pytest.raises(MotionRAGError, match="metric broken: Broken: no weights"):
        scores.add("backbone", "all", 0, batch("a"))
    scores = Scores(Metrics(makers(broken=Broken, fvd=lambda: FVD(2, features)), "warn"), resamples=5)
    for condition in ("backbone", "motionrag"):
        scores.add(condition, "all", 0, batch("a"))
    # one clip is too few for FVD: known only at the end
    assert scores.table()["backbone"]["all"].keys() == {"action_score", "n"}
    assert scores.spread()["backbone"]["all"].keys() == {"action_score"}
    assert scores.differences() == {"motionrag": {"all": {"action_score": {"value": 0.0}}}}
    assert scores.metrics.failed["broken"] == "Broken: no weights"
    assert scores.metrics.failed["fvd"].startswith("FVD: ")
    metrics = Metrics(makers(fvd=lambda: FVD(2, features)), "warn")
    metrics.check_counts({"known": 2, "new": 1})
    assert metrics.names == ["action_score"] and "'new' has 1" in metrics.failed["fvd"]
    with pytest.raises(MotionRAGError, match="no metric is left: .*no weights"):
        Scores(Metrics({"broken": Broken}, "warn")).add("backbone", "all", 0, batch("a"))
    with pytest.raises(MotionRAGError, match="metric_errors=no: choose fail or warn"):
        Metrics(makers(), "no")


def test_a_metric_that_fails_late_leaves_no_values():
    class Late(ActionScore):
        def compute(self):
            if calls.append(self) or len(calls) == 2:
                raise MotionRAGError("Late: no more")
            return super().compute()

    calls, scores = [], Scores(Metrics(makers(late=lambda: Late(extractor=features)), "warn"), resamples=0)
    for condition in ("backbone", "motionrag"):
        scores.add(condition, "all", 0, batch("a"))
    spread = scores.spread()
    assert len(calls) == 2 and spread["backbone"]["all"].keys() == {"action_score"}
    scores.metrics.failed["action_score"] = "since"
    assert scores.left(spread) == {"backbone": {"all": {}}, "motionrag": {"all": {}}}


def test_test_clips_that_are_not_whole_are_told(monkeypatch):
    record = ClipRecord("a", "a.mp4", "", "", "a", 8.0, 2, 8, 8, 0.2)
    clip = SimpleNamespace(frames=np.zeros((2, 8, 8, 3), np.uint8), note="3 of 9 frames repeat the last one")
    index = SimpleNamespace(shards=["x"], verify=str)
    monkeypatch.setattr(split, "ShardIndex", SimpleNamespace(open=lambda _: index))
    monkeypatch.setattr(split, "read_shard", lambda _: [(record, b"")])
    monkeypatch.setattr(split, "read_clip", lambda *_, **__: clip)
    backbone = SimpleNamespace(frames=2, height=8, width=8, fps=8)
    (clips,) = split.read_split("shards", backbone, None, 4)
    assert clips.notes == ["a: 3 of 9 frames repeat the last one"]


def test_damaged_test_clips_and_shards_are_named(world, tmp_path, monkeypatch):
    backbone = SimpleNamespace(frames=9, height=32, width=32, fps=8)
    shards = tmp_path / "shards"
    shutil.copytree(world / "shards", shards)
    (first, *_) = [clip_id for clips in split.read_split(shards, backbone, None, 1) for clip_id in clips.ids]
    original = split.read_clip
    monkeypatch.setattr(split, "read_clip", lambda data, *a, **k: original(b"no video", *a, **k))
    with pytest.raises(MotionRAGError, match=f"test clip {first} of {shards}: "):
        next(split.read_split(shards, backbone, None, 1))
    (tar,) = shards.glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    with pytest.raises(MotionRAGError, match=f"shard {tar} is damaged"):
        next(split.read_split(shards, backbone, None, 1))


def test_frames_that_are_not_numbers_name_the_clip():
    bad = batch("a", "b")
    bad.video[1, 0] = float("nan")
    with pytest.raises(MotionRAGError, match="clip 'b', condition motionrag, seed 3: .*NaN"):
        Scores(Metrics(makers())).add("motionrag", "all", 3, bad)


def test_seconds_are_per_clip_whatever_the_batches():
    scores = Scores(Metrics(makers()), resamples=0)
    scores.add("backbone", "all", 0, batch("a", "b", "c"), {"sampling": 1.0})
    scores.add("backbone", "all", 0, batch("d"), {"sampling": 5.0})
    assert scores.seconds() == {"backbone": {"all": {"sampling": 2.0}}}
    assert scores.table()["backbone"]["all"]["seconds_per_clip"] == 2.0


def test_a_stage_is_charged_with_what_the_gpu_still_does_for_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clips = TestClips("all", [{"id": "a"}], torch.zeros(1, 2, 3, 8, 8))
    for device, expected in (("cpu", []), ("cuda", [torch.device("cuda")])):
        Generation(SimpleNamespace(device=torch.device(device)), None, clips)._timed(waited.clear)
        assert waited == expected


def example() -> dict:
    """What evaluate writes, with round numbers: the paper's CogVideoX row."""
    rows = {
        "backbone": {
            "action_score": 59.9,
            "dino_score": 87.8,
            "fvd": 87.1,
            "seconds_per_clip": 59.4,
            "n": 1000,
        },
        "mean": {"action_score": 1.0, "dino_score": 1.0, "fvd": 1.0, "seconds_per_clip": 1.0, "n": 1000},
        "motionrag": {
            "action_score": 65.8,
            "dino_score": 89.4,
            "fvd": 80.2,
            "seconds_per_clip": 63.0,
            "n": 1000,
        },
    }
    deviation = {"action_score": {"seeds": [1.0, 2.0], "standard_deviation": 0.25}}
    seconds = {
        "backbone": {"all": {"context": 0.4, "sampling": 59.0}},
        "motionrag": {"all": {"context": 0.4, "sampling": 61.0, "retrieval": 0.5, "cama": 1.1}},
    }
    return {
        "conditions": {name: {"all": row} for name, row in rows.items()},
        "spread": {name: {"all": deviation} for name in rows},
        "differences": {"motionrag": {"all": {"fvd": {"value": -6.9, "interval": [-9.0, -5.04]}}}},
        "seconds": seconds,
    }


def test_the_papers_table(tmp_path):
    columns = ["action_score", "dino_score", "fvd", "trajectory_error", "seconds_per_clip"]
    (table,) = tables = paper_tables(example(), columns, "cogvideox")
    assert table.overhead == pytest.approx({"retrieval": 0.5, "CAMA": 1.1, "adapter": 2.0})
    write_tables(tmp_path, tables)
    markdown = (tmp_path / "table.md").read_text()
    assert "| cogvideox | 59.9 ± 0.2 | 87.8 | 87.1 | 59.40 |" in markdown
    assert "| + retrieval | 65.8 ± 0.2 | 89.4 | 80.2 | 63.00 |" in markdown
    assert "| difference | +5.9 | +1.6 | −6.9 [−9.0, −5.0] | +3.60 |" in markdown
    assert "overhead per clip: retrieval 0.500 + CAMA 1.100 + adapter 2.000 = 3.600 s" in markdown
    tex = (tmp_path / "table.tex").read_text()
    assert r"\begin{tabular}{lrrrr}" in tex and r"Action Score $\uparrow$" in tex
    assert r"difference & +5.9 & +1.6 & $-$6.9 [$-$9.0, $-$5.0] & +3.60 \\" in tex
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["cogvideox", "+ retrieval", "difference"]
    assert float(rows[2]["fvd"]) == pytest.approx(-6.9)


def test_one_condition_is_a_table_of_one_row():
    result = example()
    del result["conditions"]["motionrag"], result["conditions"]["mean"]
    (table,) = paper_tables(result, ["fvd", "seconds_per_clip"])
    assert [row.name for row in table.rows] == ["backbone"] and table.overhead == {}
