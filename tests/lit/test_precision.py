"""Stage 1 in half precision and with less memory: about the same numbers, whatever the backbone."""

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


def test_encoders_visit_the_device_for_new_clips_only(adapter_module, batch):
    module = adapter_module(cache=True)
    moves = []
    module.backbone.encoders_to = lambda device: moves.append(str(device))
    module.setup("fit")
    for _ in range(2):
        module._conditions(batch, "noise")
    assert moves == ["cpu", "cpu"]  # to the module's device, which is the CPU here, and back: once
