"""What the scripts that train the tiny weights share: an endless clip loader, a learning-rate plan and a log."""

import csv
import itertools
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from motionrag.data.motionworld import WorldClip, clip_stream, render

HERE = Path(__file__).parent
WEIGHTS = HERE.parents[1] / "src" / "motionrag" / "weights" / "tiny"
TRAINED_DOMAINS = {"known": 1.0, "compound": 1.0}  # no shipped network ever sees the new domain
FRAMES, SIZE, FPS = 9, 32, 8


class Clips(IterableDataset):
    """Endless rendered clips; `describe` turns a WorldClip into the labels a script needs."""

    def __init__(self, seed: int, describe, domains=TRAINED_DOMAINS, held_out: bool = False):
        self.seed, self.describe, self.domains, self.held_out = seed, describe, domains, held_out

    def __iter__(self):
        worker = get_worker_info().id if get_worker_info() else 0
        for clip in clip_stream(self.seed * 1000 + worker, self.domains, FRAMES, self.held_out):
            yield to_tensor(render(clip, SIZE)), self.describe(clip)


def to_tensor(frames: np.ndarray) -> torch.Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def loader(seed: int, batch: int, describe=lambda clip: 0, workers: int = 1, **kwargs):
    return iter(DataLoader(Clips(seed, describe, **kwargs), batch, num_workers=workers))


def fixed_clips(
    n: int, seed: int, domains=TRAINED_DOMAINS, held_out: bool = False
) -> tuple[torch.Tensor, list[WorldClip]]:
    clips = list(itertools.islice(clip_stream(seed, domains, FRAMES, held_out), n))
    return torch.stack([to_tensor(render(c, SIZE)) for c in clips]), clips


def optimizer(parameters, lr: float, steps: int, warmup: int = 100, weight_decay: float = 0.01):
    """AdamW with linear warm-up and cosine decay to 2 % of `lr`."""
    opt = AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)

    def plan(step):
        return min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))

    return opt, LambdaLR(opt, plan)


class Average(nn.Module):
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        super().__init__()
        self.decay, self.module, self.steps = decay, module, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def step(self):
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for key, value in self.module.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[key].lerp_(value, 1 - decay)


class Log:
    """CSV log of a run, also printed; seconds are wall-clock since the start."""

    def __init__(self, name: str):
        path = HERE / "logs" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        self.handle = open(path, "w", newline="")  # noqa: SIM115 (open as long as the training runs)
        self.start, self.fields = time.time(), None

    def write(self, **values):
        values = {"seconds": round(time.time() - self.start), **values}
        if self.fields is None:
            self.fields = csv.DictWriter(self.handle, list(values))
            self.fields.writeheader()
        self.fields.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})
        self.handle.flush()
        print(
            " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()),
            flush=True,
        )


def start(seed: int, threads: int | None = None):
    torch.manual_seed(seed)
    torch.set_num_threads(threads or int(os.environ.get("TRAIN_THREADS", "2")))
