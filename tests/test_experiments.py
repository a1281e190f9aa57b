"""What `make experiment NAME=...` would run is understood before it has trained for an hour."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from motionrag.cli import conf_dir
from motionrag.errors import MotionRAGError
from motionrag.evaluation.conditions import CONDITIONS

ALL = sorted(Path(__file__).parents[1].glob("experiments/*/experiment.yaml"))
EXPERIMENTS = [file for file in ALL if "script" not in OmegaConf.load(file)]


@pytest.fixture(scope="module")
def run():
    folder = str(EXPERIMENTS[0].parents[1])
    sys.path.insert(0, folder)
    import run

    yield run
    sys.path.remove(folder)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.parent.name)
def test_every_arm_and_training_composes(run, file):
    spec = OmegaConf.to_container(OmegaConf.load(file))
    assert spec["question"] and spec["baseline"] in spec["arms"]
    assert spec.get("worlds", {}).keys() <= spec["arms"].keys()
    weights, seen = {}, set()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for name, overrides in spec.get("trainings", {}).items():
            words = run.with_weights([*spec.get("common_training", []), *overrides], weights)
            assert compose("train", overrides=words).trainer.max_steps > 0
            weights[name] = Path(f"{len(weights)}.safetensors")
        cfg = compose("evaluate", overrides=run.with_weights(spec["common"], weights))
    for arm, overrides in spec["arms"].items():
        words = run.settled([*spec["common"], *run.with_weights(overrides, weights)])
        OverridesParser.create().parse_overrides(words)
        one = (*words, *spec.get("worlds", {}).get(arm, {}).items())
        assert one not in seen, f"{arm}: the same as another arm"
        seen.add(one)
        if changed := [word for word in words if word[0] in "+~"]:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                compose("evaluate", overrides=words)
        for key, _, value in (word.partition("=") for word in words if word not in changed):
            assert OmegaConf.select(cfg, key, default="?") != "?", f"{arm}: evaluate knows no {key}"
            assert key != "retriever" or (conf_dir() / key / f"{value}.yaml").is_file(), arm
        (condition,) = [word for word in words if word.startswith("conditions=")]
        assert condition.removeprefix("conditions=").strip("[]") in CONDITIONS, arm


def test_an_arms_own_word_counts(run):
    weights = {"a b": Path("w.safetensors")}
    assert run.with_weights(["weights.cama=trained:a b", "k=1"], weights) == [
        "weights.cama=w.safetensors",
        "k=1",
    ]
    assert run.settled(["retriever=text", "k=9", "retriever=image"]) == run.settled(
        ["k=9", "retriever=image"]
    )
    with pytest.raises(KeyError):
        run.with_weights(["weights.cama=trained:c"], weights)


@pytest.mark.parametrize("file", ALL, ids=lambda file: file.parent.name)
def test_what_lies_there_is_what_the_yaml_says(file):
    folder, spec = file.parent, OmegaConf.to_container(OmegaConf.load(file))
    results, table = json.loads((folder / "results.json").read_text()), (folder / "table.md").read_text()
    assert results["spec"] | {"conclusion": ""} == spec | {"conclusion": ""}  # words may be mended afterwards
    assert (results["question"], results["conclusion"]) == (spec["question"], spec["conclusion"])
    assert spec["question"] in table and spec["conclusion"] in table and (folder / "plot.png").is_file()
    for said in (f"`make experiment NAME={folder.name}`", f"{results['seconds']} s", "seed", "commit"):
        assert said in table, said


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.parent.name)
def test_tables_are_made_of_results_and_gates_were_passed(run, file):
    results = json.loads((file.parent / "results.json").read_text())
    assert run.markdown(results) in (file.parent / "table.md").read_text()
    if gate := results["spec"].get("gate"):
        run.check_gate(results["arms"], results["spec"]["baseline"], gate)


def test_a_run_is_named_by_all_that_it_reads(run, tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    words = [f"weights.adapter={file}", "k=9"]
    first = run.recipe_key(words)
    assert run.recipe_key(words) == first != run.recipe_key(words, {"db_clips": 9})
    moved = file.rename(tmp_path / "moved.safetensors")
    assert run.recipe_key([f"weights.adapter={moved}", "k=9"]) == first
    moved.write_bytes(b"two")
    assert run.recipe_key([f"weights.adapter={moved}", "k=9"]) != first


def test_an_incompetent_backbone_stops_an_experiment(run):
    def domain(score, error):
        return {"action_score": {"mean": score}, "trajectory_error": {"mean": error}}

    table = {"backbone": {"known": domain(30.0, 3.0), "new": domain(9.0, 6.0)}, "still": {}}
    table["still"] = {"known": domain(2.0, 5.0), "new": domain(-4.0, 6.5)}
    run.check_gate(table, "backbone", "still")
    table["still"]["new"] = domain(-4.0, 5.9)
    with pytest.raises(
        MotionRAGError, match="no better than still on new motions .path error, px 6.00 against 5.90"
    ):
        run.check_gate(table, "backbone", "still")


def test_no_such_experiment(root):
    done = subprocess.run(
        [sys.executable, "experiments/run.py", "none"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: NAME=none: no such experiment; choose from adapter, benchmark")
