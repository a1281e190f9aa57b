"""Checkpoints written while training goes on, whole or not at all."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from motionrag.io import atomic_path


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Copies a checkpoint into the CPU's memory and writes it from a thread.

    Files appear under their names when they are complete. (Lightning writes them to the system's temporary folder and
    copies them from there when that is another file system: killed then, half a file has replaced the last good one.)
    One checkpoint is on its way at a time; the next one waits for it, so memory holds one copy at most. What goes wrong
    is raised by the next call, at the latest at the end of training.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._pending: list[Future] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.wait()
        self._later(_write, apply_to_collection(checkpoint, Tensor, _copy), path)

    def remove_checkpoint(self, path: Any) -> None:
        self._later(super().remove_checkpoint, path)  # after the one that takes its place

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.wait()
        return super().load_checkpoint(path, *args, **kwargs)

    def wait(self) -> None:
        """Return when everything is on disk; raises what went wrong."""
        pending, self._pending = self._pending, []
        for job in pending:
            job.result()

    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._thread = None

    def _later(self, job: Callable[..., None], *args: Any) -> None:
        # made here: a thread does not survive the fork of ddp_fork
        self._thread = self._thread or ThreadPoolExecutor(1, "checkpoint")
        self._pending.append(self._thread.submit(job, *args))


def continue_from_step(checkpoint: dict[str, Any], batches_per_step: int) -> None:
    """Let a run continue from the end of `checkpoint`'s last optimizer step, at `batches_per_step` from now on.

    Lightning counts batches and keeps no gradients: continued with another number of accumulated batches, or from the
    middle of a step, it would make one step of too few batches, and validate at other steps than before.
    """
    loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
    progress = loop["epoch_loop.batch_progress"]
    total, current = progress["total"], progress["current"]
    ahead = step * batches_per_step - total["processed"]
    if ahead and total["completed"] < total["processed"]:  # saved in a batch, whose step Lightning will count
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - 1
    for counts in (total, current):
        counts.update({name: count + ahead for name, count in counts.items()})
    if place := checkpoint.get("MotionDataModule"):  # counts clips of whole steps
        place["batches"] = step * batches_per_step


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _write(checkpoint: dict[str, Any], path: Any) -> None:
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = error if isinstance(error, OSError) else error.__context__
            if isinstance(reason, OSError):  # a full disk, in torch's words an "unexpected pos"
                raise OSError(reason.errno, reason.strerror, str(path)) from error
            raise
