"""What the per-clip metrics share: one value per clip id, averaged over clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from motionrag.errors import MotionRAGError

ID_BYTES = 256


class PerClipMetric(Metric):
    """Mean over clips of a value per clip, kept by clip id.

    A clip seen twice (distributed samplers pad with repeats) counts once, with its first value. Ids are
    stored as rows of bytes, so that processes can exchange them like any tensor state.
    """

    full_state_update = False

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("ids", default=[], dist_reduce_fx="cat")

    def record(self, values: Tensor, clip_ids: Sequence[str]) -> None:
        """Keep ``values (B,)`` under ``clip_ids``; raises when counts differ or a value is not finite."""
        name = type(self).__name__
        if values.ndim != 1 or len(values) != len(clip_ids):
            raise MotionRAGError(
                f"{name}: {len(clip_ids)} clip ids for values of shape {tuple(values.shape)}"
            )
        values = values.detach().double()
        if not values.isfinite().all():
            clip = clip_ids[int((~values.isfinite()).nonzero()[0])]
            raise MotionRAGError(f"{name}: the value of clip '{clip}' is not finite; look at its features")
        self.values.append(values)
        self.ids.append(torch.stack([_to_bytes(clip) for clip in clip_ids]).to(values.device))

    def per_clip(self) -> dict[str, float]:
        """Value of every clip seen, in the order of first sight (over all processes when distributed)."""
        with self.sync_context():
            return self._by_id()

    def compute(self) -> Tensor:
        """Mean over clips, a float64 scalar."""
        values = list(self._by_id().values())
        return torch.tensor(values, dtype=torch.float64, device=self.device).mean()

    def _by_id(self) -> dict[str, float]:
        if isinstance(self.values, list) and not self.values:
            raise MotionRAGError(f"{type(self).__name__}: no clips were given, call update first")
        found: dict[str, float] = {}
        rows = dim_zero_cat(self.ids).cpu().numpy()
        for row, value in zip(rows, dim_zero_cat(self.values).tolist(), strict=True):
            found.setdefault(row.tobytes().rstrip(b"\0").decode(), value)
        return found


def _to_bytes(clip_id: str) -> Tensor:
    data = clip_id.encode()
    if len(data) > ID_BYTES:
        raise MotionRAGError(
            f"clip id of {len(data)} bytes, at most {ID_BYTES} are possible: {clip_id[:40]}..."
        )
    return torch.frombuffer(bytearray(data.ljust(ID_BYTES, b"\0")), dtype=torch.uint8)


def check_pair(name: str, pred: Tensor, target: Tensor, layout: str) -> None:
    """Raise unless both tensors have one shape with as many axes as ``layout`` names, e.g. ``B T D``."""
    if pred.shape != target.shape or pred.ndim != len(layout.split()):
        raise MotionRAGError(
            f"{name}: expected two tensors ({layout}) of one shape, got {tuple(pred.shape)} and {tuple(target.shape)}"
        )
