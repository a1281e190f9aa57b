"""How every sampling loop begins."""

from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def generators(seeds: Sequence[int], images: Tensor) -> list[torch.Generator]:
    """A generator for each of the images (B, ...), so that a sample's noise does not depend on its batch.

    Raises ValueError unless there is one seed for each.
    """
    if len(seeds) != len(images):
        raise ValueError(f"{len(images)} images but {len(seeds)} seeds")
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def denoising(steps: Iterable[T], of: Collection, progress: bool) -> Iterable[T]:
    """`steps`, with a bar as long as `of` if `progress` asks for one."""
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="denoising", leave=False, total=len(of))
