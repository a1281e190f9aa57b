"""Optical flow without a network: pyramidal Lucas-Kanade, and frames moved along a flow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad


def lucas_kanade(first: Tensor, second: Tensor, window: int = 7, iterations: int = 4) -> Tensor:
    """Dense flow (N, 2, H, W) float32, (x, y) in pixels, such that ``second(p + flow) = first(p)``.

    first, second: (N, 3, H, W) in [-1, 1]. Source: Lucas and Kanade (1981) on a pyramid (Bouguet 2001): coarse to fine,
    each step solves the 2 x 2 least squares of a ``window`` x ``window`` neighbourhood. The ridge leaves places without
    texture standing still; on the coarsest level (short side of at least 8) a step reaches about half the window.
    """
    grey = [x.float().mean(dim=1, keepdim=True) for x in (first, second)]
    pyramid = [grey]
    while min(pyramid[-1][0].shape[-2:]) >= 16:
        pyramid.append([avg_pool2d(x, 2) for x in pyramid[-1]])
    flow = grey[0].new_zeros(len(first), 2, *pyramid[-1][0].shape[-2:])
    for one, two in reversed(pyramid):
        height, width = one.shape[-2:]
        scale = torch.tensor([width / flow.shape[-1], height / flow.shape[-2]]).to(flow)
        flow = interpolate(flow, (height, width), mode="bilinear") * scale[:, None, None]
        for _ in range(iterations):
            moved = warp(two, flow)
            middle = pad((one + moved) / 2, (1, 1, 1, 1), mode="replicate")
            dx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
            dy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
            dt = moved - one
            products = torch.cat([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt], dim=1)
            xx, xy, yy, xt, yt = avg_pool2d(products, window, 1, window // 2, count_include_pad=False).unbind(
                dim=1
            )
            xx, yy = xx + 1e-4, yy + 1e-4
            step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / (xx * yy - xy * xy)[:, None]
            flow = flow + step.clamp(-window / 2, window / 2)
    return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """``image (N, C, H, W)`` sampled at p + flow (N, 2, H, W), bilinear; the border repeats outside."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).to(flow) + flow  # (N, 2, H, W)
    size = torch.tensor([width - 1, height - 1]).to(flow).clamp(min=1)
    grid = 2 * place.movedim(1, -1) / size - 1
    return grid_sample(image, grid, padding_mode="border", align_corners=True)
