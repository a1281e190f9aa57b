"""Several reference clips without CAMA: merge their features before the motion Resampler."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Fusion = Literal["mean", "weight", "concat", "top1"]


def fuse_references(features: Tensor, fusion: Fusion = "mean", distances: Tensor | None = None) -> Tensor:
    """features (B, K, N, D) nearest first -> (B, N, D), or (B, K*N, D) for "concat".

    "weight" needs `distances` (B, K) and weighs by `1 - distance`; where all weights of a sample are zero it
    takes the mean (the reference code gives NaN). Raises ValueError for an unknown fusion or missing distances.
    """
    match fusion:
        case "mean":
            return features.mean(dim=1)
        case "top1":
            return features[:, 0]
        case "concat":
            return rearrange(features, "b k n d -> b (k n) d")
        case "weight":
            if distances is None or distances.shape != features.shape[:2]:
                found = None if distances is None else tuple(distances.shape)
                raise ValueError(f"fusion 'weight' needs distances {tuple(features.shape[:2])}, got {found}")
            weight = 1 - distances.to(features)
            total = weight.sum(dim=1, keepdim=True)
            weight = torch.where(total == 0, 1 / weight.shape[1], weight / torch.where(total == 0, 1, total))
            return torch.einsum("bk,bknd->bnd", weight, features)
    raise ValueError(f"unknown fusion {fusion!r}: choose mean, weight, concat or top1")
