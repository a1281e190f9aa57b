"""Optical flow without a network: pyramidal Lucas-Kanade, and frames moved along a flow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, pad

RIDGE = 3e-5  # of squared brightness gradients per pixel, brightness in [-1, 1]


def lucas_kanade(first: Tensor, second: Tensor, window: int = 9, iterations: int = 4) -> Tensor:
    """Dense flow (N, 2, H, W) float32, (x, y) in pixels, such that ``second(p + flow) = first(p)``.

    first, second: (N, 3, H, W) in [-1, 1]. Source: Lucas and Kanade (1981), coarse to fine, in the form of Le Besnerais
    and Champagnat (2005): each step solves the least squares of a ``window`` x ``window`` neighbourhood for the flow
    itself, not for a change of it, which keeps dense iterations stable. A ridge leaves places without texture standing
    still. Good to a few tenths of a pixel for motions up to about an eighth of the short side.
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
            padded = pad(moved, (1, 1, 1, 1), mode="replicate")
            dx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
            dy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
            rest = one - moved + dx * flow[:, :1] + dy * flow[:, 1:]
            products = torch.cat([dx * dx, dx * dy, dy * dy, dx * rest, dy * rest], dim=1)
            xx, xy, yy, xr, yr = avg_pool2d(products, window, 1, window // 2, count_include_pad=False).unbind(
                dim=1
            )
            xx, yy = xx + RIDGE, yy + RIDGE
            flow = torch.stack([yy * xr - xy * yr, xx * yr - xy * xr], dim=1) / (xx * yy - xy * xy)[:, None]
    return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """``image (N, C, H, W)`` sampled at p + flow (N, 2, H, W), bilinear; the border repeats outside."""
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([x, y]).to(flow) + flow  # (N, 2, H, W)
    size = torch.tensor([width - 1, height - 1]).to(flow).clamp(min=1)
    grid = 2 * place.movedim(1, -1) / size - 1
    return grid_sample(image, grid, padding_mode="border", align_corners=True)
