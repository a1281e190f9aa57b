"""The metrics against numbers of the reference code."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from motionrag.metrics import ActionScore, DinoScore, FrechetDistance, MotionDistance

FOLDER = Path(
    os.environ.get("MOTIONRAG_PARITY_DIR", Path(__file__).resolve().parents[3] / "shared" / "parity")
)


@pytest.fixture
def case(request):
    """Manifest entry and tensors of one case."""
    from safetensors.torch import load_file

    manifest = FOLDER / "manifest.json"
    if not manifest.is_file():
        pytest.skip(f"no reference numbers in {FOLDER}; set MOTIONRAG_PARITY_DIR")
    cases = {entry["case"]: entry for entry in json.loads(manifest.read_text())["cases"]}
    entry = cases[request.param]
    tensors = {}
    for file in entry["files"]:
        tensors |= load_file(FOLDER / file)
    return entry, tensors


def check(case, name, actual):
    entry, tensors = case
    expected = tensors[name].double()
    tolerance = entry["tolerance"]
    actual = torch.as_tensor(actual, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance["rtol"], atol=tolerance["atol"][name])


def ids(n):
    return [f"clip{i}" for i in range(n)]


@pytest.mark.parametrize("case", ["metric_action_score"], indirect=True)
def test_action_score(case):
    pred, target = case[1]["in.pred_logits"], case[1]["in.target_logits"]
    metric, names = ActionScore(), ids(len(pred))
    metric.update(pred[:2], target[:2], names[:2])
    metric.update(pred[2:], target[2:], names[2:])
    check(case, "out.score", metric.compute())
    check(case, "out.per_sample", list(metric.per_clip().values()))


@pytest.mark.parametrize("case", ["metric_dino_score"], indirect=True)
def test_dino_score(case):
    pred, target = case[1]["in.features1"], case[1]["in.features2"]
    metric = DinoScore()
    metric.update(pred, target, ids(len(pred)))
    check(case, "out.score", metric.compute())
    check(case, "out.per_video", list(metric.per_clip().values()))


@pytest.mark.parametrize("case", ["metric_motion_distance"], indirect=True)
def test_motion_distance(case):
    pred, target = case[1]["in.pred_flow"], case[1]["in.target_flow"]
    metric = MotionDistance(bins=case[0]["constructor"]["hist_bins"])
    metric.update(pred, target, ids(len(pred)))
    check(case, "out.pred_hist", metric.histogram(pred))
    check(case, "out.target_hist", metric.histogram(target))
    check(case, "out.kl_per_video", list(metric.per_clip().values()))
    check(case, "out.motion_distance", metric.compute())


@pytest.mark.parametrize("case", ["metric_frechet_distance"], indirect=True)
def test_frechet_distance(case):
    real, fake = case[1]["in.real_features"], case[1]["in.fake_features"]
    metric = FrechetDistance(num_features=case[0]["constructor"]["d"])
    metric.update(real[:10], real=True)
    metric.update(real[10:], real=True)
    metric.update(fake, real=False)
    check(case, "out.distance", metric.compute())
    assert metric.counts == tuple(case[0]["constructor"]["n"])
