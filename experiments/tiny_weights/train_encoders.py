"""Train the two tiny frozen encoders on MotionWorld: a VideoMAE classifier and a DINOv2 appearance encoder.

    python experiments/tiny_weights/train_encoders.py motion
    python experiments/tiny_weights/train_encoders.py appearance

The VideoMAE learns to name the 46 known motions and, on compound motions and curves as well, where the object is and
how it moved; the DINOv2 learns to read looks and place off single frames. Neither sees a motion of the new domain.
Gates, on held-out clips: 85 % of known motions named; the object found to 1.5 px on single frames.
"""

import argparse

import numpy as np
import torch
from common import FRAMES, SIZE, TRAINED_DOMAINS, WEIGHTS, Average, Log, fixed_clips, loader, optimizer, start
from torch import nn
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEForVideoClassification

from motionrag.data.motions import motions
from motionrag.data.motionworld import COLOURS, GROUNDS, SHAPES, WorldClip
from motionrag.encoders import prepare_pixels

ACTIONS = [m.name for m in motions("known")]


def motion_labels(clip: WorldClip) -> dict:
    """Index of the motion (-1: not a known one), places (T, 2) and the path relative to its start (T, 5), float32."""
    track = clip.track
    turn = track[:, 2] - track[0, 2]
    path = np.column_stack(
        [
            4 * (track[:, :2] - track[0, :2]),
            np.sin(turn),
            np.cos(turn) - 1,
            2 * np.log(track[:, 3] / track[0, 3]),
        ]
    )
    name = clip.motion.name
    place = 4 * (track[:, :2] - 0.5)
    return {
        "action": ACTIONS.index(name) if name in ACTIONS else -1,
        "path": path.astype(np.float32),
        "place": place.astype(np.float32),
    }


def appearance_labels(clip: WorldClip) -> dict:
    """What can be seen on each frame: names as indices, places as (T, ...) float32."""
    looks, track = clip.looks, clip.track
    halves = np.zeros((len(track), len(COLOURS), 2))
    direction = np.column_stack([np.cos(track[:, 2]), np.sin(track[:, 2])])
    for colour, sign in zip(looks.colours, (-1, 1), strict=True):
        halves[:, list(COLOURS).index(colour)] = sign * direction
    present = np.array([c in looks.colours for c in COLOURS])
    place = np.column_stack([4 * (track[:, :2] - 0.5), 2 * np.log(track[:, 3])])
    return {
        "shape": SHAPES.index(looks.shape), "ground": list(GROUNDS).index(looks.ground),
        "present": present.astype(np.float32), "halves": halves.astype(np.float32), "place": place.astype(np.float32),
    }  # fmt: skip


def stack(labels: list[dict]) -> dict[str, torch.Tensor]:
    return {k: torch.as_tensor(np.stack([x[k] for x in labels])) for k in labels[0]}


def pixels_off(path, truth) -> float:
    """Mean distance between two paths (B, T, 5) in pixels."""
    return float((path - truth)[..., :2].norm(dim=-1).mean() / 4 * SIZE)


def train_motion(args):
    log = Log("motion_encoder")
    config = VideoMAEConfig(
        image_size=SIZE, patch_size=4, num_frames=8, tubelet_size=2, hidden_size=96, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=384, use_mean_pooling=True,
        id2label=dict(enumerate(ACTIONS)), label2id={a: i for i, a in enumerate(ACTIONS)},
    )  # fmt: skip
    model, slots = VideoMAEForVideoClassification(config), config.num_frames // config.tubelet_size
    # transformers' start lets the position codes drown what the patches show
    model.videomae.embeddings.patch_embeddings.projection.weight.data.mul_(3)
    width, side = config.hidden_size, SIZE // config.patch_size
    # Only used here. The whole path off the slots' means; every token: where the object is in its two frames, and
    # whether it is here, which is learned first and makes the rest quick to learn.
    heads = nn.ModuleDict(
        {
            "path": nn.Linear(slots * width, FRAMES * 5),
            "place": nn.Linear(width, 2 * 2),
            "here": nn.Linear(width, 2),
        }
    )
    opt, plan = optimizer([*model.parameters(), *heads.parameters()], args.lr, args.steps)
    average = Average(model)
    chosen = torch.linspace(0, FRAMES - 1, config.num_frames).round().long()  # as MotionEncoder samples
    centres = 4 * ((torch.arange(side) + 0.5) / side - 0.5)
    patches = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 1, 2)

    def forward(video):
        pixels = prepare_pixels(video[:, chosen].flatten(0, 1), SIZE).unflatten(
            0, (len(video), config.num_frames)
        )
        states = model.videomae(pixels).last_hidden_state.unflatten(1, (slots, -1))  # (B, slots, patches, D)
        path = heads["path"](states.mean(2).flatten(1)).unflatten(1, (FRAMES, 5))
        return model.classifier(model.fc_norm(states.mean((1, 2)))), path, states

    def finding(states, place):
        """How far each token is from knowing where the object is; place (B, T, 2)."""
        place = place[:, chosen].unflatten(1, (slots, -1))[:, :, None]  # (B, slots, 1, 2 frames, 2)
        here = torch.exp(-((place - patches) ** 2).sum(-1) / (2 * 0.44**2))
        found = heads["place"](states).unflatten(-1, (2, 2))
        return 4 * ((found - place) ** 2).mean() + 20 * F.mse_loss(heads["here"](states), here)

    held_out = {d: fixed_clips(512, 9002, {d: 1.0}) for d in ("known", "new")}
    data = loader(args.seed + 12, args.batch, motion_labels, domains=TRAINED_DOMAINS | {"curve": 1.0})
    for step in range(1, args.steps + 1):
        video, labels = next(data)
        video = video + 0.05 * torch.rand(len(video), 1, 1, 1, 1) * torch.randn_like(
            video
        )  # generated clips are not clean
        logits, path, states = forward(video)
        named = labels["action"] >= 0
        naming = F.cross_entropy(logits[named], labels["action"][named], label_smoothing=0.05)
        following = F.mse_loss(path, labels["path"])
        opt.zero_grad()
        (naming + 4 * following + finding(states, labels["place"])).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        plan.step()
        average.step()
        if step % 100 == 0 or step == args.steps:
            raw = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average.shadow)
            with torch.no_grad():
                (video, clips), (other, other_clips) = held_out["known"], held_out["new"]
                truth, new = (
                    stack([motion_labels(c) for c in clips]),
                    stack([motion_labels(c) for c in other_clips]),
                )
                (logits, path, _), (_, other_path, _) = forward(video), forward(other)
                accuracy = float((logits.argmax(1) == truth["action"]).float().mean())
                log.write(step=step, naming=float(naming), following=float(following), accuracy=accuracy,
                          path=float(F.mse_loss(path, truth["path"])), path_px=pixels_off(path, truth["path"]),
                          new_px=pixels_off(other_path, new["path"]),
                          path_new=float(F.mse_loss(other_path, new["path"])))  # fmt: skip
            model.save_pretrained(WEIGHTS / "videomae")
            model.load_state_dict(raw)
    if accuracy < 0.85:
        raise SystemExit(f"gate failed: accuracy {accuracy:.3f} below 0.85")


def train_appearance(args):
    log = Log("appearance_encoder")
    config = Dinov2Config(
        image_size=SIZE, patch_size=4, hidden_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    model, width = Dinov2Model(config), config.hidden_size
    sizes = {
        "shape": len(SHAPES),
        "ground": len(GROUNDS),
        "present": len(COLOURS),
        "halves": 2 * len(COLOURS),
        "place": 3,
    }
    heads = nn.ModuleDict({k: nn.Linear(width, n) for k, n in sizes.items()})
    opt, plan = optimizer([*model.parameters(), *heads.parameters()], args.lr, args.steps)
    average = Average(model)

    def forward(video, labels, frames):
        """`frames` (B, n): which frames of each clip to look at."""
        rows = torch.arange(len(video))[:, None]
        state = model(prepare_pixels(video[rows, frames].flatten(0, 1), SIZE)).last_hidden_state[:, 0]
        out = {k: head(state) for k, head in heads.items()}
        each = {k: v[:, None].expand(-1, frames.shape[1], *v.shape[1:]).flatten(0, 1)
                for k, v in labels.items() if k in ("shape", "ground", "present")}  # fmt: skip
        loss = (
            F.cross_entropy(out["shape"], each["shape"]) + F.cross_entropy(out["ground"], each["ground"])
            + 4 * F.binary_cross_entropy_with_logits(out["present"], each["present"])
            + 4 * F.mse_loss(out["halves"], labels["halves"][rows, frames].flatten(0, 1).flatten(1))
            + 4 * F.mse_loss(out["place"], labels["place"][rows, frames].flatten(0, 1))
        )  # fmt: skip
        return loss, out

    video_check, clips = fixed_clips(512, 9003)
    truth, frame_check = stack([appearance_labels(c) for c in clips]), torch.arange(512)[:, None] % FRAMES
    data = loader(args.seed + 20, args.batch // 2, appearance_labels)
    for step in range(1, args.steps + 1):
        video, labels = next(data)
        loss, _ = forward(video, labels, torch.randint(FRAMES, (len(video), 4)))
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        plan.step()
        average.step()
        if step % 250 == 0 or step == args.steps:
            raw = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(average.shadow)
            with torch.no_grad():
                check, out = forward(video_check, truth, frame_check)
                shape = float((out["shape"].argmax(1) == truth["shape"]).float().mean())
                true_place = truth["place"][torch.arange(512), frame_check[:, 0], :2]
                place_px = float((out["place"][:, :2] - true_place).norm(dim=1).mean()) / 4 * SIZE
                log.write(
                    step=step,
                    loss=float(loss),
                    held_out=float(check),
                    shape=shape,
                    place_px=place_px,
                )
            model.save_pretrained(WEIGHTS / "dinov2")
            model.load_state_dict(raw)
    if place_px > 1.5:
        raise SystemExit(f"gate failed: the object's place is off by {place_px:.2f} px, more than 1.5")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder", choices=("motion", "appearance"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start(args.seed)
    train, *defaults = {
        "motion": (train_motion, 1600, 32, 2e-3),
        "appearance": (train_appearance, 2500, 64, 1.5e-3),
    }[args.encoder]
    args.steps, args.batch, args.lr = (
        default if given is None else given
        for given, default in zip((args.steps, args.batch, args.lr), defaults, strict=True)
    )
    train(args)


if __name__ == "__main__":
    main()
