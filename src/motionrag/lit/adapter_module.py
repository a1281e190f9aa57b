"""Stage 1: teach a frozen backbone to follow motion tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from motionrag.backbones.base import RANDOM_WEIGHTS, Backbone, MotionInput
from motionrag.backbones.parts import sampled_fingerprint
from motionrag.checkpoint import load_weights
from motionrag.data.batch import MotionBatch
from motionrag.encoders import MotionEncoder
from motionrag.errors import MotionRAGError
from motionrag.lit.stage import MakeOptimizer, MakeScheduler, Stage, step_seed
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler


class AdapterModule(Stage):
    """Trains the motion Resampler and the motion adapter through the backbone's own diffusion loss.

    The reference clip is the clip itself. Backbone and encoder are frozen and live outside the module tree: never in
    a checkpoint, never in the optimizer, always in eval mode.

    Args:
        backbone: what the adapter is attached to.
        resampler: motion features -> motion tokens.
        motion_adapter: called with the backbone's sites and `token_width`, e.g. a partial of
            `MotionAdapter.for_modules`.
        optimizer: called with the trainable parameters.
        motion_encoder: encodes clips whose features the data does not bring, and the zero clip.
        scheduler: called with the optimizer; steps once per optimizer step.
        reference_dropout: per-sample chance of the zero clip; the backbone drops its own conditions by its own rule.
        weights: weights file to start from.
        gradient_checkpointing: recompute the denoiser's activations in backward.
        cache: keep latents, contexts and motion features of clips seen once, in the CPU's memory (small data sets).
            The networks that make them then visit the device for new clips only; the autoencoder stays if every
            condition image gets new noise.
        fixed_image_noise: every condition image keeps one draw of its noise (the reference draws anew each time), so
            that `cache` keeps its latents too.
        seed: of noise and time steps.
        dropout_seed: of the dropout of captions and reference clips; None: `seed`.
    """

    def __init__(
        self,
        backbone: Backbone,
        resampler: Resampler,
        motion_adapter: Callable[..., MotionAdapter],
        optimizer: MakeOptimizer,
        motion_encoder: MotionEncoder,
        scheduler: MakeScheduler | None = None,
        reference_dropout: float = 0.15,
        weights: str | None = None,
        gradient_checkpointing: bool = False,
        cache: bool = False,
        fixed_image_noise: bool = False,
        seed: int = 0,
        dropout_seed: int | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        # A tuple, because attributes that are modules would be registered.
        self._frozen = (backbone, motion_encoder)
        backbone.denoiser.requires_grad_(False).eval()
        if gradient_checkpointing:
            backbone.denoiser.enable_gradient_checkpointing()
        self.resampler = resampler
        self.motion_adapter = motion_adapter(backbone.adapter_sites(), token_width=resampler.output_dim)
        if weights:
            load_weights(weights, resampler=self.resampler, motion_adapter=self.motion_adapter)
        self.reference_dropout = reference_dropout
        self.seed, self.fixed_image_noise = seed, fixed_image_noise
        self.dropout_seed = seed if dropout_seed is None else dropout_seed
        self._kept: dict[str, dict[tuple, Any]] | None = (
            {"latents": {}, "context": {}, "images": {}, "motion": {}} if cache else None
        )
        self._null_features: Tensor | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen backbone."""
        return self._frozen[0]

    @property
    def motion_encoder(self) -> MotionEncoder:
        """The frozen motion encoder."""
        return self._frozen[1]

    def clip_options(self) -> dict[str, int]:
        """Length and size of the clips that the backbone takes."""
        return {name: getattr(self.backbone, name) for name in ("frames", "height", "width")}

    # --- motion tokens -----------------------------------------------------------------------------------------

    def motion_features(self, batch: MotionBatch) -> Tensor:
        """Features (B, N, D) of the batch's own clips, from the data if they are there."""
        if batch.target_motion is not None:
            return batch.target_motion
        names = list(zip(batch.clip_id, _rates(batch), strict=True))
        return self._encoded("motion", names, lambda rows: self.motion_encoder(batch.video[rows].float()))

    @torch.no_grad()
    def frozen_features(self, batch: MotionBatch) -> dict[str, Tensor]:
        """What the frozen networks make of clips, as fields of MotionBatch: all that training needs of them."""
        images = batch.video[:, 0]
        return {
            "video": batch.video[:, :1],
            "latents": self.backbone.encode_video(batch.video),
            "context": self.backbone.encode_context(batch.captions, images),
            "target_motion": self.motion_features(batch),
        }

    def frozen_identity(self) -> dict[str, Any]:
        """What `frozen_features` depends on (JSON-able). Raises MotionRAGError for a backbone that conditions on a random
        frame, whose context cannot be kept."""
        backbone = self.backbone
        if backbone.random_frame:
            raise MotionRAGError(
                f"{backbone.name} is trained on a frame drawn from the clip anew each time, so it "
                "takes no features: set backbone.random_frame=false, or leave features out (module.cache=true keeps them "
                "in memory)"
            )
        about = {name: getattr(backbone, name) for name in ("name", "frames", "height", "width")}
        encoders = {k: v for k, v in vars(backbone).items() if isinstance(v, nn.Module) and k != "denoiser"}
        about["weights"] = sampled_fingerprint(encoders)
        return {"backbone": about, "motion_encoder": dict(self.motion_encoder.identity)}

    def null_features(self) -> Tensor:
        """Features (1, N, D) of the all-zero clip, computed once."""
        if self._null_features is None:
            side = self.motion_encoder.size
            # dtypes are named here because precision=bf16-true makes bf16 the default
            shape = (1, self.motion_encoder.frames, 3, side, side)
            place = next(self.motion_encoder.parameters()).device  # not worth a journey
            self._null_features = self.motion_encoder(torch.zeros(shape, device=place, dtype=torch.float32))
        return self._null_features.to(self.device)

    def motion_tokens(self, features: Tensor) -> Tensor:
        """Features (B, N, D) -> motion tokens (B, n, d) in the precision that is trained in."""
        return self.resampler(features.to(self.dtype))

    def clip_tokens(self, batch: MotionBatch, dropped: Tensor | None = None) -> Tensor:
        """The tokens (B, n, d) that the backbone is shown: of the clips themselves; of `dropped` ones (B,), bool, the
        zero clip's."""
        features = self.motion_features(batch)
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.null_features(), features)
        return self.motion_tokens(features)

    # --- training ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if not self.motion_adapter.attached:
            self.motion_adapter.attach(self.backbone.adapter_sites())

    def teardown(self, stage: str) -> None:
        self.motion_adapter.detach()

    def on_fit_start(self) -> None:
        self.backbone.denoiser.to(self.device)  # the other networks come when they are needed
        if self.backbone.random_weights:
            self.print(RANDOM_WEIGHTS.format(self.backbone.name))

    def training_step(self, batch: MotionBatch, batch_idx: int) -> Tensor:
        dropout = [
            torch.Generator().manual_seed(step_seed(self.dropout_seed, "dropout", p)) for p in batch.position
        ]
        conditions = self._conditions(batch, "noise", dropout)
        # null tokens, not a skipped branch: DDP needs every gradient
        drop = torch.cat([torch.rand(1, generator=g, dtype=torch.float32) for g in dropout])
        tokens = self.clip_tokens(batch, (drop < self.reference_dropout).to(self.device))
        # Not `use`: gradient checkpointing reads the tokens again during backward, after this method returned.
        self.motion_adapter.set(tokens)
        loss = self.backbone.loss(*conditions)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: MotionBatch, batch_idx: int) -> None:
        self.motion_adapter.clear()

    def validation_step(self, batch: MotionBatch, batch_idx: int) -> None:
        """Loss with the clips' motion, and with the zero clip's on the same noise."""
        tokens = self.clip_tokens(batch)
        null = self.motion_tokens(self.null_features()).expand_as(tokens)
        for name, motion in (("val/loss", tokens), ("val/loss_null", null)):
            with self.motion_adapter.use(motion):
                loss = self.backbone.loss(*self._conditions(batch, "validation"))
            self.log(name, loss, prog_bar=name == "val/loss", batch_size=len(batch), sync_dist=True)

    @torch.no_grad()
    def _conditions(
        self, batch: MotionBatch, purpose: str, dropout: list[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, list[torch.Generator], Tensor | None, Tensor | None]:
        """Arguments of the backbone's loss; with `dropout`, one generator a clip, conditions are left out."""
        backbone, clips = self.backbone, batch.clip_id
        # one for each clip: two processes of batch n draw what one of 2n draws
        generator = [torch.Generator().manual_seed(step_seed(self.seed, purpose, p)) for p in batch.position]
        rates = _rates(batch)
        frames = [0] * len(batch)
        if backbone.random_frame:
            frames = [int(torch.randint(backbone.frames, (1,), generator=g)) for g in generator]
        images = batch.video[range(len(batch)), frames]
        # the first frame is the same at every rate
        pictures = [(c, f, *([r] if f and r else [])) for c, f, r in zip(clips, frames, rates, strict=True)]
        latents, context = batch.latents, batch.context
        if latents is None:
            latents = self._encoded(
                "latents",
                list(zip(clips, rates, strict=True)),
                lambda rows: backbone.encode_video(batch.video[rows]),
            )
        if context is None:
            context = self._encoded(
                "context",
                pictures,
                lambda rows: backbone.encode_context([batch.captions[r] for r in rows], images[rows]),
            )
        image_latents, level = self._image_latents(images, pictures, generator)
        if dropout is not None:
            kept = [
                backbone.drop_conditions(context[i : i + 1], image_latents[i : i + 1], g)
                for i, g in enumerate(dropout)
            ]
            context, image_latents = (torch.cat(part) for part in zip(*kept, strict=True))
        return latents, image_latents, context, generator, level, batch.fps

    def _image_latents(
        self, images: Tensor, names: list[tuple], generator: list[torch.Generator]
    ) -> tuple[Tensor, Tensor | None]:
        """Condition latents (B, 1, C, h, w) and their noise levels (B,)."""
        backbone = self.backbone
        if not self.fixed_image_noise:
            level = backbone.image_noise_level(len(images), generator)
            with self._on_device("images"):
                return backbone.encode_image(images, generator, level), level
        kept = {} if self._kept is None else self._kept["images"]
        new = {name: row for row, name in enumerate(names) if name not in kept}
        with self._on_device("images") if new else nullcontext():
            for name, row in new.items():
                own = torch.Generator().manual_seed(step_seed(self.seed, "image", name))
                level = backbone.image_noise_level(1, own)
                latents = backbone.encode_image(images[row : row + 1], own, level)
                kept[name] = latents if self._kept is None else latents.cpu(), level
        latents, levels = zip(*(kept[name] for name in names), strict=True)
        return torch.cat(latents).to(self.device), None if levels[0] is None else torch.cat(levels)

    def _encoded(self, kind: str, names: list[tuple], encode: Callable[[list[int]], Tensor]) -> Tensor:
        """Encode all rows, or with the cache only those never seen before."""
        if self._kept is None:
            with self._on_device(kind):
                return encode(list(range(len(names))))
        kept = self._kept[kind]
        new = list({name: row for row, name in enumerate(names) if name not in kept}.items())
        if new:
            with self._on_device(kind):
                encoded = encode([row for _, row in new]).cpu()
            kept.update(zip((name for name, _ in new), encoded, strict=True))
        return torch.stack([kept[name] for name in names]).to(self.device)

    @contextmanager
    def _on_device(self, kind: str) -> Iterator[None]:
        """The network that makes one kind of features is on the device; with the cache it leaves afterwards, unless every
        step needs it."""
        autoencoder = self.backbone.autoencoder_to
        move = {"context": self.backbone.encoders_to, "motion": self.motion_encoder.to}.get(kind, autoencoder)
        move(self.device)
        yield
        if self._kept is not None and (move != autoencoder or self.fixed_image_noise):
            move("cpu")

    # --- looking at it -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, batch: MotionBatch, steps: int, guidance: float) -> dict[str, Tensor]:
        """Videos (B, T, 3, H, W) in [-1, 1] from the batch's first frames: "without" and "with" its motion."""
        motion = MotionInput(
            self.motion_adapter,
            self.clip_tokens(batch),
            self.motion_tokens(self.null_features()),
        )
        images = batch.video[:, 0]
        with self._on_device("context"):
            contexts = (
                self.backbone.encode_context(batch.captions, images),
                self.backbone.null_context(images),
            )
        seeds = [step_seed(self.seed, "sample", position) for position in batch.position]
        options = {"steps": steps, "guidance": guidance, "seeds": seeds}
        with self.motion_adapter.use(None), self._on_device("latents"):
            return {
                "without": self.backbone.sample(images, *contexts, **options),
                "with": self.backbone.sample(images, *contexts, motion=motion, **options),
            }


def _rates(batch: MotionBatch) -> list[float | None]:
    """Frame rate of each clip, None where the data has none."""
    return [None] * len(batch) if batch.fps is None else batch.fps.tolist()
