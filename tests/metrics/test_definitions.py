"""Each metric's definition on clips whose value is known, and what all metrics refuse."""

from __future__ import annotations

import itertools

import pytest
import torch

from motionrag.errors import MotionRAGError
from motionrag.metrics import (
    FID,
    FVD,
    ActionScore,
    ClipBatch,
    ClipTextScore,
    ClipVideoScore,
    DinoScore,
    DynamicDegree,
    MotionArrival,
    MotionDistance,
    MotionSmoothness,
    SubjectConsistency,
    TrajectoryError,
)


def means(video):
    """An extractor: mean colour of every frame, (B, T, 3)."""
    return video.mean(dim=(-2, -1))


class Texts:
    """An extractor with text embeddings."""

    def __call__(self, video):
        return means(video)

    def text(self, prompts):
        return torch.tensor(
            [[float(word == prompt) for word in ("red", "green", "blue")] for prompt in prompts]
        )


def flow(video):
    """An extractor: everything moves by its brightness in x."""
    x = video[:, 1:].mean(dim=2, keepdim=True) * 8
    return torch.cat([x, torch.zeros_like(x)], dim=2)


def middles(video):
    """An extractor: the mean of both neighbours."""
    return (video[:, :-2:2] + video[:, 2::2]) / 2


METRICS = {
    "ActionScore": lambda: ActionScore(lambda video: means(video).flatten(1)),
    "ClipTextScore": lambda: ClipTextScore(Texts()),
    "ClipVideoScore": lambda: ClipVideoScore(means),
    "DinoScore": lambda: DinoScore(means),
    "DynamicDegree": lambda: DynamicDegree(flow),
    "FID": lambda: FID(3, means),
    "FVD": lambda: FVD(3, lambda video: means(video).mean(dim=1)),
    "MotionArrival": lambda: MotionArrival(),
    "MotionDistance": lambda: MotionDistance(extractor=flow),
    "MotionSmoothness": lambda: MotionSmoothness(middles),
    "SubjectConsistency": lambda: SubjectConsistency(means),
    "TrajectoryError": lambda: TrajectoryError(lambda video: means(video)[..., :2]),
}


def make_batch(count: int = 4, frames: int = 5, seed: int = 0) -> ClipBatch:
    """Random clips with every field."""
    generator = torch.Generator().manual_seed(seed)
    video, truth = torch.rand(2, count, frames, 3, 8, 8, generator=generator) * 2 - 1
    tokens, target = torch.randn(2, count, 4, 6, generator=generator)
    ids = [f"clip {i}" for i in range(count)]
    return ClipBatch(ids, video, truth, ["red"] * count, truth[:, 0], tokens, target)


@pytest.mark.parametrize("name", METRICS)
def test_all_metrics_are_driven_alike(name):
    batch, metric, apart = make_batch(), METRICS[name](), METRICS[name]()
    metric.add(batch)
    for i in (2, 0, 3, 1, 0):  # another order, one by one, one of them twice
        one = {key: getattr(batch, key)[i : i + 1] for key in ("ids", *metric.needs)}
        apart.add(ClipBatch(**({"video": batch.video[i : i + 1]} | one)))
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == apart.compute().item()  # to the last bit
    assert type(metric.higher_is_better) is bool
    ids, value = metric.statistic()
    assert ids == batch.ids
    assert value(torch.arange(4)) == metric.compute().item()
    assert value(torch.tensor([0, 0, 1, 2])) != value(torch.arange(4)) or name == "DynamicDegree"


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("name", METRICS)
def test_all_metrics_refuse_alike(name):
    metric, batch = METRICS[name](), make_batch()
    for field in metric.needs:
        lacking = make_batch()
        setattr(lacking, field, None)
        with pytest.raises(MotionRAGError, match=rf"^{name}: needs {field}, which these clips do not have"):
            metric.add(lacking)
        if field != "prompts":
            broken = make_batch()
            getattr(broken, field)[2, -1] = torch.nan
            with pytest.raises(MotionRAGError, match=rf"^{name}, clip 'clip 2': {field} holds NaN"):
                metric.add(broken)
        short = make_batch()
        setattr(short, field, getattr(short, field)[:3])
        with pytest.raises(MotionRAGError, match=rf"^{name}: 4 clip ids but 3 entries in {field}"):
            metric.add(short)
    with pytest.raises(MotionRAGError, match=name):
        metric.compute()  # nothing was added by all that
    if name != "MotionArrival":
        metric.extractor = None
        with pytest.raises(MotionRAGError, match=rf"^{name}: add needs an extractor"):
            metric.add(batch)


@pytest.mark.parametrize("name", ["DinoScore", "ClipVideoScore", "TrajectoryError", "MotionDistance"])
def test_clips_of_other_length_than_the_true_ones(name):
    batch = make_batch()
    batch.truth = batch.truth[:, :-1]
    with pytest.raises(MotionRAGError, match=rf"^{name}, clips 'clip 0' to 'clip 3': .*one shape"):
        METRICS[name]().add(batch)


def test_a_list_of_clips_of_unequal_length():
    with pytest.raises(
        MotionRAGError, match="clip 'b': its video has shape .3, 3, 2, 2., that of 'a' .4, 3, 2, 2."
    ):
        ClipBatch(["a", "b"], [torch.zeros(4, 3, 2, 2), torch.zeros(3, 3, 2, 2)])
    metric = FID(3, means)
    metric.add(make_batch(frames=5))
    with pytest.raises(MotionRAGError, match="FID, clip 'clip 0': 4 samples, earlier clips have 5"):
        metric.add(make_batch(frames=4))


def test_pixels_must_be_floats_in_their_range():
    batch = make_batch()
    batch.video[1] *= 255
    with pytest.raises(MotionRAGError, match=r"DinoScore, clip 'clip 1': video reaches 2.*\[-1, 1\]"):
        DinoScore(means).add(batch)
    batch.video = batch.video.byte()
    with pytest.raises(MotionRAGError, match="DinoScore, clips .*float, got .*uint8"):
        DinoScore(means).add(batch)


def test_features_that_are_not_finite_name_metric_and_clip():
    bad = torch.rand(2, 5, 2, 4, 4)
    bad[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(MotionRAGError, match="^DynamicDegree: the value of clip 'b' is not finite"):
        DynamicDegree().update(bad, ["a", "b"])
    with pytest.raises(MotionRAGError, match="^FVD: the value of clip 'b' is not finite"):
        FVD(2).update(torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), real=True, clip_ids=["a", "b"])
    with pytest.raises(MotionRAGError, match="^MotionSmoothness: the value of clip 'a' is not finite"):
        MotionSmoothness().update(torch.zeros(1, 0, 3, 2, 2), torch.zeros(1, 0, 3, 2, 2), ["a"])


def test_a_result_that_is_not_finite_is_never_returned():
    metric = TrajectoryError()
    metric.update(torch.ones(2, 1, 2), torch.zeros(2, 1, 2), ["a", "b"])
    metric.values[0][1] = torch.nan
    with pytest.raises(MotionRAGError, match="^TrajectoryError: the result is nan"):
        metric.compute()


def test_features_of_the_true_clips_are_made_once():
    calls = []

    def counting(video):
        calls.append(video)
        return means(video)

    batch = make_batch()
    for video in (batch.video, batch.video.flip(0)):
        again = batch.with_video(video)
        for metric in (DinoScore(counting), ClipVideoScore(counting)):
            metric.add(again)
    assert len(calls) == 3  # two ways to generate, one truth
    assert again.motion_tokens is None


def test_clip_text_score():
    video = torch.zeros(1, 2, 3, 4, 4)
    video[:, 0, 0], video[:, 1, 1] = 1, 1  # a red frame, a green one
    metric = ClipTextScore(Texts())
    metric.add(ClipBatch(["a"], video, prompts=["red"]))
    assert metric.compute().item() == pytest.approx(50)


def test_subject_consistency():
    frames = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]])
    metric = SubjectConsistency()
    metric.update(frames, torch.tensor([[0.0, 2.0]]), ["a"])
    # frame 1: 1 to the picture, 0 to frame 0; frame 2: -1 counts 0, twice
    assert metric.compute().item() == pytest.approx(100 * (1 + 0 + 0 + 0) / 4)


def test_dynamic_degree():
    """64 px: a pair moves above 1.5 px, a clip of 9 frames with 2 moving pairs."""
    still, moves, large = (torch.zeros(1, 8, 2, 64, 64) for _ in range(3))
    still[:, :, 0, :10, :20], still[:, 0, 0] = 1.4, 9  # one moving pair, the others below
    moves[:, :2, 1, :10, :21] = 1.6  # 5.1 % of the picture
    large[:, :2, 1, :10, :18] = 1.6  # 4.4 %: the mean over 5 % is below
    metric = DynamicDegree()
    metric.update(torch.cat([still, moves, large]), ["still", "moves", "small"])
    assert metric.per_clip() == {"still": 0, "moves": 100, "small": 0}
    slow = DynamicDegree()
    slow.update(moves, ["moves"], fps=4)  # frames twice as far apart: 3 px are needed
    assert slow.compute().item() == 0
    seen = []
    fast = DynamicDegree(lambda video: seen.append(video.shape[1]) or flow(video))
    fast.add(ClipBatch(["a"], torch.zeros(1, 9, 3, 8, 8), fps=24))
    assert seen == [3]  # every third frame


def test_motion_smoothness():
    video = torch.linspace(-1, 1, 5)[None, :, None, None, None].expand(1, 5, 3, 2, 2).clone()
    metric = MotionSmoothness(middles)
    metric.add(ClipBatch(["even"], video))
    video[:, 1] += 0.5
    metric.add(ClipBatch(["jerk"], video))
    assert metric.per_clip() == pytest.approx({"even": 100, "jerk": 100 * (1 - 0.5 / 2 / 2)})


def test_motion_arrival():
    metric = MotionArrival()
    tokens = torch.eye(2)[None]
    metric.update(torch.cat([tokens, tokens]), torch.cat([3 * tokens, tokens.flip(1)]), ["all", "none"])
    assert metric.per_clip() == {"all": 100, "none": 0}


@pytest.mark.parametrize(("metric", "shapes"), [
    (ClipTextScore, ((2, 3, 4), (2, 5))), (SubjectConsistency, ((2, 1, 4), (2, 4))),
])  # fmt: skip
def test_shapes_that_do_not_fit(metric, shapes):
    with pytest.raises(MotionRAGError, match=f"{metric.__name__}, clips 'a' to 'b': expected frames"):
        metric().update(*(torch.rand(shape) for shape in shapes), ["a", "b"])


def test_all_pairs_of_ids_stay_apart():
    """Ids of one character, of many bytes, and a prefix of another."""
    ids = ["a", "aa", "ü" * 128, "a/b c.mp4"]
    metric = TrajectoryError()
    for clip_id, _ in itertools.product(ids, range(2)):
        metric.update(torch.rand(1, 2, 2), torch.rand(1, 2, 2), [clip_id])
    assert list(metric.per_clip()) == ids
    with pytest.raises(MotionRAGError, match="257 bytes"):
        metric.update(torch.rand(1, 2, 2), torch.rand(1, 2, 2), ["x" * 257])
