"""Resampler: shapes, samples apart from one another, sizes as published."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motionrag.modules.resampler import Resampler

SMALL = {
    "dim": 16,
    "depth": 2,
    "dim_head": 4,
    "heads": 3,
    "num_queries": 5,
    "embedding_dim": 12,
    "output_dim": 8,
}


@settings(max_examples=10, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), frames=st.sampled_from([None, 1, 3]))
def test_any_number_of_features_gives_the_same_number_of_tokens(batch, tokens, frames):
    resampler = Resampler(**SMALL, video_length=frames)
    out = resampler(torch.randn(batch, tokens, 12))
    assert out.shape == (batch, 5 * (frames or 1), 8) == (batch, resampler.tokens, resampler.output_dim)


def test_two_samples_together_equal_each_alone():
    torch.manual_seed(0)
    resampler, x = Resampler(**SMALL), torch.randn(2, 7, 12)
    torch.testing.assert_close(resampler(x), torch.cat([resampler(x[:1]), resampler(x[1:])]))


def test_order_of_features_does_not_matter():
    torch.manual_seed(0)
    resampler, x = Resampler(**SMALL), torch.randn(1, 7, 12)
    torch.testing.assert_close(resampler(x), resampler(x.flip(1)))


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match="width 12"):
        Resampler(**SMALL)(torch.randn(1, 7, 13))
    with pytest.raises(ValueError, match="with_cls_token"):
        Resampler(**SMALL)(torch.randn(1, 7, 12), return_cls_tokens=True)


@pytest.mark.parametrize("width", [768, 1024])
def test_published_size(width):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Resampler(embedding_dim=width).parameters())
    assert parameters == pytest.approx(48.0e6, rel=0.01)
