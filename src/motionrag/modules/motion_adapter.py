"""The motion adapter: one extra cross-attention branch in front of an attention layer's output projection.

Every supported backbone hands the concatenated-head attention output `h` to `to_out[0]`. A forward pre-hook there
turns it into `h + scale * attention(W_q h, W_k m, W_v m)`, whatever attention processor, fused projection or kernel
made `h`. Nothing in the backbone is replaced, so detaching restores it exactly.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass
class _InUse:
    """What the hooks read: the motion tokens of the moment (None = bare backbone) and kept keys and values."""

    tokens: Tensor | None
    scale: float
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class AdapterSite(nn.Module):
    """The three projections of one attention layer."""

    def __init__(self, hidden: int, heads: int, token_width: int, init: str) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(hidden, hidden, bias=False)
        self.to_k = nn.Linear(token_width, hidden, bias=False)
        self.to_v = nn.Linear(token_width, hidden, bias=False)
        if init == "zero":
            nn.init.zeros_(self.to_v.weight)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, n, token_width) -> keys and values (B, heads, n, hidden / heads)."""
        tokens = tokens.to(self.to_k.weight.dtype)
        return tuple(
            rearrange(project(tokens), "b n (h d) -> b h n d", h=self.heads)
            for project in (self.to_k, self.to_v)
        )

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """hidden (r*B, L, hidden), keys and values (B, heads, n, d) -> the branch's output (r*B, L, hidden)."""
        rows, batch = len(hidden), len(keys)
        if rows < batch or rows % batch:
            raise ValueError(f"motion tokens of {batch} samples cannot serve {rows} rows of hidden states")
        if rows > batch:  # per-frame layers, or both halves of guidance: the rows of a sample are neighbours
            keys, values = (t.repeat_interleave(rows // batch, dim=0) for t in (keys, values))
        q = rearrange(self.to_q(hidden.to(self.to_q.weight.dtype)), "b l (h d) -> b h l d", h=self.heads)
        out = F.scaled_dot_product_attention(q, keys, values)
        return rearrange(out, "b h l d -> b l (h d)").to(hidden.dtype)


class MotionAdapter(nn.Module):
    """All sites of a backbone, and the motion tokens that they read while the backbone runs.

    Args:
        sites: site name -> (hidden width, heads).
        token_width: width of the motion tokens.
        init: "zero" starts the values at zero, so a fresh adapter changes nothing; "reference" keeps PyTorch's
            default everywhere, as the published code does.

    State keys are `<site with dots as slashes>.to_{q,k,v}.weight`.
    """

    def __init__(
        self,
        sites: Mapping[str, tuple[int, int]],
        token_width: int,
        init: Literal["zero", "reference"] = "zero",
    ) -> None:
        super().__init__()
        if init not in ("zero", "reference"):
            raise ValueError(f"unknown init {init!r}: choose zero or reference")
        if not sites:
            raise ValueError("a motion adapter needs at least one site")
        self.site_names = tuple(sites)
        self.token_width = token_width
        for name, (hidden, heads) in sites.items():
            self.add_module(name.replace(".", "/"), AdapterSite(hidden, heads, token_width, init))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._in_use: _InUse | None = None

    @classmethod
    def for_modules(
        cls, modules: Mapping[str, nn.Module], token_width: int, init: Literal["zero", "reference"] = "zero"
    ) -> "MotionAdapter":
        """An adapter with the sizes of these attention modules (each has `.heads` and `.to_out[0]`)."""
        sites = {name: (m.to_out[0].in_features, m.heads) for name, m in modules.items()}
        return cls(sites, token_width, init)

    def site(self, name: str) -> AdapterSite:
        """The projections of one site, by the backbone's name for it."""
        return self.get_submodule(name.replace(".", "/"))

    @property
    def attached(self) -> bool:
        """Whether hooks are installed."""
        return bool(self._handles)

    def attach(self, modules: Mapping[str, nn.Module]) -> "MotionAdapter":
        """Hook into `modules` (site name -> attention). Raises ValueError if names or widths differ."""
        if self.attached:
            raise RuntimeError("this motion adapter is attached already: detach it first")
        if set(modules) != set(self.site_names):
            raise ValueError(
                f"the adapter has {len(self.site_names)} sites, the backbone {len(modules)}; "
                f"differing: {sorted(set(modules) ^ set(self.site_names))[:4]}"
            )
        for name, module in modules.items():
            found, expected = module.to_out[0].in_features, self.site(name).to_q.in_features
            if found != expected:
                raise ValueError(f"site {name}: the adapter is {expected} wide, the backbone {found}")
        for name, module in modules.items():
            hook = module.to_out[0].register_forward_pre_hook(self._hook(name))
            self._handles.append(hook)
        return self

    def detach(self) -> None:
        """Remove all hooks; the backbone is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def set(self, tokens: Tensor | None, scale: float = 1.0) -> None:
        """Motion tokens (B, n, token_width) for all forward passes to come, or None for the bare backbone.

        Stays until `clear` or the next `set`, so that gradient checkpointing finds it again during backward.
        Raises ValueError for tokens of another width.
        """
        if tokens is not None and (tokens.ndim != 3 or tokens.shape[-1] != self.token_width):
            raise ValueError(f"motion tokens must be (B, n, {self.token_width}), got {tuple(tokens.shape)}")
        self._in_use = _InUse(tokens, float(scale))

    def clear(self) -> None:
        """Forget the motion tokens; a forward pass of the attached backbone raises from now on."""
        self._in_use = None

    @contextmanager
    def use(self, tokens: Tensor | None, scale: float = 1.0) -> Iterator[None]:
        """`set` for a block. Under gradient checkpointing backward belongs inside the block too."""
        before = self._in_use
        self.set(tokens, scale)
        try:
            yield
        finally:
            self._in_use = before

    def _hook(self, name: str):
        site = self.site(name)

        def add_motion(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            use = self._in_use
            if use is None:
                raise RuntimeError(
                    "a motion adapter is attached but has no motion tokens: call set() or use() first"
                )
            if use.tokens is None or use.scale == 0:
                return None
            hidden, *rest = args
            if torch.is_grad_enabled():
                keys, values = site.keys_values(use.tokens)
            else:  # the same clip at every denoising step: project once
                if name not in use.kept:
                    use.kept[name] = site.keys_values(use.tokens)
                keys, values = use.kept[name]
            return hidden + use.scale * site(hidden, keys, values), *rest

        return add_motion
