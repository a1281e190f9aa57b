"""Stage 2: what trains, what is saved, what the losses compare."""

import pytest
import torch
import torch.nn.functional as F

from motionrag.checkpoint import save_weights
from motionrag.data.datamodule import Part
from motionrag.errors import MotionRAGError
from motionrag.lit.cama_module import exchange_tokens
from motionrag.modules.resampler import Resampler


def test_gradients_and_keys_are_exactly_those_of_cama(cama_module, batch):
    module = cama_module()
    module.log = lambda *args, **kwargs: None
    module.training_step(batch, 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(p.grad is None for p in module.resampler.parameters())
    assert list(module.state_dict()) == [f"cama.{k}" for k in module.cama.state_dict()]
    assert "cama.sos" in module.state_dict()
    assert not module.train().resampler.training


def test_validation_compares_with_simple_predictions(cama_module, batch):
    module, logged = cama_module(), {}
    module.log_dict = lambda values, **_: logged.update(values)
    module.validation_step(batch, 0)
    tokens, target = module.motion_tokens(batch.reference_motion), module.motion_tokens(batch.target_motion)
    prediction = module.cama.predict(tokens, batch.reference_appearance, batch.target_appearance)
    expected = {
        "val/loss": F.mse_loss(prediction, target),
        "val/smooth_l1": F.smooth_l1_loss(prediction, target),
        "val/loss_mean_reference": F.mse_loss(tokens.mean(1), target),
        "val/loss_nearest_reference": F.mse_loss(tokens[:, 0], target),
    }
    torch.testing.assert_close(logged, expected)


def test_kept_tokens_are_the_computed_ones(cama_module, memory_clips):
    part, seen = Part(memory_clips(), list(range(12))), []
    plain, keeping = cama_module(), cama_module(cache=True)
    keeping.load_state_dict(plain.state_dict())
    keeping.resampler.load_state_dict(plain.resampler.state_dict())
    keeping.resampler.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for positions in ([0, 1], [1, 4], [0, 5]):
        batch = part.__getitems__(positions)
        torch.testing.assert_close(keeping._predict(batch), plain._predict(batch))
    assert seen == [6]  # all three batches are of the clips 0, 4, 8 and 1, 5, 9


def test_exchanged_tokens_agree_in_all_clips_of_a_sample():
    samples, places = 400, 8
    tokens = torch.arange(samples)[:, None, None, None].expand(samples, 4, places, 3).float()
    mixed = exchange_tokens(tokens, 0.5, range(samples))
    assert torch.equal(mixed, mixed[:, :1].expand_as(mixed))  # the same places in references and target
    foreign = mixed[:, 0, :, 0] != tokens[:, 0, :, 0]
    before = (torch.arange(samples) - 1) % samples
    assert torch.equal(mixed[:, 0, :, 0][foreign], before[:, None].expand(-1, places)[foreign].float())
    assert foreign.float().mean().item() == pytest.approx(
        0.25, abs=0.04
    )  # half of the samples, half of their places
    assert 0.35 < foreign.any(1).float().mean() < 0.5 and 0 < foreign.all(1).float().mean() < 0.15
    assert exchange_tokens(tokens, 0.0, range(samples)) is tokens


def test_exchange_is_for_training_only(cama_module, batch):
    module, logged = cama_module(exchange=1.0), []
    module.log = lambda name, value, **_: logged.append(value.item())
    module.log_dict = lambda values, **_: logged.append(values["val/loss"].item())
    for step in (module.training_step, module.validation_step):
        for numbers in ((1, 2, 3), (1, 1, 1)):  # other seeds; the same again, whatever was drawn in between
            losses = []
            for module.seed in numbers:
                torch.rand(1)
                step(batch, 0)
                losses.append(logged[-1])
            same = step == module.validation_step or len(set(numbers)) == 1
            assert len(set(losses)) == (1 if same else 3)
    with pytest.raises(MotionRAGError, match=r"module.exchange=2: expected a share from 0 \(never\) to 1"):
        cama_module(exchange=2)


def test_loss_falls(cama_module, fit):
    module = cama_module(lr=3e-3)
    before = {k: v.clone() for k, v in module.resampler.state_dict().items()}
    losses, _ = fit(module, 60)
    assert sum(list(losses.values())[-5:]) < 0.5 * sum(list(losses.values())[:5])
    assert all(torch.equal(v, before[k]) for k, v in module.resampler.state_dict().items())


def test_the_resampler_comes_from_a_stage_1_file(cama_module, tmp_path):
    resampler = Resampler(
        embedding_dim=16, dim=16, depth=1, dim_head=8, heads=2, num_queries=3, output_dim=16
    )
    state = {f"resampler.{k}": v for k, v in resampler.state_dict().items()}
    path = save_weights(tmp_path / "adapter.safetensors", state)
    module = cama_module(resampler_weights=str(path))
    assert torch.equal(module.resampler.latents, resampler.latents)
    state["resampler.latents"] = state["resampler.latents"][:, :2].clone()
    save_weights(path, state)
    with pytest.raises(MotionRAGError, match=r"resampler.latents \(1, 2, 16\) instead of \(1, 3, 16\)"):
        cama_module(resampler_weights=str(path))
