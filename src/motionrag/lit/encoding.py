"""Work on many shards as a Lightning predict job."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from torch import nn
from torch.utils.data import DataLoader


class EncodeModule(L.LightningModule):
    """Shares shards out over the processes of a `Trainer.predict`, which puts the networks on its device.

    Args:
        networks: what `work` uses.
        shards: every process takes each n-th, n processes being there.
        work: called with one shard after the other.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], shards: Sequence[Any], work: Callable[[Any], None]
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.shards, self.work = shards, work

    def predict_dataloader(self) -> DataLoader:
        """Numbers of this process's shards."""
        mine = range(self.trainer.global_rank, len(self.shards), self.trainer.world_size)
        return DataLoader(mine, batch_size=None)

    def predict_step(self, number: int, batch_idx: int) -> None:
        self.work(self.shards[number])

    def on_predict_end(self) -> None:
        """All shards are done when any process goes on."""
        self.trainer.strategy.barrier("encoded")
