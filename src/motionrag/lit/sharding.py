"""Dealing out what is trained over the processes of a run (FSDP2), for both stages alike."""

import warnings

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from motionrag.modules.motion_adapter import AdapterSite


def shard(module: L.LightningModule) -> None:
    """Called by `configure_model`: with `trainer=fsdp` every process keeps its share of each part's parameters,
    gradients and optimizer state; with other strategies nothing happens.

    A part is what is used at one time: an adapter's site, or a whole Resampler or CAMA. What a part may be asked for
    besides `forward` has to gather its parameters, too.
    """
    if not isinstance(module.trainer.strategy, ModelParallelStrategy):
        return
    # views: nothing writes into what a part returns
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Lightning's own mesh would give the processes of a machine to tensor parallelism.
    trainer = module.trainer
    mesh = init_device_mesh(trainer.strategy.root_device.type, (trainer.world_size,))
    for part in _parts(module):
        fully_shard(part, mesh=mesh)
        if isinstance(part, AdapterSite):
            for method in ("project", "fold"):
                register_fsdp_forward_method(part, method)


def _parts(module: nn.Module) -> list[nn.Module]:
    sites = [m for m in module.modules() if isinstance(m, AdapterSite)]
    return sites + [m for m in module.children() if not any(isinstance(n, AdapterSite) for n in m.modules())]
