"""`vae_tiling`: autoencoders that work on tiles, for less memory."""

import pytest
import torch

from motionrag.backbones.cogvideox import CogVideoX
from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.parts import tile_overlap

BACKBONES = {
    "cogvideox": lambda **options: CogVideoX.load("pkg:tiny", str, frames=9, **options),
    "dynamicrafter": lambda **options: DynamiCrafter.tiny(text=str, **options),
}
OVERLAP = {"cogvideox": 1, "dynamicrafter": 1}  # latents


@pytest.fixture(scope="module", params=BACKBONES)
def pair(request):
    """The same backbone, on whole pictures and on tiles, with a smooth moving video."""
    make = BACKBONES[request.param]
    ramp = torch.linspace(-1, 1, 32)
    video = torch.stack([torch.roll(ramp, t)[:, None] * ramp for t in range(9)])
    return request.param, make(), make(vae_tiling=True), video[None, :, None].expand(-1, -1, 3, -1, -1)


def test_tiles_give_the_whole_picture(pair):
    """The first tile, as far as no other overlaps it, is exactly what its part of the picture gives alone."""
    name, whole, tiled, video = pair
    latents = whole.encode_video(video)
    found = tiled.encode_video(video)
    assert found.shape == latents.shape and not torch.equal(found, latents)
    pixels = 16  # of a tile
    places = pixels // whole.spatial
    alone = places - OVERLAP[name]
    part = whole._encode(video[..., :pixels, :pixels])
    torch.testing.assert_close(found[..., :alone, :alone], part[..., :alone, :alone], atol=1e-5, rtol=1e-5)

    decoded, expected = tiled.decode(latents), whole.decode(latents)
    assert decoded.shape == expected.shape == video.shape
    part = whole.decode(latents[..., :places, :places])
    alone = pixels - OVERLAP[name] * whole.spatial
    torch.testing.assert_close(decoded[..., :alone, :alone], part[..., :alone, :alone], atol=1e-5, rtol=1e-5)
    if (
        not whole.random_weights
    ):  # trained weights make nearly the same picture of a tile as of its surroundings
        assert (decoded - expected).abs().mean() < 0.05 < expected.std() / 5


@pytest.mark.parametrize(
    "size, tile, spatial, share, overlap",
    [
        ((480, 720), (240, 360), 8, (1 / 6, 1 / 5), (5, 9)),  # CogVideoX: diffusers' own
        ((576, 1024), (512, 512), 8, (1 / 4, 1 / 4), (16, 16)),  # DynamiCrafter
        ((320, 512), (264, 280), 8, (1 / 6, 1 / 4), (5, 9)),
    ],
)
def test_tiles_join_without_a_gap(size, tile, spatial, share, overlap):
    """Cut and joined as diffusers does it, tiles make the latents of the whole picture."""
    for side, pixels, wanted, expected in zip(size, tile, share, overlap, strict=True):
        latents = pixels // spatial
        found = tile_overlap(latents, spatial, wanted)
        assert found == pytest.approx(expected / latents)
        starts = range(0, side, int(pixels * (1 - found)))
        kept = latents - int(latents * found)
        assert sum(min(kept, (side - start) // spatial) for start in starts) == side // spatial


def test_tiles_of_the_published_models_are_large():
    """diffusers takes 32 pixels where an autoencoder's config does not say."""
    from motionrag.backbones.dynamicrafter import VAE

    assert VAE["sample_size"] == 512
