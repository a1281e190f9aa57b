"""Stage 3: what trains, what the backbone is shown, for every backbone."""

import pytest
import torch

from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.svd import SVD
from motionrag.checkpoint import load_weights, save_weights, trainable_state
from motionrag.data.datamodule import Part
from motionrag.errors import MotionRAGError


def train_step(module, batch):
    module.setup("fit")
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0)
    loss.backward()
    module.teardown("fit")
    return loss


@pytest.mark.parametrize("backbone", [None, SVD, DynamiCrafter])
def test_a_batch_of_one_trains_everything_and_its_references_move_the_loss(
    backbone, joint_module, memory_clips
):
    """The published joint step shows a batch of one no motion, and runs for CogVideoX alone."""
    batch = Part(memory_clips(), list(range(12))).__getitems__([0])
    module = joint_module(init="reference", reference_dropout=0, backbone=backbone and backbone.tiny())
    loss = train_step(module, batch)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    frozen = [module.backbone.vae, module.backbone.denoiser, module.motion_encoder]
    assert not any(p.requires_grad or p.grad is not None for part in frozen for p in part.parameters())
    optimised = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert optimised == {id(p) for p in module.parameters()}
    batch.reference_motion = -batch.reference_motion
    assert (train_step(module, batch) - loss).abs() > 1e-6


def test_the_backbone_sees_camas_prediction_or_the_zero_clip(joint_module, batch):
    module, tokens = joint_module(), {}
    for name, drop in (("kept", 0.0), ("dropped", 1.0)):
        module.reference_dropout = drop
        module.backbone.loss = lambda latents, *_, n=name: (
            tokens.update({n: module.motion_adapter._in_use.tokens})
            or sum(p.sum() for p in module.parameters()) * 0
        )
        train_step(module, batch)
    references = [module.resampler(clip) for clip in batch.reference_motion]
    looks = batch.reference_appearance, batch.target_appearance
    torch.testing.assert_close(tokens["kept"], module.cama.predict(torch.stack(references), *looks))
    null = module.resampler(module.motion_encoder(torch.zeros(1, 12, 3, 16, 16)))
    torch.testing.assert_close(tokens["dropped"], null.expand(2, -1, -1))


def test_every_parameter_gets_a_gradient_even_when_all_references_are_dropped(joint_module, batch):
    module = joint_module(reference_dropout=1.0)  # DDP would hang on an unused parameter
    train_step(module, batch)
    assert all(p.grad is not None for p in module.parameters())


def test_saved_is_what_both_stages_save_and_starts_each_of_them(
    joint_module, adapter_module, cama_module, tmp_path
):
    module = joint_module(init="reference")
    state = trainable_state(module)
    assert state.keys() == {*adapter_module().state_dict(), *cama_module().state_dict()}
    file = str(save_weights(tmp_path / "joint.safetensors", state))
    again = joint_module(weights=file, cama_weights=file)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    load_weights(file, cama=cama_module().cama)
    with pytest.raises(MotionRAGError, match="missing: resampler.latents"):
        again.on_load_checkpoint({"state_dict": cama_module().state_dict()})


def test_loss_falls(joint_module, fit, memory_clips):
    module = joint_module(init="reference", reference_dropout=0, cache=True)
    module.backbone.text_dropout = 0
    first = fixed_loss(module, memory_clips())
    fit(module, 30)
    assert fixed_loss(module, memory_clips()) < 0.9 * first
    assert not any(m._forward_pre_hooks for m in module.backbone.denoiser.modules())


def fixed_loss(module, clips):
    """Loss on clips and noise that stay the same."""
    batch = Part(clips, list(range(12))).__getitems__(list(range(12)))
    module.setup("validate")
    with torch.no_grad(), module.motion_adapter.use(module.clip_tokens(batch)):
        loss = module.backbone.loss(*module._conditions(batch, "validation")).item()
    module.teardown("validate")
    return loss


def test_sampling_uses_the_prediction(joint_module, batch):
    module = joint_module(init="reference")
    module.setup("fit")
    videos = module.sample(batch, steps=2, guidance=2.0)
    batch.reference_motion = -batch.reference_motion
    other = module.sample(batch, steps=2, guidance=2.0)
    assert torch.equal(videos["without"], other["without"])
    assert not torch.allclose(videos["with"], other["with"])
