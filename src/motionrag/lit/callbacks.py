"""What a training run shows of itself, and when it stops itself."""

import logging
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from motionrag.checkpoint import resolve, save_weights, trainable_state
from motionrag.data.batch import MotionBatch
from motionrag.errors import MotionRAGError
from motionrag.io import sha256
from motionrag.lit.checkpoint_io import BackgroundCheckpointIO

log = logging.getLogger(__name__)


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
                warnings.warn(f"skipped clip {line}", stacklevel=2)  # in every process: each sees others
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
    """Writes the trained weights when training ends, and tells W&B of them.

    Args:
        path: of the weights.
        about: goes into their manifest, and into every checkpoint.
        inputs: what they are made from, as of `log_inputs`.
    """

    def __init__(
        self, path: str | Path, about: dict[str, Any], inputs: Mapping[str, str | Path | None] | None = None
    ) -> None:
        self.path, self.about, self.inputs = Path(path), about, inputs or {}

    def on_save_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["about"] = self.about

    def on_load_checkpoint(
        self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        before = checkpoint.get("about", {}).get("database_sha256")
        if before and before != self.about.get("database_sha256") and trainer.is_global_zero:
            warnings.warn("the database is not as it was when the checkpoint was saved", stacklevel=2)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        state = (
            trainer.strategy.lightning_module_state_dict()
        )  # all processes: they may have to put it together
        if not trainer.is_global_zero:
            return
        metrics = {name: value.item() for name, value in sorted(trainer.callback_metrics.items())}
        about = self.about | {"steps": trainer.global_step, "metrics": metrics}
        save_weights(self.path, trainable_state(state), about)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log_inputs(logger.experiment, self.inputs)
                logger.experiment.log_artifact(_artifact("weights", self.path))


def log_inputs(run: Any, inputs: Mapping[str, str | Path | None]) -> None:
    """Tell a run of W&B what it was made from: role -> weights file, or the folder of a database; None is left out.

    Checksums go into its configuration under `inputs`. Online the inputs become artifacts that it uses, the very ones
    that the runs that made them logged; W&B keeps no such lineage of offline runs. Of a database the manifest is kept,
    its features stay where they are.
    """
    found = {}
    for role, place in inputs.items():
        if place and (path := resolve(place)).exists():
            found[role] = _artifact("database" if path.is_dir() else "weights", path)
    run.config.update(
        {"inputs": {role: artifact.name for role, artifact in found.items()}}, allow_val_change=True
    )
    for artifact in found.values() if not run.offline else ():
        run.use_artifact(artifact)


def _artifact(kind: str, path: Path) -> Any:
    """Named by its checksum, so that equal things are one."""
    import wandb

    files = [path / "manifest.json"] if path.is_dir() else [path, path.with_suffix(".json")]
    artifact = wandb.Artifact(
        f"{path.resolve().stem}-{sha256(files[0])[:12]}", kind, metadata={"path": str(path.resolve())}
    )
    for file in filter(Path.is_file, files):
        artifact.add_file(str(file), policy="immutable")  # not copied: nobody changes it
    return artifact


class Preemption(L.Callback):
    """Saves a checkpoint at the end of the step in which the machine announces that it will be taken away.

    - SIGUSR1 and SIGUSR2 (`--signal` of Slurm: before the time limit, before a preemption): the job is put back into
      Slurm's queue and this process ends.
    - SIGTERM: inside Slurm training goes on, since Slurm alone knows what follows (the end, or another start by
      itself); elsewhere the process ends.

    The processes of a run agree first, so all stop at the same step.

    Args:
        path: the checkpoint; a run is continued from it with `ckpt_path=last`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._asked = 0  # 1: save, 2: save and requeue
        self._saved = 0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # After Lightning's own handlers, which may save in the middle of a step; it puts the old ones back at the end.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._asked = max(self._asked, 1 if number == signal.SIGTERM else 2)

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: MotionBatch, idx: int
    ) -> None:
        self._step = trainer.global_step
        if not self._saved:
            return
        # Only now: the saved step is in the logs, and it was not the last one.
        saved, self._saved = self._saved, 0
        job = os.environ.get("SLURM_JOB_ID")
        if job and saved == 2 and trainer.is_global_zero:
            subprocess.run(["scontrol", "requeue", _slurm_job()], check=True)
        if saved == 2 or not job:
            raise SystemExit(128 + signal.SIGTERM)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: MotionBatch, idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated: no step has ended
            return
        asked = self._asked
        if trainer.world_size > 1:
            level = torch.tensor(float(asked), device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(level, reduce_op="max"))
        if asked:
            self._asked, self._saved = 0, asked
            trainer.save_checkpoint(self.path)
            if isinstance(trainer.strategy.checkpoint_io, BackgroundCheckpointIO):
                trainer.strategy.checkpoint_io.wait()
            trainer.strategy.barrier("preemption")  # no process ends before the file is there
            if trainer.is_global_zero:
                line = f"asked to stop: saved step {trainer.global_step} to {self.path}"
                print(line, flush=True)
                log.info(line)


def _slurm_job() -> str:
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


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
        stepped = (idx + 1) % trainer.accumulate_grad_batches == 0
        if self._since is None or (stepped and trainer.global_step % self.every_n_steps == 0):
            if self._clips:
                module.log("clips_per_second", self._clips / (now - self._since))
            self._since, self._clips = now, 0

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._since, self._clips = None, 0


class LogLines(Logger):
    """Adds a line to the run's log whenever numbers are logged."""

    name = version = ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "epoch")
        log.info("step %d: %s", (step or 0) + 1, numbers)


class Progress(TQDMProgressBar):
    """Lightning's bar over the batches of the whole run (its own ends after as many batches as there are steps left)."""

    @property
    def total_train_batches(self) -> int | float:
        """Of the run, from its first start on."""
        steps = self.trainer.max_steps
        return steps * self.trainer.accumulate_grad_batches if steps > 0 else float("inf")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if trainer.max_steps > 0:  # Lightning sets it when an epoch starts: not in a run that continues
            self.train_progress_bar.total = self.total_train_batches


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
