"""Train a tiny SVD on MotionWorld, then a motion adapter with either query, all else equal, and compare the two.

    make experiment NAME=svd_query                      # 25 to 45 min on one core
    python experiments/svd_query/compare.py --smoke     # a minute: does it run
    python experiments/svd_query/compare.py --show      # nothing is run: table and plot from results.json

1. autoencoder and UNet (`SVD.tiny`, a thinner autoencoder) on rendered clips; the image encoder stays random
2. Stage 1 for each query: `motionrag train experiment=tiny_adapter`, same seeds, clips, noise and number of steps
3. `motionrag evaluate` on held-out clips, the true clip's motion as reference (oracle), against the bare backbone

Parts that are done are kept in outputs/svd_query and not made again. Written beside this file: results.json, table.md,
plot.png.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

HERE = Path(__file__).parent
sys.path += [str(HERE.parent), str(HERE.parent / "tiny_weights")]
from common import Average, fixed_clips, optimizer  # noqa: E402
from run import verb  # noqa: E402

from motionrag.backbones.svd import SCHEDULER, SVD, TINY_IMAGE_ENCODER, TINY_UNET, TINY_VAE  # noqa: E402
from motionrag.cli import conf_dir  # noqa: E402
from motionrag.data.motionworld import make_dataset  # noqa: E402
from motionrag.io import write_json, write_text  # noqa: E402
from motionrag.provenance import git_state  # noqa: E402

VAE = TINY_VAE | {"block_out_channels": (32, 32, 32)}
COMMAND = "make experiment NAME=svd_query"
QUERIES = ("output", "hidden")
METRICS = {"action_score": "Action Score", "trajectory_error": "path error, px", "dino_score": "DINO score"}


def train(name, module, steps, lr, loss_of):
    """Train `module` on `loss_of(step)`; returns the average of its weights and the last losses' mean."""
    opt, plan = optimizer(module.parameters(), lr, steps, warmup=min(100, steps))
    average, losses = Average(module, 0.995), []
    for step in range(1, steps + 1):
        loss = loss_of()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        opt.step()
        plan.step()
        average.step()
        losses.append(loss.item())
        if step % max(steps // 10, 1) == 0:
            print(f"{name} {step}/{steps}: {sum(losses[-50:]) / len(losses[-50:]):.4f}", flush=True)
    module.load_state_dict(average.shadow)
    return sum(losses[-50:]) / len(losses[-50:])


def make_backbone(folder, args):
    """Train autoencoder and UNet, and save them as SVD.load reads them."""
    torch.manual_seed(args.seed)
    backbone = SVD(
        AutoencoderKLTemporalDecoder(**VAE),
        CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY_IMAGE_ENCODER)),
        UNetSpatioTemporalConditionModel(**TINY_UNET),
        EulerDiscreteScheduler(**SCHEDULER),
        **args.sizes,
    )
    vae, unet = backbone.vae, backbone.denoiser
    videos, _ = fixed_clips(args.clips, args.seed + 100, {"known": 1.0, "compound": 1.0})
    generator = torch.Generator().manual_seed(args.seed)

    def some(count):
        return torch.randint(len(videos), (count,), generator=generator)

    def reconstruct():
        clips = videos[some(4)]
        frames = clips.flatten(0, 1)
        mean = vae.encode(frames).latent_dist.mean
        # a fixed small noise instead of the posterior's own, which buries the signal at first
        noisy = mean + 0.05 * torch.randn(mean.shape, generator=generator)
        output = vae.decode(noisy, num_frames=clips.shape[1]).sample
        # the object is small, and it is what matters
        ground = frames.flatten(2).median(-1).values[..., None, None]
        weight = 1 + 4 * ((frames - ground).abs().amax(1, keepdim=True) > 0.3).float()
        error = output - frames
        return (weight * (error.abs() + 2 * error.square())).mean() + 1e-3 * mean.square().mean()

    vae.train().requires_grad_(True)
    found = {"autoencoder_loss": train("autoencoder", vae, args.vae_steps, 2e-3, reconstruct)}
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([backbone.encode_video(part) for part in videos.split(32)])
        scale = 1 / latents.std().item() / vae.config.scaling_factor
        vae.register_to_config(scaling_factor=vae.config.scaling_factor * scale)
        latents *= scale
        context = torch.cat([backbone.encode_context([""] * len(p), p) for p in videos[:, 0].split(32)])
        shown = backbone.decode(latents[:32])
        found["psnr_db"] = float(-10 * ((shown - videos[:32]).square().mean() / 4).log10())

    def denoise():
        rows = some(16)
        level = backbone.image_noise_level(len(rows), generator)
        image = backbone.encode_image(videos[rows, 0], generator, level)
        return backbone.loss(latents[rows], image, context[rows], generator, level)

    unet.train().requires_grad_(True)
    found["unet_loss"] = train("unet", unet, args.unet_steps, 2e-3, denoise)
    unet.eval()
    parts = {"vae": vae, "image_encoder": backbone.image_encoder, "unet": unet}
    for name, part in (parts | {"scheduler": backbone.scheduler}).items():
        part.save_pretrained(folder / name)
    write_json(folder / "done.json", found)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clips", type=int, default=2000, help="rendered for the backbone, packed for Stage 1"
    )
    parser.add_argument("--vae-steps", type=int, default=400)
    parser.add_argument("--unet-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=250, help="of Stage 1, for each query")
    parser.add_argument("--test-clips", type=int, default=64)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--show", action="store_true", help="run nothing: table and plot from results.json")
    args = parser.parse_args()
    spec = OmegaConf.to_container(OmegaConf.load(HERE / "experiment.yaml"))
    words = {key: spec[key] for key in ("question", "conclusion")}
    if args.show:
        return write(
            HERE, json.loads((HERE / "results.json").read_text()) | words | {"spec": spec, "command": COMMAND}
        )
    if args.smoke:
        args.clips, args.vae_steps, args.unet_steps, args.steps, args.test_clips = 24, 3, 3, 2, 4
    args.sizes = {"frames": 9, "height": 32, "width": 32, "name": "svd_motionworld"}
    start, root = (
        time.time(),
        HERE.parents[1] / "outputs" / ("svd_query_smoke" if args.smoke else "svd_query"),
    )
    if not (root / "backbone/done.json").is_file():
        make_backbone(root / "backbone", args)
    if not (root / "test/shards").is_dir():
        table = make_dataset(
            root / "test", args.test_clips, args.seed + 2, {"known": 1.0}, held_out=True, prefix="test"
        )
        verb("pack", f"table={table}", f"videos={root}/test/videos", f"out={root}/test/shards")
    backbone = ["backbone=svd", f"backbone.path={root}/backbone", "backbone.dtype=float32", "backbone.fps=8"]
    backbone += [f"backbone.{k}={v}" for k, v in args.sizes.items()]
    arms = {}
    for query in QUERIES:
        asked, out = f"backbone.adapter_query={query}", root / query
        if not (out / "done.json").is_file():
            trained = verb(
                "train", "experiment=tiny_adapter", *backbone, asked, f"run_dir={out}", f"seed={args.seed}",
                "logger=csv", f"make.out={root}/world", f"make.clips={args.clips // 2}", "make.domains={known:1.0}",
                "data.val_share=0.1", f"trainer.max_steps={args.steps}", f"trainer.val_check_interval={args.steps}",
            )  # fmt: skip
            write_json(out / "done.json", {k: trained[k] for k in ("metrics", "weights")})
        trained = json.loads((out / "done.json").read_text())
        if not (out / "scores/metrics.json").is_file():
            verb(
                "evaluate", *backbone, asked, f"weights.adapter={trained['weights']}", f"db={root}/world/db",
                f"shards={root}/test/shards", "conditions=[backbone,oracle]", "steps=12", f"seed={args.seed}",
                "resamples=0", "save_clips=4", f"out={out}/scores",
            )  # fmt: skip
        scores = json.loads((out / "scores/metrics.json").read_text())["conditions"]
        arms[query] = {
            "val_loss": {
                k.removeprefix("val/"): v for k, v in trained["metrics"].items() if k.startswith("val/")
            },
            **{name: {m: scores[name]["known"][m] for m in METRICS} for name in scores},
        }
    about = words | {
        "command": COMMAND,
        "spec": spec,
        "settings": dict(vars(args)) | {"threads": torch.get_num_threads()},
        "backbone": json.loads((root / "backbone/done.json").read_text()),
        "commit": (git_state(HERE.parents[1]) or {}).get("commit", "unknown"),
        "seconds": round(time.time() - start),
    }
    write(root if args.smoke else HERE, about | {"arms": arms})


def write(folder, results):
    """results.json, table.md and plot.png in `folder`."""
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", table_of(results))
    bare = next(iter(results["arms"].values()))["backbone"]
    bars = {"no adapter": bare} | {query: arm["oracle"] for query, arm in results["arms"].items()}
    figure, axes = figure_of(len(METRICS))
    for axis, (metric, heading) in zip(axes, METRICS.items(), strict=True):
        axis.bar(list(bars), [each[metric] for each in bars.values()], color="#4477aa")
        axis.set_title(heading, fontsize=10)
    figure.tight_layout()
    figure.savefig(folder / "plot.png", dpi=110)
    print(table_of(results))


def figure_of(columns):
    """A figure without a screen, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(10, 2.8))


def table_of(results):
    """Markdown: a row for the bare backbone and one for each query with the true clip's motion."""
    settings, arms = results["settings"], results["arms"]
    lines = [f"# svd_query\n\n{results['question']}\n\n{results['conclusion']}\n"]
    lines.append(
        f"`{results['command']}`: seed {settings['seed']}, {settings['test_clips']} test clips of known motions, "
        f"{settings['steps']} steps of Stage 1 each, {results['seconds']} s in all, commit {results['commit'][:7]}.\n"
    )
    lines.append(
        "| query | loss with the clip's motion | with the zero clip's | "
        + " | ".join(METRICS.values())
        + " |"
    )
    lines.append("|---|" + "---|" * (len(METRICS) + 2))
    bare = next(iter(arms.values()))["backbone"]
    lines.append("| no adapter | | | " + " | ".join(f"{bare[m]:.2f}" for m in METRICS) + " |")
    for query, arm in arms.items():
        losses = f"{arm['val_loss']['loss']:.4f} | {arm['val_loss']['loss_null']:.4f}"
        lines.append(
            f"| {query} | {losses} | " + " | ".join(f"{arm['oracle'][m]:.2f}" for m in METRICS) + " |"
        )
    lines.append("\nThe true clip's own motion as reference. Losses are of the same clips and noise.\n")
    return "\n".join(lines)


if __name__ == "__main__":
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        main()
