"""What `make experiment NAME=...` would run is understood before it has trained for an hour."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from motionrag.cli import conf_dir
from motionrag.evaluation.conditions import CONDITIONS

EXPERIMENTS = sorted(Path(__file__).parents[1].glob("experiments/*/experiment.yaml"))


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
