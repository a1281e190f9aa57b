"""Train the tiny CogVideoX video autoencoder (2x in time, 4x in space, 16 channels) on MotionWorld.

    python experiments/tiny_weights/train_autoencoder.py

The network is convolutional, so most steps see 16 x 16 crops around the object (four times cheaper, and the object is
what is hard); the last steps see whole frames.

Gate: reconstruction PSNR on held-out clips of the known AND of the new domain must reach 26 dB.
"""

import argparse
import math

import torch
from common import SIZE, WEIGHTS, Average, Log, fixed_clips, loader, optimizer, start
from diffusers import AutoencoderKLCogVideoX

from motionrag.backbones.cogvideox import TINY_VAE

GATE_PSNR, NOISE = 26.0, 0.05


def build() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(**TINY_VAE)


def middle_place(clip) -> torch.Tensor:
    """Centre (x, y) of the object in the middle frame, in frame units."""
    return torch.tensor(clip.track[len(clip.track) // 2, :2])


def crop(video: torch.Tensor, place: torch.Tensor, side: int = 16) -> torch.Tensor:
    """(B, 3, T, H, W) -> (B, 3, T, side, side), near `place`, on the grid of the latents (4 pixels)."""
    corner = place * SIZE - side / 2 + torch.randint(-4, 5, place.shape)
    corner = (corner / 4).round().long().clamp(0, (SIZE - side) // 4) * 4
    return torch.stack(
        [v[..., y : y + side, x : x + side] for v, (x, y) in zip(video, corner.tolist(), strict=True)]
    )


def weighted_error(output: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error; the object fills a tenth of the picture and is what matters, so it weighs more."""
    middle = video.flatten(3).median(-1).values[..., None, None]
    weight = 1 + 4 * ((video - middle).abs().amax(1, keepdim=True) > 0.3).float()
    error = output - video
    return (weight * (error.abs() + 2 * error.square())).mean()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean PSNR in dB over clips; inputs (B, ...) in [-1, 1]."""
    mse = (a.clamp(-1, 1) - b).square().flatten(1).mean(1) / 4
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def reconstruct(vae: AutoencoderKLCogVideoX, video: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [vae.decode(vae.encode(v).latent_dist.mode()).sample for v in video.transpose(1, 2).split(8)]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--whole", type=int, default=350, help="steps at the end on whole frames")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--size", type=float, default=1e-3, help="weight of the latents' mean square")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start(args.seed)
    vae, log = build().train(), Log("autoencoder")
    opt, plan = optimizer(vae.parameters(), args.lr, args.steps, weight_decay=0.0)
    average = Average(vae, 0.995)
    crops = loader(args.seed, 2 * args.batch, middle_place)
    wholes = loader(args.seed + 1, args.batch)
    check = {d: fixed_clips(32, 9001, {d: 1.0})[0] for d in ("known", "new")}
    for step in range(1, args.steps + 1):
        video, place = next(wholes if step > args.steps - args.whole else crops)
        video = video.transpose(1, 2)  # (B, 3, T, H, W)
        if step <= args.steps - args.whole:
            video = crop(video, place)
        if step % 4 == 0:  # the image condition is a clip of one frame: train on those as well
            video = video.transpose(1, 2).flatten(0, 1)[::2, :, None]
        # Sampling from a posterior that starts at variance 1 buries the signal for a thousand steps, so the noise is
        # fixed and small, and the posterior's variance is only pulled to the same value.
        posterior = vae.encode(video).latent_dist
        output = vae.decode(posterior.mean + NOISE * torch.randn_like(posterior.mean)).sample
        reconstruction = weighted_error(output, video)
        variance = (posterior.logvar - 2 * math.log(NOISE)).square().mean()
        size = posterior.mean.square().mean()
        opt.zero_grad()
        (reconstruction + 1e-3 * variance + args.size * size).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        opt.step()
        plan.step()
        average.step()
        if step % 50 == 0 or step == args.steps:
            log.write(
                step=step, loss=reconstruction.item(), latent_rms=size.sqrt().item(), lr=plan.get_last_lr()[0]
            )
        if step % 200 == 0 or step == args.steps:
            final = build().eval()
            final.load_state_dict(average.shadow)
            scores = {d: psnr(reconstruct(final, v), v.transpose(1, 2)) for d, v in check.items()}
            print(f"step {step}: PSNR " + ", ".join(f"{d} {s:.2f} dB" for d, s in scores.items()), flush=True)
            latents = torch.cat(
                [final.encode(v).latent_dist.mode() for v in check["known"].transpose(1, 2).split(8)]
            )
            final.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
            final.save_pretrained(WEIGHTS / "vae")
    if min(scores.values()) < GATE_PSNR:
        raise SystemExit(f"gate failed: PSNR {scores} below {GATE_PSNR} dB")


if __name__ == "__main__":
    main()
