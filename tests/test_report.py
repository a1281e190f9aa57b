"""The page: everything inside it, true to the numbers, and clear errors for folders that are none."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from motionrag.data.video import write_mp4
from motionrag.errors import MotionRAGError
from motionrag.report import chart, metric_table, write_report

CONDITIONS = {
    "backbone": {
        "known": {
            "action_score": 17.4,
            "dino_score": 61.0,
            "trajectory_error": 4.1,
            "seconds_per_clip": 0.52,
            "n": 20,
        },
        "new": {
            "action_score": 14.4,
            "dino_score": 60.2,
            "trajectory_error": 6.56,
            "seconds_per_clip": 0.52,
            "n": 20,
        },
    },
    "motionrag": {
        "known": {
            "action_score": 29.1,
            "dino_score": 63.4,
            "trajectory_error": 3.2,
            "seconds_per_clip": 0.55,
            "n": 20,
        },
        "new": {
            "action_score": 32.8,
            "dino_score": 60.1,
            "trajectory_error": 3.75,
            "seconds_per_clip": 0.55,
            "n": 20,
        },
    },
    "oracle": {
        "known": {"action_score": 33.0, "dino_score": 64.9, "trajectory_error": 2.5, "n": 20},
        "new": {"action_score": 36.8, "dino_score": 64.0, "trajectory_error": 2.9, "n": 20},
    },
}


def moving_square(path, size=32, step=2, colour=(220, 90, 60)):
    frames = np.full((9, size, size, 3), 235, np.uint8)
    for t, frame in enumerate(frames):
        frame[10:20, 2 + t * step : 12 + t * step] = colour
        frame[10:20, 2 + t * step : 7 + t * step] = (60, 80, 160)
    write_mp4(path, frames, fps=8)
    return frames


def make_run(folder, clips=6, conditions=CONDITIONS):
    """A run folder as evaluate writes it."""
    rows = []
    for i in range(clips):
        name = f"c{i}"
        truth = moving_square(folder / f"clips/{name}_truth.mp4", step=2)
        Image.fromarray(truth[0]).save(folder / f"clips/{name}_first.png")
        outputs = {}
        for j, condition in enumerate(conditions):
            outputs[condition] = f"clips/{name}_{condition}.mp4"
            moving_square(folder / outputs[condition], step=j)
        references = []
        for k in range(4):
            file = f"clips/{name}_ref{k}.mp4"
            moving_square(folder / file, colour=(40 * k, 160, 90))
            caption = "slides to the right at an even pace"
            references.append(
                {
                    "id": f"r{k}",
                    "caption": "a green box",
                    "motion_caption": caption,
                    "score": 0.9 - k / 10,
                    "clip": file,
                }
            )
        rows.append(
            {
                "id": name,
                "domain": "known" if i % 2 else "new",
                "prompt": f"a red & blue box <slides> right, number {i}",
                "motion_prompt": "slides right",
                "first_frame": f"clips/{name}_first.png",
                "references": references,
                "outputs": outputs,
                "truth": f"clips/{name}_truth.mp4",
                "scores": {
                    c: {"action_score": 20.0 + j, "trajectory_error": 3.5} for j, c in enumerate(conditions)
                },
            }
        )
    (folder / "clips.json").write_text(json.dumps(rows))
    metrics = {
        "conditions": conditions,
        "settings": {"k": 9, "steps": 25, "guidance": 3.0, "weights": "shipped"},
        "notes": ["Networks never saw the new motions."],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "provenance.json").write_text(
        json.dumps(
            {
                "argv": ["motionrag", "evaluate"],
                "date": "2026-01-01T00:00:00+00:00",
                "seed": 0,
                "git": {"commit": "0123abc", "dirty": True},
                "versions": {"torch": "2.13.0"},
                "python": "3.11",
                "platform": "Linux",
            }
        )
    )
    return folder


def make_training(folder, steps=1000):
    folder.mkdir(parents=True)
    lines = ["epoch,step,train_loss_step,val_loss"]
    for i in range(steps):
        lines.append(f"0,{i},{1 / (1 + i / 50) + 0.05 * ((i * 7) % 5):.5f},")
        if i % 200 == 199:
            lines.append(f"0,{i},,{1.1 / (1 + i / 50) + 0.1:.5f}")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


class Page(HTMLParser):
    """Tags, sources and balance of a page."""

    VOID = {"meta", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text, self.tags = [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_self_contained_and_complete(tmp_path):
    run = make_run(tmp_path / "run")
    make_training(run / "train" / "adapter" / "version_0")
    out = write_report([run], tmp_path / "deep" / "page.html", title="A title", max_clips=4)
    page = Page(out.read_text())
    text = " ".join(page.text)
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"(https?:|//)\w+\.", re.sub(r"data:[^\"]+", "", out.read_text()))
    assert "script" not in page.tags
    # 4 rows of 3 references, 3 conditions and the truth; one first frame each
    assert page.tags.count("video") == 4 * 7 and page.tags.count("img") == 4
    assert page.tags.count("svg") == 1
    for shown in (
        "A title",
        "without retrieval",
        "with retrieval",
        "a red & blue box <slides> right, number 0",
        "looked up: slides right",
        "similarity 0.90",
        "Action Score 21.0",
        "32.8",
        "+18.4",
        "4 of 6 test clips",
        "Networks never saw the new motions.",
        "0123abc with uncommitted changes",
        "train / adapter",
    ):
        assert shown in text, shown


def test_rows_are_shared_between_domains(tmp_path):
    run = make_run(tmp_path / "run", clips=6)
    text = write_report([run], tmp_path / "page.html", max_clips=2).read_text()
    assert "New motions" in text and "Known motions" in text


def test_several_runs(tmp_path):
    runs = [make_run(tmp_path / "first", clips=1), make_training(tmp_path / "second" / "csv").parent]
    page = Page(write_report(runs, tmp_path / "page.html").read_text())
    assert {"first", "second"} <= set(page.text)


def test_metric_table():
    table = metric_table(CONDITIONS, {"motionrag": "ours"})
    assert table.domains == [("known, 20 clips", 4), ("new, 20 clips", 4)]
    assert [label for label, _ in table.rows] == ["backbone", "ours", "oracle"]
    ours = dict(zip(table.columns[4:], table.rows[1][1][4:], strict=True))
    assert ours["Action Score ↑"].difference == "+18.4" and ours["Action Score ↑"].verdict == "better"
    assert ours["Path error, px ↓"].difference == "−2.81" and ours["Path error, px ↓"].verdict == "better"
    assert ours["DINO score ↑"].verdict == "worse" and not ours["DINO score ↑"].best
    assert ours["s per clip"].difference == ""
    assert [row[1][4].best for row in table.rows] == [False, False, True]
    assert table.rows[2][1][3].text == "–"  # oracle has no time


def test_unknown_metrics_and_conditions_are_shown(tmp_path):
    conditions = {"backbone": {"all": {"sharpness": 1.5}}, "k_3": {"all": {"sharpness": 2.5}}}
    table = metric_table(conditions, {})
    assert table.columns == ["sharpness"] and table.rows[1][0] == "k 3"
    assert not table.rows[1][1][0].best  # nobody said whether more is better


@pytest.mark.parametrize(
    "points", [[(0, 1.0)], [(0, 2.0), (1, 2.0)], [(5, 0.0), (5, 0.0)], [(i, -1e-6 * i) for i in range(5000)]]
)
def test_charts_of_odd_series(points):
    drawn = chart({"train_loss": points}, "x")
    numbers = [float(v) for v in re.split("[ ,]", drawn["lines"][0]["points"])]
    assert all(0 <= x <= 560 for x in numbers[::2]) and all(0 <= y <= 220 for y in numbers[1::2])
    assert len(numbers) <= 600 and 2 <= len(drawn["y_ticks"]) <= 8


def test_diverged_steps_are_left_out_of_curves(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,train_loss\n0,1.0\n1,nan\n2,0.5\n")
    assert "1 → 0.5" in write_report([folder], tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: (run / "clips.json").unlink(), "clips.json is missing"),
        (
            lambda run: (run / "metrics.json").unlink(),
            "is no run folder: expected metrics.json and clips.json",
        ),
        (lambda run: (run / "metrics.json").write_text("{"), "metrics.json is no JSON"),
        (lambda run: (run / "metrics.json").write_text("{}"), 'expected {"conditions"'),
        (
            lambda run: (run / "clips/c0_truth.mp4").unlink(),
            "clips.json names clips/c0_truth.mp4, which is missing",
        ),
        (
            lambda run: (run / "clips/c0_truth.mp4").write_bytes(b"no"),
            "c0_truth.mp4 is no readable picture or clip",
        ),
        (lambda run: (run / "clips.json").write_text('[{"id": "x"}]'), "clip x has no 'outputs'"),
        (
            lambda run: (run / "metrics.csv").write_text("step,loss\n1,x\n"),
            "metrics.csv, line 2: expected numbers",
        ),
    ],
)
def test_damaged_runs(tmp_path, damage, expected):
    run = make_run(tmp_path / "run", clips=1)
    damage(run)
    with pytest.raises(MotionRAGError, match=re.escape(expected)):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_command(tmp_path, motionrag):
    make_run(tmp_path / "a run, (1)", clips=1)
    done = motionrag("report", "a run, (1)", "title=Hello, you")
    assert done.returncode == 0, done.stderr
    assert "<title>Hello, you</title>" in (tmp_path / "a run, (1)" / "report.html").read_text()
    done = motionrag("report", "nowhere")
    assert done.returncode == 2 and done.stderr.startswith("error: no run folder nowhere")


def test_unfinished_runs_are_left_out_and_named(tmp_path, motionrag):
    for name in ("a", "c"):
        make_run(tmp_path / name, clips=1)
    (tmp_path / "b/clips").mkdir(parents=True)
    (tmp_path / "b/provenance.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("of mine")
    said = "left out b: it has not finished"
    done = motionrag("report", "b", "a", "c", "notes.txt", "out=page.html")
    assert done.returncode == 0 and "report: 2 runs -> page.html" in done.stdout
    assert said in done.stderr and "left out notes.txt: it is a file, not a run folder" in done.stderr
    text = (tmp_path / "page.html").read_text()
    assert said in text and "These runs" in text
    done = motionrag("report", "notes.txt", "a")
    assert done.returncode == 0 and (tmp_path / "a" / "report.html").is_file()
    (tmp_path / "d").mkdir()
    done = motionrag("report", "b", "d", "out=none.html")
    assert done.returncode == 2 and done.stderr.startswith("error: b is no run folder: expected metrics.json")
    assert not (tmp_path / "none.html").exists()
    done = motionrag("report", "a", "nowhere", "out=none.html")
    assert done.returncode == 2 and done.stderr.startswith("error: no run folder nowhere")
