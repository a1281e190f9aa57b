"""Runs side by side: what was varied is found, numbers are those of the files, failed points are shown, clips are shared."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from omegaconf import OmegaConf
from PIL import Image

from motionrag import sweeps
from motionrag.comparison import compare, main_condition, read_runs, read_sweep, varied
from motionrag.errors import MotionRAGError
from motionrag.io import write_json
from motionrag.report import write_report


@pytest.fixture
def sweep(tmp_path):
    """Four trainings over k and the seed; the last one failed."""
    folder = tmp_path / "depth"
    points = [[f"k={k}", f"seed={seed}", "path=a"] for k in (1, 9) for seed in (0, 1)]
    assert len(sweeps.plan(folder, "train", [], points, ["k", "seed"])) == 4
    for i, (k, seed) in enumerate([(1, 0), (1, 1), (9, 0), (9, 1)]):
        run = folder / f"k={k}_seed={seed}"
        failed = i == 3
        write_json(run / "provenance.json", {"seed": seed})
        error = {"error": "no <shards> in a: pack clips first"} if failed else {}
        write_json(
            run / "state.json",
            {"state": "failed" if failed else "finished", "seconds": 3.0, "error": None, **error},
        )
        if not failed:
            write_json(run / "results.json", {"steps": 40, "metrics": {"val/loss": 0.123456789 - 0.01 * i}})
    return folder


def evaluated(folder, k, seed, score, clips=("c0", "c1")):
    """A run folder of `motionrag evaluate`, its clips pictures to be quick."""
    folder.mkdir(parents=True)
    settings = {
        "k": k,
        "seed": seed,
        "seeds": ["${seed}"],
        "run_dir": str(folder),
        "cama": {"k": "${k}"},
        "name": folder.name,
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "config.yaml", resolve=True)
    conditions = {
        "backbone": {"new": {"action_score": 10.0, "n": 2}},
        "motionrag": {"new": {"action_score": score, "n": 2}},
    }
    write_json(folder / "metrics.json", {"conditions": conditions, "settings": {}})
    rows = []
    for name in clips:
        files = {}
        for part in ("first", "truth", "backbone", "motionrag"):
            files[part] = f"{name}_{part}.png"
            Image.new("RGB", (16, 16), (k, seed, 99)).save(folder / files[part])
        outputs = {c: files[c] for c in conditions}
        rows.append(
            {"id": name, "domain": "new", "prompt": f"box {name}", "first_frame": files["first"], "truth": files["truth"],
             "outputs": outputs, "scores": {"motionrag": {"action_score": score}}}
        )  # fmt: skip
    write_json(folder / "clips.json", rows)
    return folder


class Page(HTMLParser):
    """Cells of the sortable tables, captions, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append([dict(attrs).get("data-value"), ""])
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1][1] += data.strip()


def test_a_sweep_becomes_a_table_and_plots(sweep, tmp_path):
    text = write_report([sweep], tmp_path / "page.html").read_text()
    page = Page(text)
    head, *rows = page.rows
    assert [name for _, name in head] == ["run", "k", "seed", "state", "step", "val/loss"]
    assert [[value for value, _ in row] for row in rows] == [
        ["k=1_seed=0", "1", "0", "finished", "40", repr(0.123456789)],
        ["k=1_seed=1", "1", "1", "finished", "40", repr(0.123456789 - 0.01)],
        ["k=9_seed=0", "9", "0", "finished", "40", repr(0.123456789 - 0.02)],
        ["k=9_seed=1", "9", "1", "failed", "", ""],
    ]
    assert rows[3][3][1] == "failedno <shards> in a: pack clips first" and rows[3][5][1] == "–"
    assert "4 runs (3 finished, 1 failed). Varied: k, seed." in text
    assert "Not drawn: k=9_seed=1 (failed)." in text
    assert "script" in [tag for tag, _ in page.tags]
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    assert all(a.get(k, "data:").startswith("data:") for _, a in page.tags for k in ("src", "href"))


def test_plots_hold_every_run_and_the_mean_over_seeds(sweep):
    ((parameter, _, (chart,)),) = compare("x", read_sweep(sweep), 0).plots
    (line,) = chart["lines"]
    assert parameter == "k" and [text for _, text, _ in chart["x_ticks"]] == ["1", "9"]
    assert sorted(said for *_, said in line["dots"]) == [
        "k=1_seed=0: 0.1235", "k=1_seed=1: 0.1135", "k=9_seed=0: 0.1035"
    ]  # fmt: skip
    (x, y), last = line["means"]
    dots = [at for at in line["dots"] if at[0] == x]
    assert len(dots) == 2 and y == pytest.approx(sum(at[1] for at in dots) / 2, abs=0.1)
    assert last == line["dots"][2][:2] and line["points"] == f"{x},{y} {last[0]},{last[1]}"


def test_evaluations_are_compared_with_their_clips(tmp_path):
    runs = [evaluated(tmp_path / name, k, seed, score, clips)
            for name, k, seed, score, clips in [("a", 1, 0, 20.25, ("c0", "c1")), ("b", 9, 1, 30.5, ("c1", "c2"))]]  # fmt: skip
    comparison = compare("both", read_runs(runs), 4)
    assert [(h.text, h.small) for h in comparison.headings] == [
        ("run", ""), ("k", ""), ("seed", ""), ("state", ""),
        ("Action Score ↑", "without retrieval"), ("Action Score ↑", "with retrieval"),
    ]  # fmt: skip
    values = [[cell.value for cell in cells] for _, cells in comparison.rows]
    assert values == [
        ["a", "1", "0", "finished", "10.0", "20.25"],
        ["b", "9", "1", "finished", "10.0", "30.5"],
    ]
    assert [cells[-1].best for _, cells in comparison.rows] == [False, True]
    ((parameter, _, (chart,)),) = comparison.plots
    assert parameter == "k" and [line["label"] for line in chart["lines"]] == [
        "without retrieval",
        "with retrieval",
    ]
    assert comparison.shared_clips == 1
    (row,) = comparison.clips
    assert row.id == "c1"
    assert [(f.label, f.details) for f in row.outputs] == [
        ("truth", ()), ("k 1, seed 0", ("Action Score 20.2",)), ("k 9, seed 1", ("Action Score 30.5",)),
    ]  # fmt: skip
    assert row.outputs[1].uri != row.outputs[2].uri

    text = write_report(runs, tmp_path / "page.html").read_text()
    assert text.index("The same clips in all runs") < text.index("<h2>a</h2>") < text.index("<h2>b</h2>")
    alone = write_report(runs[:1], tmp_path / "alone.html").read_text()
    assert "<script" not in alone and 'class="runs"' not in alone and "Side by side" in alone


def test_what_was_varied():
    a = {"backbone.name": "svd", "backbone.path": "x", "backbone.frames": "16", "module.backbone.name": "svd", "lr": "0.1",
         "cama.width": "64", "cama.ff_dim": "64", "weights": "runs/a/last.safetensors", "logger.csv.save_dir": "1",
         "out": "1", "callbacks.best.dirpath": "1", "data.seed": "1", "name": "a", "same": "1"}  # fmt: skip
    b = {**{key: value + "2" for key, value in a.items()}, "lr": "0.1", "same": "1", "only": "here"}
    b |= {"weights": "runs/b/last.safetensors"}
    assert varied([a, b]) == {
        "backbone.name": ["svd", "svd2"],
        "cama.width = cama.ff_dim": ["64", "642"],
        "weights": ["a", "b"],
        "only": [None, "here"],
    }
    assert varied([a, a]) == {}
    stages = [{"m._target_": "x.Adapter", "m.lr": "1"}, {"m._target_": "x.CAMA", "m.lr": "2", "m.depth": "4"}]
    assert varied(stages) == {"m._target_": ["Adapter", "CAMA"], "m.lr": ["1", "2"]}  # only CAMA has a depth
    deeper = {**stages[1], "m.depth": "8"}
    assert varied([*stages, deeper])["m.depth"] == [None, "4", "8"]


def test_words_stand_apart_and_wide_ranges_are_logarithmic(tmp_path):
    runs = read_runs([evaluated(tmp_path / str(i), i, 0, 10.0 + i) for i in range(3)])
    for run, lr, fusion in zip(runs, ("1e-5", "1e-4", "1e-3"), ("mean", "top1", "null"), strict=True):
        run.parameters = {"fusion": fusion, "lr": lr}
    ((parameter, legend, (by_lr,)),) = compare("x", runs, 0).plots
    assert parameter == "lr" and "cannot tell which mattered: fusion." in legend
    for run in runs:
        del run.parameters["lr"]
    ((_, _, (by_fusion,)),) = compare("x", runs, 0).plots
    (left, *_), (middle, *_), (right, *_) = by_lr["x_ticks"]
    assert middle - left == pytest.approx(right - middle)
    assert [text for _, text, _ in by_fusion["x_ticks"]] == ["mean", "top1", "null"]
    assert not any(line["points"] for line in by_fusion["lines"])  # words have no order to draw a line along


def test_lines_go_through_one_setting_of_everything_else(tmp_path):
    runs = read_runs([evaluated(tmp_path / str(i), i, 0, 10.0 + i) for i in range(4)])
    for run, (k, fusion) in zip(
        runs, [("1", "cama"), ("9", "cama"), ("9", "mean"), ("9", "top1")], strict=True
    ):
        run.parameters = {"k": k, "fusion": fusion}
        run.metrics = {
            metric: value for metric, value in run.metrics.items() if metric.condition == "motionrag"
        }
    (_, _, (by_k,)), (_, _, (by_fusion,)) = compare("x", runs, 0).plots
    assert {line["label"]: (bool(line["points"]), len(line["dots"])) for line in by_k["lines"]} == {
        "fusion cama": (True, 2), "other settings": (False, 2),
    }  # fmt: skip
    assert [line["label"] for line in by_fusion["lines"]] == ["other settings", "k 9"]


def test_conditions_that_were_run_one_by_one_are_what_was_varied(tmp_path):
    runs = [evaluated(tmp_path / name, 9, 0, 10.0) for name in ("backbone", "motionrag")]
    for run in runs:
        record = json.loads((run / "metrics.json").read_text())
        write_json(run / "metrics.json", {**record, "conditions": {run.name: record["conditions"][run.name]}})
    comparison = compare("x", read_runs(runs), 0)
    assert [h.text for h in comparison.headings] == ["run", "condition", "seed", "state", "Action Score ↑"]
    assert [cells[1].text for _, cells in comparison.rows] == ["without retrieval", "with retrieval"]


def test_main_condition():
    assert main_condition(["backbone", "motionrag", "mean"]) == "motionrag"
    assert main_condition(["backbone", "mean"]) == "mean" and main_condition(["backbone"]) == "backbone"


def test_damaged_runs(sweep, tmp_path):
    runs = [evaluated(tmp_path / name, 1, 0, 5.0) for name in "ab"]
    clips = json.loads((runs[1] / "clips.json").read_text())
    (runs[1] / "clips.json").write_text(json.dumps([{**clips[0], "outputs": {}}]))
    with pytest.raises(MotionRAGError, match="clip c0 lacks"):
        compare("x", read_runs(runs), 4)
    (runs[1] / "config.yaml").write_text("a: [")
    with pytest.raises(MotionRAGError, match="config.yaml is no config"):
        read_runs(runs)
    (sweep / "sweep.json").write_text("{}")
    with pytest.raises(MotionRAGError, match="is no sweep"):
        write_report([sweep], tmp_path / "page.html")
