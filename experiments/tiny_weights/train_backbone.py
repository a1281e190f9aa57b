"""Train the tiny CogVideoX transformer on cached MotionWorld latents; then check that it is a competent animator.

    python experiments/tiny_weights/train_backbone.py
    python experiments/tiny_weights/train_backbone.py --check   # the gate, needs the encoders

Gate, on clips generated from held-out prompts of the known and of the new domain: at the last frame the object's two
colours cover 50 to 200 % of the area they covered at first, in 80 % of the clips; the outline of the last frame fits
that of the first, moved, scaled and turned onto it, at least 0.8 times as well as the true clip's does as the
autoencoder gives it back, which is as good as this can get (printed beside it: a disk in the true object's place and of
its area, which the bound does not rule out, and the share of outlines whose shape is right, which no bound asks for
yet); the Action Score is above that of a clip that stands still.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from cache import CACHE, CLIPS, KINDS, SHARES, has_full_caption
from common import WEIGHTS, Average, Log, fixed_clips, optimizer, start
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from outlines import coloured, disk, fit, named_right

from motionrag.backbones.cogvideox import SCHEDULER, TINY_TRANSFORMER, CogVideoX, SentenceText
from motionrag.checkpoint import save_weights

FULL = [0.9 if kind == "fine" else 0.1 if kind == "empty" else 0.0 for kind in KINDS]  # of a fine-tune
HELD_OUT = 256  # of the clips, to see the loss on


def assemble(transformer, text=None) -> CogVideoX:
    vae = AutoencoderKLCogVideoX.from_pretrained(WEIGHTS / "vae")
    return CogVideoX(
        vae, transformer, CogVideoXDPMScheduler(**SCHEDULER), text or SentenceText(), 9,
        name="cogvideox_tiny", sampler="ddim",
    )  # fmt: skip


def train(args):
    name = "finetuned" if args.finetune else "backbone"
    log, kept = Log(name), CACHE.with_name(f"{name}.pt")
    backbone = assemble(CogVideoXTransformer3DModel(**TINY_TRANSFORMER), text=lambda prompts: None)
    scale = backbone.vae.config.scaling_factor
    model = backbone.denoiser.train().requires_grad_(True)
    opt, plan = optimizer(model.parameters(), args.lr, args.steps, warmup=200)
    latents, images = (torch.from_numpy(np.load(CACHE / f"{n}.npy")) for n in ("latents", "images"))
    text, captions = torch.from_numpy(np.load(CACHE / "text.npy")), np.load(CACHE / "captions.npy")
    rows = np.array([row for row in range(CLIPS) if has_full_caption(row) or not args.finetune])
    seen, unseen = rows[rows < CLIPS - HELD_OUT], rows[rows >= CLIPS - HELD_OUT]

    def batch(rows, rng):
        shares = (FULL if args.finetune else SHARES[has_full_caption(int(row))] for row in rows)
        kinds = [rng.choice(len(KINDS), p=p) for p in shares]
        latent, image = (x[torch.as_tensor(rows)].float().transpose(1, 2) * scale for x in (latents, images))
        return latent, image, text[torch.as_tensor(captions[kinds, rows])].float()

    rng = np.random.default_rng(99)
    held_out = [batch(some, rng) for some in np.split(unseen, len(unseen) // 32)]

    @torch.no_grad()
    def validation():
        """Loss of the averaged weights on held-out clips, the same noise every time."""
        current = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average.shadow)
        generator = torch.Generator().manual_seed(5)
        loss = float(np.mean([backbone.loss(*b, generator=generator).item() for b in held_out]))
        model.load_state_dict(current)
        return loss

    begin, total = 0, []
    rng = np.random.default_rng(args.seed)
    if args.finetune:
        model.load_state_dict(
            CogVideoXTransformer3DModel.from_pretrained(WEIGHTS / "transformer").state_dict()
        )
    average = Average(model, 0.9985)
    if args.resume:
        state = torch.load(kept, weights_only=True)
        begin = state["step"]
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        plan.load_state_dict(state["plan"])
        average.shadow, average.steps = state["shadow"], begin
        rng = np.random.default_rng(args.seed + begin)
    for step in range(begin + 1, args.steps + 1):
        loss = backbone.loss(*batch(rng.choice(seen, args.batch), rng))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        plan.step()
        average.step()
        total.append(loss.item())
        if step % 250 == 0 or step == args.steps:
            log.write(step=step, loss=float(np.mean(total)), held_out=validation(), lr=plan.get_last_lr()[0])
            total = []
            torch.save({"step": step, "model": model.state_dict(), "shadow": average.shadow,
                        "optimizer": opt.state_dict(), "plan": plan.state_dict()}, kept)  # fmt: skip
    if args.finetune:
        state = {f"backbone.{key}": average.shadow[key].half() for key, _ in model.named_parameters()}
        return save_weights(Path(args.finetune), state, {"of": "cogvideox_tiny", "steps": args.steps})
    final = CogVideoXTransformer3DModel(**TINY_TRANSFORMER)
    final.load_state_dict(average.shadow)
    final.save_pretrained(WEIGHTS / "transformer")
    CogVideoXDPMScheduler(**SCHEDULER).save_pretrained(WEIGHTS / "scheduler")


@torch.no_grad()
def check(args):
    from motionrag.encoders import MotionEncoder
    from motionrag.metrics.action_score import ActionScore

    backbone = assemble(CogVideoXTransformer3DModel.from_pretrained(WEIGHTS / "transformer"))
    judge, failed = MotionEncoder("pkg:tiny/videomae", size=32), []
    for domain in ("known", "new"):
        truth, clips = fixed_clips(args.clips, 9004, {domain: 1.0}, held_out=True)
        contexts = (
            backbone.encode_context([c.caption for c in clips], truth[:, 0]),
            backbone.null_context(truth[:, 0]),
        )
        video = backbone.sample(
            truth[:, 0], *contexts, steps=10, guidance=args.guidance, seeds=range(len(clips))
        )
        ends = {
            "true": truth,
            "autoencoder": backbone.decode(backbone.encode_video(truth)),
            "generated": video,
        }
        ends = {name: coloured(one, clips) for name, one in ends.items()}
        area = ends["generated"].mean((2, 3))
        kept = float(((area[:, -1] / area[:, 0]).log2().abs() < 1).float().mean())
        first = ends["true"][:, 0]
        ends = {name: masks[:, -1] for name, masks in ends.items()}
        ends["disk"] = torch.stack([disk(mask) for mask in ends["true"]])
        shapes = {name: named_right(masks, clips) for name, masks in ends.items()}
        fits = {
            name: float(np.mean([fit(m, f) for m, f in zip(masks, first, strict=True)]))
            for name, masks in ends.items()
        }
        scores = {}
        for name, one in (("generated", video), ("still", truth[:, :1].expand_as(truth))):
            score = ActionScore()
            score.update(judge.logits(one), judge.logits(truth), [str(i) for i in range(len(clips))])
            scores[name] = float(score.compute())
        print(
            f"{domain}: object kept {kept:.2f}, Action Score {scores['generated']:.1f}, still clip {scores['still']:.1f}"
        )
        for name in ends:
            print(f"    {name}: shape {shapes[name]:.2f}, overlap with the first outline {fits[name]:.2f}")
        shape = fits["generated"] >= 0.8 * fits["autoencoder"]
        if kept < 0.8 or not shape or scores["generated"] <= scores["still"]:
            failed.append(domain)
    if failed:
        raise SystemExit(f"gate failed in {failed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    parser.add_argument(
        "--finetune", metavar="FILE", help="from the shipped weights on full captions, into FILE"
    )
    args = parser.parse_args()
    start(args.seed)
    (check if args.check else train)(args)
