"""What every backbone owes to training, generation and evaluation, checked on its tiny form with random weights.

A new backbone joins with one line in ``BACKBONES``.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from motionrag.backbones.base import Backbone, MotionInput
from motionrag.backbones.cogvideox import CogVideoX
from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.svd import SVD
from motionrag.errors import MotionRAGError
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler

BACKBONES = {  # name -> a tiny one, the same at every call
    "cogvideox": CogVideoX.tiny,
    "dynamicrafter": DynamiCrafter.tiny,
    "svd": SVD.tiny,
}

TOKENS, WIDTH = 8, 16  # of the motion tokens
PROMPTS = ["a ball rolls to the left", "a wheel turns"]


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request) -> Backbone:
    return BACKBONES[request.param]()


@dataclass
class Clips:
    """Two clips, as the training loss and as sampling take them."""

    video: Tensor
    latents: Tensor
    image_latents: Tensor
    context: Tensor
    null_context: Tensor

    @property
    def image(self) -> Tensor:
        return self.video[:, 0]


@pytest.fixture(scope="module")
def clips(backbone) -> Clips:
    video = noise((2, backbone.frames, 3, backbone.height, backbone.width), 0).clamp(-1, 1)
    return Clips(
        video,
        backbone.encode_video(video),
        backbone.encode_image(video[:, 0]),
        backbone.encode_context(PROMPTS, video[:, 0]),
        backbone.null_context(video[:, 0]),
    )


@pytest.fixture
def adapter(backbone):
    """An attached adapter whose values are not zero any more."""
    torch.manual_seed(0)
    adapter = MotionAdapter.for_modules(backbone.adapter_sites(), WIDTH, query=backbone.adapter_query)
    for name in adapter.site_names:
        torch.nn.init.normal_(adapter.site(name).to_v.weight)
    yield adapter.attach(backbone.adapter_sites())
    adapter.detach()


@pytest.fixture
def fresh(backbone):
    """An attached adapter as training starts with it."""
    torch.manual_seed(0)
    adapter = MotionAdapter.for_modules(backbone.adapter_sites(), WIDTH).attach(backbone.adapter_sites())
    yield adapter
    adapter.detach()


def noise(shape, seed) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, seed=0) -> Tensor:
    return noise((batch, TOKENS, WIDTH), seed)


def loss(backbone, clips, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return backbone.loss(clips.latents, clips.image_latents, clips.context, generator)


def sample(backbone, clips, adapter=None, motion=None, scale=1.0, rows=slice(None), seeds=(3, 4), **options):
    """Two denoising steps, guided unless told otherwise."""
    if adapter is not None:
        motion = MotionInput(adapter, motion[rows], torch.zeros(1, TOKENS, WIDTH), scale)
    options = {"steps": 2, "guidance": 2.0, "null_context": clips.null_context[rows], **options}
    return backbone.sample(
        clips.image[rows], clips.context[rows], seeds=seeds[rows], motion=motion, **options
    )


def each(rows) -> list[torch.Generator]:
    """Random numbers for each sample, the same in every batch."""
    return [torch.Generator().manual_seed(row) for row in rows]


# ---------------------------------------------------------------- protocol and shapes


def test_protocol(backbone):
    assert isinstance(backbone, Backbone)
    assert backbone.name and backbone.fps > 0 and backbone.random_weights
    assert backbone.adapter_query in ("output", "hidden")
    assert not backbone.denoiser.training
    assert not any(parameter.requires_grad for parameter in backbone.denoiser.parameters())
    sites = backbone.adapter_sites()
    modules = dict(backbone.denoiser.named_modules())
    for name, site in sites.items():
        assert modules[name] is site
        assert site.to_out[0].in_features % site.heads == 0
    assert sites.keys() == backbone.adapter_sites().keys()


def test_shapes(backbone, clips):
    assert clips.latents.ndim == clips.image_latents.ndim == 5
    batch, frames, *latent = clips.latents.shape
    assert batch == 2 and 1 <= frames <= backbone.frames
    assert clips.image_latents.shape == (2, 1, *latent)
    assert clips.context.ndim == 3 and len(clips.context) == 2
    assert clips.null_context.shape == clips.context.shape
    assert not torch.equal(clips.context[0], clips.context[1])
    assert not torch.equal(clips.context, clips.null_context)
    for part in (clips.latents, clips.image_latents, clips.context, clips.null_context):
        assert part.dtype == torch.float32 and not part.requires_grad
    value = loss(backbone, clips)
    assert value.ndim == 0 and value.isfinite() and value > 0
    video = sample(backbone, clips)
    assert video.shape == clips.video.shape and video.dtype == torch.float32
    assert -1 <= video.min() < video.max() <= 1


@pytest.mark.parametrize("change", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 8, 0), (0, 0, 0, 8)])
def test_clips_of_another_size_are_refused(backbone, change):
    size = (backbone.frames, 3, backbone.height, backbone.width)
    wrong = [a + b for a, b in zip(size, change, strict=True)]
    with pytest.raises(MotionRAGError, match="x".join(map(str, wrong))) as error:
        backbone.encode_video(torch.zeros(1, *wrong))
    assert "x".join(map(str, size)) in str(error.value) and "\n" not in str(error.value)


def test_one_seed_for_each_image(backbone, clips):
    with pytest.raises(ValueError, match="2 images but 1 seeds"):
        sample(backbone, clips, seeds=(3,))


# ---------------------------------------------------------------- randomness


def test_encoding_is_deterministic_unless_noise_is_asked_for(backbone, clips):
    assert torch.equal(backbone.encode_video(clips.video), clips.latents)
    assert torch.equal(backbone.encode_image(clips.image), clips.image_latents)

    def noisy(seed, level):
        generator = torch.Generator().manual_seed(seed)
        return backbone.encode_image(clips.image, generator, torch.full((2,), level))

    assert torch.equal(noisy(1, 0.1), noisy(1, 0.1))
    assert not torch.equal(noisy(1, 0.1), noisy(2, 0.1))
    assert not torch.equal(noisy(1, 0.1), clips.image_latents)
    assert torch.equal(noisy(1, 0.0), clips.image_latents)


def test_noise_levels_come_from_the_generator(backbone):
    levels = [backbone.image_noise_level(2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    if levels[0] is None:
        assert levels == [None] * 3
        return
    assert levels[0].shape == (2,) and (levels[0] > 0).all()
    assert torch.equal(levels[0], levels[1]) and not torch.equal(levels[0], levels[2])
    alone = [backbone.image_noise_level(1, each([row])) for row in (1, 2)]
    assert torch.equal(backbone.image_noise_level(2, each([1, 2])), torch.cat(alone))


def test_loss_depends_on_the_generator_alone(backbone, clips):
    torch.manual_seed(5)
    first = loss(backbone, clips, 1)
    torch.manual_seed(6)
    assert torch.equal(loss(backbone, clips, 1), first)
    assert not torch.equal(loss(backbone, clips, 2), first)


def test_video_depends_on_the_seed_alone(backbone, clips):
    torch.manual_seed(5)
    first = sample(backbone, clips)
    torch.manual_seed(6)
    assert torch.equal(sample(backbone, clips), first)
    other = sample(backbone, clips, seeds=(3, 5))
    torch.testing.assert_close(other[0], first[0], atol=1e-4, rtol=0)
    assert not torch.allclose(other[1], first[1], atol=1e-3)


# ---------------------------------------------------------------- conditions


def test_a_clips_context_depends_on_the_clip_alone(backbone, clips):
    torch.manual_seed(5)
    again = backbone.encode_context(PROMPTS[1:], clips.image[1:])
    torch.testing.assert_close(again, clips.context[1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        backbone.null_context(clips.image[1:]), clips.null_context[1:], atol=1e-5, rtol=1e-4
    )


def test_conditions_are_dropped_by_the_generator_alone_and_never_in_place(backbone, clips):
    before = clips.context.clone(), clips.image_latents.clone()

    def drop(seed, rows=slice(None)):
        generator = torch.Generator().manual_seed(seed)
        return backbone.drop_conditions(clips.context[rows], clips.image_latents[rows], generator)

    for seed in range(8):
        first, second = drop(seed), drop(seed)
        for one, other, given in zip(first, second, before, strict=True):
            assert torch.equal(one, other)
            assert one.shape == given.shape and one.dtype == given.dtype
    assert torch.equal(clips.context, before[0]) and torch.equal(clips.image_latents, before[1])
    both = backbone.drop_conditions(clips.context, clips.image_latents, each([3, 4]))
    alone = [
        backbone.drop_conditions(clips.context[i : i + 1], clips.image_latents[i : i + 1], each([3 + i]))
        for i in (0, 1)
    ]
    assert all(
        torch.equal(part, torch.cat(parts))
        for part, parts in zip(both, zip(*alone, strict=True), strict=True)
    )


def test_encoders_may_leave(request, clips):
    """Once contexts are known, neither training nor sampling needs the encoders."""
    backbone = BACKBONES[request.node.callspec.params["backbone"]]()
    assert backbone.to("cpu") is backbone and backbone.encoders_to("cpu") is backbone
    assert torch.equal(backbone.encode_context(PROMPTS, clips.image), clips.context)
    backbone.encoders_to("meta")  # gone
    assert loss(backbone, clips).isfinite()
    assert sample(backbone, clips).isfinite().all()
    assert backbone.autoencoder_to("meta") is backbone
    assert loss(backbone, clips).isfinite()
    assert backbone.device.type == "cpu"


def test_precision_is_a_choice(request, clips):
    """Of the networks; what goes in and comes out stays float32."""
    make = BACKBONES[request.node.callspec.params["backbone"]]
    half = make(dtype="bfloat16")
    assert half.dtype == half.vae.dtype == torch.bfloat16
    found = half.encode_video(clips.video), half.encode_context(PROMPTS, clips.image)
    for one, exact in zip(found, (clips.latents, clips.context), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, exact, atol=0.05, rtol=0.05)
    assert loss(half, clips).item() == pytest.approx(loss(make(), clips).item(), rel=0.03)
    assert sample(half, clips).dtype == torch.float32
    with pytest.raises(MotionRAGError, match="dtype=int8: expected float32, bfloat16 or float16"):
        make(dtype="int8")


# ---------------------------------------------------------------- the motion adapter


def test_saved_keys_are_the_projections_of_every_site(backbone, fresh):
    expected = {
        f"{site.replace('.', '/')}.{projection}.weight"
        for site in backbone.adapter_sites()
        for projection in ("to_q", "to_k", "to_v")
    }
    assert fresh.state_dict().keys() == expected


def test_a_fresh_adapter_changes_nothing(backbone, clips, fresh):
    with fresh.use(tokens()):
        with_loss = loss(backbone, clips)
    with_video = sample(backbone, clips, fresh, tokens())
    fresh.detach()
    assert torch.equal(with_loss, loss(backbone, clips))
    assert torch.equal(with_video, sample(backbone, clips))


def test_other_tokens_change_loss_and_video(backbone, clips, adapter):
    losses, videos = [], []
    for seed in (0, 1):
        with adapter.use(tokens(seed=seed)):
            losses.append(loss(backbone, clips))
        videos.append(sample(backbone, clips, adapter, tokens(seed=seed)))
    assert (losses[0] - losses[1]).abs() > 1e-4
    assert (videos[0] - videos[1]).abs().max() > 1e-2


def test_scale_zero_is_the_bare_backbone(backbone, clips, adapter):
    with adapter.use(tokens(), scale=0):
        with_loss = loss(backbone, clips)
    with_video = sample(backbone, clips, adapter, tokens(), scale=0.0)
    adapter.detach()
    assert torch.equal(with_loss, loss(backbone, clips))
    assert torch.equal(with_video, sample(backbone, clips))


def test_detaching_restores_the_backbone(backbone, clips):
    weights = {name: value.clone() for name, value in backbone.denoiser.state_dict().items()}
    before = loss(backbone, clips), sample(backbone, clips)
    adapter = MotionAdapter.for_modules(backbone.adapter_sites(), WIDTH, init="reference")
    adapter.attach(backbone.adapter_sites())
    with adapter.use(tokens()):
        assert not torch.equal(loss(backbone, clips), before[0])
    adapter.detach()
    after = loss(backbone, clips), sample(backbone, clips)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not any(module._forward_pre_hooks for module in backbone.denoiser.modules())
    assert weights.keys() == backbone.denoiser.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in backbone.denoiser.state_dict().items())


def test_an_adapter_without_tokens_refuses(backbone, clips, adapter):
    with pytest.raises(RuntimeError, match="no motion tokens"):
        loss(backbone, clips)


# ---------------------------------------------------------------- gradients


def gradients(backbone, clips, adapter) -> dict[str, Tensor]:
    """Of everything that Stage 1 trains, by name."""
    torch.manual_seed(1)
    trained = torch.nn.ModuleDict(
        {
            "resampler": Resampler(
                dim=16, depth=1, dim_head=8, heads=2, num_queries=TOKENS, embedding_dim=12, output_dim=WIDTH
            ),
            "motion_adapter": adapter,
        }
    )
    trained.zero_grad()
    adapter.set(trained["resampler"](noise((2, 10, 12), 7)))
    loss(backbone, clips).backward()
    adapter.clear()
    return {name: parameter.grad for name, parameter in trained.named_parameters()}


def test_gradients_reach_exactly_what_is_trained(backbone, clips, adapter):
    found = gradients(backbone, clips, adapter)
    assert {name.split(".")[0] for name in found} == {"resampler", "motion_adapter"}
    without = [name for name, gradient in found.items() if gradient is None or not gradient.abs().max() > 0]
    assert not without
    assert all(parameter.grad is None for parameter in backbone.denoiser.parameters())


def test_gradient_checkpointing_changes_nothing(backbone, clips, adapter):
    plain = gradients(backbone, clips, adapter)
    calls = []
    site = next(iter(backbone.adapter_sites().values())).to_out[0]
    handle = site.register_forward_hook(lambda *_: calls.append(1))
    backbone.denoiser.enable_gradient_checkpointing()
    try:
        recomputed = gradients(backbone, clips, adapter)
    finally:
        backbone.denoiser.disable_gradient_checkpointing()
        handle.remove()
    assert len(calls) == 2, "nothing was computed again"
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------- batches and guidance


def test_loss_of_a_batch_is_the_mean_of_each_alone(backbone, clips, adapter):
    def of(rows, *parts):
        with adapter.use(tokens()[rows]):
            return backbone.loss(*(part[rows] for part in parts), each(range(2)[rows]))

    parts = clips.latents, clips.image_latents, clips.context
    alone = torch.stack([of(slice(i, i + 1), *parts) for i in range(2)])
    assert (alone[0] - alone[1]).abs() > 1e-3
    torch.testing.assert_close(of(slice(0, 2), *parts), alone.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_videos_of_a_batch_equal_each_alone(backbone, clips, adapter, guidance):
    both = sample(backbone, clips, adapter, tokens(), guidance=guidance)
    for i in range(2):
        alone = sample(backbone, clips, adapter, tokens(), rows=slice(i, i + 1), guidance=guidance)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=0)


def test_guidance_one_runs_the_conditional_half_alone(backbone, clips, adapter):
    rows = []
    site = next(iter(backbone.adapter_sites().values())).to_out[0]
    handle = site.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    unusable = torch.full_like(clips.null_context, torch.nan)
    try:
        video = sample(backbone, clips, adapter, tokens(), guidance=1.0, null_context=unusable)
        guided = sample(backbone, clips, adapter, tokens(), guidance=2.0)
    finally:
        handle.remove()
    half = len(rows) // 2
    assert [2 * n for n in rows[:half]] == rows[half:]
    assert video.isfinite().all()
    assert not torch.allclose(video, guided, atol=1e-3)
