"""DynamiCrafter beyond the contract: its encoders, conditions, sampling options, files, and the command line."""

import copy
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch
import transformers
from diffusers import AutoencoderKL
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from motionrag import cli
from motionrag.backbones.dynamicrafter import (
    TINY_CLIP_IMAGE,
    TINY_IMAGE_RESAMPLER,
    TINY_VAE,
    VAE,
    DynamiCrafter,
    drop,
    dropped,
)
from motionrag.backbones.dynamicrafter_encoders import (
    CLIP_IMAGE,
    CLIP_TEXT,
    CLIPImage,
    CLIPText,
)
from motionrag.backbones.dynamicrafter_unet import TINY_UNET
from motionrag.errors import MotionRAGError
from motionrag.modules.ddim import Schedule


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def words(prompts):
    """Text states without a text encoder."""
    return torch.stack([noise(24, 384, seed=len(text)) for text in prompts])


def tiny(**options):
    return DynamiCrafter.tiny(text=words, **options)


@pytest.fixture(scope="module")
def backbone():
    return tiny()


IMAGE = noise(1, 3, 32, 32, seed=7).clamp(-1, 1)


def sample(backbone, steps=2, **options):
    contexts = backbone.encode_context(["a ball"], IMAGE), backbone.null_context(IMAGE)
    return backbone.sample(IMAGE, *contexts, steps=steps, seeds=[1], **options)


@pytest.fixture
def calls(backbone):
    """Inputs of every UNet call: (x, timesteps, context, fs)."""
    seen = []
    handle = backbone.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args))
    yield seen
    handle.remove()


# ---------------------------------------------------------------- encoders


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["!", *letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_text_is_the_layer_before_the_last_and_the_final_norm(tokenizer):
    sizes = dict(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, hidden_act="gelu", vocab_size=60
    )
    sizes |= dict(max_position_embeddings=9, initializer_factor=5.0)
    torch.manual_seed(0)
    whole = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=3)).eval()
    cut = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2))
    assert not cut.load_state_dict(whole.state_dict(), strict=False).missing_keys
    states = CLIPText(cut, tokenizer)(["ab c", "", "a very long prompt"])
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    ids = [[start, *tokenizer.convert_tokens_to_ids(["a", "b</w>", "c</w>"]), end, 0, 0, 0, 0]]
    ids += [[start, end, 0, 0, 0, 0, 0, 0, 0], tokenizer("a very long prompt").input_ids[:8] + [end]]
    hidden = whole(torch.tensor(ids), output_hidden_states=True)
    torch.testing.assert_close(states, whole.final_layer_norm(hidden.hidden_states[-2]))
    assert (states - hidden.last_hidden_state).abs().max() > 1e-2


@torch.no_grad()
def test_image_is_every_token_without_the_final_norm():
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP_IMAGE)).eval()
    states = CLIPImage(model)(IMAGE)
    assert states.shape == (1, 1 + 4, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    hidden = model(((IMAGE + 1) / 2 - mean) / std, output_hidden_states=True)
    torch.testing.assert_close(states, hidden.hidden_states[-1], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- conditions


def test_shares_of_dropped_conditions():
    no_text, no_image = dropped(torch.arange(1000) / 1000, 0.05)
    counts = {
        (t, i): int(((no_text == t) & (no_image == i)).sum()) for t in (True, False) for i in (True, False)
    }
    assert counts == {(True, False): 50, (True, True): 50, (False, True): 50, (False, False): 850}


def test_each_sample_drops_its_own(backbone, monkeypatch):
    images = noise(40, 3, 32, 32, seed=1)
    context = backbone.encode_context([f"{'x' * i}" for i in range(40)], images)
    latents = noise(40, 1, 4, 4, 4)
    null, text = backbone.null_context(images), backbone.denoiser.config.text_tokens
    out, image_latents = backbone.drop_conditions(context, latents, torch.Generator().manual_seed(0))
    assert torch.equal(image_latents, latents)
    kinds = set()
    for i in range(1, 40):  # prompt 0 is the empty one
        parts = []
        for part in (slice(0, text), slice(text, None)):
            gone, kept = torch.equal(out[i, part], null[i, part]), torch.equal(out[i, part], context[i, part])
            assert gone != kept
            parts.append(gone)
        kinds.add(tuple(parts))
    assert len(kinds) >= 3
    monkeypatch.setattr(backbone, "condition_dropout", 0.0)
    assert torch.equal(backbone.drop_conditions(context, latents)[0], context)


def test_dropping_broadcasts():
    states = noise(3, 2, 2)
    out = drop(states, torch.zeros(1, 1, 1), torch.tensor([True, False, True]))
    assert not out[[0, 2]].any() and torch.equal(out[1], states[1])


def fixed_rate(backbone, fs):
    """The same networks, told one rate for all clips."""
    other = copy.copy(backbone)
    other.training_fs = fs
    return other


def test_frame_rate_condition(backbone, calls):
    latents = noise(2, 9, 4, 4, 4)
    context = backbone.encode_context(["a", "b"], IMAGE.expand(2, -1, -1, -1))
    conditions = latents, latents[:, :1], context, torch.Generator().manual_seed(0)
    backbone.loss(*conditions)
    assert calls.pop()[3].tolist() == [8, 8]  # clips without a rate of their own
    backbone.loss(*conditions, fps=torch.tensor([12.0, 10.0]))
    assert calls.pop()[3].tolist() == [12, 10]
    fixed_rate(backbone, 3).loss(*conditions, fps=torch.tensor([12.0, 10.0]))
    assert calls.pop()[3].tolist() == [3, 3]
    sample(backbone, steps=1)
    assert calls.pop()[3].tolist() == [15, 15]


def test_condition_latents_are_the_same_in_all_frames_and_not_rescaled(backbone, calls):
    latents, image = noise(2, 9, 4, 4, 4), noise(2, 1, 4, 4, 4, seed=2)
    context = backbone.null_context(torch.zeros(2, 3, 32, 32))
    backbone.loss(latents, image, context, torch.Generator().manual_seed(0))
    x = calls.pop()[0].transpose(1, 2)
    assert torch.equal(x[:, :, 4:], image.expand(-1, 9, -1, -1, -1))


# ---------------------------------------------------------------- sampling


def test_reference_mode_takes_one_step_more(backbone, monkeypatch):
    assert len(backbone.steps(30)) == 30
    monkeypatch.setattr(backbone, "spacing", "uniform")
    assert len(backbone.steps(30)) == 31
    monkeypatch.setattr(backbone, "spacing", "even")
    with pytest.raises(MotionRAGError, match="spacing='even': choose trailing or uniform"):
        sample(backbone)


def test_options_of_sampling_change_the_video(backbone, monkeypatch):
    videos = [sample(backbone)]
    for name, value in {
        "spacing": "uniform",
        "eta": 0.0,
        "guidance_rescale": 0.0,
        "image_guidance": 4.0,
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(backbone, name, value)
            videos.append(sample(backbone))
    for i, video in enumerate(videos):
        assert all((video - other).abs().max() > 1e-4 for other in videos[:i])
    assert torch.equal(sample(backbone), videos[0])


def test_one_scale_for_text_and_image_is_plain_guidance(backbone, calls, monkeypatch):
    plain = sample(backbone, guidance=3.0)
    monkeypatch.setattr(backbone, "image_guidance", 3.0)
    calls.clear()
    torch.testing.assert_close(sample(backbone, guidance=3.0), plain, atol=1e-3, rtol=0)
    null, image_only, both = calls[0][2].split(1)
    text = backbone.denoiser.config.text_tokens
    assert torch.equal(image_only[:, :text], null[:, :text]) and torch.equal(
        image_only[:, text:], both[:, text:]
    )
    assert not torch.equal(null[:, text:], both[:, text:]) and not torch.equal(null[:, :text], both[:, :text])


def test_noise_prediction():
    older = tiny(prediction="noise", spacing="uniform")
    older.schedule = Schedule(zero_terminal_snr=False)
    assert sample(older).isfinite().all()
    latents, context = noise(1, 9, 4, 4, 4), older.null_context(IMAGE)
    older.denoiser.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
    value = older.loss(latents, latents[:, :1], context, torch.Generator().manual_seed(0))
    assert value == pytest.approx(1, abs=0.15)  # the noise's own power: it is the target
    with pytest.raises(MotionRAGError, match="prediction='x0', choose v or noise"):
        tiny(prediction="x0")


# ---------------------------------------------------------------- files


def test_saved_and_read_again(backbone, tmp_path, capfd):
    transformers.utils.logging.disable_progress_bar()
    backbone.save(tmp_path)
    capfd.readouterr()
    sizes = dict(frames=9, height=32, width=32, fps=8)
    loaded = DynamiCrafter.load(str(tmp_path), words, schedule=backbone.schedule, **sizes)
    assert capfd.readouterr() == ("", "")
    once = dict(steps=1, guidance=1.0)
    # not bit for bit: tensors mapped from a file lie elsewhere in memory, which may choose another kernel
    torch.testing.assert_close(sample(loaded, **once), sample(backbone, **once), atol=1e-4, rtol=0)
    assert not loaded.random_weights and not loaded.denoiser.training
    half = DynamiCrafter.load(str(tmp_path), words, dtype="bfloat16", **sizes)
    assert {half.dtype, half.vae.dtype, half.image_encoder.model.dtype} == {torch.bfloat16}
    assert sample(half, **once).isfinite().all()


def test_text_encoder_and_tokenizer_are_kept_too(tmp_path, tokenizer):
    sizes = dict(
        hidden_size=384, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60
    )
    text = CLIPText(CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=24)), tokenizer)
    backbone = DynamiCrafter.tiny(text=text)
    backbone.save(tmp_path)
    loaded = DynamiCrafter.load(str(tmp_path), frames=9, height=32, width=32)
    torch.testing.assert_close(loaded.encode_text(["ab"]), backbone.encode_text(["ab"]), atol=1e-5, rtol=1e-5)


def original(**parts):
    """These networks as a published checkpoint holds them."""
    path = Path(__file__).with_name("test_dynamicrafter_unet.py")
    spec = importlib.util.spec_from_file_location("unet_tests", path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.original(parts)


def test_published_checkpoint(tokenizer, tmp_path):
    """A model.ckpt of small networks is read like the published one, text encoder included."""
    clip = dict(
        hidden_size=384,
        intermediate_size=32,
        num_attention_heads=2,
        vocab_size=60,
        max_position_embeddings=24,
    )
    torch.manual_seed(0)
    clip_of = [
        CLIPTextModel(CLIPTextConfig(**CLIP_TEXT | clip | {"num_hidden_layers": n})).eval() for n in (2, 1)
    ]
    clip_of[1].load_state_dict(clip_of[0].state_dict(), strict=False)
    backbone = DynamiCrafter.tiny(text=CLIPText(clip_of[1], tokenizer))
    state = original(
        unet=backbone.denoiser, vae=backbone.vae, image_resampler=backbone.image_resampler, text=clip_of[0],
        image_encoder=backbone.image_encoder.model,
    )  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    sizes = {
        "unet": TINY_UNET, "vae": TINY_VAE, "image_resampler": TINY_IMAGE_RESAMPLER, "image_encoder": TINY_CLIP_IMAGE,
        "text_encoder": clip | {"num_hidden_layers": 1},
    }  # fmt: skip
    options = dict(sizes=sizes, frames=9, height=32, width=32, fps=8)
    loaded = DynamiCrafter.load(str(tmp_path), **options)
    for name in ("denoiser", "vae"):
        ours, theirs = (getattr(b, name).state_dict() for b in (loaded, backbone))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    contexts = [b.encode_context(["ab"], IMAGE) for b in (loaded, backbone)]
    torch.testing.assert_close(*contexts, atol=1e-5, rtol=1e-5)
    half = DynamiCrafter.load(str(tmp_path), dtype="bfloat16", **options)
    assert half.dtype == half.vae.dtype == half.image_resampler.dtype == torch.bfloat16
    torch.testing.assert_close(half.encode_context(["ab"], IMAGE), contexts[0], atol=0.1, rtol=0.1)
    with pytest.raises(MotionRAGError, match="dtype=half16: expected float32, bfloat16 or float16"):
        DynamiCrafter.load(str(tmp_path), dtype="half16", **options)
    (tmp_path / "tokenizer").rename(tmp_path / "other")
    with pytest.raises(MotionRAGError, match="no CLIP tokenizer in .*gone; set tokenizer="):
        DynamiCrafter.load(str(tmp_path), tokenizer=str(tmp_path / "gone"), **options)


@pytest.mark.parametrize("missing", ["unet", "image_resampler", "all"])
def test_missing_parts_are_one_line(backbone, tmp_path, missing):
    backbone.save(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    for folder in (tmp_path / "whole").iterdir():
        if missing not in (folder.name, "all"):
            (tmp_path / "part" / folder.name).symlink_to(folder)
    for path in (tmp_path / "part", tmp_path / "gone"):
        with pytest.raises(MotionRAGError, match="expected a folder or hub id with") as error:
            DynamiCrafter.load(str(path), words)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_full_sizes():
    """Parameters of the published networks: Stable Diffusion's autoencoder, OpenCLIP ViT-H/14's two halves."""
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**CLIP_TEXT))
        parts = (
            AutoencoderKL(**VAE),
            CLIPVisionModel(CLIPVisionConfig(**CLIP_IMAGE)),
            text,
            text.encoder.layers[0],
        )
    vae, image, text, layer = (sum(p.numel() for p in part.parameters()) for part in parts)
    assert vae == 83653863
    assert image + 1280 * 1024 == 632076800  # with its projection
    assert text + layer + 1024 * 1024 == 354032640  # with its last layer and projection


def test_sizes_that_do_not_fit():
    with pytest.raises(MotionRAGError, match="40x32 pixels, expected multiples of 16"):
        tiny(height=40)


@pytest.mark.parametrize("name", ["dynamicrafter", "dynamicrafter_512", "dynamicrafter_256"])
def test_published_models_differ_by_config(name):
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.conf_dir())):
        cfg = compose("generate", overrides=[f"backbone={name}", "image=x", "prompt=y"]).backbone
    known = inspect.signature(DynamiCrafter.load).parameters.keys()
    known |= inspect.signature(DynamiCrafter.__init__).parameters.keys()
    assert set(cfg) - {"_target_"} <= known
    schedule = instantiate(cfg.schedule)
    expected = {"dynamicrafter": 0.3, "dynamicrafter_512": 0.7, "dynamicrafter_256": 1.0}[name]
    assert schedule.scale(torch.tensor([999])) == pytest.approx(expected)
    assert (schedule.abar[-1] == 0) == (name != "dynamicrafter_256") == (cfg.get("prediction", "v") == "v")
    assert cfg.height % 64 == cfg.width % 64 == 0
