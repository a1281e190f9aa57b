"""What all stages have in common: an optimizer by config, parameters that can be dealt out, checked
checkpoints, seeds for what is drawn."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import nn

from motionrag.checkpoint import check_state
from motionrag.lit.checkpoint_io import continue_from_step
from motionrag.lit.sharding import shard

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


def step_seed(seed: int, purpose: str, position: int | tuple) -> int:
    """A 63-bit seed for one purpose at one place of the training stream.

    Randomness of a step depends on nothing else, so a resumed run draws what the uninterrupted one would have.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Stage(L.LightningModule):
    """A stage of training; its parameters are what it trains.

    Args:
        optimizer: called with the parameters.
        scheduler: called with the optimizer; steps once per optimizer step.
    """

    def __init__(self, optimizer: MakeOptimizer, scheduler: MakeScheduler | None = None) -> None:
        super().__init__()
        self._make_optimizer, self._make_scheduler = optimizer, scheduler

    def configure_model(self) -> None:
        shard(self)

    def configure_optimizers(self) -> Any:
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self._make_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # else the strategy has read, and checked, it already
            check_state(self.state_dict(), checkpoint["state_dict"], "the checkpoint")
        continue_from_step(checkpoint, self.trainer.accumulate_grad_batches)
