"""What both stages give Lightning as their optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def configured(
    parameters: Iterable[nn.Parameter], optimizer: MakeOptimizer, scheduler: MakeScheduler | None
) -> Any:
    """The optimizer of `parameters` and, if there is one, its scheduler, which steps once per optimizer step."""
    made = optimizer(parameters)
    if scheduler is None:
        return made
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler(made), "interval": "step"}}
