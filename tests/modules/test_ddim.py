"""Schedule, steps and guidance: against diffusers where it does the same, and what must hold anyway."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.errors import MotionRAGError
from motionrag.modules.ddim import Schedule, ddim_step, guide
from motionrag.modules.diffusion import add_noise, velocity


def tensors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, 3, 2, 2, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("zero_snr", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_whole_run_equals_diffusers_where_its_stride_is_right(zero_snr, eta):
    theirs = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=False, clip_sample=False,
    )  # fmt: skip
    ours = Schedule(zero_terminal_snr=zero_snr)
    torch.testing.assert_close(ours.abar.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)
    theirs.set_timesteps(10)
    steps = ours.steps(10, "trailing", eta)
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    x = expected = tensors(1)[0]
    for step in steps:
        v, noise = tensors(2, step.t)
        x, _ = ddim_step(x, v, step, noise)
        expected = theirs.step(v, step.t, expected, eta=eta, variance_noise=noise).prev_sample
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=1e-4)


def test_no_signal_is_left_at_the_end_of_a_zero_snr_schedule():
    assert Schedule().abar[-1] == 0
    assert Schedule(zero_terminal_snr=False).abar[-1] > 0.004


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 1000))
def test_trailing_times_begin_at_the_end_and_fall(count):
    steps = Schedule().steps(count, "trailing")
    times = [step.t for step in steps]
    assert len(times) == count and times[0] == 999 and min(times) >= 0
    assert all(a > b for a, b in zip(times, times[1:], strict=False))
    assert all(
        a.abar_prev == b.abar and a.scale_prev == b.scale for a, b in zip(steps, steps[1:], strict=False)
    )


def test_trailing_times_are_the_published_ones():
    schedule = Schedule()
    for count in range(1, 1001):
        times = [step.t for step in schedule.steps(count, "trailing")]
        theirs = np.round(np.arange(1000, 0, -1000 / count)).astype(np.int64) - 1
        assert times == theirs[:count].tolist()
        assert all(
            time == -1 for time in theirs[count:]
        )  # at 61 and others: wraps to the noisiest level there


def test_uniform_times_take_one_step_more_and_miss_the_end():
    times = [step.t for step in Schedule().steps(30, "uniform")]
    assert (len(times), times[0], times[-1]) == (31, 991, 1)


@pytest.mark.parametrize(
    ("count", "spacing", "message"),
    [
        (0, "trailing", "steps=0: expected 1 to 1000"),
        (1001, "uniform", "steps=1001: expected 1 to 1000"),
        (9, "uniform", "steps=9: uniform spacing would begin at time 1000"),
        (4, "leading", "spacing='leading': choose trailing or uniform"),
    ],
)
def test_steps_that_do_not_work(count, spacing, message):
    with pytest.raises(MotionRAGError, match=message) as error:
        Schedule().steps(count, spacing)
    assert "\n" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 60), base=st.sampled_from([1.0, 0.3]), kind=st.sampled_from(["v", "noise"]))
def test_a_perfect_network_keeps_to_the_path(count, base, kind):
    """Without added noise, steps lead along x_t of the same clean latents and noise, rescaled for each time."""
    schedule = Schedule(base_scale=base, zero_terminal_snr=kind == "v")
    x0, noise = tensors(2)
    steps = schedule.steps(count, "trailing", eta=0.0)
    for step in (steps[0], steps[count // 2], steps[-1]):
        abar, before = torch.tensor([step.abar]), torch.tensor([step.abar_prev])
        clean = schedule.rescale(x0, torch.tensor([step.t]))
        predicted = velocity(clean, noise, abar) if kind == "v" else noise
        x_prev, implied = ddim_step(add_noise(clean, noise, abar), predicted, step, noise, kind)
        torch.testing.assert_close(implied, x0 * step.scale_prev, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(x_prev, add_noise(implied, noise, before), atol=1e-4, rtol=1e-4)


def test_rescale_turns_at_its_step():
    schedule = Schedule(base_scale=0.3, turning_step=400)
    scale = schedule.scale(torch.arange(1000))
    assert scale[0] == 1 and scale[398] > 0.3 and scale[399:].sub(0.3).abs().max() < 1e-12
    assert Schedule().scale(torch.arange(1000)).eq(1).all()
    x0 = torch.ones(2, 1, 3)
    assert torch.allclose(schedule.rescale(x0, torch.tensor([0, 999]))[:, 0, 0], torch.tensor([1.0, 0.3]))


def test_guidance():
    conditional, unconditional, image_only = tensors(3)
    assert torch.allclose(guide(conditional, unconditional, 1.0), conditional, atol=1e-6)
    plain = guide(conditional, unconditional, 3.0)
    assert torch.allclose(plain, 3 * conditional - 2 * unconditional, atol=1e-5)
    # one scale for text and image: what the image alone says cancels out
    assert torch.allclose(guide(conditional, unconditional, 3.0, image_only), plain, atol=1e-5)
    split = guide(conditional, unconditional, 3.0, image_only, image_scale=1.0)
    assert torch.allclose(split, image_only + 3 * (conditional - image_only), atol=1e-5)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance_rescale_is_that_of_diffusers(rescale):
    conditional, unconditional = tensors(2)
    guided = guide(conditional, unconditional, 7.5, rescale=rescale)
    expected = rescale_noise_cfg(guide(conditional, unconditional, 7.5), conditional, rescale)
    torch.testing.assert_close(guided, expected)
    if rescale == 1:
        torch.testing.assert_close(guided.flatten(1).std(1), conditional.flatten(1).std(1))
