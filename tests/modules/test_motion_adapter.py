"""The motion adapter on real CogVideoX and SVD networks of minimal size."""

from functools import partial

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, UNetSpatioTemporalConditionModel

from motionrag.errors import MotionRAGError
from motionrag.modules.motion_adapter import AdapterSite, MotionAdapter

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


def test_an_adapter_at_some_sites(transformer, inputs, tokens):
    make = partial(MotionAdapter.for_modules, sites(transformer), WIDTH, init="reference")
    some = make(only=".*blocks.1.*").attach(sites(transformer))
    assert {key.split(".")[0] for key in some.state_dict()} == {"transformer_blocks/1/attn1"}
    with some.use(tokens):
        moved = run(transformer, inputs)
    hooked = [bool(site.to_out[0]._forward_pre_hooks) for site in sites(transformer).values()]
    some.detach()
    assert hooked == [False, True] and not torch.allclose(moved, run(transformer, inputs))
    with pytest.raises(
        MotionRAGError, match="only=blocks: no site is called like that; there are transformer_blocks.0"
    ):
        make(only="blocks")
    with pytest.raises(MotionRAGError, match="is no regular expression"):
        make(only="(")


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


def test_saved_keys(adapter):
    assert list(adapter.state_dict()) == [
        f"transformer_blocks/{i}/attn1.to_{p}.weight" for i in range(2) for p in "qkv"
    ]


@pytest.mark.parametrize("first_out", [0, 1])
def test_several_adapters_do_not_interfere(transformer, adapter, inputs, tokens, first_out):
    """Any order of attaching and detaching gives the same; each asks with the backbone's own output."""
    torch.manual_seed(4)
    other = MotionAdapter.for_modules(sites(transformer), WIDTH, init="reference").attach(sites(transformer))
    with adapter.use(None), other.use(None):
        bare = run(transformer, inputs)
    with adapter.use(tokens), other.use(tokens.flip(1), 0.5):
        both = run(transformer, inputs)
    adapter.detach()
    adapter.attach(sites(transformer))  # now behind the other
    with adapter.use(tokens), other.use(tokens.flip(1), 0.5):
        torch.testing.assert_close(run(transformer, inputs), both, atol=1e-6, rtol=1e-6)
    out, left = (adapter, other) if first_out == 0 else (other, adapter)
    with out.use(None), left.use(tokens):
        alone = run(transformer, inputs)
    out.detach()
    with left.use(tokens):
        assert torch.equal(run(transformer, inputs), alone) and not torch.allclose(alone, both)
    left.detach()
    assert torch.equal(run(transformer, inputs), bare)


def test_errors_say_what_was_expected(transformer, adapter):
    with pytest.raises(ValueError, match=rf"\(B, n, {WIDTH}\)"):
        adapter.set(torch.randn(2, 5, WIDTH + 1))
    with pytest.raises(RuntimeError, match="attached already"):
        adapter.attach(sites(transformer))
    with pytest.raises(MotionRAGError, match="init=ones: choose"):
        MotionAdapter({"a": (8, 2)}, WIDTH, init="ones")
    with pytest.raises(ValueError, match="1 sites, the backbone 2"):
        MotionAdapter({"a": (8, 2)}, WIDTH).attach(sites(transformer))
    narrow = MotionAdapter(dict.fromkeys(sites(transformer), (16, 2)), WIDTH)
    with pytest.raises(ValueError, match="16 wide, the backbone 32"):
        narrow.attach(sites(transformer))
    assert not narrow.attached


# ---------------------------------------------------------------- where the query comes from


@pytest.fixture(scope="module")
def unet():
    """SVD's network: its spatial cross-attention reads one image token."""
    torch.manual_seed(0)
    model = UNetSpatioTemporalConditionModel(
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        block_out_channels=(32,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        layers_per_block=1,
        cross_attention_dim=10,
        num_attention_heads=2,
        num_frames=3,
    )
    return model.eval().requires_grad_(False)


@pytest.fixture
def unet_inputs():
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 3, 8, 4, 4),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(2, 1, 10),
        "added_time_ids": torch.ones(2, 3),
    }


def cross_attentions(unet):
    return {
        name: m
        for name, m in unet.named_modules()
        if name.endswith("attn2") and ".transformer_blocks" in name
    }


@pytest.fixture
def unet_adapter(unet, request):
    """Attached, with values that do something; `request.param` is the query."""
    torch.manual_seed(3)
    adapter = MotionAdapter.for_modules(cross_attentions(unet), WIDTH, init="reference", query=request.param)
    yield adapter.attach(cross_attentions(unet))
    adapter.detach()
    unet.disable_gradient_checkpointing()


def spread(unet, adapter, inputs, tokens):
    """How much the first site's output differs between the positions of a frame."""
    found = []
    handle = next(iter(cross_attentions(unet).values())).register_forward_hook(lambda *a: found.append(a[-1]))
    with torch.no_grad(), adapter.use(tokens):
        run(unet, inputs)
    handle.remove()
    return (found[0] - found[0][:, :1]).abs().max()


@pytest.mark.parametrize("unet_adapter", ["output"], indirect=True)
def test_with_one_key_the_attention_output_asks_for_the_same_motion_everywhere(
    unet, unet_adapter, unet_inputs, tokens
):
    assert spread(unet, unet_adapter, unet_inputs, tokens) < 1e-6


@pytest.mark.parametrize("unet_adapter", ["hidden"], indirect=True)
def test_hidden_states_ask_for_motion_of_their_own(unet, unet_adapter, unet_inputs, tokens):
    assert spread(unet, unet_adapter, unet_inputs, tokens) > 1e-3


@pytest.mark.parametrize("unet_adapter", ["hidden"], indirect=True)
def test_hidden_query_equals_the_formula(unet, unet_adapter, unet_inputs, tokens):
    name, attention = next(iter(cross_attentions(unet).items()))
    site, hidden, image = unet_adapter.site(name), torch.randn(6, 16, 32), torch.randn(6, 1, 10)
    with unet_adapter.use(tokens, scale=0.7):
        found = attention(hidden, encoder_hidden_states=image)
    unet_adapter.detach()
    each = tokens.repeat_interleave(3, 0)
    q, k, v = (
        projection(x).unflatten(-1, (2, 16)).transpose(1, 2)
        for projection, x in ((site.to_q, hidden), (site.to_k, each), (site.to_v, each))
    )
    motion = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = attention.to_out[0](
        attention.to_v(image) + 0.7 * motion
    )  # one key: its value is the attention
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unet_adapter", ["output", "hidden"], indirect=True)
def test_gradient_checkpointing_changes_nothing_for_either_query(unet, unet_adapter, unet_inputs, tokens):
    plain = gradients(unet, unet_adapter, unet_inputs, tokens)
    unet.enable_gradient_checkpointing()
    recomputed = gradients(unet, unet_adapter, unet_inputs, tokens)
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad)
    reaches_queries = [name for name, grad in plain.items() if "to_q" in name and grad.abs().max() > 0]
    assert len(reaches_queries) == len(unet_adapter.site_names)


@pytest.mark.parametrize("unet_adapter", ["hidden"], indirect=True)
@torch.no_grad()
def test_hidden_queries_of_a_batch_equal_each_alone(unet, unet_adapter, unet_inputs, tokens):
    with unet_adapter.use(tokens):
        both = run(unet, unet_inputs)
    for i in range(2):
        with unet_adapter.use(tokens[i : i + 1]):
            alone = run(unet, rows(unet_inputs, slice(i, i + 1)))
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("unet_adapter", ["hidden"], indirect=True)
def test_detaching_removes_both_hooks(unet, unet_adapter, unet_inputs, tokens):
    unet_adapter.detach()
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in unet.modules())


def test_query_changes_no_keys_and_can_differ_between_sites(unet):
    modules = cross_attentions(unet)
    first, *others = modules
    mixed = MotionAdapter.for_modules(modules, WIDTH, query={first: "hidden"})
    assert mixed.query == {first: "hidden", **dict.fromkeys(others, "output")}
    plain = MotionAdapter.for_modules(modules, WIDTH)
    assert {k: v.shape for k, v in mixed.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


def test_query_mistakes(transformer, unet, inputs, tokens):
    with pytest.raises(MotionRAGError, match="query=input: choose output or hidden"):
        MotionAdapter({"a": (8, 2)}, WIDTH, query="input")
    with pytest.raises(ValueError, match=r"query names sites that this adapter has not: \['b'\]"):
        MotionAdapter({"a": (8, 2)}, WIDTH, query={"b": "hidden"})
    # joint attention: its hidden states are the video tokens alone, its output has the text tokens too
    joint = MotionAdapter.for_modules(sites(transformer), WIDTH, query="hidden").attach(sites(transformer))
    with (
        joint.use(tokens),
        pytest.raises(MotionRAGError, match=r"\(2, 12, 32\).*\(2, 15, 32\).*query=output"),
    ):
        run(transformer, inputs)
    joint.detach()


# ---------------------------------------------------------------- the fast form


def site_of(hidden=64, heads=2, dtype=torch.float32):
    torch.manual_seed(0)
    return AdapterSite(hidden, heads, WIDTH, "reference").to(dtype)


@torch.no_grad()
@pytest.mark.parametrize(("n", "rows", "length"), [(1, 1, 7), (8, 2, 40), (31, 6, 12)])
def test_folded_equals_plain(n, rows, length):
    site, tokens, query = site_of(), torch.randn(rows // 3 or rows, n, WIDTH), torch.randn(rows, length, 64)
    folded, plain = site.fold(tokens), site.project(tokens)
    assert folded.folded and folded.keys.shape == (len(tokens), 2, n, 64)
    expected = site.double()(query.double(), site.double().project(tokens.double()))
    for motion in (folded, plain):
        error = (site.float()(query, motion) - expected).abs().max() / expected.abs().max()
        assert error < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 5, 40, 512])
def test_blocks_on_a_cpu_change_nothing(block, monkeypatch):
    """2 samples of 3 rows of 13 positions; the last block is shorter, blocks end within rows."""
    site, tokens, (query, hidden) = site_of(), torch.randn(2, 8, WIDTH), torch.randn(2, 6, 13, 64)
    plain, folded = site.project(tokens), site.fold(tokens)
    monkeypatch.setattr("motionrag.modules.motion_adapter.CPU_BLOCK", block)
    assert torch.allclose(site(query, folded), site(query, plain), atol=1e-5)
    assert torch.allclose(site(query, folded, hidden, 0.7), site(query, plain, hidden, 0.7), atol=1e-5)


@torch.no_grad()
def test_many_tokens_stay_plain():
    """More tokens than a head is wide would make folding the slower form."""
    site = site_of()
    assert site.fold(torch.randn(1, 31, WIDTH)).folded
    assert not site.fold(torch.randn(1, 32, WIDTH)).folded


@torch.no_grad()
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_folded_loses_no_precision_in_bfloat16(common):
    """Against exact arithmetic on the same bfloat16 weights and inputs, with sharp attention."""
    site = site_of(256, 4, torch.bfloat16)
    site.to_q.weight *= 3
    site.to_k.weight *= 3
    tokens = (torch.randn(2, 25, WIDTH) + common * torch.randn(1, 1, WIDTH)).bfloat16()
    query = torch.randn(2, 300, 256).bfloat16()
    found = {fold: site(query, site.fold(tokens) if fold else site.project(tokens)) for fold in (0, 1)}
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    site.double()
    exact = site(query.double(), site.project(tokens.double()))
    plain, folded = ((found[fold] - exact).norm() / exact.norm() for fold in (0, 1))
    assert folded < 1.5 * plain < 0.02


@torch.no_grad()
@pytest.mark.parametrize("amp", [False, True])
def test_half_precision_hidden_states_keep_their_type(amp):
    site, query = site_of(), torch.randn(1, 4, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for motion in (site.project(torch.randn(1, 2, WIDTH)), site.fold(torch.randn(1, 2, WIDTH))):
            assert site(query, motion).dtype == torch.bfloat16


def moved(transformer, adapter, inputs, tokens, fast):
    with torch.set_grad_enabled(not fast), adapter.use(tokens):
        return run(transformer, inputs).detach()


def test_without_gradients_the_network_computes_the_same(transformer, adapter, inputs, tokens):
    plain, fast = (moved(transformer, adapter, inputs, tokens, fast) for fast in (False, True))
    torch.testing.assert_close(fast, plain, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_folding_happens_once_per_clip(transformer, adapter, inputs, tokens, monkeypatch):
    calls, fold = [], AdapterSite.fold
    monkeypatch.setattr(AdapterSite, "fold", lambda site, m: calls.append(1) or fold(site, m))
    with adapter.use(tokens):
        first = run(transformer, inputs)
        assert torch.equal(run(transformer, inputs), first)
    assert len(calls) == 2  # sites
    with adapter.use(tokens + 1):
        assert not torch.allclose(run(transformer, inputs), first)
    assert len(calls) == 4
    with adapter.use(tokens, 0.5), adapter.use(tokens):  # the inner one, then the outer one
        assert torch.equal(run(transformer, inputs), first)


def change_in_place(adapter):
    for p in adapter.parameters():
        p.mul_(1.5)


def load_others(adapter):
    adapter.load_state_dict({k: 1.5 * v for k, v in adapter.state_dict().items()})


def assign_others(adapter):
    adapter.load_state_dict({k: 1.5 * v for k, v in adapter.state_dict().items()}, assign=True)


def optimize(adapter):
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()


def to_double_and_back(adapter):
    change_in_place(adapter.double())
    adapter.float()


@pytest.mark.parametrize(
    "change", [change_in_place, load_others, assign_others, optimize, to_double_and_back]
)
def test_kept_keys_never_outlive_their_weights(transformer, adapter, inputs, tokens, change):
    with torch.no_grad():
        adapter.set(tokens)
        before = run(transformer, inputs)
        change(adapter)
        after = run(transformer, inputs)
        adapter.clear()
    assert not torch.allclose(before, after, atol=1e-4)
    plain = moved(transformer, adapter, inputs, tokens, fast=False)
    torch.testing.assert_close(after, plain, atol=1e-6, rtol=1e-6)


def test_weights_that_cannot_be_watched_are_folded_anew(transformer, inputs, tokens):
    with torch.inference_mode():
        adapter = MotionAdapter.for_modules(sites(transformer), WIDTH, init="reference").attach(
            sites(transformer)
        )
        with adapter.use(tokens):
            before = run(transformer, inputs)
            change_in_place(adapter)
            after = run(transformer, inputs)
        adapter.detach()
    assert not torch.allclose(before, after, atol=1e-4)


def test_tokens_are_those_of_the_moment_they_were_set(transformer, adapter, inputs, tokens):
    mine = tokens.clone()
    with torch.no_grad(), adapter.use(mine):
        first = run(transformer, inputs)
        mine.zero_()
        assert torch.equal(run(transformer, inputs), first)


def test_training_after_sampling_with_the_same_tokens(transformer, adapter, inputs, tokens):
    """Kept keys are for the fast form alone: gradients are as if it had never run."""
    expected = gradients(transformer, adapter, inputs, tokens)
    leaf = tokens.clone().requires_grad_()
    adapter.zero_grad()
    adapter.set(leaf)
    with torch.no_grad():
        run(transformer, inputs)
    run(transformer, inputs).square().mean().backward()
    adapter.clear()
    torch.testing.assert_close(leaf.grad, expected["tokens"])
    for name, p in adapter.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@torch.no_grad()
def test_guidance_gives_each_half_its_own_tokens(transformer, adapter, inputs, tokens):
    doubled = {name: torch.cat([value] * 2) for name, value in inputs.items()}
    null = torch.zeros_like(tokens)
    both = moved(transformer, adapter, doubled, torch.cat([null, tokens]), fast=True)
    for half, m in zip(both.chunk(2), (null, tokens), strict=True):
        alone = moved(transformer, adapter, inputs, m, fast=True)
        torch.testing.assert_close(half, alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def compiled(unet):
    """One transformer block, as a function; the list of graphs that compiling it made; its only site."""
    graphs = []
    block = unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
    torch.compiler.reset()
    # keeps the gradients' graph as it is: what is tested is what the compiler sees
    call = torch.compile(block, backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True)
    torch.manual_seed(1)
    image = torch.randn(6, 1, 10)
    hidden = torch.randn(6, 16, 32)
    yield (lambda net=call: net(hidden, encoder_hidden_states=image)), block, graphs
    torch.compiler.reset()


@pytest.mark.parametrize("query", ["output", "hidden"])
def test_compiled(compiled, tokens, query):
    """Graphs keep the hooks of their first run: attaching and detaching must make them look again."""
    call, block, graphs = compiled
    with torch.no_grad():
        bare = call()
    adapter = MotionAdapter.for_modules({"attn2": block.attn2}, WIDTH, "reference", query)
    adapter.attach({"attn2": block.attn2})
    with torch.no_grad():
        for m, scale in ((tokens, 1.0), (tokens.flip(0), 1.0), (tokens, 0.5), (tokens, 0.25)):
            with adapter.use(m, scale):
                found = call()
                torch.testing.assert_close(found, call(block), atol=1e-5, rtol=1e-5)
                assert torch.equal(call(), found) and not torch.allclose(found, bare)
    assert len(graphs) <= 3  # bare, with motion, with motion at any scale
    found = []
    for net in ({}, {"net": block}):
        adapter.zero_grad()
        with adapter.use(tokens):
            call(**net).square().mean().backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
    torch.testing.assert_close(*found)
    adapter.detach()
    with torch.no_grad():
        torch.testing.assert_close(call(), bare)
