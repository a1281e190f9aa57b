"""The motions of MotionWorld: paths with random parameters, and the words for them, in four domains."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

# Unit of all distances: the frame's side. Angles in radians, clockwise on screen (y points down).
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


def _wave(rng: np.random.Generator, harmonics: int) -> Callable[[np.ndarray], np.ndarray]:
    """A random smooth function of t in [0, 1] that starts at 0."""
    order = np.arange(1, harmonics + 1)
    odd, even = rng.normal(size=(2, harmonics)) / order
    return lambda t: (
        np.sin(np.pi * np.outer(t, order)) @ odd + (1 - np.cos(np.pi * np.outer(t, order))) @ even
    )


def _curve(x, y, turn, grow, low=0.3, high=0.52) -> Path4:
    """The curve (x, y) at random size and nearly upright; `turn` and `grow` as they are."""

    def path(t, rng):
        points = np.stack([x(t), y(t)])
        points *= rng.uniform(low, high) / np.ptp(points, axis=1).max()
        lean = rng.uniform(-0.25, 0.25)
        dx, dy = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]]) @ points
        strength = rng.uniform(0.8, 1.2)
        return _track(t, dx, dy, strength * turn(t), strength * grow(t))

    return path


def _scaled(wave: Callable[[np.ndarray], np.ndarray], most: float) -> Callable[[np.ndarray], np.ndarray]:
    largest = np.abs(wave(np.linspace(0, 1, 33))).max()
    return lambda t: wave(t) * (most / largest)


def _curves(count: int = 1000, seed: int = 1) -> Iterator[Motion]:
    """Random smooth curves, half of them turning or changing size: what teaches encoders to follow any path at all."""
    rng = np.random.default_rng(seed)
    unit = {k: np.divide(d, math.hypot(*d)) for k, d in _DIRECTIONS.items()}
    for number in range(count):
        x, y, turn, grow, extra = _wave(rng, 3), _wave(rng, 3), np.zeros_like, np.zeros_like, []
        if rng.random() < 0.35:
            turn = _scaled(_wave(rng, 2), rng.uniform(0.8, 6.0))
            extra.append("turning clockwise" if turn(np.ones(1))[0] > 0 else "turning counterclockwise")
        if rng.random() < 0.25:
            grow = _scaled(_wave(rng, 2), rng.uniform(0.3, 0.5))
            extra.append("growing" if grow(np.ones(1))[0] > 0 else "shrinking")
        thirds = np.diff(np.stack([x(np.linspace(0, 1, 4)), y(np.linspace(0, 1, 4))], axis=1), axis=0)
        keys = [max(unit, key=lambda k: float(unit[k] @ step)) for step in thirds]
        keys = [k for i, k in enumerate(keys) if not i or k != keys[i - 1]]
        words = [", then ".join(_WORDS[k][i] for k in keys) for i in (0, 1)]
        tail = f" while {' and '.join(extra)}" if extra else ""
        yield Motion(
            f"curve {number}", "curve", _curve(x, y, turn, grow),
            tuple(f"{p}{tail}" for p in (f"curves {words[0]}", f"bends {words[1]}", f"winds {words[0]}")),
            tuple(f"{p}{tail}" for p in (f"swerves {words[1]}", f"meanders {words[0]}")), "moves",
        )  # fmt: skip


@cache
def motions(domain: str) -> tuple[Motion, ...]:
    """All motions of a domain: `known`, `compound`, `curve` or `new`. Raises KeyError for another name."""
    return tuple({"known": _known, "compound": _compound, "curve": _curves, "new": _new}[domain]())
