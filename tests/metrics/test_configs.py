"""Every file of conf/metrics: it composes, builds and measures what its name says."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

import motionrag.metrics
from motionrag.cli import conf_dir
from motionrag.metrics import ClipBatch, ClipMetric

FILES = sorted(path.stem for path in (conf_dir() / "metrics").glob("*.yaml"))
# what runs without anything fetched
OFFLINE = [name for name in FILES if name.endswith("_tiny")] + ["motion_arrival", "trajectory_error"]


def read(name):
    """What one file says of its metric."""
    (config,) = OmegaConf.load(conf_dir() / "metrics" / f"{name}.yaml").values()
    return config


def test_every_metric_has_a_config_and_every_config_a_metric():
    abstract = {"ClipMetric", "PerClipMetric", "FrechetDistance"}
    classes = {name for name in motionrag.metrics.__all__ if name not in abstract | {"ClipBatch"}}
    assert {read(name)._target_ for name in FILES} == {f"motionrag.metrics.{name}" for name in classes}
    for name in FILES:
        keys = list(OmegaConf.load(conf_dir() / "metrics" / f"{name}.yaml"))
        assert keys == [name.removesuffix("_tiny")]


@pytest.mark.parametrize("name", [name for name in FILES if f"{name}_tiny" in FILES])
def test_tiny_differs_only_in_what_it_looks_through(name):
    full, tiny = read(name), read(f"{name}_tiny")
    assert full._target_ == tiny._target_
    assert full.keys() == tiny.keys()
    for config in (full, tiny):
        get_class(config.extractor._target_)


def test_all_that_run_offline():
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose(overrides=[f"+metrics=[{','.join(OFFLINE)}]"]).metrics
    assert len(config) == len(OFFLINE)
    metrics = instantiate(config)
    generator = torch.Generator().manual_seed(0)
    video, truth = torch.rand(2, 3, 9, 3, 32, 32, generator=generator) * 2 - 1
    tokens = torch.rand(2, 3, 4, 8, generator=generator)
    batch = ClipBatch(["a", "b", "c"], video, truth, None, truth[:, 0], *tokens)
    for name, metric in metrics.items():
        assert isinstance(metric, ClipMetric)
        metric.add(batch)
        assert metric.compute().isfinite(), name
    # networks and features are shared: the true clips went through DINOv2 once for three metrics
    assert sum(type(key[0]).__name__ == "FrameFeatures" for key in batch._shared) == 2  # true clips, pictures


@pytest.mark.parametrize("name", ["fvd", "fid", "motion_distance", "dynamic_degree", "motion_smoothness"])
def test_missing_weights_are_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InstantiationException, match=r"torchscript file weights/.*no such file; docs/metrics\.md"
    ):
        instantiate(read(name))


def test_the_docs_name_every_metric_and_their_example_runs():
    text = (conf_dir().parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in FILES if f"| `{name.removesuffix('_tiny')}` |" not in text] == []
    source = next(part for part in text.split("```python")[1:] if "class Brightness" in part).split("```")[0]
    names = {name: getattr(motionrag.metrics, name) for name in ("ClipBatch", "PerClipMetric")}
    names |= {"Tensor": torch.Tensor, "Sequence": Sequence}
    exec(textwrap.dedent(source), names)
    metric = names["Brightness"](lambda video: video.mean(dim=(-2, -1)))
    metric.add(ClipBatch(["a", "b"], torch.stack([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)])))
    assert metric.compute().item() == 0.5
