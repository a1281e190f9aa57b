"""The metrics against the reference's numbers."""

import torch

from motionrag.metrics import ActionScore, DinoScore, FrechetDistance, MotionDistance


def ids(values):
    """A name for every row."""
    return [f"clip{i}" for i in range(len(values))]


def per_clip(metric):
    """The metric's values by clip as a tensor."""
    return torch.tensor(list(metric.per_clip().values()))


def test_metric_action_score(case):
    pred, target = case["in.pred_logits"], case["in.target_logits"]
    metric = ActionScore()
    half = len(pred) // 2
    for rows in (slice(0, half), slice(half, None)):
        metric.update(pred[rows], target[rows], ids(pred)[rows])
    case.check(score=metric.compute(), per_sample=per_clip(metric))


def test_metric_dino_score(case):
    pred, target = case["in.features1"], case["in.features2"]
    metric = DinoScore()
    metric.update(pred, target, ids(pred))
    case.check(score=metric.compute(), per_video=per_clip(metric))


def test_metric_motion_distance(case):
    pred, target = case["in.pred_flow"], case["in.target_flow"]
    metric = MotionDistance(bins=case.constructor["hist_bins"])
    metric.update(pred, target, ids(pred))
    case.check(pred_hist=metric.histogram(pred), target_hist=metric.histogram(target))
    case.check(kl_per_video=per_clip(metric), motion_distance=metric.compute())


def test_metric_frechet_distance(case):
    real, fake = case["in.real_features"], case["in.fake_features"]
    metric = FrechetDistance(num_features=case.constructor["d"])
    for rows in real.chunk(2):
        metric.update(rows, real=True)
    metric.update(fake, real=False)
    case.check(distance=metric.compute())
