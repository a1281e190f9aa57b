"""MotionWorld: short synthetic clips whose looks and motion are independent, with captions for both.

A two-coloured object performs a motion with continuous parameters. What it looks like, where it starts and how it
moves are drawn independently, so the first frame says little about the motion; only the caption, or a reference clip,
does. Three domains: `known` (named motions), `compound` (random combinations with generated phrases) and `new` (named
motions that no shipped network was trained on). Every motion has paraphrases for training and others for testing.

Everything follows from integer seeds: the same arguments give the same frames, captions and (with the same x264) files.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

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

Path4 = Callable[
    [np.ndarray, np.random.Generator], np.ndarray
]  # t (T,) in [0,1] -> (T,4): dx, dy, turn, log scale


@dataclass(frozen=True)
class Motion:
    """One way to move: a path with random parameters, and the words for it.

    `phrases` are used for training clips and databases, `held_out` only for test prompts, `coarse` is what a vague
    caption would say.
    """

    name: str
    domain: str
    path: Path4
    phrases: tuple[str, ...]
    held_out: tuple[str, ...]
    coarse: str


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


# --- paths ---------------------------------------------------------------------------------------------------------


def _track(t: np.ndarray, dx=0.0, dy=0.0, turn=0.0, grow=0.0) -> np.ndarray:
    return np.stack([np.broadcast_to(np.asarray(v, float), t.shape) for v in (dx, dy, turn, grow)], axis=-1)


def _along(
    direction: tuple[float, float], ease: Callable[[np.ndarray], np.ndarray], low=0.30, high=0.44
) -> Path4:
    norm = math.hypot(*direction)
    ux, uy = direction[0] / norm, direction[1] / norm

    def path(t, rng):
        s = ease(t) * rng.uniform(low, high)
        return _track(t, ux * s, uy * s)

    return path


def _ease_stop(t):
    return np.clip(t / 0.36, 0, 1) * 0.5 + np.clip((t - 0.64) / 0.36, 0, 1) * 0.5


def _side_to_side(
    forward: tuple[float, float], wave: Callable[[np.ndarray], np.ndarray], amount: float
) -> Path4:
    ux, uy = forward

    def path(t, rng):
        s, a = t * rng.uniform(0.34, 0.44), wave(t) * amount * rng.uniform(0.85, 1.15)
        return _track(t, ux * s - uy * a, uy * s + ux * a)

    return path


def _triangle_wave(t, cycles=2.0):
    return 2 / np.pi * np.arcsin(np.sin(2 * np.pi * cycles * t))


def _orbit(sign: int, turns: float) -> Path4:
    def path(t, rng):
        radius, start = rng.uniform(0.15, 0.2), rng.uniform(0, 2 * np.pi)
        angle = start + sign * 2 * np.pi * turns * t
        return _track(t, radius * (np.cos(angle) - np.cos(start)), radius * (np.sin(angle) - np.sin(start)))

    return path


def _turning(amount: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> Path4:
    return lambda t, rng: _track(t, turn=amount(t) * rng.uniform(low, high))


def _growing(amount: Callable[[np.ndarray], np.ndarray], low: float, high: float) -> Path4:
    return lambda t, rng: _track(t, grow=amount(t) * rng.uniform(low, high))


def _hops(count: int, across: float) -> Path4:
    def path(t, rng):
        height, reach = rng.uniform(0.2, 0.28) / math.sqrt(count), rng.uniform(0.32, 0.42)
        return _track(t, across * reach * t, -height * np.abs(np.sin(np.pi * count * t)))

    return path


def _pendulum(t, rng):
    length, swing = 0.5, rng.uniform(0.38, 0.48)
    angle = swing * np.sin(2 * np.pi * t)
    return _track(t, length * np.sin(angle), length * (np.cos(angle) - 1), -angle)


def _shake(ux: float, uy: float) -> Path4:
    def path(t, rng):
        s = rng.uniform(0.07, 0.1) * np.sin(2 * np.pi * 2.5 * t)
        return _track(t, ux * s, uy * s)

    return path


def _roll(sign: int) -> Path4:
    def path(t, rng):
        s = rng.uniform(0.34, 0.44)
        return _track(t, sign * s * t, 0, sign * s / 0.14 * t)

    return path


def _polyline(points: list[tuple[float, float]], low=0.24, high=0.32, close=False) -> Path4:
    corners = np.array([(0.0, 0.0), *points] + ([(0.0, 0.0)] if close else []))
    lengths = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(corners, axis=0).T))])
    lengths /= lengths[-1]

    def path(t, rng):
        size = rng.uniform(low, high)
        return _track(
            t, size * np.interp(t, lengths, corners[:, 0]), size * np.interp(t, lengths, corners[:, 1])
        )

    return path


def _spiral(outwards: bool) -> Path4:
    def path(t, rng):
        start, turns, reach = rng.uniform(0, 2 * np.pi), 1.6, rng.uniform(0.2, 0.25)
        radius = reach * (t if outwards else 1 - t)
        x, y = radius * np.cos(start + 2 * np.pi * turns * t), radius * np.sin(start + 2 * np.pi * turns * t)
        return _track(t, x - x[0], y - y[0])

    return path


def _figure_eight(upright: bool) -> Path4:
    def path(t, rng):
        size = rng.uniform(0.19, 0.24)
        long, short = size * np.sin(2 * np.pi * t), 0.6 * size * np.sin(4 * np.pi * t)
        return _track(t, *((short, long) if upright else (long, short)))

    return path


def _throw(sign: int) -> Path4:
    def path(t, rng):
        height, reach = rng.uniform(0.28, 0.36), rng.uniform(0.38, 0.46)
        return _track(t, sign * reach * t, -4 * height * t * (1 - t), sign * 0.8 * np.pi * t)

    return path


def _u_turn(t, rng):
    reach, gap = rng.uniform(0.28, 0.34), rng.uniform(0.16, 0.22)
    arc = np.clip((t - 0.36) / 0.28, 0, 1) * np.pi
    straight = np.clip(t / 0.36, 0, 1) - np.clip((t - 0.64) / 0.36, 0, 1)
    return _track(t, reach * straight + gap / 2 * np.sin(arc), gap / 2 * (1 - np.cos(arc)))


def _drop_and_bounce(t, rng):
    height, rebound = rng.uniform(0.36, 0.44), rng.uniform(0.45, 0.6)
    fall, hop = np.clip(t / 0.45, 0, 1), np.clip((t - 0.45) / 0.55, 0, 1)
    return _track(t, 0, height * (fall**2 - rebound * 4 * hop * (1 - hop)))


def _tumble(t, rng):
    reach = rng.uniform(0.3, 0.38)
    return _track(t, reach * t, reach * 1.1 * t**2, 2 * np.pi * rng.uniform(0.9, 1.1) * t)


def _swing_and_spin(t, rng):
    base = _pendulum(t, rng)
    base[:, 2] = 2 * np.pi * t
    return base


# --- the vocabulary ------------------------------------------------------------------------------------------------

_DIRECTIONS = {
    "right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "up right": (1, -1), "up left": (-1, -1),
    "down right": (1, 1), "down left": (-1, 1),
}  # fmt: skip
_WORDS = {
    "right": ("to the right", "rightwards"), "left": ("to the left", "leftwards"), "up": ("up", "upwards"),
    "down": ("down", "downwards"), "up right": ("up and to the right", "diagonally up right"),
    "up left": ("up and to the left", "diagonally up left"),
    "down right": ("down and to the right", "diagonally down right"),
    "down left": ("down and to the left", "diagonally down left"),
}  # fmt: skip
_STRAIGHT = ("right", "left", "up", "down")


def _directed(name, directions, path, phrases, held_out, coarse="moves"):
    for key in directions:
        a, b = _WORDS[key]
        fill = [tuple(p.format(a=a, b=b) for p in group) for group in (phrases, held_out)]
        yield Motion(f"{name} {key}", "known", path(_DIRECTIONS[key]), *fill, coarse)


def _known() -> Iterator[Motion]:
    yield from _directed(
        "slide", _DIRECTIONS, lambda d: _along(d, lambda t: t),
        ("slides {a}", "glides {b}", "moves steadily {a}", "travels {b} at an even pace"),
        ("drifts evenly {b}", "goes {a} in a straight line"),
    )  # fmt: skip
    yield from _directed(
        "accelerate", _STRAIGHT, lambda d: _along(d, lambda t: t**2.4),
        ("speeds up {a}", "starts slowly and accelerates {b}", "moves {a} faster and faster"),
        ("picks up speed going {b}", "rushes {a} after a slow start"),
    )  # fmt: skip
    yield from _directed(
        "return", _STRAIGHT, lambda d: _along(d, lambda t: np.sin(np.pi * t)),
        ("moves {a} and comes back", "goes {b} and returns to where it started", "slides {a}, then back again"),
        ("heads {b}, then turns back to its starting place", "makes a trip {a} and back"),
        "moves back and forth",
    )  # fmt: skip
    yield from _directed(
        "stop and go", _STRAIGHT, lambda d: _along(d, _ease_stop),
        ("moves {a}, stops, and goes on", "goes {b} with a pause in the middle", "slides {a}, waits, slides on"),
        ("advances {b}, halts for a moment, then continues", "travels {a} in two stages with a break"),
    )  # fmt: skip
    yield from _directed(
        "zigzag", _STRAIGHT, lambda d: _side_to_side(d, _triangle_wave, 0.1),
        ("zigzags {a}", "moves {b} in a sharp zigzag", "goes {a} with quick turns from side to side"),
        ("makes a zigzag line {b}", "darts from side to side on its way {a}"),
    )  # fmt: skip
    yield from _directed(
        "roll", ("right", "left"), lambda d: _roll(d[0]),
        ("rolls {a}", "rolls along {b} like a wheel", "turns over and over while moving {a}"),
        ("is rolling {b}", "wheels its way {a}"),
    )  # fmt: skip
    yield from _directed(
        "hop", ("right", "left"), lambda d: _hops(2, d[0]),
        ("hops {a}", "jumps {b} in two hops", "bounces along {a}"), ("skips {b} with two leaps", "leaps its way {a}"),
        "jumps",
    )  # fmt: skip

    def known(name, path, phrases, held_out, coarse):
        return Motion(name, "known", path, phrases, held_out, coarse)

    for word, sign in (("clockwise", 1), ("counterclockwise", -1)):
        yield known(f"orbit {word}", _orbit(sign, 1),
            (f"moves in a circle {word}", f"goes once around {word}", f"circles {word} along a round path"),
            (f"travels around a ring {word}", f"makes one {word} loop"), "goes around")  # fmt: skip
        yield known(f"half circle {word}", _orbit(sign, 0.5),
            (f"moves along a half circle {word}", f"goes half way around {word}", f"follows a semicircle {word}"),
            (f"takes half a {word} loop", f"sweeps {word} through a semicircular arc"), "goes around")  # fmt: skip
        yield known(f"spin {word}", _turning(lambda t, s=sign: s * t, 1.4 * np.pi, 2.0 * np.pi),
            (f"spins {word} in place", f"rotates {word} on the spot", f"turns {word} without moving away"),
            (f"twirls {word} where it stands", f"revolves {word} about its own centre"), "turns")  # fmt: skip
    yield known("rock", _turning(lambda t: np.sin(4 * np.pi * t), 0.5, 0.7),
        ("rocks back and forth in place", "tilts left and right on the spot", "wobbles from side to side"),
        ("sways in place, tipping one way and the other", "teeters without leaving its place"), "turns")  # fmt: skip
    yield known("grow", _growing(lambda t: t, 0.5, 0.65),
        ("grows larger", "gets bigger and bigger", "expands steadily"),
        ("swells up to a larger size", "becomes larger all the time"), "changes size")  # fmt: skip
    yield known("shrink", _growing(lambda t: -t, 0.5, 0.65),
        ("shrinks", "gets smaller and smaller", "becomes steadily smaller"),
        ("dwindles to a smaller size", "contracts all the time"), "changes size")  # fmt: skip
    yield known("pulse", _growing(lambda t: np.sin(np.pi * t), 0.42, 0.55),
        ("grows and shrinks back", "swells once and returns to its size", "pulses once"),
        ("inflates, then deflates", "gets large for a moment and small again"), "changes size")  # fmt: skip
    yield known("pulse twice", _growing(lambda t: np.abs(np.sin(2 * np.pi * t)), 0.38, 0.5),
        ("pulses twice", "grows and shrinks two times", "beats like a heart"),
        ("throbs two times", "swells and falls back twice"), "changes size")  # fmt: skip
    yield known("jump", _hops(1, 0),
        ("jumps up and lands", "jumps once on the spot", "leaps up and comes down again"),
        ("springs into the air and lands where it was", "makes one high vertical jump"), "jumps")  # fmt: skip
    yield known("jump twice", _hops(2, 0),
        ("jumps twice on the spot", "bounces up and down two times", "makes two jumps in place"),
        ("leaps up two times in the same place", "does a double jump without moving aside"), "jumps")  # fmt: skip
    yield known("pendulum", _pendulum,
        ("swings like a pendulum", "swings from side to side along an arc", "sways as if hanging from a string"),
        ("oscillates like a clock weight", "dangles and swings both ways"), "moves back and forth")  # fmt: skip
    yield known("shake sideways", _shake(1, 0),
        ("shakes from left to right", "trembles sideways", "vibrates horizontally"),
        ("jitters left and right", "quivers from one side to the other"), "moves back and forth")  # fmt: skip
    yield known("shake up and down", _shake(0, 1),
        ("shakes up and down", "trembles vertically", "vibrates upwards and downwards"),
        ("jitters up and down", "quivers in the vertical direction"), "moves back and forth")  # fmt: skip
    for key, sign in (("right", 1), ("left", -1)):
        a, b = _WORDS[key]
        yield known(f"wave {key}", _side_to_side((sign, 0), lambda t: np.sin(3 * np.pi * t), 0.11),
            (f"moves {a} in waves", f"follows a wavy line {b}", f"undulates {a}"),
            (f"snakes its way {b}", f"goes {a} along a sine curve"), "moves")  # fmt: skip


def _new() -> Iterator[Motion]:
    def new(name, path, phrases, held_out, coarse):
        return Motion(name, "new", path, phrases, held_out, coarse)

    square, triangle = [(1, 0), (1, 1), (0, 1)], [(1, 0), (0.5, 0.87)]
    for word, flip in (("clockwise", 1), ("counterclockwise", -1)):
        yield new(f"square path {word}", _polyline([(x * flip, y) for x, y in square], 0.26, 0.33, close=True),
            (f"moves along the sides of a square {word}", f"traces a square {word}", f"follows a square path {word}"),
            (f"draws a {word} square with its path", f"walks around four corners {word}"), "goes around")  # fmt: skip
        yield new(f"triangle path {word}", _polyline([(x * flip, y) for x, y in triangle], 0.32, 0.4, close=True),
            (f"moves along a triangle {word}", f"traces a triangle {word}", f"follows a triangular path {word}"),
            (f"draws a {word} triangle with its path", f"walks around three corners {word}"), "goes around")  # fmt: skip
    yield new("spiral outwards", _spiral(True),
        ("spirals outwards", "moves in a widening spiral", "circles in ever larger turns"),
        ("winds its way out from the middle", "follows a spiral that opens up"), "goes around")  # fmt: skip
    yield new("spiral inwards", _spiral(False),
        ("spirals inwards", "moves in a narrowing spiral", "circles in ever smaller turns"),
        ("winds its way in to the middle", "follows a spiral that closes"), "goes around")  # fmt: skip
    yield new("figure eight", _figure_eight(False),
        ("moves in a figure eight lying on its side", "traces the infinity sign", "loops around a horizontal eight"),
        ("follows a sideways number eight", "draws the shape of infinity"), "goes around")  # fmt: skip
    yield new("upright figure eight", _figure_eight(True),
        ("moves in an upright figure eight", "traces a standing eight", "loops around a vertical eight"),
        ("follows a number eight that stands upright", "draws an eight from top to bottom"), "goes around")  # fmt: skip
    for key, sign in (("right", 1), ("left", -1)):
        a, b = _WORDS[key]
        yield new(f"throw {key}", _throw(sign),
            (f"is thrown {a} in a high arc", f"flies {b} like a thrown ball", f"is tossed {a} and falls"),
            (f"sails {b} through the air as if hurled", f"gets lobbed {a}"), "moves")  # fmt: skip
    yield new("u-turn", _u_turn,
        ("moves to the right and makes a U-turn", "makes a U-turn and comes back on a lower lane",
         "goes right, turns around in a bend, and goes left"),
        ("drives right, rounds a hairpin bend and heads back", "reverses its course by a tight curve"),
        "moves back and forth")  # fmt: skip
    yield new("drop and bounce", _drop_and_bounce,
        ("drops down and bounces", "falls to the ground and bounces once", "falls like a ball and springs back"),
        ("plunges, hits the floor and rebounds", "tumbles straight down and bounces back up"), "jumps")  # fmt: skip
    yield new("tumble", _tumble,
        ("tumbles down to the right", "falls to the right while turning over", "topples down a slope, spinning"),
        ("goes head over heels down to the right", "plunges rightwards in a somersault"), "moves")  # fmt: skip
    yield new("swing and spin", _swing_and_spin,
        ("swings like a pendulum while spinning", "spins around as it swings from side to side",
         "swings on a string and rotates"),
        ("twirls while swaying along an arc", "whirls about itself as it oscillates"), "moves back and forth")  # fmt: skip


_TURNS = {
    "": None, "spinning clockwise": lambda t: 1.6 * np.pi * t, "spinning counterclockwise": lambda t: -1.6 * np.pi * t,
    "rocking": lambda t: 0.6 * np.sin(4 * np.pi * t),
}  # fmt: skip
_SIZES = {"": None, "growing": lambda t: 0.5 * t, "shrinking": lambda t: -0.5 * t,
          "pulsing": lambda t: 0.42 * np.sin(np.pi * t)}  # fmt: skip


def _with(path: Path4, turn, size) -> Path4:
    def compound(t, rng):
        track = path(t, rng)
        scale = rng.uniform(0.9, 1.15)
        track[:, 2] += scale * turn(t) if turn else 0
        track[:, 3] += scale * size(t) if size else 0
        return track

    return compound


def _compound(count: int = 600, seed: int = 0) -> Iterator[Motion]:
    """Random polylines and named paths, some of them turning or changing size at the same time."""
    rng = np.random.default_rng(seed)
    named = [
        m for m in _known() if m.name.split()[0] not in ("spin", "rock", "grow", "shrink", "pulse", "roll")
    ]
    seen: set[str] = set()
    while len(seen) < count:
        turn, size = (
            rng.choice(list(_TURNS), p=(0.55, 0.15, 0.15, 0.15)),
            rng.choice(list(_SIZES), p=(0.55, 0.15, 0.15, 0.15)),
        )
        if rng.random() < 0.6:
            keys = [str(rng.choice(list(_DIRECTIONS)))]
            while len(keys) < rng.integers(2, 4):
                keys.append(str(rng.choice([k for k in _DIRECTIONS if k != keys[-1]])))
            corners = np.cumsum(
                [np.divide(_DIRECTIONS[k], math.hypot(*_DIRECTIONS[k])) for k in keys], axis=0
            )
            if np.hypot(*corners[-1]) < 0.5 or np.abs(corners).max() > 1.8:
                continue  # closed paths belong to the new domain; very long ones leave the frame
            base, coarse = _polyline([tuple(c) for c in corners], 0.2, 0.27), "moves"
            words = [
                ", then ".join(form.format(_WORDS[k][i]) for k in keys) for i, form in ((0, "{}"), (1, "{}"))
            ]
            phrases = (f"moves {words[0]}", f"goes {words[1]}", f"slides {words[0]}")
            held_out = (f"heads {words[1]}", f"travels {words[0]}")
        else:
            if not (turn or size):
                continue
            one = named[rng.integers(len(named))]
            base, coarse, phrases, held_out = one.path, one.coarse, one.phrases, one.held_out
        extra = " and ".join(w for w in (turn, size) if w)
        name = phrases[0] + (f" while {extra}" if extra else "")
        if name in seen:
            continue
        seen.add(name)
        if extra:
            phrases = tuple(f"{p} while {extra}" for p in phrases)
            held_out = tuple(f"{p}, {extra} all the while" for p in held_out)
        yield Motion(
            f"compound: {name}",
            "compound",
            _with(base, _TURNS[turn], _SIZES[size]),
            phrases,
            held_out,
            coarse,
        )


@cache
def motions(domain: str) -> tuple[Motion, ...]:
    """All motions of a domain: `known`, `compound` or `new`. Raises KeyError for another name."""
    return tuple({"known": _known, "compound": _compound, "new": _new}[domain]())


# --- clips ---------------------------------------------------------------------------------------------------------


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


def _distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
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
    inside = np.clip(0.5 - _distance(clip.looks.shape, u, v) * pixel, 0, 1)[..., None]
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
        domains: weights of `known`, `compound`, `new`; default only `known`.
        frames, size, fps: clip length, side in pixels, frame rate.
        held_out: use the paraphrases kept for testing.
        prefix: start of every clip id.

    Returns:
        Path of the table. Columns: id, video, caption, motion_caption, action, domain, source, fps.
    """
    import csv

    from motionrag.data.video import write_mp4
    from motionrag.io import atomic_path

    out = Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, clip in enumerate(
        itertools.islice(clip_stream(seed, domains or {"known": 1.0}, frames, held_out), n)
    ):
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
