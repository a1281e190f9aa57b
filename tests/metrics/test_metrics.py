"""What the metrics promise beyond the reference's numbers."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp

from motionrag.errors import MotionRAGError
from motionrag.metrics import ActionScore, DinoScore, FrechetDistance, MotionDistance, TrajectoryError

PER_CLIP = [
    (ActionScore, (3, 7), 100.0),
    (DinoScore, (3, 4, 6), 100.0),
    (MotionDistance, (3, 2, 2, 8, 8), 0.0),
    (TrajectoryError, (3, 5, 2), 0.0),
]


@pytest.mark.parametrize(("metric", "shape", "best"), PER_CLIP)
def test_per_clip_metrics(metric, shape, best):
    torch.manual_seed(0)
    pred, target = torch.randn(shape), torch.randn(shape)
    same = metric()
    same.update(target, target, ["a", "b", "c"])
    assert same.compute().item() == pytest.approx(best, abs=1e-9)

    together, apart = metric(), metric()
    together.update(pred, target, ["a", "b", "ü/c 3"])
    for i, name in enumerate(["a", "b", "ü/c 3"]):
        apart.update(pred[i : i + 1], target[i : i + 1], [name])
    assert together.per_clip() == pytest.approx(apart.per_clip())
    values = together.per_clip()
    assert list(values) == ["a", "b", "ü/c 3"]
    assert together.compute().dtype == torch.float64
    assert together.compute().item() == pytest.approx(sum(values.values()) / 3)
    assert (together.compute() < same.compute()) == metric.higher_is_better


def test_a_clip_seen_twice_counts_once():
    metric = TrajectoryError()
    zero, one = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    metric.update(one, zero, ["a"])
    metric.update(zero, zero, ["b"])
    metric.update(zero, zero, ["b"])
    assert metric.compute().item() == pytest.approx(2**0.5 / 2)


def test_trajectory_error_is_in_pixels():
    metric = TrajectoryError()
    metric.update(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]), torch.zeros(1, 2, 2), ["a"])
    assert metric.compute().item() == pytest.approx(2.5)


@pytest.mark.parametrize(("metric", "shape", "best"), PER_CLIP)
def test_per_clip_metrics_refuse(metric, shape, best):
    x = torch.rand(shape)
    with pytest.raises(MotionRAGError, match="one shape"):
        metric().update(x, x[:2], ["a", "b", "c"])
    with pytest.raises(MotionRAGError, match="2 clip ids"):
        metric().update(x, x, ["a", "b"])
    with pytest.raises(MotionRAGError, match="no clips"):
        metric().per_clip()


def test_a_value_that_is_not_finite_names_the_clip():
    x = torch.rand(2, 5)
    x[1, 0] = torch.nan
    with pytest.raises(MotionRAGError, match="'b'"):
        ActionScore().update(x, torch.rand(2, 5), ["a", "b"])


def test_reset():
    metric = ActionScore()
    metric.update(torch.rand(1, 3), torch.rand(1, 3), ["a"])
    metric.reset()
    metric.update(torch.ones(1, 3), torch.ones(1, 3), ["b"])
    assert metric.per_clip() == pytest.approx({"b": 100.0})


def _rank(rank, store, out):
    import json

    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    score, distance = TrajectoryError(), FrechetDistance(3)
    # uneven parts, with one clip seen by both processes
    for name in (["a", "b", "shared"], ["shared", "c"])[rank]:
        score.update(torch.full((1, 2, 2), float(len(name))), torch.zeros(1, 2, 2), [name])
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(5))
    part = features[:12] if rank == 0 else features[12:]
    distance.update(part, real=True)
    distance.update(part * 2, real=False)
    result = {
        "clips": score.per_clip(),
        "mean": score.compute().item(),
        "distance": distance.compute().item(),
    }
    if rank == 0:
        with open(out, "w") as file:
            json.dump(result, file)
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    import json

    # forked: two fresh interpreters would import torch again, ten seconds on a small machine
    mp.start_processes(
        _rank, (str(tmp_path / "store"), str(tmp_path / "out.json")), nprocs=2, start_method="fork"
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert set(result["clips"]) == {"a", "b", "c", "shared"}
    assert result["mean"] == pytest.approx((1 + 1 + 1 + 6) * 2**0.5 / 4)
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(5))
    single = FrechetDistance(3)
    single.update(features, real=True)
    single.update(features * 2, real=False)
    assert result["distance"] == pytest.approx(single.compute().item())


def test_frechet_distance_of_gaussians_it_knows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    metric = FrechetDistance(4)
    metric.update(x, real=True)
    metric.update(3 * x + 1, real=False)
    # mean shift |2m + 1|^2, spread (3 - 1)^2 tr(S): exact, because one set is a linear image of the other
    expected = (2 * x.mean(0) + 1).square().sum() + 4 * x.T.cov().trace()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_equal_sets_is_not_negative():
    metric = FrechetDistance(32)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))  # fewer samples than features
    metric.update(x, real=True)
    metric.update(x, real=False)
    assert 0 <= metric.compute().item() < 1e-3


def test_frechet_distance_refuses():
    metric = FrechetDistance(4)
    with pytest.raises(MotionRAGError, match=r"\(n, 4\)"):
        metric.update(torch.rand(2, 5), real=True)
    metric.update(torch.rand(5, 4), real=True)
    metric.update(torch.rand(1, 4), real=False)
    with pytest.raises(MotionRAGError, match="at least 2 true and 2 generated samples, got 5 and 1"):
        metric.compute()
