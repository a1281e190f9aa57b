"""CogVideoX beyond the contract: reading folders, its text encoder."""

import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from motionrag.backbones.cogvideox import CogVideoX, SentenceText
from motionrag.errors import MotionRAGError


def words(prompts):
    """Text states without a text encoder."""
    rows = [torch.randn(24, 384, generator=torch.Generator().manual_seed(len(text))) for text in prompts]
    return torch.stack(rows)


@pytest.fixture(scope="module")
def tiny():
    return CogVideoX.tiny(text=words, num_layers=1)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogvideox")
    for name, part in (("vae", tiny.vae), ("transformer", tiny.denoiser), ("scheduler", tiny.scheduler)):
        part.save_pretrained(folder / name)
    return folder


def test_a_saved_one_is_the_same(tiny, folder):
    loaded = CogVideoX.load(str(folder), words, frames=9, name="copy")
    assert (loaded.frames, loaded.height, loaded.width, loaded.name) == (9, 32, 32, "copy")
    image = torch.zeros(1, 3, 32, 32)
    videos = [b.sample(image, words(["x"]), words([""]), steps=2, seeds=[0]) for b in (tiny, loaded)]
    assert torch.equal(*videos)
    assert not loaded.denoiser.training and not loaded.vae.training


def test_a_hub_id_is_as_good_as_a_folder(tiny, folder, publish):
    publish("someone/cogvideox", folder)
    loaded = CogVideoX.load("someone/cogvideox", words, frames=9)
    image = torch.zeros(1, 3, 32, 32)
    videos = [b.sample(image, words(["x"]), words([""]), steps=2, seeds=[0]) for b in (tiny, loaded)]
    assert torch.equal(*videos)


def test_loading_is_silent(folder, capfd):
    CogVideoX.load(str(folder), words, frames=9)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("missing", ["vae", "transformer", "scheduler", "all"])
def test_missing_parts_are_one_line(folder, tmp_path, missing):
    for part in {"vae", "transformer", "scheduler"} - {missing}:
        if missing != "all":
            (tmp_path / part).symlink_to(folder / part)
    with pytest.raises(MotionRAGError, match="expected a folder or hub id with vae/, transformer/") as error:
        CogVideoX.load(str(tmp_path), words, frames=9)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_frames_that_do_not_fit_the_autoencoder(folder):
    with pytest.raises(MotionRAGError, match=r"frames=8, expected 1 \+ a multiple of 2"):
        CogVideoX.load(str(folder), words, frames=8)


def test_sentence_states_are_zero_where_there_is_no_token():
    text = SentenceText(max_length=12)
    states = text(["a ball rolls", ""])
    assert states.shape == (2, 12, 384)
    assert (states.abs().sum(-1) > 0).sum(1).tolist() == [5, 2]  # start and end count


def test_one_noise_level_for_all_images_is_a_choice():
    for quirks, levels in ((False, 3), (True, 1)):
        backbone = CogVideoX.tiny(text=words, reference_quirks=quirks, num_layers=1)
        drawn = backbone.image_noise_level(3, torch.Generator().manual_seed(0))
        assert drawn.shape == (3,) and len(drawn.unique()) == levels


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_sampling_is_that_of_diffusers(tiny, monkeypatch, sampler):
    """The pipeline draws the condition latents, our sampling takes their mode; all else is the same."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    backbone = CogVideoX(tiny.vae, tiny.denoiser, tiny.scheduler, words, 9, sampler=sampler)
    pipe = CogVideoXImageToVideoPipeline(None, None, backbone.vae, backbone.denoiser, backbone.scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    contexts = words(["a ball", "a cube here"]), words(["", ""])
    frames = pipe(
        images / 2 + 0.5, prompt_embeds=contexts[0], negative_prompt_embeds=contexts[1], height=32, width=32,
        num_frames=9, num_inference_steps=4, guidance_scale=2.0, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)],
    ).frames  # fmt: skip
    ours = backbone.sample(images, *contexts, steps=4, guidance=2.0, seeds=[3, 4])
    torch.testing.assert_close(ours / 2 + 0.5, frames, atol=2e-5, rtol=0)


def test_samplers_differ_and_are_named(tiny):
    image, contexts = torch.zeros(1, 3, 32, 32), (words(["x"]), words([""]))
    videos = [
        CogVideoX(tiny.vae, tiny.denoiser, tiny.scheduler, words, 9, sampler=name).sample(
            image, *contexts, steps=3, seeds=[0]
        )
        for name in ("dpm", "ddim")
    ]
    assert (videos[0] - videos[1]).abs().max() > 1e-3
    with pytest.raises(MotionRAGError, match="sampler=euler: expected dpm or ddim"):
        CogVideoX(tiny.vae, tiny.denoiser, tiny.scheduler, words, 9, sampler="euler")
