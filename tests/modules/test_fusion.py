"""Merging references without CAMA."""

import pytest
import torch

from motionrag.modules.fusion import fuse_references


def test_weights_follow_similarity():
    x = torch.arange(3.0)[None, :, None, None].expand(1, 3, 2, 4)
    near_second = fuse_references(x, "weight", torch.tensor([[1.0, 0.0, 1.0]]))
    assert near_second.eq(1).all()


def test_references_without_any_similarity_are_averaged():
    x = torch.randn(2, 3, 2, 4)
    distances = torch.tensor([[1.0, 1.0, 1.0], [0.5, 1.0, 1.0]])
    out = fuse_references(x, "weight", distances)
    torch.testing.assert_close(out[0], x[0].mean(0))
    torch.testing.assert_close(out[1], x[1, 0])


def test_errors_say_what_was_expected():
    x = torch.randn(2, 3, 2, 4)
    with pytest.raises(ValueError, match="unknown fusion 'sum'"):
        fuse_references(x, "sum")
    with pytest.raises(ValueError, match=r"distances \(2, 3\), got None"):
        fuse_references(x, "weight")
