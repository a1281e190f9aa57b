"""The measure of kept shapes that the tiny backbone's gate prints: it names true outlines, and not blobs."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from motionrag.data.motionworld import SHAPES, clip_stream, render

COUNT = 48


@pytest.fixture(scope="module")
def outlines():
    path = Path(__file__).parents[1] / "experiments" / "tiny_weights" / "outlines.py"
    spec = importlib.util.spec_from_file_location("outlines", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clips():
    return list(itertools.islice(clip_stream(3, {"known": 1.0, "new": 1.0}), COUNT))


@pytest.fixture(scope="module")
def last(outlines, clips):
    """Outlines of the true last frames, (B, H, W)."""
    frames = torch.from_numpy(np.stack([render(c)[-1:] for c in clips]))
    return outlines.coloured(frames.permute(0, 1, 4, 2, 3) / 127.5 - 1, clips)[:, 0]


def test_true_outlines_are_named_and_disks_are_not(outlines, clips, last):
    assert {c.looks.shape for c in clips} == set(SHAPES)
    assert outlines.named_right(last, clips) >= 0.85
    disks = torch.stack([outlines.disk(mask) for mask in last])
    circles = np.mean([c.looks.shape == "circle" for c in clips])
    assert outlines.named_right(disks, clips) == pytest.approx(circles, abs=0.05)


def test_the_fit_does_not_see_place_size_or_turn(outlines):
    one, other = (outlines.templates(side)["triangle"] for side in (64, 96))
    moved = torch.zeros(128, 128)
    moved[20:116, 5:101] = other.rot90(1, (0, 1))
    assert outlines.fit(one, moved) > 0.93
    assert outlines.fit(one, outlines.disk(moved)) < 0.8
    assert outlines.fit(one, outlines.templates()["capsule"]) < 0.8


def test_a_disk_has_the_masks_place_and_area(outlines):
    mask = torch.zeros(32, 32)
    mask[4:14, 10:24] = 1
    centre, area = outlines.place(mask)
    assert torch.allclose(centre, torch.tensor([2 * 17 / 32 - 1, 2 * 9 / 32 - 1]))
    assert area == pytest.approx(140 * 4 / 1024)
    assert outlines.disk(mask).sum() == pytest.approx(140, abs=8)
