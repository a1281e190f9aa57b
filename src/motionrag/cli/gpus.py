"""Which GPUs a point of a sweep has while joblib runs others beside it on this machine."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from omegaconf import DictConfig

from motionrag.errors import MotionRAGError
from motionrag.io import only_writer

_held = ExitStack()  # until the process ends
_taken: list[str] = []


def of_a_point(cfg: DictConfig) -> int:
    """How many GPUs a point takes: its trainer's devices, or 1 for its device; 0 if there are none or they are named."""
    trainer = cfg.get("trainer", {"devices": 1} if "device" in cfg else {"accelerator": None})
    if trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return 0
    import torch

    devices = str(trainer.get("devices", 1))
    if devices in ("auto", "-1"):
        return torch.cuda.device_count()
    return int(devices) if devices.isdecimal() and torch.cuda.device_count() else 0


def points_at_once(n_jobs: int, cfg: DictConfig) -> int:
    """`launcher.n_jobs`, of which a negative one means as many as there are GPUs for.

    Raises MotionRAGError when the points need more GPUs than there are.
    """
    if not (each := of_a_point(cfg)):
        return n_jobs
    import torch

    there = torch.cuda.device_count()
    most = there // each
    if max(n_jobs, 1) > most:
        raise MotionRAGError(
            f"launcher.n_jobs={n_jobs}: points of {each} GPU(s) need {max(n_jobs, 1) * each}, {there} there "
            f"(choose with launcher.n_jobs=N, trainer.devices=N)"
        )
    return most if n_jobs < 0 else n_jobs


def take(sweep: Path, cfg: DictConfig) -> None:
    """Let this process see GPUs that no other process of the sweep in folder `sweep` sees, as long as it lives.

    Nothing happens where points need none. Raises MotionRAGError when all are taken.
    """
    if _taken or not (each := of_a_point(cfg)):
        return
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
    for first in range(0, len(names) - each + 1, each):
        own = names[first : first + each]
        try:
            _held.enter_context(only_writer(sweep / ".gpus" / ",".join(own), "taken"))
        except MotionRAGError:
            continue
        _taken.extend(own)
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return
    raise MotionRAGError(
        f"all {len(names)} GPUs are taken by other points of the sweep: fewer launcher.n_jobs"
    )
