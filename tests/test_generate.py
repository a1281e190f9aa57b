"""From an image and reference clips to a video: the parts of the method put together."""

import shutil

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from omegaconf import OmegaConf
from PIL import Image

from motionrag.cli import conf_dir
from motionrag.cli.generate import build
from motionrag.errors import MotionRAGError
from motionrag.generate import MotionRAG, fit, read_image, to_float, to_uint8


@pytest.fixture(scope="module")
def cfg(random_models):
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        return compose("generate", overrides=["image=x", "prompt=y", *random_models])


@pytest.fixture(scope="module")
def model(cfg) -> MotionRAG:
    return build(cfg)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def generate(model, tokens=None, seeds=(1, 2), **options):
    image = noise(2, 3, 32, 32)[: len(seeds)]
    options = {"steps": 2, "guidance": 2.0, **options}
    return model.generate(image, ["a ball rolls", "a wheel"][: len(seeds)], tokens, seeds=seeds, **options)


def test_widths_that_do_not_go_together(cfg):
    """One line each, before any weights are read."""
    for words, reason in (
        (["cama.width=64"], "appearance tokens have width .* CAMA has 64"),
        (["cama.width=96", "cama.appearance_resampler.output_dim=96"], "makes .* takes .* of width 96"),
        (["cama.appearance_resampler.num_queries=7"], "makes .* takes 7 of width"),
    ):
        changed = OmegaConf.merge(cfg, OmegaConf.from_dotlist(words))
        with pytest.raises(Exception, match=reason) as error:
            build(changed)
        assert isinstance(error.value, MotionRAGError) or isinstance(error.value.__cause__, MotionRAGError)


# ---------------------------------------------------------------- pictures


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=3, max_side=6).map(lambda s: (*s, 3))))
def test_pixels_survive_the_way_there_and_back(frames):
    floats = to_float(frames)
    assert floats.dtype == torch.float32 and -1 <= floats.min() <= floats.max() <= 1
    assert np.array_equal(to_uint8(floats), frames)


@settings(deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), shade=st.floats(-1, 1))
def test_any_picture_is_made_to_fit(height, width, shade):
    fitted = fit(torch.full((1, 3, height, width), shade), 32, 48)
    assert fitted.shape == (1, 3, 32, 48)
    torch.testing.assert_close(fitted, torch.full_like(fitted, shade), atol=1e-5, rtol=0)


def test_fit_keeps_the_centre_undistorted():
    image = noise(1, 3, 32, 32)
    assert torch.equal(fit(image, 32, 32), image)
    wide = torch.full((1, 3, 32, 96), -1.0)
    wide[..., 32:64] = image
    assert torch.equal(fit(wide, 32, 32), image)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_every_kind(tmp_path, mode):
    grey = Image.fromarray(np.full((20, 30), 200, np.uint8))
    path = tmp_path / ("x.tiff" if mode in ("CMYK", "I;16") else "x.png")
    (grey.convert("RGB") if mode in ("RGBA", "LA", "CMYK", "P") else grey).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (1, 3, 20, 30) and image.dtype == torch.float32


def test_a_turned_photo_is_read_upright(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    image = read_image(tmp_path / "x.png")
    assert image.shape == (1, 3, 30, 20)
    assert image[..., :15, :].min() == 1 and image[..., 15:, :].max() == -1


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "cut", "damaged"])
def test_no_picture_is_one_line(tmp_path, kind):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    data = bytearray(path.read_bytes())
    data[60:80] = bytes(20)
    if kind in ("missing", "folder"):
        path.unlink()
    if kind == "folder":
        path.mkdir()
    contents = {"empty": b"", "text": b"a ball", "cut": data[:500], "damaged": data}
    if kind in contents:
        path.write_bytes(contents[kind])
    with pytest.raises(MotionRAGError, match="x.png: (no such file|not a readable picture)") as error:
        read_image(path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- motion tokens


def test_everything_is_frozen(model):
    for module in (model.adapter, model.resampler, model.cama, model.motion_encoder, model.backbone.denoiser):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_motion_tokens_keep_leading_axes(model):
    features = noise(2, 3, 64, 24)
    tokens = model.motion_tokens(features)
    assert tokens.shape == (2, 3, 8, 128)
    torch.testing.assert_close(tokens[1, 2], model.motion_tokens(features[1, 2:])[0], atol=1e-5, rtol=1e-4)


def test_null_tokens_are_those_of_an_all_zero_clip(model):
    assert model.null_tokens.shape == (1, 8, 128)
    clip = torch.zeros(1, 5, 3, 50, 40)  # the encoder sees the same at any size
    torch.testing.assert_close(model.null_tokens, model.motion_tokens(model.motion_encoder(clip)))


def test_reference_clips_of_different_sizes(model):
    clips = [noise(9, 3, 32, 32), noise(4, 3, 40, 60, seed=1)]
    motion, appearance = model.encode_references(clips)
    assert motion.shape == (1, 2, 64, 24) and appearance.shape == (1, 2, 17, 24)
    torch.testing.assert_close(motion[0, 1], model.motion_encoder(clips[1][None])[0])
    torch.testing.assert_close(appearance[0, 0], model.appearance_encoder(clips[0][:1])[0])


def test_adapted_tokens(model):
    motion, appearance, image = noise(2, 3, 64, 24), noise(2, 3, 17, 24), noise(2, 3, 32, 32)
    tokens = model.adapt(motion, appearance, image)
    assert tokens.shape == (2, 8, 128)
    alone = model.adapt(motion[1:], appearance[1:], image[1:])
    torch.testing.assert_close(tokens[1:], alone, atol=1e-5, rtol=1e-4)
    for changed in (
        (motion.flip(1), appearance.flip(1), image),  # the order of the references matters
        (motion, appearance, image.flip(0)),
        (motion + 0.1 * noise(2, 3, 64, 24, seed=1), appearance, image),
    ):
        assert not torch.allclose(model.adapt(*changed), tokens, atol=1e-4)


def test_the_range_in_which_the_reference_shows_cama_the_picture(model, monkeypatch):
    motion, appearance, image = noise(1, 3, 64, 24), noise(1, 3, 17, 24), noise(1, 3, 32, 32)
    expected = model.adapt(motion, appearance, image / 2 + 0.5)
    monkeypatch.setattr(model.backbone, "reference_quirks", True)
    assert torch.equal(model.adapt(motion, appearance, image), expected)


def test_more_references_than_positions(model):
    motion, appearance = noise(1, 32, 64, 24), noise(1, 32, 17, 24)
    assert model.adapt(motion[:, :31], appearance[:, :31], noise(1, 3, 32, 32)).shape == (1, 8, 128)
    with pytest.raises(MotionRAGError, match="k=32: this CAMA takes at most 31 reference clips"):
        model.adapt(motion, appearance, noise(1, 3, 32, 32))


# ---------------------------------------------------------------- videos


def test_videos_follow_seeds_and_tokens(model):
    tokens = noise(2, 8, 128)
    video = generate(model, tokens)
    assert video.shape == (2, 9, 3, 32, 32) and -1 <= video.min() <= video.max() <= 1
    assert torch.equal(generate(model, tokens), video)
    torch.testing.assert_close(generate(model, tokens[:1], seeds=(1,)), video[:1], atol=1e-4, rtol=0)
    for other in (
        generate(model, tokens, seeds=(3, 4)),
        generate(model, tokens.flip(0)),
        generate(model),
        generate(model, tokens, motion_scale=0.5),
    ):
        assert (other - video).abs().max() > 1e-3


def test_no_tokens_or_no_scale_is_the_bare_backbone(model):
    bare = generate(model)
    assert torch.equal(generate(model, noise(2, 8, 128), motion_scale=0.0), bare)
    model.detach()
    try:
        assert torch.equal(generate(model), bare)
    finally:
        model.adapter.attach(model.backbone.adapter_sites())


@pytest.mark.parametrize("name", ["guidance", "motion_scale"])
def test_a_scale_that_is_no_number(model, name):
    with pytest.raises(MotionRAGError, match=f"{name}=nan: expected a number"):
        generate(model, noise(2, 8, 128), **{name: float("nan")})


def test_weights_without_their_manifest(cfg, tmp_path):
    shutil.copy(cfg.weights.adapter, tmp_path / "adapter.safetensors")
    with pytest.warns(UserWarning, match="adapter.safetensors has no .json beside it"):
        build(OmegaConf.merge(cfg, {"weights": {"adapter": str(tmp_path / "adapter.safetensors")}}))


def test_less_than_one_step(model):
    with pytest.raises(MotionRAGError, match="steps=0: expected at least 1"):
        generate(model, steps=0)


def test_encoders_leave_the_device_once_they_have_encoded(cfg, model):
    moves = []
    lean = build(OmegaConf.merge(cfg, {"offload": True, "device": "cpu"}))
    encoders_to, sample = lean.backbone.encoders_to, lean.backbone.sample
    lean.backbone.encoders_to = lambda device: (moves.append(f"encoders {device}"), encoders_to(device))
    lean.backbone.sample = lambda *a, **k: (moves.append("sample"), sample(*a, **k))[1]
    tokens = noise(2, 8, 128)
    assert torch.equal(generate(lean, tokens), generate(model, tokens))
    assert moves == ["encoders cpu", "encoders cpu", "sample"]  # the device is the CPU here


# ---------------------------------------------------------------- without CAMA


def test_stage_one_alone(cfg):
    model = build(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "cama"]))  # as `~cama` does
    assert generate(model, model.motion_tokens(noise(2, 64, 24))).shape == (2, 9, 3, 32, 32)
    with pytest.raises(MotionRAGError, match="hold no CAMA"):
        model.adapt(noise(1, 1, 64, 24), noise(1, 1, 17, 24), noise(1, 3, 32, 32))


def test_cama_without_weights(cfg):
    with pytest.raises(MotionRAGError, match="cama_weights is missing.*~cama"):
        build(OmegaConf.merge(cfg, {"weights": {"cama": None}}))
