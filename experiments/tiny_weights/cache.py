"""Encode the backbone's training clips once: captions through the sentence encoder, clips through the autoencoder.

    python experiments/tiny_weights/cache.py text       # needs nothing
    python experiments/tiny_weights/cache.py latents    # needs the trained autoencoder

Writes memory-mapped arrays to outputs/tiny_weights/cache (not kept in the repository).
"""

import argparse
import itertools
import json

import numpy as np
import torch
from common import FRAMES, HERE, SIZE, TRAINED_DOMAINS, start, to_tensor
from diffusers import AutoencoderKLCogVideoX
from tqdm import tqdm

from motionrag.backbones.cogvideox import SentenceText
from motionrag.data.motionworld import WorldClip, clip_stream, render

CACHE = HERE.parents[1] / "outputs" / "tiny_weights" / "cache"
CLIPS, SEED = 16000, 100
# A backbone that mostly reads vague captions becomes a competent animator that does not know how things move: one clip
# in four has its full caption, and is then trained with it more often than not. All in all: 15 % full captions.
KINDS = ("coarse", "looks", "empty", "fine")
SHARES = {False: (0.75, 0.15, 0.10, 0.0), True: (0.15, 0.15, 0.10, 0.60)}


def has_full_caption(row: int) -> bool:
    return row % 4 == 0


def training_clips():
    return itertools.islice(clip_stream(SEED, TRAINED_DOMAINS, FRAMES), CLIPS)


def caption(clip: WorldClip, kind: str) -> str:
    return {"coarse": clip.coarse_caption, "fine": clip.caption, "looks": clip.looks.words(), "empty": ""}[
        kind
    ]


def text():
    """Token states (U, L, D) float16 of the U different captions, and which of them each clip has, (kinds, N)."""
    encode = SentenceText()
    captions: dict[str, int] = {}
    rows = np.zeros((len(KINDS), CLIPS), np.int64)
    for i, clip in enumerate(training_clips()):
        for row, kind in enumerate(KINDS):
            if kind != "fine" or has_full_caption(i):
                rows[row, i] = captions.setdefault(caption(clip, kind), len(captions))
    np.save(CACHE / "captions.npy", rows)
    words = list(captions)
    out = np.lib.format.open_memmap(
        CACHE / "text.npy", "w+", np.float16, (len(words), encode.max_length, encode.encoder.width)
    )
    for begin in tqdm(range(0, len(words), 100), desc="captions", mininterval=20):
        out[begin : begin + 100] = encode(words[begin : begin + 100]).numpy()


def latents():
    """Unscaled latents of clips (N, C, F, h, w) and of first frames, clean and noised as in training, float16."""
    from common import WEIGHTS

    from motionrag.modules.diffusion import image_noise_sigma, noisy_image

    vae = AutoencoderKLCogVideoX.from_pretrained(WEIGHTS / "vae").eval()
    side = SIZE // 4
    generator = torch.Generator().manual_seed(SEED)
    clips = np.lib.format.open_memmap(CACHE / "latents.npy", "w+", np.float16, (CLIPS, 16, 5, side, side))
    images = np.lib.format.open_memmap(CACHE / "images.npy", "w+", np.float16, (CLIPS, 16, 1, side, side))
    stream, batch = training_clips(), 50
    for begin in tqdm(range(0, CLIPS, batch), desc="latents", mininterval=20):
        video = torch.stack([to_tensor(render(c, SIZE)) for c in itertools.islice(stream, batch)])
        first = video[:, 0]
        noise = torch.randn(first.shape, generator=generator)
        first = noisy_image(first, image_noise_sigma(batch, generator), noise)
        with torch.no_grad():
            clips[begin : begin + batch] = vae.encode(video.transpose(1, 2)).latent_dist.mode().numpy()
            images[begin : begin + batch] = vae.encode(first[:, :, None]).latent_dist.mode().numpy()
    (CACHE / "cache.json").write_text(json.dumps({"clips": CLIPS, "seed": SEED}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("text", "latents"))
    what = parser.parse_args().what
    CACHE.mkdir(parents=True, exist_ok=True)
    start(SEED)
    {"text": text, "latents": latents}[what]()
