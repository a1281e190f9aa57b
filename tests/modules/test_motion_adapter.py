"""The motion adapter on a real CogVideoX transformer of minimal size."""

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from motionrag.modules.motion_adapter import MotionAdapter

WIDTH = 12  # of motion tokens


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=10,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=3,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 3, 4, 4, 4),
        "encoder_hidden_states": torch.randn(2, 3, 10),
        "timestep": torch.tensor([3, 700]),
    }


@pytest.fixture
def tokens():
    torch.manual_seed(2)
    return torch.randn(2, 5, WIDTH)


def sites(transformer):
    return {f"transformer_blocks.{i}.attn1": b.attn1 for i, b in enumerate(transformer.transformer_blocks)}


@pytest.fixture
def adapter(transformer):
    """Attached, with values that do something; detached afterwards."""
    torch.manual_seed(3)
    adapter = MotionAdapter.for_modules(sites(transformer), WIDTH, init="reference").attach(
        sites(transformer)
    )
    yield adapter
    adapter.detach()
    transformer.disable_gradient_checkpointing()


def run(transformer, inputs):
    return transformer(**inputs, return_dict=False)[0]


def rows(inputs, which):
    return {name: value[which] for name, value in inputs.items()}


def test_a_fresh_adapter_equals_the_bare_backbone(transformer, inputs, tokens):
    bare = run(transformer, inputs)
    adapter = MotionAdapter.for_modules(sites(transformer), WIDTH).attach(sites(transformer))
    with adapter.use(tokens):
        assert torch.equal(run(transformer, inputs), bare)
    adapter.detach()


def test_detaching_and_switching_off_restore_the_backbone(transformer, adapter, inputs, tokens):
    with adapter.use(tokens):
        moved = run(transformer, inputs)
    with adapter.use(tokens, scale=0):
        off = run(transformer, inputs)
    with adapter.use(None):
        none = run(transformer, inputs)
    adapter.detach()
    bare = run(transformer, inputs)
    assert torch.equal(off, bare) and torch.equal(none, bare) and not torch.allclose(moved, bare)
    assert not any(m._forward_pre_hooks for m in transformer.modules())


def test_other_tokens_and_scales_change_the_output(transformer, adapter, inputs, tokens):
    outs = []
    for m, scale in ((tokens, 1.0), (tokens.flip(0), 1.0), (tokens, 0.5)):
        with adapter.use(m, scale):
            outs.append(run(transformer, inputs))
    assert not any(torch.allclose(outs[0], out, atol=1e-5) for out in outs[1:])


def test_two_samples_together_equal_each_alone(transformer, adapter, inputs, tokens):
    with adapter.use(tokens):
        both = run(transformer, inputs)
    for i in range(2):
        with adapter.use(tokens[i : i + 1]):
            alone = run(transformer, rows(inputs, slice(i, i + 1)))
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_tokens_of_a_sample_serve_its_neighbouring_rows(transformer, adapter, inputs, tokens):
    repeated = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    with adapter.use(tokens):
        short = run(transformer, repeated)
    with adapter.use(tokens.repeat_interleave(3, 0)):
        torch.testing.assert_close(short, run(transformer, repeated))
    with adapter.use(tokens), pytest.raises(ValueError, match="2 samples cannot serve 1 rows"):
        run(transformer, rows(inputs, slice(0, 1)))


def test_an_empty_holder_raises(transformer, adapter, inputs, tokens):
    with pytest.raises(RuntimeError, match="no motion tokens"):
        run(transformer, inputs)
    with adapter.use(tokens):
        run(transformer, inputs)
    with pytest.raises(RuntimeError, match="no motion tokens"):
        run(transformer, inputs)


def gradients(transformer, adapter, inputs, tokens):
    tokens = tokens.clone().requires_grad_()
    adapter.zero_grad()
    adapter.set(tokens)
    run(transformer, inputs).square().mean().backward()
    adapter.clear()
    return {"tokens": tokens.grad, **{k: p.grad.clone() for k, p in adapter.named_parameters()}}


def test_gradients_reach_exactly_the_adapter(transformer, adapter, inputs, tokens):
    found = gradients(transformer, adapter, inputs, tokens)
    assert all(grad.abs().sum() > 0 for grad in found.values())
    assert all(p.grad is None for p in transformer.parameters())


def test_gradient_checkpointing_changes_nothing(transformer, adapter, inputs, tokens):
    plain = gradients(transformer, adapter, inputs, tokens)
    transformer.enable_gradient_checkpointing()
    for name, grad in gradients(transformer, adapter, inputs, tokens).items():
        torch.testing.assert_close(grad, plain[name])


@torch.no_grad()
def test_keys_and_values_are_made_once_per_clip(transformer, adapter, inputs, tokens, monkeypatch):
    site = adapter.site("transformer_blocks.0.attn1")
    calls, original = [], site.keys_values
    monkeypatch.setattr(site, "keys_values", lambda m: calls.append(1) or original(m))
    with adapter.use(tokens):
        first = run(transformer, inputs)
        torch.testing.assert_close(run(transformer, inputs), first)
    assert len(calls) == 1
    with adapter.use(tokens + 1):
        assert not torch.allclose(run(transformer, inputs), first)
    assert len(calls) == 2


def test_saved_keys(adapter):
    assert list(adapter.state_dict()) == [
        f"transformer_blocks/{i}/attn1.to_{p}.weight" for i in range(2) for p in "qkv"
    ]


def test_two_adapters_do_not_interfere(transformer, adapter, inputs, tokens):
    with adapter.use(tokens):
        one = run(transformer, inputs)
    other = MotionAdapter.for_modules(sites(transformer), WIDTH, init="reference").attach(sites(transformer))
    with adapter.use(tokens), other.use(tokens):
        assert not torch.allclose(run(transformer, inputs), one)
    other.detach()
    with adapter.use(tokens):
        assert torch.equal(run(transformer, inputs), one)


def test_half_precision_hidden_states_keep_their_type(adapter):
    site = adapter.site("transformer_blocks.0.attn1")
    keys, values = site.keys_values(torch.randn(1, 2, WIDTH))
    assert site(torch.randn(1, 4, 32, dtype=torch.float16), keys, values).dtype == torch.float16


def test_errors_say_what_was_expected(transformer, adapter):
    with pytest.raises(ValueError, match=rf"\(B, n, {WIDTH}\)"):
        adapter.set(torch.randn(2, 5, WIDTH + 1))
    with pytest.raises(RuntimeError, match="attached already"):
        adapter.attach(sites(transformer))
    with pytest.raises(ValueError, match="unknown init"):
        MotionAdapter({"a": (8, 2)}, WIDTH, init="ones")
    with pytest.raises(ValueError, match="1 sites, the backbone 2"):
        MotionAdapter({"a": (8, 2)}, WIDTH).attach(sites(transformer))
    narrow = MotionAdapter(dict.fromkeys(sites(transformer), (16, 2)), WIDTH)
    with pytest.raises(ValueError, match="16 wide, the backbone 32"):
        narrow.attach(sites(transformer))
    assert not narrow.attached
