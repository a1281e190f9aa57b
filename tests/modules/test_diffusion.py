"""Formulas of v-prediction."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.modules import diffusion as D

ABAR = st.floats(0, 0.999)


def tensors(seed, n=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, generator=generator) for _ in range(n)]


@settings(max_examples=25, deadline=None)
@given(abar=st.tuples(ABAR, ABAR), seed=st.integers(0, 99))
def test_the_true_velocity_gives_back_the_clean_latents(abar, seed):
    x0, noise = tensors(seed, 2)
    abar = torch.tensor(abar)
    x_t = D.add_noise(x0, noise, abar)
    torch.testing.assert_close(D.x0_from_velocity(D.velocity(x0, noise, abar), x_t, abar), x0)
    assert D.v_loss(D.velocity(x0, noise, abar), x0, noise, abar) == 0


@settings(max_examples=25, deadline=None)
@given(abar=st.tuples(ABAR, ABAR), seed=st.integers(0, 99))
def test_both_ways_to_write_the_loss_agree(abar, seed):
    v, x0, noise = tensors(seed)
    abar = torch.tensor(abar)
    a, b = D.v_loss(v, x0, noise, abar), D.weighted_x0_loss(v, x0, noise, abar)
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_ends_of_the_schedule():
    x0, noise = tensors(0, 2)
    assert torch.equal(D.add_noise(x0, noise, torch.zeros(2)), noise)
    assert torch.equal(D.add_noise(x0, noise, torch.ones(2)), x0)


def test_image_noise_is_drawn_per_sample_around_exp_minus_three():
    sigma = D.image_noise_sigma(4000, torch.Generator().manual_seed(0))
    assert sigma.shape == (4000,) and sigma.unique().numel() > 3900
    assert abs(sigma.log().mean() + 3) < 0.05 and abs(sigma.log().std() - 0.5) < 0.05
    image, noise = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert D.noisy_image(image, torch.tensor([1.0, 2.0]), noise)[:, 0, 0, 0].tolist() == [1, 2]
    assert (
        D.noisy_image(image, torch.tensor([3.0]), noise).eq(3).all()
    )  # one level for the batch, as the reference


def test_condition_image_enters_the_first_frame_only():
    latents, image = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 1, 4, 5, 5)
    out = D.first_frame_condition(latents, image)
    assert out.shape == (2, 3, 8, 5, 5)
    assert torch.equal(out[:, :, :4], latents) and torch.equal(out[:, :1, 4:], image)
    assert not out[:, 1:, 4:].any()
