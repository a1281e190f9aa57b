"""Stage 2: teach CAMA to predict a clip's motion tokens from reference clips."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from motionrag.checkpoint import load_weights
from motionrag.data.batch import MotionBatch
from motionrag.errors import MotionRAGError
from motionrag.lit.stage import MakeOptimizer, MakeScheduler, Stage, step_seed
from motionrag.modules.cama import CAMA, cama_losses, sequence_order
from motionrag.modules.resampler import Resampler


class CAMAModule(Stage):
    """Trains CAMA, its appearance Resampler and start tokens on the motion tokens of a frozen motion Resampler.

    Training takes the squared error over all clips of the sequence, validation over the target's block, beside two
    simple predictions: the mean of the references' tokens and the nearest reference's.

    Args:
        cama: what is trained.
        resampler: the motion Resampler; held outside the module tree and frozen.
        resampler_weights: the Stage 1 weights file it comes from (None: it is filled already).
        optimizer: called with the trainable parameters.
        scheduler: called with the optimizer; steps once per optimizer step.
        weights: CAMA weights file to start from.
        exchange: share of training samples in which some tokens, of references and target alike, are another sample's
            (see `exchange_tokens`; 0 in the paper). CAMA then learns to hand on motion that it does not know.
        cache: keep every clip's motion tokens in the CPU's memory once they are computed (small databases).
        seed: of what is exchanged; it depends on nothing but this and the sample's place in the data.
    """

    def __init__(
        self,
        cama: CAMA,
        resampler: Resampler,
        optimizer: MakeOptimizer,
        resampler_weights: str | None = None,
        scheduler: MakeScheduler | None = None,
        weights: str | None = None,
        exchange: float = 0.0,
        cache: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 <= exchange <= 1:
            raise MotionRAGError(f"module.exchange={exchange}: expected a share from 0 (never) to 1")
        super().__init__(optimizer, scheduler)
        if (resampler.tokens, resampler.output_dim) != (cama.tokens, cama.width):
            raise ValueError(
                f"the motion Resampler gives {resampler.tokens} x {resampler.output_dim} tokens, "
                f"CAMA works on {cama.tokens} x {cama.width}"
            )
        if resampler_weights:
            load_weights(resampler_weights, resampler=resampler)
        self._frozen = (resampler.requires_grad_(False).eval(),)
        self.cama = cama
        if weights:
            load_weights(weights, cama=cama)
        self.exchange, self.seed = exchange, seed
        self._kept: dict[str, Tensor] | None = {} if cache else None

    @property
    def resampler(self) -> Resampler:
        """The frozen motion Resampler."""
        return self._frozen[0]

    def clip_options(self) -> dict[str, int]:
        """Nothing: features have their size already."""
        return {}

    def feature_widths(self) -> dict[str, int]:
        """Width that motion and appearance features must have."""
        return {
            "motion": self.resampler.embedding_dim,
            "appearance": self.cama.appearance_resampler.embedding_dim,
        }

    @torch.no_grad()
    def motion_tokens(self, features: Tensor) -> Tensor:
        """Features (..., N, D) -> motion tokens (..., l, d), in the precision that is trained in."""
        # The Resampler keeps its own precision: it is frozen, and outside what Lightning casts.
        exact = next(self.resampler.parameters()).dtype
        tokens = self.resampler(features.flatten(0, -3).to(exact))
        return tokens.unflatten(0, features.shape[:-2]).to(self.dtype)

    def on_fit_start(self) -> None:
        self.resampler.to(self.device)

    def training_step(self, batch: MotionBatch, batch_idx: int) -> Tensor:
        prediction, truth = self._predict(batch, self.exchange)
        losses = cama_losses(prediction, truth)
        self.log("train/loss", losses["mse"], prog_bar=True, batch_size=len(batch))
        self.log("train/smooth_l1", losses["smooth_l1"], batch_size=len(batch))
        return losses["mse"]

    def validation_step(self, batch: MotionBatch, batch_idx: int) -> None:
        prediction, truth = self._predict(batch)
        references, target = truth[:, :-1], truth[:, -1]
        losses = cama_losses(prediction, truth, target_only=True)
        values = {
            "val/loss": losses["mse"],
            "val/smooth_l1": losses["smooth_l1"],
            "val/loss_mean_reference": F.mse_loss(references.mean(1), target),
            "val/loss_nearest_reference": F.mse_loss(references[:, -1], target),
        }
        self.log_dict(values, batch_size=len(batch), sync_dist=True)

    def _predict(self, batch: MotionBatch, exchange: float = 0.0) -> tuple[Tensor, Tensor]:
        """CAMA's tokens and the true ones, both (B, K+1, l, d) in sequence order."""
        if batch.reference_tokens is not None:  # of this Resampler: the database was checked
            tokens = torch.cat([batch.reference_tokens, batch.target_tokens[:, None]], dim=1)
        else:
            tokens = self._tokens(
                batch, torch.cat([batch.reference_motion, batch.target_motion[:, None]], dim=1)
            )
        tokens = exchange_tokens(
            tokens, exchange, [step_seed(self.seed, "exchange", p) for p in batch.position]
        )
        references = tokens[:, :-1]
        truth = sequence_order(references, tokens[:, -1])
        return self.cama(references, batch.reference_appearance, batch.target_appearance), truth

    def _tokens(self, batch: MotionBatch, features: Tensor) -> Tensor:
        """Motion tokens (B, S, l, d) of the references' and the targets' features (B, S, N, D); with the cache on, each
        clip's only once."""
        if self._kept is None:
            return self.motion_tokens(features)
        rows = [i for own, clip in zip(batch.reference_id, batch.clip_id, strict=True) for i in (*own, clip)]
        new = {clip: place for place, clip in enumerate(rows) if clip not in self._kept}
        if new:
            tokens = self.motion_tokens(features.flatten(0, 1)[list(new.values())]).cpu()
            self._kept.update(zip(new, tokens, strict=True))
        kept = torch.stack([self._kept[clip] for clip in rows]).to(features.device)
        return kept.unflatten(0, features.shape[:2])


def exchange_tokens(tokens: Tensor, share: float, seeds: Sequence[int]) -> Tensor:
    """Motion tokens (B, S, l, d) with some of the l places, the same in all S clips, taken from the sample before.

    It happens to each sample with probability `share`, to each place of it with one that is drawn evenly from 0..1 for
    that sample, by its own one of `seeds` (B). Such mixtures are motions that no clip shows, yet references and target
    agree about them.
    """
    if not share:
        return tokens
    taken = []
    for seed in seeds:
        draw = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
        taken.append(draw(tokens.shape[2]) < draw(1) * (draw(1) < share))
    return torch.where(torch.stack(taken).to(tokens.device)[:, None, :, None], tokens.roll(1, 0), tokens)
