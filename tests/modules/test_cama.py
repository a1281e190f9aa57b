"""CAMA: who sees whom, what is saved, order of clips."""

import pytest
import torch

from motionrag.errors import MotionRAGError
from motionrag.modules.cama import CAMA, block_causal_mask, cama_losses, sequence_order
from motionrag.modules.resampler import Resampler


@pytest.fixture
def cama():
    torch.manual_seed(0)
    resampler = Resampler(
        dim=16, depth=1, dim_head=4, heads=2, num_queries=3, embedding_dim=10, output_dim=16
    )
    return CAMA(resampler, width=16, depth=2, heads=2, ff_dim=32, max_positions=15)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 16), torch.randn(2, 4, 7, 10), torch.randn(2, 7, 10)


def test_shapes(cama, inputs):
    assert cama(*inputs).shape == (2, 5, 3, 16)
    torch.testing.assert_close(cama.predict(*inputs), cama(*inputs)[:, -1])


def test_a_block_sees_earlier_clips_and_its_own_appearance_only(cama, inputs):
    """Changing one clip changes the blocks from its appearance on, or from the one after its motion."""
    before = cama(*inputs)
    for clip in range(4):  # nearest first: clip i sits at place 3 - i of the sequence
        for part, first in ((0, 4 - clip), (1, 3 - clip)):
            changed = [x.clone() for x in inputs]
            changed[part][:, clip] += 1
            differs = (cama(*changed) - before).abs().amax((0, 2, 3)) > 1e-5
            assert differs.tolist() == [place >= first for place in range(5)]
    look = inputs[2] + 1
    differs = (cama(*inputs[:2], look) - before).abs().amax((0, 2, 3)) > 1e-5
    assert differs.tolist() == [False] * 4 + [True]


def test_samples_are_independent(cama, inputs):
    alone = torch.cat([cama(*(x[i : i + 1] for x in inputs)) for i in range(2)])
    torch.testing.assert_close(cama(*inputs), alone, atol=1e-6, rtol=1e-5)


def test_evaluation_without_gradients_gives_the_same(cama, inputs):
    expected = cama.train()(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(cama.eval()(*inputs), expected, atol=1e-5, rtol=1e-5)


def test_start_tokens_are_trained_and_saved_and_tables_are_not(cama, inputs):
    cama(*inputs).sum().backward()
    assert all(p.grad is not None for p in cama.parameters()) and cama.sos.grad.abs().sum() > 0
    assert {k.split(".")[0] for k in cama.state_dict()} == {"sos", "appearance_resampler", "transformer"}


def test_mask_lets_a_clip_see_all_of_itself():
    mask = block_causal_mask(3, 2)
    assert mask.dtype == torch.bool
    assert (~mask).sum(1).tolist() == [2, 2, 4, 4, 6, 6]


def test_sequence_goes_from_farthest_to_target():
    references, target = torch.arange(3.0)[None, :, None], torch.tensor([[9.0]])
    assert sequence_order(references, target).flatten().tolist() == [2, 1, 0, 9]


def test_losses_look_where_they_should():
    truth = torch.zeros(1, 3, 2, 4)
    prediction = truth.clone()
    prediction[:, 0] = 3
    assert cama_losses(prediction, truth)["mse"] == 3
    assert cama_losses(prediction, truth, target_only=True)["mse"] == 0


def test_errors_say_what_was_expected(cama, inputs):
    with pytest.raises(ValueError, match=r"motion tokens \(B, K, 3, 16\)"):
        cama(inputs[0][:, :, :2], *inputs[1:])
    with pytest.raises(ValueError, match="end at 15"):
        cama(*(torch.cat([x, x[:, :1]], 1) for x in inputs[:2]), inputs[2])
    with pytest.raises(MotionRAGError, match="width 16, CAMA has 8"):
        CAMA(cama.appearance_resampler, width=8)


def test_published_size():
    with torch.device("meta"):
        cama = CAMA(Resampler(embedding_dim=1024))
        assert sum(p.numel() for p in cama.transformer.parameters()) == pytest.approx(50.4e6, rel=0.01)
