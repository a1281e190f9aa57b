"""How features are kept on disk: as 16-bit floats, or as bytes with one step size for each token."""

from __future__ import annotations

import numpy as np
import torch

#: What a database may be asked for -> its name in messages. int8: multiples -127..127 of a token's largest value / 127.
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


def pack(values: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (b,N,D) -> what is stored, and for int8 the tokens' steps (b,N) float32.

    Stored are float16, the bits of bfloat16 as uint16 (NumPy has no such type), or int8, all rounded to nearest.
    """
    exact = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    if precision == "fp16":
        return exact.half().numpy(), None
    if precision == "bf16":
        return exact.bfloat16().view(torch.uint16).numpy(), None
    step = exact.abs().amax(-1) / 127
    levels = exact / step[..., None].clamp_min(torch.finfo().tiny)
    return levels.round().to(torch.int8).numpy(), step.numpy()


def unpack(
    stored: np.ndarray, step: np.ndarray | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What was stored (...,D), and the steps (...) of int8 -> values (...,D) float32, written into ``out`` if given."""
    found = torch.from_numpy(stored)
    if stored.dtype == np.uint16:
        found = found.view(torch.bfloat16)
    out = torch.empty(found.shape) if out is None else out
    out.copy_(found)  # much faster than NumPy's way to float32
    return out if step is None else out.mul_(torch.from_numpy(step)[..., None])
