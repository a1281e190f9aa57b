"""What the metrics look at: from clips to features. One small callable for each, all alike.

A call takes clips (B, T, 3, H, W) in [-1, 1] and returns a float32 tensor on the CPU. Clips go through one by one, so a
feature does not depend on what else is in a batch. Networks are loaded once for each set of arguments, however many
metrics use them, and when the extractor is made: missing weights are an error before anything is generated. Equal
arguments make equal extractors, whose features `ClipBatch` computes once.

device: of the network; None: a GPU if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad

from motionrag.encoders import AppearanceEncoder, MotionEncoder, _from_pretrained, _require, resolve_weights
from motionrag.errors import MotionRAGError
from motionrag.metrics.optical_flow import lucas_kanade, warp


@dataclass(frozen=True)
class _OfEncoder:
    path: str  # pkg:NAME, a folder or a hub id
    size: int = 224
    revision: str | None = None
    device: str | None = None

    kind: ClassVar[type] = MotionEncoder

    def __post_init__(self) -> None:
        self.encoder  # noqa: B018  loads it

    @property
    def encoder(self) -> Any:
        """The encoder of this kind, one for all that name the same weights."""
        return _encoder(self.kind, self.path, self.size, self.revision, _device(self.device))


@dataclass(frozen=True)
class VideoLogits(_OfEncoder):
    """VideoMAE's class logits (B, classes). Raises MotionRAGError if the weights hold no classifier."""

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(self.encoder.logits, video, self.device)


@dataclass(frozen=True)
class VideoFeatures(_OfEncoder):
    """VideoMAE's features, mean over tokens (B, D)."""

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(lambda clip: self.encoder(clip).mean(dim=1), video, self.device)


@dataclass(frozen=True)
class FrameFeatures(_OfEncoder):
    """DINOv2's CLS token of every frame (B, T, D)."""

    kind: ClassVar[type] = AppearanceEncoder

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(lambda clip: self.encoder(clip[0])[None, :, 0], video, self.device)


@dataclass(frozen=True)
class ClipEmbeddings:
    """CLIP's image embedding of every frame (B, T, D) and text embeddings (B, D), all of length 1.

    path: folder or hub id that transformers' CLIPModel and tokenizer load. Frames: short side to the model's size
    (bilinear, antialias), centre crop, CLIP's mean and std.
    """

    path: str
    revision: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        self.model  # noqa: B018  loads it

    @property
    def model(self) -> nn.Module:
        return _clip(self.path, self.revision, _device(self.device))[0]

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(lambda clip: self._images(clip[0])[None], video, self.device)

    def _images(self, frames: Tensor) -> Tensor:
        side = self.model.config.vision_config.image_size
        frames = (_short_side(frames, side) + 1) / 2
        top, left = ((n - side) // 2 for n in frames.shape[-2:])
        frames = frames[..., top : top + side, left : left + side]
        mean, std = (frames.new_tensor(values)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
        return normalize(_pooled(self.model.get_image_features((frames - mean) / std)), dim=-1)

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, D) of B prompts; longer ones are cut to what the model takes."""
        device = _device(self.device)
        tokenizer = _clip(self.path, self.revision, device)[1]
        length = self.model.config.text_config.max_position_embeddings
        rows = []
        for prompt in prompts:
            tokens = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt").to(device)
            rows.append(normalize(_pooled(self.model.get_text_features(**tokens)), dim=-1).float().cpu())
        return torch.cat(rows)


@dataclass(frozen=True)
class _TorchScriptFeatures:
    """A torchscript that takes uint8 pixels.

    path: the file. arguments: switches of its call that are set to True.
    """

    path: str
    arguments: tuple[str, ...] = ()
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", tuple(self.arguments))
        _torchscript(self.path, _device(self.device))

    def _features(self, pixels: Tensor) -> Tensor:
        return _call(self.path, _device(self.device), pixels, **dict.fromkeys(self.arguments, True))


@dataclass(frozen=True)
class TorchScriptVideo(_TorchScriptFeatures):
    """Features (B, D) of a torchscript that takes uint8 clips (1, 3, T, H, W): the I3D of FVD.

    path: the file. arguments: switches of its call that are set to True.
    """

    arguments: tuple[str, ...] = ("rescale", "resize", "return_features")

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(lambda clip: self._features(_uint8(clip).transpose(1, 2)), video, self.device)


@dataclass(frozen=True)
class TorchScriptFrames(_TorchScriptFeatures):
    """Features (B, T, D) of a torchscript that takes uint8 pictures (N, 3, H, W): the Inception of FID.

    path: the file. arguments: switches of its call that are set to True.
    """

    arguments: tuple[str, ...] = ("return_features",)

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(lambda clip: self._features(_uint8(clip[0])).flatten(1)[None], video, self.device)


@dataclass(frozen=True)
class TorchScriptFlow:
    """Optical flow (B, T-1, 2, H', W') of a torchscript: RAFT.

    path: a script of (first, second), both (N, 3, H', W') in [-1, 1] with sides that 8 divides, that returns flow
    (N, 2, H', W') in pixels, or a list whose last entry is that. Frames: short side to ``size`` (bilinear, antialias),
    sides padded to multiples of 8 by reflection at the bottom and right, as MotionRAG's published code does.
    """

    path: str
    size: int = 256
    device: str | None = None

    def __post_init__(self) -> None:
        _torchscript(self.path, _device(self.device))

    def __call__(self, video: Tensor) -> Tensor:
        def flow(clip: Tensor) -> Tensor:
            frames = _short_side(clip[0], self.size)
            frames = pad(frames, (0, -frames.shape[-1] % 8, 0, -frames.shape[-2] % 8), mode="reflect")
            found = _call(self.path, _device(self.device), frames[:-1], frames[1:])
            return (found[-1] if isinstance(found, (list, tuple)) else found)[None]

        return _one_by_one(flow, _at_least(video, 2, "optical flow"), self.device)


@dataclass(frozen=True)
class LucasKanadeFlow:
    """Optical flow (B, T-1, 2, H, W) without a network, in pixels; see ``motionrag.metrics.optical_flow``."""

    device: str | None = None

    def __call__(self, video: Tensor) -> Tensor:
        return _one_by_one(
            lambda clip: lucas_kanade(clip[0, :-1], clip[0, 1:])[None],
            _at_least(video, 2, "optical flow"),
            self.device,
        )


@dataclass(frozen=True)
class FlowInterpolation:
    """Frames 1, 3, 5, ... (B, (T-1)//2, 3, H, W) from their two neighbours, without a network.

    Both neighbours are moved half-way along the Lucas-Kanade flow between them and averaged.
    """

    device: str | None = None

    def __call__(self, video: Tensor) -> Tensor:
        def between(clip: Tensor) -> Tensor:
            even = clip[0, ::2]
            flow = lucas_kanade(even[:-1], even[1:]) / 2
            return ((warp(even[:-1], -flow) + warp(even[1:], flow)) / 2)[None]

        return _one_by_one(between, _at_least(video, 3, "interpolation"), self.device)


@dataclass(frozen=True)
class TorchScriptInterpolation:
    """Frames 1, 3, 5, ... (B, (T-1)//2, 3, H, W) from their two neighbours by a torchscript: AMT-S.

    path: a script of (first, second), both (N, 3, H, W) in [-1, 1], that returns the frames half-way between them.
    """

    path: str
    device: str | None = None

    def __post_init__(self) -> None:
        _torchscript(self.path, _device(self.device))

    def __call__(self, video: Tensor) -> Tensor:
        def between(clip: Tensor) -> Tensor:
            even = clip[0, ::2]
            return _call(self.path, _device(self.device), even[:-1], even[1:])[None]

        return _one_by_one(between, _at_least(video, 3, "interpolation"), self.device)


@dataclass(frozen=True)
class ObjectTrack:
    """Where the object of a MotionWorld clip is, (B, T, 2) of (x, y) in pixels; needs no network."""

    def __call__(self, video: Tensor) -> Tensor:
        from motionrag.data.motionworld import track_object

        frames = _uint8(video).movedim(2, -1).cpu().numpy()
        return torch.stack([torch.from_numpy(track_object(clip)) for clip in frames])


_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def _one_by_one(function: Callable[[Tensor], Tensor], video: Tensor, device: str | None) -> Tensor:
    rows = [function(clip.float().to(_device(device))).float().cpu() for clip in video.split(1)]
    return torch.cat(rows)


def _device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@cache
def _encoder(cls: type, path: str, size: int, revision: str | None, device: str) -> Any:
    return cls(path, size, revision).to(device)


@cache
def _clip(path: str, revision: str | None, device: str) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer, CLIPModel

    model, missing = _from_pretrained(CLIPModel, path, revision)
    _require(path, missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_weights(path), revision=revision)
    except (OSError, ValueError) as error:
        raise _no_tokenizer(path, str(error).strip().splitlines()[0]) from error
    words, expected = len(tokenizer), model.config.text_config.vocab_size
    if words < expected / 2:  # transformers makes an empty tokenizer where the files are missing
        raise _no_tokenizer(path, f"{words} words, the model knows {expected}")
    return model.requires_grad_(False).eval().to(device), tokenizer


def _no_tokenizer(path: str, reason: str) -> MotionRAGError:
    return MotionRAGError(
        f"{path}: its tokenizer cannot be loaded ({reason}); expected tokenizer.json beside the weights"
    )


@cache
def _torchscript(path: str, device: str) -> torch.jit.ScriptModule:
    if not Path(path).is_file():
        raise MotionRAGError(
            f"torchscript file {path}: no such file; docs/metrics.md says where each comes from, or leave the metric out"
        )
    try:
        return torch.jit.load(path, map_location=device).eval()
    except RuntimeError as error:
        raise MotionRAGError(
            f"{path}: not a torchscript file ({str(error).strip().splitlines()[0]}); save one with torch.jit.save"
        ) from error


def _call(path: str, device: str, *inputs: Tensor, **options: bool) -> Any:
    try:
        return _torchscript(path, device)(*inputs, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise MotionRAGError(
            f"{path}: refused an input of {shapes} ({str(error).strip().splitlines()[-1]}); if that is a matter of "
            "shapes: I3D needs clips of about 16 frames, and the switches of the call must be those the script has"
        ) from error


def _pooled(output: Any) -> Tensor:
    """The embeddings, whichever way this version of transformers returns them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _short_side(frames: Tensor, side: int) -> Tensor:
    height, width = frames.shape[-2:]
    size = [max(side, round(n * side / min(height, width))) for n in (height, width)]
    return interpolate(frames, size, mode="bilinear", antialias=True) if size != [height, width] else frames


def _uint8(video: Tensor) -> Tensor:
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _at_least(video: Tensor, frames: int, what: str) -> Tensor:
    if video.shape[1] < frames:
        raise MotionRAGError(f"{what} needs clips of at least {frames} frames, got {video.shape[1]}")
    return video
