"""What every metric's ``add`` takes: a few generated clips and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from motionrag.errors import MotionRAGError


@dataclass
class ClipBatch:
    """B generated clips; a field that no metric in use needs may be None (each metric's ``needs`` names its own).

    Clips of unequal size go into batches of their own, or into lists that are stacked here: a list with clips of
    unequal shape raises :class:`MotionRAGError` naming the clip.
    """

    ids: Sequence[str]  # unique over the whole evaluation; a clip met twice counts once
    video: Tensor  # generated, (B, T, 3, H, W) float in [-1, 1]
    truth: Tensor | None = None  # true clips, same layout
    prompts: Sequence[str] | None = None  # what the clips were generated from
    first_frame: Tensor | None = None  # the given picture, (B, 3, H, W) float in [-1, 1]
    motion_tokens: Tensor | None = None  # of the generated clip: Resampler(motion encoder(video)), (B, l, d)
    target_tokens: Tensor | None = None  # the adapted tokens that were to be injected, (B, l, d)
    fps: float = 8.0  # of both clips
    # (extractor, field) -> features: of the generated clips, and of what all ways to generate them share
    _own: dict = field(default_factory=dict, repr=False)
    _shared: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.ids = list(self.ids)
        for name in TENSORS:
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, self._stack(name, value))

    def with_video(
        self, video: Tensor, motion_tokens: Tensor | None = None, target_tokens: Tensor | None = None
    ) -> ClipBatch:
        """The same clips generated otherwise; features of the true clips are shared, not computed again."""
        return replace(self, video=video, motion_tokens=motion_tokens, target_tokens=target_tokens, _own={})

    def get(self, metric: str, name: str) -> Tensor | list[str]:
        """A field, checked; raises MotionRAGError naming ``metric`` if it is missing, mismatched or not finite."""
        value = getattr(self, name)
        if value is None:
            raise MotionRAGError(
                f"{metric}: needs {name}, which these clips do not have; give it, or leave {metric} out"
            )
        if len(value) != len(self.ids):
            raise MotionRAGError(f"{metric}: {len(self.ids)} clip ids but {len(value)} entries in {name}")
        if isinstance(value, Tensor):
            self._check(metric, name, value)
        return value

    def _check(self, metric: str, name: str, value: Tensor) -> None:
        layout = TENSORS[name].split()
        channels = value.shape[-3] if "3" in layout and value.ndim == len(layout) else 3
        if value.ndim != len(layout) or channels != 3 or not value.is_floating_point():
            raise MotionRAGError(
                f"{metric}, {clips(self.ids)}: expected {name} ({', '.join(layout)}) float, got "
                f"{tuple(value.shape)} {value.dtype}"
            )
        for clip_id, one in zip(self.ids, value, strict=True):
            if not one.isfinite().all():
                frames = (~one.flatten(1).isfinite().all(dim=1)).nonzero() if one.ndim == 4 else []
                where = f" in frame {int(frames[0])}" if len(frames) else ""
                raise MotionRAGError(
                    f"{metric}, clip '{clip_id}': {name} holds NaN or infinity{where}; make the clip again"
                )
            if "3" in layout and one.abs().max() > 1.001:
                raise MotionRAGError(
                    f"{metric}, clip '{clip_id}': {name} reaches {float(one.abs().max()):.4g}, expected pixels in [-1, 1]"
                )

    def features(self, metric: str, extractor: Callable[[Tensor], Tensor], name: str) -> Tensor:
        """``extractor(field)``, computed once for all metrics whose extractors are equal."""
        known, key = self._own if name == "video" else self._shared, (extractor, name)
        if key not in known:
            value = self.get(metric, name)
            known[key] = extractor(value[:, None] if name == "first_frame" else value)
        return known[key]

    def _stack(self, name: str, values: Sequence[Tensor]) -> Tensor:
        for clip_id, value in zip(self.ids, values, strict=False):
            if value.shape != values[0].shape:
                raise MotionRAGError(
                    f"clip '{clip_id}': its {name} has shape {tuple(value.shape)}, that of '{self.ids[0]}' "
                    f"{tuple(values[0].shape)}; clips of one batch must be equally long and large"
                )
        return torch.stack(list(values))


TENSORS = {
    "video": "B T 3 H W",
    "truth": "B T 3 H W",
    "first_frame": "B 3 H W",
    "motion_tokens": "B l d",
    "target_tokens": "B l d",
}


def clips(ids: Sequence[str]) -> str:
    """``clip 'a'`` or ``clips 'a' to 'c'``, for messages."""
    return f"clips '{ids[0]}' to '{ids[-1]}'" if len(ids) > 1 else f"clip {', '.join(map(repr, ids))}"
