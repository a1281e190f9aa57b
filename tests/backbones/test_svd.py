"""SVD beyond the contract: diffusers' own pipeline, reading folders, what guidance and the query do."""

from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from motionrag.backbones.svd import SVD, adapter_sites
from motionrag.errors import MotionRAGError
from motionrag.generate import to_float
from motionrag.modules.motion_adapter import MotionAdapter


@pytest.fixture(scope="module")
def tiny():
    return SVD.tiny()


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    parts = {"vae": tiny.vae, "image_encoder": tiny.image_encoder, "unet": tiny.denoiser}
    for name, part in (parts | {"scheduler": tiny.scheduler}).items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def pictures():
    """Two first frames as PIL pictures."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def as_tensor(pictures):
    return torch.cat([to_float(np.array(picture))[None] for picture in pictures])


def video(backbone, image, **options):
    contexts = backbone.encode_context([""] * len(image), image), backbone.null_context(image)
    return backbone.sample(image, *contexts, **{"steps": 3, "seeds": [3, 4][: len(image)], **options})


@pytest.mark.parametrize(("guidance", "least"), [(3.0, 1.0), (1.0, 1.0), (3.0, 1.5)])
def test_sampling_is_that_of_diffusers(tiny, pictures, monkeypatch, guidance, least):
    monkeypatch.setattr(tiny, "min_guidance", least)
    pipe = StableVideoDiffusionPipeline(
        tiny.vae, tiny.image_encoder, tiny.denoiser, tiny.scheduler, CLIPImageProcessorPil()
    )
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        pictures, height=32, width=32, num_frames=9, num_inference_steps=3, max_guidance_scale=guidance,
        min_guidance_scale=least, generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], output_type="pt",
    ).frames  # fmt: skip
    ours = video(tiny, as_tensor(pictures), guidance=guidance)
    torch.testing.assert_close(ours / 2 + 0.5, frames, atol=2e-5, rtol=0)


def test_guidance_rises_over_the_frames(tiny, pictures):
    """From 1 at the first frame to the given value at the last."""
    seen = []
    step = tiny.scheduler.step

    def keep(output, *args, **options):
        seen.append(output)
        return step(output, *args, **options)

    tiny.scheduler.step = keep
    try:
        for guidance in (1.0, 3.0):
            video(tiny, as_tensor(pictures), guidance=guidance, steps=1)
    finally:
        del tiny.scheduler.step
    plain, guided = seen
    torch.testing.assert_close(plain[:, 0], guided[:, 0], atol=1e-5, rtol=1e-5)
    distance = (guided - plain).abs().flatten(2).mean((0, 2))
    assert (distance[1:] > distance[:-1]).all()


def test_a_saved_one_is_the_same(tiny, folder, pictures):
    loaded = SVD.load(str(folder), frames=9, height=32, width=32, name="copy")
    assert (loaded.frames, loaded.name, loaded.random_weights) == (9, "copy", False)
    image = as_tensor(pictures[:1])
    assert torch.equal(video(tiny, image), video(loaded, image))
    parts = loaded.vae, loaded.image_encoder, loaded.denoiser
    assert not any(part.training or any(p.requires_grad for p in part.parameters()) for part in parts)


@pytest.mark.parametrize("damage", ["missing", "cut", "lacking", "dtype"])
def test_a_damaged_folder_is_one_line(folder, tmp_path, damage):
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    unet, options = tmp_path / "unet", {}
    unet.unlink()
    if damage != "missing":
        unet.mkdir()
        (unet / "config.json").write_bytes((folder / "unet/config.json").read_bytes())
        weights = folder / "unet/diffusion_pytorch_model.safetensors"
        if damage == "lacking":
            from safetensors.torch import load_file, save_file

            state = load_file(weights)
            del state["conv_in.weight"]
            save_file(state, unet / weights.name, metadata={"format": "pt"})
        else:
            data = weights.read_bytes()
            (unet / weights.name).write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    if damage == "dtype":
        options = {"dtype": "float3"}
    with pytest.raises(MotionRAGError) as error:
        SVD.load(str(tmp_path), **options)
    expected = {
        "lacking": "unet/ lacks 1 weights, the first is conv_in.weight",
        "dtype": "dtype=float3: expected",
    }
    assert expected.get(damage, "expected a folder or hub id with vae/, image_encoder/") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_size_that_does_not_fit():
    with pytest.raises(MotionRAGError, match="height=36, width=32, expected multiples of 8"):
        SVD.tiny(height=36)


def test_the_autoencoder_may_work_in_chunks_of_frames(tiny, pictures):
    latents = torch.randn(2, 9, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    chunked, image = SVD.tiny(vae_chunk=4), as_tensor(pictures)
    torch.testing.assert_close(SVD.tiny(vae_chunk=1).encode_image(image), tiny.encode_image(image))
    # a frame is decoded with the others of its chunk
    parts = [tiny.decode(part) for part in latents.split(4, dim=1)]
    torch.testing.assert_close(chunked.decode(latents), torch.cat(parts, dim=1))


def test_the_full_size_model_has_sixteen_sites():
    with torch.device("meta"):
        sites = adapter_sites(UNetSpatioTemporalConditionModel())
    widths = Counter(site.to_out[0].in_features for site in sites.values())
    assert widths == {320: 5, 640: 5, 1280: 6}
    assert not any("temporal" in name for name in sites)


def branch(backbone, query):
    """What the motion adapter adds in one site: (rows, places, width)."""
    torch.manual_seed(0)
    sites = backbone.adapter_sites()
    adapter = MotionAdapter.for_modules(sites, 16, init="reference", query=query).attach(sites)
    added = []
    name, module = next(iter(sites.items()))
    adapter.site(name).register_forward_hook(lambda module, args, out: added.append(out))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    try:
        with adapter.use(torch.randn(1, 4, 16)):
            backbone.loss(
                torch.randn(1, 9, 4, 8, 8), backbone.encode_image(image), backbone.encode_context([""], image)
            )
    finally:
        adapter.detach()
    return added[0]


def test_hidden_states_ask_for_motion_place_by_place(tiny):
    """With one image token the attention's output is a constant, and so is the motion that it asks for."""
    spread = {query: branch(tiny, query).std((0, 1)).max() for query in ("output", "hidden")}
    assert tiny.adapter_query == "hidden"
    assert spread["output"] < 1e-5 < 1e-3 < spread["hidden"]
