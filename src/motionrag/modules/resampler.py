"""Perceiver resampler: any number of feature tokens in, a fixed number of learned tokens out."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class PerceiverAttention(nn.Module):
    """Latents attend to the features and to themselves; no biases, scale `dim_head ** -0.5`."""

    def __init__(self, dim: int, dim_head: int, heads: int) -> None:
        super().__init__()
        inner = dim_head * heads
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """x (B, N, dim), latents (B, Q, dim) -> (B, Q, dim)."""
        x, latents = self.norm1(x), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.heads) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    """LayerNorm, widen by `mult`, GELU, narrow; no biases in the linear layers."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class Resampler(nn.Module):
    """Learned queries that read a feature sequence through `depth` attention and feed-forward layers.

    Args:
        dim: inner width.
        depth: number of layers.
        dim_head, heads: attention sizes; `dim_head * heads` need not equal `dim`.
        num_queries: output tokens (per frame if `video_length` is given).
        embedding_dim: width of the features that come in.
        output_dim: width of the tokens that go out; they are layer-normalised.
        ff_mult: widening of the feed-forward part.
        video_length: multiplies the number of queries; the output is then frame-major.
        with_cls_token: one more query in front, returned only on request.
    """

    def __init__(
        self,
        dim: int = 1024,
        depth: int = 4,
        dim_head: int = 64,
        heads: int = 12,
        num_queries: int = 25,
        embedding_dim: int = 768,
        output_dim: int = 1024,
        ff_mult: int = 4,
        video_length: int | None = None,
        with_cls_token: bool = False,
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.output_dim = output_dim
        self.with_cls_token = with_cls_token
        self.tokens = num_queries * (video_length or 1)
        self.latents = nn.Parameter(torch.randn(1, self.tokens + with_cls_token, dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, dim_head, heads), feed_forward(dim, ff_mult)])
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)

    def forward(self, x: Tensor, return_cls_tokens: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, N, embedding_dim) -> tokens (B, Q, output_dim).

        With `return_cls_tokens` (needs `with_cls_token`) -> (cls (B, output_dim), tokens).
        Raises ValueError when the width of `x` is not `embedding_dim`.
        """
        if x.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"Resampler expects features of width {self.embedding_dim}, got {tuple(x.shape)}"
            )
        latents = self.latents.expand(x.shape[0], -1, -1)
        x = self.proj_in(x)
        for attend, feed in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + feed(latents)
        out = self.norm_out(self.proj_out(latents))
        if not self.with_cls_token:
            if return_cls_tokens:
                raise ValueError("return_cls_tokens needs a Resampler built with with_cls_token=True")
            return out
        return (out[:, 0], out[:, 1:]) if return_cls_tokens else out[:, 1:]
