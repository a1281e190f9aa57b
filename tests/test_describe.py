"""Full-size configurations without weights: sizes against the published files, FLOPs and memory against arithmetic."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from motionrag import cli, describe
from motionrag.describe import (
    against_release,
    backbone_on_meta,
    encoders_on_meta,
    flops,
    fused_attention,
    peak_bytes,
)

PUBLISHED_FILES = (
    Path(os.environ.get("MOTIONRAG_PARITY_DIR", Path(__file__).resolve().parents[2] / "shared" / "parity"))
    / "checkpoint_keys.json"
)


@cache
def configuration(name: str) -> describe.Configuration:
    """As the command line makes it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("describe", overrides=[f"backbone={name}"])
    sizes = cfg.tiny if name.endswith("_tiny") else cfg.full
    backbone = backbone_on_meta(cfg.backbone)
    with torch.device("meta"):
        resampler, cama = instantiate(sizes.resampler), instantiate(sizes.cama)
        adapter = instantiate(cfg.motion_adapter)(backbone.adapter_sites(), token_width=resampler.output_dim)
    return describe.Configuration(backbone, *encoders_on_meta(sizes.encoders), resampler, adapter, cama)


@pytest.fixture(scope="module")
def published() -> dict:
    if not PUBLISHED_FILES.is_file():
        pytest.skip(f"no {PUBLISHED_FILES}")
    return json.loads(PUBLISHED_FILES.read_text())


@pytest.fixture(scope="module")
def tiny() -> describe.Configuration:
    return configuration("svd_tiny")


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "denoiser", "context"),
    [("cogvideox", 5.57e9, 4.76e9), ("svd", 1.525e9, 0.632e9), ("dynamicrafter", 1.44e9, None)],
)
def test_full_size_is_as_published(name, denoiser, context):
    c = configuration(name)
    assert all(p.device.type == "meta" for module in c.frozen().values() for p in module.parameters())
    assert against_release(c, name) == dict.fromkeys(["sites", *describe.PUBLISHED[name]], True)
    counts = {role: describe.parameters(module) for role, module in c.frozen().items()}
    assert counts["denoiser"] == pytest.approx(denoiser, rel=0.005)  # as the model pages state it
    assert counts["motion encoder"] == pytest.approx(86.4e6, rel=0.01)
    assert counts["appearance encoder"] == pytest.approx(304.4e6, rel=0.005)
    if context:
        assert counts[{"cogvideox": "text", "svd": "image_encoder"}[name]] == pytest.approx(
            context, rel=0.005
        )


def test_a_difference_is_seen(monkeypatch):
    c = configuration("svd")
    small = torch.nn.Linear(8, 8, bias=False, device="meta")
    monkeypatch.setitem(c.adapter.site(c.adapter.site_names[0])._modules, "to_q", small)
    assert against_release(c, "svd") == {
        "sites": False, "motion adapter": False, "motion Resampler": True, "CAMA": True
    }  # fmt: skip


def test_published_counts_are_those_of_the_files(published):
    folders = {"cogvideox": "CogVideoX", "svd": "SVD", "dynamicrafter": "DynamiCrafter"}
    for name, folder in folders.items():
        files = {k.split("/")[-1]: v for k, v in published["files"].items() if f"/{folder}/" in k}
        expected = describe.PUBLISHED[name]
        resampler = files["motion_proj.ckpt"]["n_params"]
        assert expected["motion Resampler"] == resampler
        assert expected["motion adapter"] == files["Motion-Adapter.ckpt"]["n_params"] - resampler
        assert expected["CAMA"] == files["motion_transformer.ckpt"]["n_params"]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("CogVideoXTransformer3DModel", describe.COGVIDEOX_TRANSFORMER),
        ("UNetSpatioTemporalConditionModel", describe.SVD_UNET),
    ],
)
def test_full_sizes_are_the_public_configs(published, kind, sizes):
    import diffusers

    with torch.device("meta"):
        config = getattr(diffusers, kind)(**sizes).config
    expected = published["base_configs"][kind]
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k in expected} == expected


def test_unknown_sizes_are_one_line():
    from omegaconf import OmegaConf

    from motionrag.errors import MotionRAGError

    paths = {"motion": {"path": "some/encoder"}, "appearance": {"path": "facebook/dinov2-large"}}
    with pytest.raises(MotionRAGError, match="sizes of some/encoder: expected one of MCG-NJU/"):
        encoders_on_meta(OmegaConf.create(paths))


# ---------------------------------------------------------------- counting


def blank(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def test_flops_of_attention_forward_and_backward():
    q, k = (blank(2, 4, length, 16, requires_grad=True) for length in (100, 50))
    one = 2 * 2 * 4 * 100 * 50 * 16  # a product of queries and keys
    out, forward = flops(lambda: F.scaled_dot_product_attention(q, k, k))
    _, backward = flops(out.sum().backward)
    assert forward == 2 * one
    assert backward == 5 * one  # one of them computes the scores again
    masked, same = flops(lambda: F.scaled_dot_product_attention(q, k, k, blank(100, 50, dtype=torch.bool)))
    assert masked.shape == out.shape == (2, 4, 100, 16) and same == forward


def test_attention_keeps_no_scores():
    q = blank(1, 1, 10_000, 16, requires_grad=True)
    assert (
        peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
        < 20 * q.nbytes
        < 10_000 * 10_000 * 4
    )


def test_attention_on_other_devices_is_left_alone():
    q = torch.randn(1, 2, 5, 4)
    with fused_attention():
        found = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(found, F.scaled_dot_product_attention(q, q, q))


def test_peak_counts_what_is_alive_at_once():
    megabyte = 250_000  # float32 values
    x = blank(megabyte)

    def chain():
        y = x + 1  # x is none of this function's business
        for _ in range(5):
            y = y + 1  # the old one goes when the new one is there
        view = y[10:]
        return view

    assert peak_bytes(chain) == 2_000_000
    model = torch.nn.Linear(500, 500, bias=False, device="meta")
    optimizer = describe._optimizer(model)
    assert all(p.grad is None for p in model.parameters())
    assert peak_bytes(lambda: None, model, optimizer) == pytest.approx(3_000_000, abs=100)

    def step():
        model(blank(1, 500)).sum().backward()

    assert peak_bytes(step, model, optimizer) == pytest.approx(4_000_000, rel=0.01)  # the gradient


# ---------------------------------------------------------------- the costs of a tiny configuration


@pytest.fixture(scope="module")
def costs(tiny) -> dict:
    return describe.describe(tiny, k=3, steps=4, size=32, release=None)


def test_flops_are_those_of_the_real_network(tiny, costs):
    from motionrag.backbones.svd import SVD

    real = SVD.tiny()
    video = torch.zeros(1, real.frames, 3, real.height, real.width)
    with torch.no_grad():
        conditions = real.encode_video(video), real.encode_image(video[:, 0]), torch.zeros(1, 1, 32)
        # the counter has no entry for the CPU's fused attention
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            real.loss(*conditions)
    assert costs["stage_1_step"]["flops"]["denoiser"] == counter.get_total_flops() > 0


def test_adapter_flops_are_those_of_the_formula(tiny, costs):
    """16 x 16 latents; the first site works on all of its positions, later ones on what the network leaves."""
    n, width = tiny.resampler.tokens, tiny.resampler.output_dim
    lengths = {}
    handles = [
        module.to_out[0].register_forward_pre_hook(
            lambda _, args, name=name: lengths.update({name: args[0].shape[0] * args[0].shape[1]})
        )
        for name, module in tiny.backbone.adapter_sites().items()
    ]
    with torch.no_grad():
        tiny.backbone.loss(*tiny.conditions())
    for handle in handles:
        handle.remove()
    plain = folded = folding = 0
    for name, d in describe.sites(tiny).items():
        heads = tiny.adapter.site(name).heads
        project = 2 * 2 * n * width * d  # keys and values
        rows = lengths[name]
        plain += project + 2 * rows * d * d + 2 * 2 * rows * n * d
        folded += 2 * (2 * rows * d * heads * n + 2 * rows * n * d)  # both halves of guidance
        folding += 2 * (project + 2 * n * d * d)
    assert n < 16  # a head: else nothing is folded
    assert costs["stage_1_step"]["flops"]["motion adapter"] == plain
    assert costs["one_clip"]["flops"]["motion adapter"] == folding + 4 * folded


def test_gradient_checkpointing_trades_work_for_memory(costs):
    step = costs["stage_1_step"]
    assert step["peak_bytes"]["gradient checkpointing"] < step["peak_bytes"]["plain"]
    forward = step["flops"]["denoiser"] + step["flops"]["motion adapter"]
    assert 0.3 * forward < step["recomputed_flops"] <= forward


def test_counting_work_holds_on_to_nothing_that_memory_is_measured_of():
    c = configuration("dynamicrafter_tiny")
    c.adapter.attach(c.backbone.adapter_sites())
    try:
        peaks = describe.stage_one(c)["peak_bytes"]
    finally:
        c.adapter.detach()
    assert peaks["gradient checkpointing"] < 0.9 * peaks["plain"]


def test_everything_is_left_as_it_was(tiny, costs):
    assert not tiny.adapter.attached
    assert all(p.requires_grad for module in tiny.trained().values() for p in module.parameters())
    assert not any(p.requires_grad for module in tiny.frozen().values() for p in module.parameters())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("k=1000", "k=1000: expected 1 to 31 reference"),
        ("k=0", "k=0"),
        ("steps=-3", "steps=-3: expected at least 1"),
    ],
)
def test_what_cannot_be_described(tmp_path, monkeypatch, capsys, word, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["describe", "backbone=svd_tiny", word, "hydra.run.dir=out"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert message in line


def test_command_line(tmp_path, monkeypatch, capsys, tiny, costs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(describe, "describe", lambda c, **options: costs)  # computed above
    assert cli.main(["describe", "backbone=svd_tiny", "hydra.run.dir=out"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "motion adapter",
        "Stage 1 step, gradient checkpointing",
        "+ gradient checkpointing",
        "never published",
    ):
        assert word in shown
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["sites"] == describe.sites(tiny)
    assert results["stage_2_step"]["total_flops"] == sum(results["stage_2_step"]["flops"].values())
