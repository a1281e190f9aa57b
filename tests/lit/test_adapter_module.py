"""Stage 1: what trains, what is saved, what the motion tokens do."""

import pytest
import torch

from motionrag.data.datamodule import Part
from motionrag.errors import MotionRAGError


def train_step(module, batch):
    module.setup("fit")
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0)
    loss.backward()
    return loss


def test_gradients_reach_exactly_the_trainable_part(adapter_module, batch):
    module = adapter_module(init="reference", reference_dropout=0)
    train_step(module, batch)
    frozen = [module.backbone.vae, module.backbone.denoiser, module.motion_encoder]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert not any(p.requires_grad or p.grad is not None for part in frozen for p in part.parameters())
    assert not any(m.training for part in frozen for m in part.modules())


def test_saved_and_optimised_are_exactly_resampler_and_adapter(adapter_module):
    module = adapter_module().train()
    sites = [f"motion_adapter.transformer_blocks/{i}/attn1.to_{p}.weight" for i in range(2) for p in "qkv"]
    resampler = [f"resampler.{k}" for k in module.resampler.state_dict()]
    assert list(module.state_dict()) == resampler + sites
    optimised = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert optimised == {id(p) for p in (*module.resampler.parameters(), *module.motion_adapter.parameters())}
    assert not module.backbone.denoiser.training and not module.motion_encoder.training


def test_every_parameter_gets_a_gradient_even_when_all_references_are_dropped(adapter_module, batch):
    module = adapter_module(reference_dropout=1.0)  # DDP would hang on an unused parameter
    train_step(module, batch)
    assert all(p.grad is not None for p in module.parameters())


def test_dropout_uses_the_zero_clip_and_the_empty_caption(adapter_module, batch):
    seen = {}
    for name, drop in (("kept", 0.0), ("dropped", 1.0)):
        module = adapter_module(reference_dropout=drop)
        module.backbone.text_dropout = drop
        module.backbone.loss = lambda latents, image, context, *_, m=module, n=name: (
            seen.update({n: (m.motion_adapter._in_use.tokens, context)}) or latents.sum() * 0
        )
        module.setup("fit")
        module.log = lambda *args, **kwargs: None
        module.training_step(batch, 0)
    null = module.resampler(module.motion_encoder(torch.zeros(1, 12, 3, 16, 16)))
    torch.testing.assert_close(seen["dropped"][0], null.expand(2, -1, -1))
    torch.testing.assert_close(seen["kept"][0], module.resampler(batch.target_motion))
    images = batch.video[:, 0]
    assert torch.equal(seen["dropped"][1], module.backbone.null_context(images))
    assert torch.equal(seen["kept"][1], module.backbone.encode_context(batch.captions, images))


def test_a_fresh_adapter_starts_at_the_bare_loss_and_motion_moves_it(adapter_module, batch):
    losses = {}
    for init in ("zero", "reference"):
        module = adapter_module(init=init)
        module.setup("fit")
        logged = {}
        module.log = lambda name, value, logged=logged, **_: logged.update({name: value.item()})
        module.validation_step(batch, 0)
        with module.motion_adapter.use(None):
            losses[init] = module.backbone.loss(*module._conditions(batch, "validation")).item(), logged
        module.teardown("fit")
    bare, logged = losses["zero"]
    assert logged["val/loss"] == logged["val/loss_null"] == bare
    bare, logged = losses["reference"]
    assert len({logged["val/loss"], logged["val/loss_null"], bare}) == 3


def test_options_that_must_not_change_the_numbers(adapter_module, batch):
    """Gradient checkpointing and the cache change memory and time only."""
    check_same_step(adapter_module, batch, [{}, {"gradient_checkpointing": True}, {"cache": True}])
    check_same_step(
        adapter_module, batch, [{"fixed_image_noise": True}, {"fixed_image_noise": True, "cache": True}]
    )


def test_clips_at_several_rates_are_told_apart(adapter_module, batch):
    """Each rate has latents of its own in the cache, and the backbone hears of it; first frames are shared."""
    module = adapter_module(cache=True)
    batch.clip_id, batch.fps = ["same", "same"], torch.tensor([8.0, 12.0])
    latents, *_, fps = module._conditions(batch, "noise")
    assert not torch.equal(latents[0], latents[1]) and fps is batch.fps
    assert set(module._kept["latents"]) == {("same", 8.0), ("same", 12.0)}
    assert set(module._kept["context"]) == {("same", 0)}


def check_same_step(adapter_module, batch, variants):
    results = []
    for options in variants:
        module = adapter_module(init="reference", **options)
        loss = train_step(module, batch)
        if options.get("cache"):  # the second time everything comes from memory
            module.zero_grad()
            module.backbone.encode_video = module.backbone.encode_context = None
            if options.get("fixed_image_noise"):
                module.backbone.encode_image = None
            loss = train_step(module, batch)
        results.append((loss, [p.grad for p in module.parameters()]))
    for loss, grads in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(grads, results[0][1])


def test_features_come_from_the_encoder_when_the_data_has_none(adapter_module, batch):
    module = adapter_module()
    batch.target_motion = None
    assert torch.equal(module.motion_features(batch), module.motion_encoder(batch.video))


def test_loss_falls(adapter_module, fit, memory_clips):
    module = adapter_module(init="reference", lr=1e-2, reference_dropout=0, cache=True)
    module.backbone.text_dropout = 0
    before = {k: v.clone() for k, v in module.backbone.denoiser.state_dict().items()}
    fit(module, 1)
    first = fixed_loss(module, memory_clips())
    fit(module, 30)
    assert fixed_loss(module, memory_clips()) < 0.9 * first
    assert all(torch.equal(v, before[k]) for k, v in module.backbone.denoiser.state_dict().items())
    assert not any(m._forward_pre_hooks for m in module.backbone.denoiser.modules())


def fixed_loss(module, clips):
    """Loss on clips and noise that stay the same."""
    batch = Part(clips, list(range(12))).__getitems__(list(range(12)))
    module.setup("validate")
    with torch.no_grad(), module.motion_adapter.use(module.resampler(batch.target_motion)):
        loss = module.backbone.loss(*module._conditions(batch, "validation")).item()
    module.teardown("validate")
    return loss


def test_sampling_with_and_without_motion(adapter_module, batch):
    module = adapter_module(init="reference")
    module.setup("fit")
    videos = module.sample(batch, steps=2, guidance=2.0)
    assert all(v.shape == (2, 9, 3, 32, 32) for v in videos.values())
    assert not torch.allclose(videos["with"], videos["without"])


def test_a_checkpoint_of_another_size_is_refused_by_name(adapter_module, cama_module):
    module = adapter_module()
    with pytest.raises(MotionRAGError, match=r"missing: resampler.latents.*unexpected: cama.sos"):
        module.on_load_checkpoint({"state_dict": cama_module().state_dict()})
