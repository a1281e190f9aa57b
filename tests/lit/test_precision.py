"""Stage 1 in half precision and with less memory: about the same numbers, whatever the backbone."""

import copy

import pytest
import torch

from motionrag.backbones.cogvideox import CogVideoX
from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.svd import SVD


def text(prompts):
    """Text states that depend on the prompt alone."""
    rows = [torch.randn(24, 384, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
    return torch.stack(rows)


BACKBONES = {
    "cogvideox": lambda: CogVideoX.tiny(text=text, num_layers=2, num_attention_heads=1),
    "dynamicrafter": lambda: DynamiCrafter.tiny(text=text),
    "svd": SVD.tiny,
}


@pytest.fixture(params=BACKBONES)
def first_loss(request, adapter_module, fit):
    """Train one step; returns its loss and the module."""

    def run(half=False, precision="32-true", **options):
        backbone = BACKBONES[request.param]()
        if half:  # as conf/backbone/*.yaml does with dtype=bfloat16
            backbone.to(torch.bfloat16)
        module = adapter_module(init="reference", backbone=backbone, **options)
        losses, _ = fit(module, 1, precision=precision, batch_size=2)
        return losses[1], module

    return run


def test_half_precision(first_loss):
    full, _ = first_loss()
    for options in (
        dict(precision="bf16-mixed", gradient_checkpointing=True),
        dict(precision="bf16-true", cache=True),
        dict(precision="bf16-true", half=True, gradient_checkpointing=True),
    ):
        loss, module = first_loss(**options)
        assert loss == pytest.approx(full, rel=0.02) and loss != full, options
        trained = torch.bfloat16 if options["precision"] == "bf16-true" else torch.float32
        assert {p.dtype for p in module.parameters()} == {trained}
        frozen = torch.bfloat16 if options.get("half") else torch.float32
        assert module.backbone.denoiser.dtype == frozen


def test_stage_two_in_half_precision(cama_module, fit):
    full = fit(cama_module(), 1, batch_size=2)[0][1]
    for precision, trained in (("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)):
        module = cama_module()
        loss = fit(module, 1, batch_size=2, precision=precision)[0][1]
        assert loss == pytest.approx(full, rel=0.02) and loss != full, precision
        assert {p.dtype for p in module.parameters()} == {trained}
        assert {p.dtype for p in module.resampler.parameters()} == {torch.float32}


class Moves(list):
    """Where networks were sent, in order; they go there, too."""

    def watch(self, module):
        backbone = module.backbone
        places = ((backbone, "autoencoder_to"), (backbone, "encoders_to"), (module.motion_encoder, "to"))
        for owner, name in places:
            self._watch(owner, name)
        return self

    def _watch(self, owner, name):
        original = getattr(owner, name)

        def move(device):
            self.append((name, str(device)))
            return original(device)

        setattr(owner, name, move)


@pytest.fixture(params=BACKBONES)
def make(request, adapter_module):
    """`make(**options)`: a Stage 1 module on one of the backbones, and its moves."""

    def make(**options):
        # its own motion encoder: others share the fixture's
        module = adapter_module(init="reference", backbone=BACKBONES[request.param](), **options)
        module._frozen = (module.backbone, copy.deepcopy(module.motion_encoder))
        module.setup("fit")
        return module, Moves().watch(module)

    return make


def test_networks_whose_outputs_are_kept_leave_the_device(make, batch):
    """The second step computes the same without any of them."""
    batch.target_motion = None
    module, moves = make(cache=True, fixed_image_noise=True)
    module.null_features()

    def step():
        conditions = module._conditions(batch, "noise")
        with module.motion_adapter.use(module.clip_tokens(batch)):
            return module.backbone.loss(*conditions)

    first = step()
    assert {name for name, _ in moves} == {"autoencoder_to", "encoders_to", "to"}
    for name in (
        "autoencoder_to",
        "encoders_to",
        "to",
    ):  # there (the module's device is the CPU here) and back
        own = [device for where, device in moves if where == name]
        assert own == ["cpu", "cpu"] * (2 if name == "autoencoder_to" else 1)
    moves.clear()
    module.backbone.autoencoder_to("meta").encoders_to("meta")
    module.motion_encoder.to("meta")
    moves.clear()
    assert torch.equal(step(), first) and not moves


def test_networks_stay_where_every_step_needs_them(make, batch):
    """Without the cache all do; the autoencoder also where images get new noise each time."""
    batch.target_motion = None
    for options, leaving in (({}, set()), ({"cache": True}, {"encoders_to", "to"})):
        module, moves = make(**options)
        module.clip_tokens(batch)
        module._conditions(batch, "noise")
        counts = {name: sum(where == name for where, _ in moves) for name, _ in moves}
        assert counts == {
            "autoencoder_to": 2,
            "encoders_to": 1 + ("encoders_to" in leaving),
            "to": 1 + ("to" in leaving),
        }


def test_features_from_the_data_need_no_encoder(make, batch):
    module, moves = make(fixed_image_noise=True)
    batch.latents = module.backbone.encode_video(batch.video)
    batch.context = module.backbone.encode_context(batch.captions, batch.video[:, 0])
    module.clip_tokens(batch)
    module._conditions(batch, "noise")
    assert moves == [("autoencoder_to", "cpu")]  # for the condition images alone


def test_sampling_fetches_what_it_needs(make, batch):
    module, moves = make(cache=True, fixed_image_noise=True)
    videos = module.sample(batch, steps=1, guidance=1.0)
    assert not torch.equal(videos["with"], videos["without"])
    assert moves == [
        (name, "cpu") for name in ("encoders_to", "encoders_to", "autoencoder_to", "autoencoder_to")
    ]
