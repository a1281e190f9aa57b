"""MotionWorld: short synthetic clips whose looks and motion are independent, with captions for both.

A two-coloured object performs a motion with continuous parameters. What it looks like, where it starts and how it
moves are drawn independently, so the first frame says little about the motion; only the caption, or a reference clip,
does. Four domains: `known` (named motions), `compound` (random combinations) and `curve` (random smooth curves), both with
generated phrases, and `new` (named motions that no shipped network was trained on). Every motion has paraphrases for training and others for testing.

Everything follows from integer seeds: the same arguments give the same frames, captions and (with the same x264) files.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from motionrag.data.motions import Motion, motions

# Unit of all positions and sizes: the frame's side. Angles in radians, clockwise on screen (y points down).
COLOURS = {
    "red": (214, 48, 49), "green": (30, 150, 75), "blue": (45, 90, 220), "yellow": (245, 205, 60),
    "purple": (130, 60, 170), "orange": (240, 130, 30), "white": (245, 245, 245), "black": (30, 30, 35),
}  # fmt: skip
GROUNDS = {
    "grey": (150, 152, 158), "sand": (205, 185, 150), "mint": (160, 205, 185), "sky": (150, 190, 225),
    "rose": (220, 170, 175), "lavender": (185, 170, 215),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "capsule")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Looks:
    """Appearance of one clip; colours as names, sizes in units of the frame's side."""

    shape: str
    colours: tuple[str, str]
    ground: str
    size: float
    tilt: float
    slope: tuple[float, float]

    def words(self) -> str:
        """Noun phrase naming the looks."""
        first, second = self.colours
        return f"{_with_article(first)} and {second} {self.shape} on {_with_article(self.ground)} background"


@dataclass(frozen=True)
class WorldClip:
    """One clip before rendering. `track` (T, 4) float64: x, y (frame units), angle (rad), scale factor."""

    motion: Motion
    looks: Looks
    track: np.ndarray = field(repr=False)
    motion_caption: str

    @property
    def caption(self) -> str:
        """Looks and motion in one sentence."""
        return f"{self.looks.words()} {self.motion_caption}"

    @property
    def coarse_caption(self) -> str:
        """Looks and a vague verb."""
        return f"{self.looks.words()} {self.motion.coarse}"


def sample_looks(rng: np.random.Generator) -> Looks:
    """Draw an appearance."""
    first, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
    return Looks(
        shape=str(rng.choice(SHAPES)), colours=(first, second), ground=str(rng.choice(list(GROUNDS))),
        size=rng.uniform(0.145, 0.185), tilt=rng.uniform(-0.5, 0.5), slope=tuple(rng.uniform(-0.16, 0.16, 2)),
    )  # fmt: skip


def sample_clip(
    rng: np.random.Generator, motion: Motion, frames: int = 9, held_out: bool = False
) -> WorldClip:
    """Draw looks, parameters, start and words for one motion.

    Args:
        rng: source of all randomness.
        motion: the motion to perform.
        frames: clip length T.
        held_out: take the caption from the paraphrases kept for testing.
    """
    looks = sample_looks(rng)
    path = motion.path(np.linspace(0, 1, frames), rng)
    # Start anywhere that keeps the centre inside the margin for the whole clip: the start says as little as possible.
    low, high = 0.17 - path[:, :2].min(0), 0.83 - path[:, :2].max(0)
    middle = (low + high) / 2
    start = rng.uniform(np.minimum(low, middle), np.maximum(high, middle))
    track = np.column_stack([start + path[:, :2], looks.tilt + path[:, 2], np.exp(path[:, 3])])
    if motion.name == "grow" or "growing" in motion.name or motion.name.startswith("pulse"):
        track[:, 3] *= 0.8  # room to grow; ends within the frame
    phrases = motion.held_out if held_out else motion.phrases
    return WorldClip(motion, looks, track, phrases[rng.integers(len(phrases))])


def shape_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points (u, v) in units of the object's half size."""
    if shape == "circle":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88
    if shape == "diamond":
        return (np.abs(u) + np.abs(v) - 1.2) / math.sqrt(2)
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(u) - 0.5 * v - 0.6, v - 0.75)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 1.05, b - 0.4), np.maximum(a - 0.4, b - 1.05))
    if shape == "capsule":
        return np.hypot(u - np.clip(u, -0.55, 0.55), v) - 0.58
    raise ValueError(f"unknown shape {shape!r}; one of {SHAPES}")


def render(clip: WorldClip, size: int = 32) -> np.ndarray:
    """Draw a clip with anti-aliased edges.

    Returns:
        (T, size, size, 3) uint8 RGB.
    """
    axis = (np.arange(size) + 0.5) / size
    x, y = axis[None, None, :], axis[None, :, None]
    cx, cy, angle, scale = (clip.track[:, i, None, None] for i in range(4))
    half = clip.looks.size * scale
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = ((x - cx) * cos + (y - cy) * sin) / half, ((y - cy) * cos - (x - cx) * sin) / half
    pixel = half * size  # distances in pixels, for one-pixel soft edges
    inside = np.clip(0.5 - shape_distance(clip.looks.shape, u, v) * pixel, 0, 1)[..., None]
    side = np.clip(0.5 + u * pixel, 0, 1)[..., None]
    first, second = (np.array(COLOURS[c], float) for c in clip.looks.colours)
    sx, sy = clip.looks.slope
    shade = 1 + sx * (x[0] - 0.5) * 2 + sy * (y[0] - 0.5) * 2
    ground = np.array(GROUNDS[clip.looks.ground], float) * shade[..., None]
    frames = ground * (1 - inside) + (first * (1 - side) + second * side) * inside
    return np.clip(np.round(frames), 0, 255).astype(np.uint8)


def clip_stream(
    seed: int, domains: dict[str, float], frames: int = 9, held_out: bool = False
) -> Iterator[WorldClip]:
    """Endless clips, domains drawn with the given weights, motions evenly within a domain. Deterministic in `seed`."""
    rng = np.random.default_rng(seed)
    names, weights = list(domains), np.array(list(domains.values()), float)
    while True:
        pool = motions(names[rng.choice(len(names), p=weights / weights.sum())])
        yield sample_clip(rng, pool[rng.integers(len(pool))], frames, held_out)


def make_dataset(
    out: str | Path, n: int, seed: int = 0, domains: dict[str, float] | None = None, frames: int = 9, size: int = 32,
    fps: float = 8.0, held_out: bool = False, prefix: str = "clip",
) -> Path:  # fmt: skip
    """Write `n` clips as mp4 files under `out`/videos and a table `out`/clips.csv that `motionrag pack` reads.

    Args:
        out: folder; its table is replaced if it is there.
        n: number of clips.
        seed: the same seed and arguments give the same clips.
        domains: weights of `known`, `compound`, `curve`, `new`; default only `known`.
        frames, size, fps: clip length, side in pixels, frame rate.
        held_out: use the paraphrases kept for testing.
        prefix: start of every clip id.

    Returns:
        Path of the table. Columns: id, video, caption, motion_caption, action, domain, source, fps.
    """
    import csv

    from rich.progress import track

    from motionrag.data.video import write_mp4
    from motionrag.io import atomic_path

    out = Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    stream = itertools.islice(clip_stream(seed, domains or {"known": 1.0}, frames, held_out), n)
    for i, clip in enumerate(track(stream, description=f"rendering {out.name}", total=n)):
        clip_id = f"{prefix}-{i:05d}"
        write_mp4(out / "videos" / f"{clip_id}.mp4", render(clip, size), fps, pix_fmt="yuv444p", crf=10)
        rows.append(
            dict(id=clip_id, video=f"{clip_id}.mp4", caption=clip.caption, motion_caption=clip.motion_caption,
                 action=clip.motion.name, domain=clip.motion.domain, source=f"motionworld-{seed}-{i}", fps=fps)
        )  # fmt: skip
    table = out / "clips.csv"
    with atomic_path(table) as temporary, open(temporary, "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return table


def track_object(video: np.ndarray) -> np.ndarray:
    """Where the object is, without any network.

    The ground is a plane in (x, y) for each colour; it is fitted to each frame, leaving out what does not fit. The
    object is what differs from it, and its place the centroid of that.

    Args:
        video: (T, H, W, 3) uint8.

    Returns:
        (T, 2) float64: x, y in pixels. A frame that shows no object repeats the place before it (the frame's centre
        if there is none before).
    """
    count, height, width, _ = video.shape
    y, x = np.mgrid[:height, :width]
    basis = np.column_stack([np.ones(height * width), x.ravel() / width, y.ravel() / height])
    places = np.empty((count, 2))
    place = np.array([(width - 1) / 2, (height - 1) / 2])
    for i, pixels in enumerate(video.reshape(count, -1, 3).astype(float)):
        keep = np.ones(len(pixels), bool)
        for _ in range(4):
            plane, *_ = np.linalg.lstsq(basis[keep], pixels[keep], rcond=None)
            distance = np.abs(pixels - basis @ plane).max(axis=1)
            keep = distance <= max(np.quantile(distance, 0.7), 12)
        weight = np.clip((distance - 30) / 30, 0, 1)
        if weight.sum() >= 4:
            place = np.array([weight @ x.ravel(), weight @ y.ravel()]) / weight.sum()
        places[i] = place
    return places
