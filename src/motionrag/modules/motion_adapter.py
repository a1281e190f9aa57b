"""The motion adapter: one extra cross-attention branch in front of an attention layer's output projection.

Every supported backbone hands the concatenated-head attention output `h` to `to_out[0]`. A forward pre-hook there
turns it into `h + scale * attention(W_q h, W_k m, W_v m)`, whatever attention processor, fused projection or kernel
made `h`. Nothing in the backbone is replaced, so detaching restores it exactly.

Where the backbone's own attention has one single key (SVD's image token), `h` is one constant per sample and so would
be the motion that it asks for. Such sites take their query from the attention's input instead: `W_q x` for `W_q h`.

Without gradients the branch runs in its fast form. Motion tokens are few (n) and stay the same for a whole clip, so
`W_q` goes into the keys once, `A = K W_q` per head, and the scores are `h A^T`: n / head size of the work of `W_q h`.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from motionrag.errors import MotionRAGError

Query = Literal["output", "hidden"]

# Positions at once on a CPU, in the fast form: what lies between its steps then stays in the cache.
CPU_BLOCK = 512


class Motion(NamedTuple):
    """What one site keeps of the motion tokens of B samples.

    Attributes:
        keys: (B, heads, n, d); folded (B, heads, n, hidden), with the scale of attention in them.
        values: (B, heads, n, d).
        folded: whether `W_q` is in the keys.
    """

    keys: Tensor
    values: Tensor
    folded: bool


@dataclass
class _InUse:
    """What the hooks read: the motion tokens of the moment (None = bare backbone) and what they leave each other."""

    tokens: Tensor | None
    scale: float
    queries: dict[str, Tensor] = field(default_factory=dict)  # from a site's first hook to its second
    kept: dict[str, tuple[tuple, Motion]] = field(
        default_factory=dict
    )  # with the state of the site's weights


class AdapterSite(nn.Module):
    """The three projections of one attention layer."""

    def __init__(self, hidden: int, heads: int, token_width: int, init: str, query: Query = "output") -> None:
        super().__init__()
        self.heads = heads
        self.query = query
        self.to_q = nn.Linear(hidden, hidden, bias=False)
        self.to_k = nn.Linear(token_width, hidden, bias=False)
        self.to_v = nn.Linear(token_width, hidden, bias=False)
        if init == "zero":
            nn.init.zeros_(self.to_v.weight)

    def project(self, tokens: Tensor) -> Motion:
        """Keys and values of the motion tokens (B, n, token_width): the plain form, for training."""
        tokens = tokens.to(self.to_k.weight.dtype)
        keys, values = (
            rearrange(linear(tokens), "b n (h d) -> b h n d", h=self.heads)
            for linear in (self.to_k, self.to_v)
        )
        return Motion(keys, values, folded=False)

    def fold(self, tokens: Tensor) -> Motion:
        """The same with `W_q` in the keys: the fast form. Plain where it would cost more (n >= d).

        Computed in float32 or better, and with the mean key taken off, which softmax does not see: then rounding
        the folded keys and the scores to bfloat16 costs about as much as rounding queries does in the plain form.
        """
        head_size = self.to_q.out_features // self.heads
        if tokens.shape[1] >= head_size:
            return self.project(tokens)
        kept, exact = self.to_q.weight.dtype, torch.promote_types(self.to_q.weight.dtype, torch.float32)
        to_q, to_k, tokens = (t.to(exact) for t in (self.to_q.weight, self.to_k.weight, tokens.to(kept)))
        with _no_autocast(tokens.device.type):
            keys = rearrange(tokens @ to_k.mT, "b n (h d) -> b h n d", h=self.heads)
            keys = (keys - keys.mean(2, keepdim=True)) * head_size**-0.5
            keys = keys @ to_q.unflatten(0, (self.heads, -1))
            values = rearrange(self.to_v(tokens.to(kept)), "b n (h d) -> b h n d", h=self.heads)
        return Motion(keys.to(kept), values, folded=True)

    def forward(
        self, query: Tensor, motion: Motion, hidden: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """query (r*B, L, hidden) and the motion of B samples -> the branch's output (r*B, L, hidden), or, with `hidden`
        of that shape, hidden + scale * branch: one pass over memory less.

        The r rows of a sample (per-frame layers) are neighbours. Raises ValueError if rows and samples do not fit.
        """
        rows, batch = len(query), len(motion.values)
        if rows < batch or rows % batch:
            raise ValueError(f"motion tokens of {batch} samples cannot serve {rows} rows of hidden states")
        x = query.reshape(batch, -1, query.shape[-1])
        hidden = None if hidden is None else hidden.reshape(x.shape)
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if motion.folded and on_cpu and x.shape[1] > CPU_BLOCK:
            out = torch.empty_like(x)
            parts = [t.split(CPU_BLOCK, 1) for t in (out, x, out if hidden is None else hidden)]
            for done, x, before in zip(*parts, strict=True):
                done.copy_(self._branch(x, motion, None if hidden is None else before, scale))
        else:
            out = self._branch(x, motion, hidden, scale)
        return out.reshape(query.shape)

    def _branch(self, query: Tensor, motion: Motion, hidden: Tensor | None, scale: float) -> Tensor:
        """`forward` for query and hidden (B, L, hidden)."""
        x = query.to(self.to_q.weight.dtype)
        if motion.folded:  # positions last: softmax runs along them, whatever n is
            scores = (motion.keys.flatten(1, 2) @ x.mT).unflatten(1, (self.heads, -1))
            out = scores.softmax(2).mT @ motion.values
        else:
            q = rearrange(self.to_q(x), "b l (h d) -> b h l d", h=self.heads)
            out = F.scaled_dot_product_attention(q, motion.keys, motion.values)
        out = rearrange(out, "b h l d -> b l h d").to(query.dtype)
        if hidden is not None:
            out = torch.add(hidden.unflatten(2, (self.heads, -1)), out, alpha=scale)
        return out.flatten(2)

    def stamp(self) -> tuple | None:
        """Differs whenever the weights have changed; None if that cannot be told (inference tensors)."""
        weights = (self.to_q.weight, self.to_k.weight, self.to_v.weight)
        if any(w.is_inference() for w in weights):
            return None
        return tuple((w.data_ptr(), w.dtype, w._version) for w in weights)


class MotionAdapter(nn.Module):
    """All sites of a backbone, and the motion tokens that they read while the backbone runs.

    Args:
        sites: site name -> (hidden width, heads).
        token_width: width of the motion tokens.
        init: "zero" starts the values at zero, so a fresh adapter changes nothing; "reference" keeps PyTorch's
            default everywhere, as the published code does.
        query: what asks for motion: "output", the attention output `h`, as in the published code, or "hidden", the
            attention's input `hidden_states`, for sites whose own attention has a single key. One for all sites, or
            site name -> query; sites that are not named then take "output".
        only: regular expression that a site's whole name must match, or there is no adapter at it; None for all.

    The query is no weight: an adapter has to be built with the one it was trained with. Raises MotionRAGError for an
    `init`, `query` or `only` that there is not.

    State keys are `<site with dots as slashes>.to_{q,k,v}.weight`.
    """

    def __init__(
        self,
        sites: Mapping[str, tuple[int, int]],
        token_width: int,
        init: Literal["zero", "reference"] = "zero",
        query: Query | Mapping[str, Query] = "output",
        only: str | None = None,
    ) -> None:
        super().__init__()
        every, sites = sites, _chosen(sites, only)
        if every and not sites:
            raise MotionRAGError(
                f"motion_adapter.only={only}: no site is called like that; there are {', '.join(list(every)[:4])}, ..."
            )
        if init not in ("zero", "reference"):
            raise MotionRAGError(f"motion_adapter.init={init}: choose zero or reference")
        if not sites:
            raise ValueError("a motion adapter needs at least one site")
        queries = dict.fromkeys(sites, query) if isinstance(query, str) else dict(query)
        if unknown := sorted(queries.keys() - sites.keys()):
            raise ValueError(f"query names sites that this adapter has not: {unknown[:4]}")
        if wrong := sorted(set(queries.values()) - {"output", "hidden"}):
            raise MotionRAGError(f"motion_adapter.query={wrong[0]}: choose output or hidden")
        self.site_names, self.only = tuple(sites), only
        self.token_width = token_width
        for name, (hidden, heads) in sites.items():
            site = AdapterSite(hidden, heads, token_width, init, queries.get(name, "output"))
            self.add_module(name.replace(".", "/"), site)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._in_use: _InUse | None = None

    @classmethod
    def for_modules(
        cls,
        modules: Mapping[str, nn.Module],
        token_width: int,
        init: Literal["zero", "reference"] = "zero",
        query: Query | Mapping[str, Query] = "output",
        only: str | None = None,
    ) -> "MotionAdapter":
        """An adapter with the sizes of these attention modules (each has `.heads` and `.to_out[0]`)."""
        sites = {name: (m.to_out[0].in_features, m.heads) for name, m in modules.items()}
        return cls(sites, token_width, init, query, only)

    def site(self, name: str) -> AdapterSite:
        """The projections of one site, by the backbone's name for it."""
        return self.get_submodule(name.replace(".", "/"))

    @property
    def query(self) -> dict[str, Query]:
        """Site name -> where its query comes from."""
        return {name: self.site(name).query for name in self.site_names}

    @property
    def attached(self) -> bool:
        """Whether hooks are installed."""
        return bool(self._handles)

    def attach(self, modules: Mapping[str, nn.Module]) -> "MotionAdapter":
        """Hook into `modules` (site name -> attention), those of them that `only` lets through.

        Raises ValueError if names or widths differ.
        """
        if self.attached:
            raise RuntimeError("this motion adapter is attached already: detach it first")
        modules = _chosen(modules, self.only)
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
            self._handles += self._hooks(name, module)
        _compile_again()
        return self

    def detach(self) -> None:
        """Remove all hooks; the backbone is as it was."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _compile_again()
        self._handles.clear()

    def set(self, tokens: Tensor | None, scale: float = 1.0) -> None:
        """Motion tokens (B, n, token_width) for all forward passes to come, or None for the bare backbone.

        Stays until `clear` or the next `set`, so that gradient checkpointing finds it again during backward. The
        tokens are copied: changing them in place afterwards has no effect. Without gradients every site keeps its
        folded keys as long: `B * n * heads * hidden` values a site, 0.3 GB a sample for CogVideoX-5B in bfloat16.
        Raises ValueError for tokens of another width.
        """
        if tokens is not None and (tokens.ndim != 3 or tokens.shape[-1] != self.token_width):
            raise ValueError(f"motion tokens must be (B, n, {self.token_width}), got {tuple(tokens.shape)}")
        self._in_use = _InUse(None if tokens is None else tokens.clone(), float(scale))

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

    def _motion(self, name: str, site: AdapterSite, use: _InUse) -> Motion:
        """Keys and values for this forward pass: with gradients made anew, else kept for the clip."""
        if torch.is_grad_enabled():
            return site.project(use.tokens)
        if (
            torch.compiler.is_compiling()
        ):  # a graph cannot look after the kept ones; folding is 1 % of the branch
            return site.fold(use.tokens)
        stamp = site.stamp()
        if stamp is None:
            return site.fold(use.tokens)
        if name not in use.kept or use.kept[name][0] != stamp:
            use.kept[name] = stamp, site.fold(use.tokens)
        return use.kept[name][1]

    def _hooks(self, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        """Install the two hooks of one site: the first notes the query, the second adds the branch's output."""
        site = self.site(name)

        def note_query(_: nn.Module, args: tuple, kwargs: dict) -> None:
            use = self._in_use
            if use is None:
                raise RuntimeError(
                    "a motion adapter is attached but has no motion tokens: call set() or use() first"
                )
            if use.tokens is not None and use.scale != 0:
                use.queries[name] = args[0] if args else kwargs["hidden_states"]

        def add_motion(_: nn.Module, args: tuple) -> tuple | None:
            use = self._in_use
            if use.tokens is None or use.scale == 0:
                return None
            hidden, *rest = args
            query = use.queries.pop(name)
            if query.shape != hidden.shape:
                raise MotionRAGError(
                    f"site {name}: the attention's input, which motion_adapter.query=hidden asks with, has the shape "
                    f"{tuple(query.shape)}, its output {tuple(hidden.shape)}; expected the same: set "
                    "motion_adapter.query=output for this backbone"
                )
            return site(query, self._motion(name, site, use), hidden, use.scale), *rest

        # In front of all other hooks: the motion that another adapter adds to `h` is no part of this one's query.
        source = module if site.query == "hidden" else module.to_out[0]
        return [
            source.register_forward_pre_hook(note_query, prepend=True, with_kwargs=True),
            module.to_out[0].register_forward_pre_hook(add_motion),
        ]


def _chosen(sites: Mapping[str, Any], only: str | None) -> dict[str, Any]:
    """The sites whose whole names match `only`, all if it is None."""
    try:
        return {name: site for name, site in sites.items() if only is None or re.fullmatch(only, name)}
    except re.error as error:
        raise MotionRAGError(f"motion_adapter.only={only} is no regular expression: {error}") from error


def _no_autocast(device: str) -> AbstractContextManager:
    """Full precision inside; devices without autocast (meta) need nothing for that."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


def _compile_again() -> None:
    """Make compiled modules look at their hooks once more: `torch.compile` takes those of its first run for good."""
    if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import would take seconds
        torch.compiler.reset()
