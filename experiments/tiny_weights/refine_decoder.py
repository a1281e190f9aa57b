"""Train the autoencoder's decoder on, with the encoder fixed: sharper objects, and the cached latents stay valid.

Run: python experiments/tiny_weights/refine_decoder.py
"""

import argparse

import torch
from common import WEIGHTS, Average, Log, fixed_clips, loader, optimizer, start
from diffusers import AutoencoderKLCogVideoX
from train_autoencoder import GATE_PSNR, NOISE, psnr, reconstruct, weighted_error


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start(args.seed)
    vae = AutoencoderKLCogVideoX.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32)
    log = Log("decoder")
    vae.requires_grad_(False)
    decoder = vae.decoder.train().requires_grad_(True)
    opt, plan = optimizer(decoder.parameters(), args.lr, args.steps, weight_decay=0.0)
    average, data = Average(decoder, 0.995), loader(args.seed + 2, args.batch)
    check = {d: fixed_clips(32, 9001, {d: 1.0})[0] for d in ("known", "new")}
    for step in range(1, args.steps + 1):
        video = next(data)[0].transpose(1, 2)
        if step % 8 == 0:  # lone frames, as the encoder gives them for the image condition
            video = video.transpose(1, 2).flatten(0, 1)[::2, :, None]
        with torch.no_grad():
            latents = vae.encode(video).latent_dist.mode()
        loss = weighted_error(vae.decode(latents + NOISE * torch.randn_like(latents)).sample, video)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        opt.step()
        plan.step()
        average.step()
        if step % 50 == 0 or step == args.steps:
            log.write(step=step, loss=loss.item(), lr=plan.get_last_lr()[0])
    decoder.load_state_dict(average.shadow)
    vae.eval()
    scores = {d: psnr(reconstruct(vae, v), v.transpose(1, 2)) for d, v in check.items()}
    print("PSNR " + ", ".join(f"{d} {s:.2f} dB" for d, s in scores.items()))
    if min(scores.values()) < GATE_PSNR:
        raise SystemExit(f"gate failed: PSNR {scores} below {GATE_PSNR} dB")
    vae.save_pretrained(WEIGHTS / "vae")


if __name__ == "__main__":
    main()
