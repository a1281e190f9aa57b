"""How well a clip shows its object's shape: the outline of its two colours, told apart among MotionWorld's shapes."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from motionrag.data.motionworld import COLOURS, SHAPES, WorldClip, shape_distance

ALIKE = {"diamond": "square"}  # a square that is turned
TURNS = 36


def coloured(video: Tensor, clips: Iterable[WorldClip]) -> Tensor:
    """Where each frame shows the object's two colours, (B, T, H, W) 0 or 1; video (B, T, 3, H, W) in [-1, 1]."""
    out = []
    for frames, clip in zip(video, clips, strict=True):
        pixels = (frames + 1) * 127.5
        near = [
            (pixels - torch.tensor(COLOURS[c]).view(3, 1, 1)).abs().amax(1) < 60 for c in clip.looks.colours
        ]
        out.append((near[0] | near[1]).float())
    return torch.stack(out)


def _line(n: int) -> Tensor:
    return (torch.arange(n) * 2 + 1) / n - 1


def place(mask: Tensor) -> tuple[Tensor, float]:
    """Centre (x, y) in [-1, 1] and area, of the picture's 4, of a mask (H, W)."""
    line, count = _line(len(mask)), mask.sum().clamp(min=1)
    centre = torch.stack([(mask.sum(0) * line).sum(), (mask.sum(1) * line).sum()]) / count
    return centre, float(count) * 4 / mask.numel()


def disk(mask: Tensor) -> Tensor:
    """A disk (H, W) of the mask's place and area: what is left once nothing of the shape is."""
    (x, y), area = place(mask)
    line = _line(len(mask))
    return ((line[None] - x) ** 2 + (line[:, None] - y) ** 2 < area / torch.pi).float()


def fit(mask: Tensor, model: Tensor) -> float:
    """Overlap (intersection over union, 0 to 1) of two outlines, `model` (M, M) moved, scaled and turned onto `mask`
    (H, H); both 0 or 1.
    """
    (centre, area), (origin, size) = place(mask), place(model)
    angle = torch.arange(TURNS) * (2 * np.pi / TURNS)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2)
    turn = turn * (size / area) ** 0.5
    theta = torch.cat([turn, (origin - turn @ centre)[..., None]], -1)
    side = 4 * len(mask)
    sample = partial(grid_sample, align_corners=False)
    there = sample(model.expand(TURNS, 1, -1, -1), affine_grid(theta, (TURNS, 1, side, side), False)) > 0.5
    here = sample(mask[None, None], affine_grid(torch.eye(2, 3)[None], (1, 1, side, side), False)) > 0.5
    return float(((there & here).sum((1, 2, 3)) / (there | here).sum((1, 2, 3)).clamp(min=1)).max())


def templates(side: int = 64) -> dict[str, Tensor]:
    """The outline of every shape, (side, side) 0 or 1; the object's half size is two thirds of the picture's."""
    u, v = np.meshgrid(_line(side).numpy() * 1.5, _line(side).numpy() * 1.5)
    return {s: torch.from_numpy(shape_distance(s, u, v) < 0).float() for s in SHAPES if s not in ALIKE}


def named_right(masks: Tensor, clips: Iterable[WorldClip]) -> float:
    """Share (0 to 1) of the masks (B, H, H), 0 or 1, that their clip's shape fits best; disks: that of circles."""
    shapes = templates()
    right = []
    for mask, clip in zip(masks, clips, strict=True):
        best = max(shapes, key=lambda shape: fit(mask, shapes[shape]))
        right.append(best == ALIKE.get(clip.looks.shape, clip.looks.shape))
    return float(np.mean(right))
