"""What the motion adapter costs in a backbone's attention layers: without it, in plain form, with queries folded."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.benchmark import Timer

from motionrag.backbones.base import Backbone
from motionrag.describe import backbone_on_meta
from motionrag.errors import MotionRAGError
from motionrag.modules.motion_adapter import AdapterSite

SHARE = {"full": 1, "quick": 64}  # of a layer's positions, one in so many


@dataclass
class Layer:
    """One attention layer as a backbone calls it.

    Attributes:
        module: the attention module, on the meta device.
        args, kwargs: what it is called with, tensors on the meta device.
        shape: of what enters its output projection: rows, positions, width.
    """

    module: nn.Module
    args: tuple
    kwargs: dict
    shape: tuple[int, int, int]


def run(
    backbones: Mapping[str, DictConfig],
    size: str = "full",
    tokens: int = 25,
    token_width: int = 1024,
    repeats: int = 5,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Time the attention layers that carry an adapter, one clip at a time, random weights, no gradients.

    Layers of one backbone that are alike (same shape) are timed once and counted as often as they are there. The
    three forms take turns in every repeat, so that a busy machine slows all of them; figures are medians.

    Args:
        backbones: name -> config (`conf/backbone/NAME.yaml`); networks of the public sizes are made, no weights read.
        size: "full", or "quick": a sixty-fourth of the positions, to see that it runs.
        tokens, token_width: motion tokens of a clip.
        repeats: turns.
        device, dtype: where and in which precision.

    Returns rows {backbone, layers, rows, positions, width, heads, layer_ms, plain_ms, folded_ms, folded_of_plain,
    error}: one attention layer without an adapter, what the adapter adds in either form, the ratio of the two, and
    their largest difference relative to the largest value; then a row for all layers of each backbone.
    """
    if size not in SHARE:
        raise MotionRAGError(f"bench adapter: size={size}, expected full or quick")
    precision = getattr(torch, dtype, None)
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise MotionRAGError(f"bench adapter: dtype={dtype}, expected float32, bfloat16 or float16")
    rows = []
    for name, cfg in backbones.items():
        found = [
            {"backbone": name, **_time(layer, count, size, (tokens, token_width), repeats, device, precision)}
            for layer, count in layers(backbone_on_meta(cfg))
        ]
        rows += [*found, _sum(name, found)]
    whole = [row for row in rows if row["width"] is None]
    return {
        "summary": "folded costs "
        + ", ".join(f"{row['folded_of_plain']:.0%} of plain in {row['backbone']}" for row in whole),
        "title": f"motion adapter, {device}, {dtype}, {torch.get_num_threads()} threads, {size}, "
        f"{tokens} motion tokens, medians of {repeats}",
        "rows": rows,
    }


@torch.no_grad()
def layers(backbone: Backbone) -> list[tuple[Layer, int]]:
    """The different attention layers that motion enters, and how many there are of each.

    Found by running the backbone's loss once on the meta device.
    """
    calls: dict[str, Layer] = {}

    def watch(name: str, module: nn.Module) -> list[Any]:
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[name] = Layer(module, args, kwargs, (0, 0, 0))

        def project(_: nn.Module, args: tuple) -> None:
            calls[name].shape = tuple(args[0].shape)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.to_out[0].register_forward_pre_hook(project),
        ]

    handles = [h for name, module in backbone.adapter_sites().items() for h in watch(name, module)]
    video = torch.empty(1, backbone.frames, 3, backbone.height, backbone.width, device="meta")
    latents, image = backbone.encode_video(video), backbone.encode_image(video[:, 0])
    backbone.loss(latents, image, backbone.encode_context([""], video[:, 0]))
    for handle in handles:
        handle.remove()
    counts = Counter((layer.shape, layer.module.heads) for layer in calls.values())
    first = {(layer.shape, layer.module.heads): layer for layer in reversed(calls.values())}
    return [(first[key], count) for key, count in sorted(counts.items(), reverse=True)]


@torch.no_grad()
def _time(
    layer: Layer,
    count: int,
    size: str,
    motion_tokens: tuple[int, int],
    repeats: int,
    device: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    torch.manual_seed(0)
    rows, positions, width = layer.shape
    share = SHARE[size]
    module = layer.module.to_empty(device=device).to(dtype)
    for p in module.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)

    def real(t: Tensor) -> Tensor:
        """Random values, and in a quick run fewer positions: of sequences (B, L, D) and of tables (L, D)."""
        shape = [max(s // share, 1) if s > 1000 and i == t.ndim - 2 else s for i, s in enumerate(t.shape)]
        return torch.randn(shape, device=device, dtype=dtype if t.is_floating_point() else t.dtype)

    args, kwargs = tree_map_only(Tensor, real, (layer.args, layer.kwargs))
    site = AdapterSite(width, layer.module.heads, motion_tokens[1], "reference").to(device, dtype)
    tokens = torch.randn(1, *motion_tokens, device=device, dtype=dtype)
    plain, folded = site.project(tokens), site.fold(tokens)
    query = torch.randn(rows, max(positions // share, 1), width, device=device, dtype=dtype)
    forms: dict[str, Callable[[], Any]] = {
        "layer": lambda: module(*args, **kwargs),
        "plain": lambda: site(query, plain, query),
        "folded": lambda: site(query, folded, query),
    }
    expected = site(query, plain)
    error = (site(query, folded) - expected).abs().max() / expected.abs().max()
    timers = {name: Timer("work()", globals={"work": work}) for name, work in forms.items()}
    timers["layer"].timeit(1)
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, timer in timers.items():
            taken[name].append(1000 * timer.timeit(1).mean)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    layer.module.to("meta")
    return {
        "layers": count,
        "rows": rows,
        "positions": query.shape[1],
        "width": width,
        "heads": layer.module.heads,
        **{f"{name}_ms": value for name, value in medians.items()},
        "folded_of_plain": medians["folded"] / medians["plain"],
        "error": float(error),
    }


def _sum(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All layers of a backbone, for one pass of one clip."""
    times = {
        key: sum(row["layers"] * row[key] for row in rows) for key in ("layer_ms", "plain_ms", "folded_ms")
    }
    return {
        "backbone": name,
        "layers": sum(row["layers"] for row in rows),
        **dict.fromkeys(("rows", "positions", "width", "heads")),
        **times,
        "folded_of_plain": times["folded_ms"] / times["plain_ms"],
        "error": max(row["error"] for row in rows),
    }
