"""What a training run shows of itself, and when it stops itself."""

import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from PIL import Image

from motionrag.checkpoint import save_weights, trainable_state
from motionrag.data.batch import MotionBatch
from motionrag.errors import MotionRAGError


class SkippedClips(L.Callback):
    """Names clips that could not be read, counts them, and stops the run when they are too many.

    Args:
        max_share: of all training clips.
    """

    def __init__(self, max_share: float = 0.1) -> None:
        self.max_share = max_share
        self.reasons: dict[str, str] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: MotionBatch, idx: int
    ) -> None:
        for line in batch.skipped:
            clip, _, reason = line.partition(": ")
            if clip not in self.reasons:
                self.reasons[clip] = reason
                rank_zero_warn(f"skipped clip {line}")
        total = len(trainer.datamodule.train_part)
        if len(self.reasons) > self.max_share * total:
            clip, reason = next(iter(self.reasons.items()))
            raise MotionRAGError(
                f"{len(self.reasons)} of {total} training clips cannot be read, more than max_share={self.max_share} "
                f"allows, the first: {clip}: {reason}; repair or repack them, or raise callbacks.skipped.max_share"
            )
        if self.reasons:
            module.log("data/skipped", float(len(self.reasons)))


class SaveWeights(L.Callback):
    """Writes the trained weights when training ends; `about` goes into their manifest with steps and metrics."""

    def __init__(self, path: str | Path, about: dict[str, Any]) -> None:
        self.path, self.about = Path(path), about

    @rank_zero_only
    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        metrics = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        about = self.about | {"steps": trainer.global_step, "metrics": metrics}
        save_weights(self.path, trainable_state(module), about)


class Throughput(L.Callback):
    """Logs training clips per second over all processes, validation and the first batches left out."""

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._since: float | None = None
        self._clips = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: MotionBatch, idx: int
    ) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self._clips += len(batch) * trainer.world_size
        if self._since is None or trainer.global_step % self.every_n_steps == 0:
            if self._clips:
                module.log("clips_per_second", self._clips / (now - self._since))
            self._since, self._clips = now, 0

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since, self._clips = None, 0


class SampleGrid(L.Callback):
    """Stage 1: writes a picture after validation: truth, without motion, with motion; frames from left to right.

    Args:
        every_n_validations: how often.
        clips: how many validation clips.
        steps, guidance: of sampling.
    """

    def __init__(
        self, every_n_validations: int = 1, clips: int = 2, steps: int = 10, guidance: float = 3.0
    ) -> None:
        self.every_n_validations, self.clips = every_n_validations, clips
        self.steps, self.guidance = steps, guidance
        self._validations = 0

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: MotionBatch,
        idx: int,
        *_: Any,
    ) -> None:
        if idx or trainer.sanity_checking:
            return
        self._validations += 1
        if self._validations % self.every_n_validations:
            return
        videos = {"truth": batch.video, **module.sample(batch, self.steps, self.guidance)}
        rows = [videos[name][i] for i in range(min(self.clips, len(batch))) for name in videos]
        path = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grid(rows)).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=trainer.global_step)


def grid(videos: list[torch.Tensor]) -> np.ndarray:
    """Videos (T, 3, H, W) in [-1, 1] -> one picture, uint8 (rows * H, T * W, 3), a video per row."""
    rows = [torch.cat(list(video.float().cpu()), dim=2) for video in videos]
    pixels = torch.cat(rows, dim=1).clamp(-1, 1).add(1).mul(127.5).round().byte()
    return pixels.permute(1, 2, 0).numpy()
