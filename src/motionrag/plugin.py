"""Motion for a diffusers pipeline of one's own: load a package, attach it, call the pipeline as always.

    motion = MotionPackage.load("pkg:tiny").attach(pipe)
    video = pipe(image=image, prompt="a ball rolls", references=["a.mp4", "b.mp4"], motion_scale=1.0).frames
    motion.detach()

While something is attached, the pipeline object has a class of its own, a child of the class it had, whose `__call__`
takes `references`. Its networks get the hooks of the motion adapter and nothing else; both go when it is detached.

Shapes: B pictures, K reference clips, N x D motion features of a clip, M x E appearance features of a picture, n motion
tokens of width d.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, DiffusionPipeline, StableVideoDiffusionPipeline
from torch import Tensor, nn

from motionrag.backbones import cogvideox, svd
from motionrag.backbones.base import Backbone, MotionInput
from motionrag.checkpoint import described_network, read_weights
from motionrag.data.video import read_clip
from motionrag.encoders import AppearanceEncoder, CaptionEncoder, MotionEncoder, resolve_weights
from motionrag.errors import MotionRAGError
from motionrag.generate import MotionRAG, to_float
from motionrag.modules.cama import CAMA
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.retrievers import TextRetriever

File = str | Path
Clip = File | np.ndarray | Tensor


class MotionPackage:
    """Motion Resampler, motion adapter, CAMA and the encoders they were trained with; see `load`.

    Encoders, Resampler and CAMA run once per call, on the CPU. The adapter lives while the package is attached, in the
    precision of the network that it enters and, during a call, on the device the pipeline runs on.
    """

    def __init__(
        self,
        folder: Path,
        motion_encoder: MotionEncoder,
        appearance_encoder: AppearanceEncoder,
        resampler: Resampler,
        cama: CAMA,
        about: Mapping[str, Any],
    ) -> None:
        self.folder, self.about = folder, dict(about)
        self.motion_encoder, self.appearance_encoder = motion_encoder, appearance_encoder
        self.resampler, self.cama = resampler, cama
        self._host: _Host | None = None
        self._model: MotionRAG | None = None
        self._entered: list[nn.Module] = []
        self._retrievers: dict[str, TextRetriever] = {}

    @classmethod
    def load(
        cls,
        path: File,
        motion_encoder: MotionEncoder | None = None,
        appearance_encoder: AppearanceEncoder | None = None,
    ) -> MotionPackage:
        """Read a package.

        Args:
            path: folder, hub id or `pkg:NAME` with adapter.safetensors and cama.safetensors, each with its .json, as
                `motionrag train` and `motionrag import` write them. The .json say which sizes, encoders and query.
            motion_encoder, appearance_encoder: in place of those that the package names. By default each is read from
                the package's folder of that name, or else by its hub id.

        Raises MotionRAGError for a file that is missing, damaged or not what its .json says, and for an encoder with
        other weights than the package was trained with.
        """
        folder = _folder(path)
        stage1 = _about(folder / "adapter.safetensors", "motion")
        stage2 = _about(folder / "cama.safetensors", "appearance")
        resampler = described_network("resampler", folder / "adapter.safetensors", stage1)
        cama = described_network("cama", folder / "cama.safetensors", stage2)
        motion_encoder = motion_encoder or _encoder(MotionEncoder, folder, stage1["encoders"]["motion"])
        appearance_encoder = appearance_encoder or _encoder(
            AppearanceEncoder, folder, stage2["encoders"]["appearance"]
        )
        _check_encoder(folder, motion_encoder, stage1["encoders"]["motion"])
        _check_encoder(folder, appearance_encoder, stage2["encoders"]["appearance"])
        return cls(folder, motion_encoder, appearance_encoder, resampler, cama, stage1)

    # --- attaching -------------------------------------------------------------------------------------------------

    def attach(self, pipe: DiffusionPipeline | Backbone) -> MotionPackage:
        """Let a pipeline take `references`; returns the package.

        Args:
            pipe: a `CogVideoXImageToVideoPipeline`, a `StableVideoDiffusionPipeline`, or a `Backbone` of this project
                such as DynamiCrafter, whose `sample` then takes what the others' call does.

        The pipeline's call then has, besides its own arguments:
            references: one clip or a list, nearest first: names of video files, uint8 (T, H, W, 3), or float
                (T, 3, H, W) in [-1, 1]. Or one name of a folder: a retrieval database. All pictures of a call share
                the clips. With several packages attached {package: references}. None is the bare pipeline.
            motion_prompt: with a database, the motion to look for: a text, or one for each picture; by default the
                prompt.
            k: with a database, how many clips to take (retrieval depth), 9 by default.
            motion_scale: weight of the motion adapter, 1 by default; 0 is the bare pipeline. With several packages
                attached a number for all or {package: number}.

        Raises MotionRAGError, and leaves the pipeline as it was, for another kind of pipeline, for one that the weights
        do not fit, and if the package is attached already. The call raises it for references that cannot be used.
        """
        if self._host is not None:
            raise MotionRAGError(
                f"{self.folder} is attached already: detach it first, or load the package once more"
            )
        host = _host(pipe)
        # the first packages do not say their query: CogVideoX
        query, only = (self.about.get("adapter_query") or ["output"])[0], self.about.get("adapter_only")
        try:
            model = MotionRAG(
                backbone=host,
                motion_encoder=self.motion_encoder,
                appearance_encoder=self.appearance_encoder,
                resampler=self.resampler,
                motion_adapter=partial(MotionAdapter.for_modules, query=query, only=only),
                cama=self.cama,
                adapter_weights=str(self.folder / "adapter.safetensors"),
                cama_weights=str(self.folder / "cama.safetensors"),
            )
        except MotionRAGError as error:
            trained_on = self.about.get("backbone", "another backbone")
            raise MotionRAGError(
                f"{self.folder}, trained on {trained_on}, cannot be attached to this {type(pipe).__name__}: {error}"
            ) from error
        model.adapter.set(None)  # outside of calls with references the pipeline is bare
        self._host, self._model, self._entered = host, model, host.entrances()
        host.add(self)
        return self

    def detach(self) -> None:
        """Restore the pipeline bit for bit; other packages stay attached. Nothing happens if none is attached."""
        if self._host is None:
            return
        self._model.detach()
        self._host.remove(self)
        self._host = self._model = None

    def _follow(self) -> MotionAdapter:
        """The adapter where the pipeline runs now, in front of the layers that it has now.

        Pipelines are moved and cast, and LoRA puts layers of its own in place of `to_out[0]`, after attaching too.
        """
        adapter, entrances = self._model.adapter, self._host.entrances()
        if entrances != self._entered:
            adapter.detach()
            try:
                adapter.attach(self._host.adapter_sites())
            except ValueError as error:
                raise MotionRAGError(
                    f"the network that {self.folder} was attached to has changed: {error}"
                ) from error
            self._entered = entrances
        return adapter.to(self._host.device, self._host.denoiser.dtype)

    # --- motion tokens ---------------------------------------------------------------------------------------------

    def _motion(self, call: _Call, references: Any, prompts: Any, k: int | None, scale: float) -> MotionInput:
        """The motion input of one call, (B, n, d) and (1, n, d)."""
        clips = list(references) if isinstance(references, list | tuple) else [references]
        if not clips:
            raise MotionRAGError("references is empty: give at least one clip, or leave it out")
        if len(clips) == 1 and isinstance(clips[0], File) and Path(clips[0]).is_dir():
            k = 9 if k is None else k
            if not isinstance(k, int):
                raise MotionRAGError(f"k={k!r}: expected a whole number of reference clips")
            tokens, appearance = self._retrieve(str(clips[0]), prompts or call.prompts, k, call.image)
        elif prompts is not None or k is not None:
            raise MotionRAGError(
                "motion_prompt and k choose clips of a database: give its folder as references"
            )
        else:
            motion, appearance = self._model.encode_references([self._read(clip) for clip in clips])
            tokens = self._model.motion_tokens(motion)
        found = (value.expand(len(call.image), *value.shape[1:]) for value in (tokens, appearance))
        tokens = self._model.adapt_tokens(*found, call.image)
        tokens = tokens.repeat_interleave(call.videos, dim=0)
        adapter, device = self._follow(), self._host.device
        return MotionInput(adapter, tokens.to(device), self._model.null_tokens.to(device), scale)

    def _read(self, clip: Clip) -> Tensor:
        """A reference clip -> (T, 3, H, W) in [-1, 1]."""
        if isinstance(clip, File):  # no more frames than the encoder takes: a reference may be long
            return to_float(read_clip(clip, frames=self.motion_encoder.frames).frames)
        frames = torch.as_tensor(clip).cpu() if isinstance(clip, Clip) else None
        if frames is None:
            found = type(clip).__name__
        elif frames.dtype == torch.uint8 and frames.ndim == 4 and frames.shape[-1] == 3 and len(frames):
            return to_float(frames.numpy())
        elif frames.is_floating_point() and frames.ndim == 4 and frames.shape[1] == 3 and len(frames):
            if frames.abs().max() <= 1.001:
                return frames.float()
            found = f"float with values up to {frames.abs().max():g}"
        else:
            found = f"{frames.dtype} {tuple(frames.shape)}"
        raise MotionRAGError(
            f"a reference clip is {found}: expected uint8 (T,H,W,3), float (T,3,H,W) in [-1, 1], or a video file"
        )

    def _retrieve(self, db: str, prompts: Any, k: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """Motion tokens (B or 1, K, l, d) and appearance features (B or 1, K, M, E) of the clips nearest to each prompt."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        if len(prompts) not in (1, len(image)):
            raise MotionRAGError(
                f"references={db} is a database: expected motion_prompt, one text or one for each of {len(image)} "
                f"pictures, got {len(prompts)}"
            )
        if db not in self._retrievers:
            database = RetrievalDatabase(db)
            self._model.check_database(database)
            caption = CaptionEncoder(database.manifest["encoders"]["caption"]["name"])
            self._retrievers[db] = TextRetriever(database, caption)
        retriever = self._retrievers[db]
        found = [retriever.retrieve(prompt, k)[0] for prompt in prompts]
        return self._model.read_references(retriever.db, found)


# --- what a package is attached to -----------------------------------------------------------------------------------


@dataclass
class _Call:
    """What the arguments of one call say.

    Attributes:
        image: the pictures as the pipeline will see them, (B, 3, H, W) in [-1, 1].
        prompts: a text or texts, if any.
        guided: whether the denoiser gets [unconditional, conditional] batches.
        videos: for each picture.
    """

    image: Tensor
    prompts: str | Sequence[str] | None
    guided: bool
    videos: int = 1


class _Host:
    """A `Backbone` with a package attached; `MotionRAG` takes it for one that nobody moves: its owner places it."""

    method = "sample"  # takes the references

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @property
    def denoiser(self) -> nn.Module:
        return _bare(self.pipe.denoiser)

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs."""
        return self.denoiser.device

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        return self.pipe.adapter_sites()

    def entrances(self) -> list[nn.Module]:
        """The layers in front of which the adapter adds motion."""
        return [site.to_out[0] for site in self.adapter_sites().values()]

    def to(self, device: Any) -> None:
        """Nothing."""

    def encoders_to(self, device: Any) -> None:
        """Nothing."""

    def read(self, image: Tensor, guidance: float, **_: Any) -> _Call:
        """What a call with these arguments says."""
        return _Call(image.float().cpu(), None, guidance != 1)

    def add(self, package: MotionPackage) -> None:
        """Let the pipeline know a package."""
        kind = type(self.pipe)
        if "_motion_packages" not in vars(kind):
            call = _with_references(getattr(kind, self.method), self)
            members = {"__module__": kind.__module__, "__doc__": kind.__doc__, self.method: call}
            self.pipe.__class__ = type(kind.__name__, (kind,), members | {"_motion_packages": []})
        type(self.pipe)._motion_packages.append(package)

    def remove(self, package: MotionPackage) -> None:
        """Forget it; without any left the pipeline gets its own class back."""
        kind = type(self.pipe)
        kind._motion_packages.remove(package)
        if not kind._motion_packages:
            self.pipe.__class__ = kind.__base__


class _PipelineHost(_Host):
    """A diffusers pipeline."""

    method = "__call__"

    @property
    def device(self) -> torch.device:
        """Where the denoiser runs; with offloading that is not where its weights are."""
        return self.pipe._execution_device


class _CogVideoXHost(_PipelineHost):
    """A `CogVideoXImageToVideoPipeline`."""

    @property
    def denoiser(self) -> nn.Module:
        return _bare(self.pipe.transformer)

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        return cogvideox.adapter_sites(self.denoiser)

    def read(
        self, image: Any, height: Any, width: Any, prompt: Any, guidance_scale: float, **_: Any
    ) -> _Call:
        config, scale = self.denoiser.config, self.pipe.vae_scale_factor_spatial
        size = height or config.sample_height * scale, width or config.sample_width * scale
        image = self.pipe.video_processor.preprocess(image, *size)
        return _Call(image.float().cpu(), prompt, guidance_scale > 1)


class _SVDHost(_PipelineHost):
    """A `StableVideoDiffusionPipeline`: it reads no prompt."""

    @property
    def denoiser(self) -> nn.Module:
        return _bare(self.pipe.unet)

    def adapter_sites(self) -> Mapping[str, nn.Module]:
        return svd.adapter_sites(self.denoiser)

    def read(
        self, image: Any, height: Any, width: Any, max_guidance_scale: float, num_videos_per_prompt: Any, **_: Any
    ) -> _Call:  # fmt: skip
        image = self.pipe.video_processor.preprocess(image, height, width)
        return _Call(image.float().cpu(), None, max_guidance_scale > 1, num_videos_per_prompt or 1)


def _bare(network: nn.Module) -> nn.Module:
    """The network that `torch.compile` has wrapped."""
    return getattr(network, "_orig_mod", network)


def _host(pipe: Any) -> _Host:
    """Raises MotionRAGError for a pipeline that has no place for motion."""
    kinds = {
        CogVideoXImageToVideoPipeline: _CogVideoXHost,
        StableVideoDiffusionPipeline: _SVDHost,
        Backbone: _Host,
    }
    for kind, host in kinds.items():
        if isinstance(pipe, kind):
            return host(pipe)
    raise MotionRAGError(
        f"motion cannot be attached to {type(pipe).__name__}: expected CogVideoXImageToVideoPipeline, "
        "StableVideoDiffusionPipeline or a motionrag backbone"
    )


def _with_references(original: Callable, host: _Host) -> Callable:
    """The pipeline's call with the arguments that `MotionPackage.attach` describes."""

    @wraps(original)
    def call(
        self: Any,
        *args: Any,
        references: Any = None,
        motion_prompt: str | Sequence[str] | None = None,
        k: int | None = None,
        motion_scale: float | Mapping[MotionPackage, float] | None = None,
        **kwargs: Any,
    ) -> Any:
        packages = type(self)._motion_packages
        if references is None:
            if (motion_prompt, k, motion_scale) != (None, None, None):
                raise MotionRAGError(
                    "motion_prompt, k and motion_scale need references: give clips or a database"
                )
            return original(self, *args, **kwargs)
        given = _by_package(references, packages)
        scales = dict.fromkeys(given, 1.0 if motion_scale is None else motion_scale)
        if isinstance(motion_scale, Mapping):
            scales = dict.fromkeys(given, 1.0) | _by_package(motion_scale, list(given))
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        del arguments["self"]
        read = host.read(**arguments)
        motions = [p._motion(read, given[p], motion_prompt, k, _number(scales[p])) for p in given]
        motion = _Joined.input(motions)
        if host.method == "sample":  # it orders the parts of guidance itself
            return original(self, *args, **kwargs, motion=motion)
        with motion.use(read.guided):
            return original(self, *args, **kwargs)

    return call


def _number(scale: Any) -> float:
    """A motion scale; raises MotionRAGError for what would make a video of nothing."""
    try:
        number = float(scale)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MotionRAGError(
            f"motion_scale={scale!r}: expected a number; 0 is the bare pipeline, 1 the default"
        )
    return number


def _by_package(references: Any, packages: Sequence[MotionPackage]) -> dict[MotionPackage, Any]:
    """{package: its references}; raises MotionRAGError if it is not clear whose they are."""
    if not isinstance(references, Mapping):
        if len(packages) > 1:
            raise MotionRAGError(
                f"{len(packages)} packages are attached: say whose references these are, "
                "references={package: references}"
            )
        return {packages[0]: references}
    if not references or any(package not in packages for package in references):
        raise MotionRAGError(
            "references={package: references}, motion_scale={package: number}: expected packages that are attached to "
            "this pipeline and, for motion_scale, have references in this call"
        )
    return dict(references)


class _Joined:
    """Several adapters behind the face of one: their tokens side by side in one row for each sample.

    So whoever orders samples for guidance orders all of them at once.
    """

    def __init__(self, motions: Sequence[MotionInput]) -> None:
        self.motions = motions

    @classmethod
    def input(cls, motions: Sequence[MotionInput]) -> MotionInput:
        """One motion input for all."""
        tokens = torch.cat([m.tokens.flatten(1) for m in motions], dim=1)
        null_tokens = torch.cat([m.null_tokens.flatten(1) for m in motions], dim=1)
        return MotionInput(cls(motions), tokens[:, None], null_tokens[:, None])

    @contextmanager
    def use(self, tokens: Tensor, scale: float = 1.0) -> Iterator[None]:
        """As `MotionAdapter.use`, with each adapter's own tokens and scale."""
        sizes = [m.tokens[0].numel() for m in self.motions]
        with ExitStack() as stack:
            for motion, part in zip(self.motions, tokens[:, 0].split(sizes, dim=1), strict=True):
                own = part.unflatten(1, motion.tokens.shape[1:])
                stack.enter_context(motion.adapter.use(own, motion.scale * scale))
            yield


# --- reading a package -----------------------------------------------------------------------------------------------


def _folder(path: File) -> Path:
    """The folder of a package; a hub id is fetched, or taken from the cache."""
    folder = Path(resolve_weights(str(path)))
    if folder.exists():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MotionRAGError(
            f"package {str(path)!r} cannot be loaded ({reason}); expected a folder or hub id with adapter.safetensors "
            "and cama.safetensors"
        ) from error


def _about(file: Path, role: str) -> dict[str, Any]:
    """What the manifest of a weights file says; raises MotionRAGError unless it names the encoder."""
    about = read_weights(file)[1].get("about", {})
    try:
        encoder = about["encoders"][role]
        said = isinstance(encoder["name"], str) and isinstance(encoder["size"], int)
    except (KeyError, TypeError):
        said = False
    if not said:
        raise MotionRAGError(
            f"{file.with_suffix('.json')} does not say the {role} encoder: copy it from where the weights were written "
            "(motionrag train), or import the release again"
        )
    return about


def _encoder(kind: type, folder: Path, named: Mapping[str, Any]) -> Any:
    """The encoder that a manifest names: in the package's folder, or else by its hub id."""
    inside = folder / Path(named["name"]).name
    return kind(str(inside) if inside.is_dir() else named["name"], size=named["size"])


def _check_encoder(folder: Path, encoder: Any, named: Mapping[str, Any]) -> None:
    """Raise MotionRAGError for other weights than those of the training; releases name theirs without a checksum."""
    found = encoder.identity["weights"]
    if named.get("weights", found) != found:
        raise MotionRAGError(
            f"{folder} was trained with the encoder {named['name']} (weights {named['weights'][:8]}), not with "
            f"{encoder.name} (weights {found[:8]}): give the encoder of the training"
        )
