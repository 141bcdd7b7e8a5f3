"""Rotary embedding in plain torch: the oracle, and the composition that runs where no kernel can.

n = x * rsqrt(mean(x^2) + eps) * weight            n = x without a weight
out = (n[a] cos - n[b] sin, n[b] cos + n[a] sin)   for the pairs (a, b); values beyond them stay
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def angles(table: Tensor, positions: Tensor | None, length: int) -> Tensor:
    """Rows of a table for every token, to be broadcast over heads."""
    if positions is None:
        return table[:length]
    rows = table[positions]
    return rows.unsqueeze(1) if positions.dim() == 2 else rows


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of the first ``2 * cos.size(-1)`` values."""
    half = cos.size(-1)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _heads_inside(x: Tensor) -> Tensor:
    """The kernels' layout."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Plain torch :func:`ptkernels.rotary_embedding`: same arguments, shapes and results.

    Computes in float64 for float64 inputs and in float32 otherwise, and rounds once at the end. Differentiable in
    every tensor argument any number of times in forward and reverse mode.

    Example:
        >>> import math, torch, ptkernels as ptk
        >>> x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> quarter = torch.tensor([[math.pi / 2]])
        >>> ptk.reference.rotary_embedding(x, x, quarter.cos(), quarter.sin())[0].round().flatten()
        tensor([-0., 1.])
    """
    wide, length = compute_dtype(query.dtype), query.size(2)
    c, s = (angles(table.to(wide), positions, length) for table in (cos, sin))

    def embed(x: Tensor, weight: Tensor | None) -> Tensor:
        y = x.to(wide)
        if weight is not None:
            y = rms_norm(y, weight.to(wide), norm_eps)
        return _heads_inside(rotate(y, c, s, interleaved).to(x.dtype))

    return embed(query, query_norm_weight), embed(key, key_norm_weight)


def gradients(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    query_norm_weight: Tensor | None,
    key_norm_weight: Tensor | None,
    interleaved: bool,
    norm_eps: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """First derivatives, of query, key and the two weights, written so that they can be differentiated further.

    With g the gradient rotated back and r the inverse root: dx = r (g w - x r^2 mean(g w x)), dw = sum(g x r).
    """
    wide, length = compute_dtype(query.dtype), query.size(2)
    c, s = (angles(table.to(wide), positions, length) for table in (cos, sin))
    found: list[tuple[Tensor, Tensor | None]] = []
    for grad, x, weight in ((grad_query, query, query_norm_weight), (grad_key, key, key_norm_weight)):
        g = rotate(grad.to(wide), c, -s, interleaved)
        if weight is None:
            found.append((_heads_inside(g.to(x.dtype)), None))
            continue
        y = x.to(wide)
        r = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm_eps)
        gw = g * weight.to(wide)
        dx = r * (gw - y * r.square() * (gw * y).mean(-1, keepdim=True))
        dw = (g * y * r).sum((0, 1, 2))
        found.append((_heads_inside(dx.to(x.dtype)), dw.to(weight.dtype)))
    (dq, dwq), (dk, dwk) = found
    return dq, dk, dwq, dwk
