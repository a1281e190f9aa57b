"""What all metrics share: rows of numbers kept by clip id, exact for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from motionrag.errors import MotionRAGError
from motionrag.metrics.batch import ClipBatch

ID_BYTES = 256


class ClipMetric(Metric):
    """A metric over clips.

    ``add(batch)`` is the one interface that all metrics have: it takes a :class:`ClipBatch`, makes features with the
    metric's own extractor and hands them to ``update``, which takes features and can be called by itself.

    A clip seen twice (distributed samplers pad with repeats) counts once, with what was seen first. Ids are stored as
    rows of bytes, so that processes can exchange them like any tensor state. Results do not depend on the order of
    clips, on batches or on the number of processes.

    extractor: called with (B, T, 3, H, W) in [-1, 1], returns what ``update`` takes; None if only ``update`` is used.
    """

    full_state_update = False
    is_differentiable = False
    #: fields of ClipBatch that `add` reads
    needs: tuple[str, ...] = ("video", "truth")
    #: fewest clips that it has a value for
    least_clips: int = 1
    #: names of the states that hold rows
    kept: tuple[str, ...]

    def __init__(self, extractor: Callable[[Tensor], Tensor] | None = None, **kwargs) -> None:
        super().__init__(**{"dist_sync_fn": _gather, **kwargs})
        self.extractor = extractor
        for name in self.kept:
            self.add_state(name, default=[], dist_reduce_fx="cat")
            self.add_state(f"{name}_ids", default=[], dist_reduce_fx="cat")

    def sync(self, dist_sync_fn: Callable | None = None, **kwargs) -> None:
        """torchmetrics' own, but always with the gathering function given at construction."""
        super().sync(dist_sync_fn or self.dist_sync_fn, **kwargs)

    def add(self, batch: ClipBatch) -> None:
        """Add the clips of a batch."""
        raise NotImplementedError

    def statistic(self) -> tuple[list[str], Callable[[Tensor], float]]:
        """Sorted clip ids, and the metric's value over any choice of them (indices (n,), repeats allowed)."""
        raise NotImplementedError

    def extract(self, batch: ClipBatch, *names: str) -> list[Tensor]:
        """Features of the batch's fields ``names``."""
        name = type(self).__name__
        if self.extractor is None:
            raise MotionRAGError(
                f"{name}: add needs an extractor, give {name}(extractor=...); with features at hand call update"
            )
        return [batch.features(name, self.extractor, field) for field in names]

    def keep(self, state: str, rows: Tensor, clip_ids: Sequence[str]) -> None:
        """Keep ``rows (B, ...)`` under ``clip_ids``; raises when counts differ or a row is not finite."""
        name = type(self).__name__
        if len(rows) != len(clip_ids):
            raise MotionRAGError(f"{name}: {len(clip_ids)} clip ids for values of shape {tuple(rows.shape)}")
        if not len(rows):
            return
        finite = rows.flatten(1).isfinite().all(dim=1) if rows.ndim > 1 else rows.isfinite()
        if not finite.all():
            clip = clip_ids[int((~finite).nonzero()[0])]
            raise MotionRAGError(
                f"{name}: the value of clip '{clip}' is not finite; look at its frames and features"
            )
        getattr(self, state).append(rows.detach().to(self.device))
        getattr(self, f"{state}_ids").append(
            torch.stack([_to_bytes(clip) for clip in clip_ids]).to(self.device)
        )

    def by_id(self, state: str) -> dict[str, Tensor]:
        """Row of every clip kept, in the order of first sight."""
        found: dict[str, Tensor] = {}
        if isinstance(getattr(self, state), list) and not getattr(self, state):
            return found
        keys = dim_zero_cat(getattr(self, f"{state}_ids")).cpu().numpy()
        for key, row in zip(keys, dim_zero_cat(getattr(self, state)), strict=True):
            found.setdefault(key.tobytes().rstrip(b"\0").decode(), row)
        return found

    def result(self, value: float) -> Tensor:
        """A float64 scalar; raises when it is not finite."""
        if not torch.isfinite(torch.tensor(value)):
            raise MotionRAGError(f"{type(self).__name__}: the result is {value}; look at the values per clip")
        return torch.tensor(value, dtype=torch.float64, device=self.device)


def _gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The tensor of every process that has rows; torchmetrics' own gathering fails when one has none."""
    parts: list[Tensor | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.cpu(), group=group)
    parts = [part.to(tensor.device) for part in parts if part.numel()] or [tensor]
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise MotionRAGError(f"metric: processes hold clips of unequal length or width, {sorted(shapes)}")
    return parts


def _to_bytes(clip_id: str) -> Tensor:
    data = clip_id.encode()
    if not 0 < len(data) <= ID_BYTES:
        raise MotionRAGError(
            f"clip id of {len(data)} bytes, 1 to {ID_BYTES} are possible: {clip_id[:40]!r}..."
        )
    return torch.frombuffer(bytearray(data.ljust(ID_BYTES, b"\0")), dtype=torch.uint8)
