"""Attention with every option of the Triton kernels, in plain torch and in the dtype it is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    low = 0xFFFFFFFF
    for _ in range(10):
        first, third = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (third >> 32 & low) ^ counter[1] ^ key[0],
            third & low,
            (first >> 32 & low) ^ counter[3] ^ key[1],
            first & low,
        ]
        key = (key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low
    return counter


def kept(seed: int, keep_below: int, batch: int, heads: int, rows: int, keys: int) -> Tensor:
    """What dropout keeps: sixteen bits of Philox at (key, row // 8, head, batch), in the place of row % 8."""
    counter = torch.broadcast_tensors(
        torch.arange(keys),
        torch.arange(rows)[:, None] // 8,
        torch.arange(heads)[:, None, None],
        torch.arange(batch)[:, None, None, None],
    )
    words = philox(list(counter), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    word = torch.stack(words).gather(0, ((torch.arange(rows)[:, None] % 8) // 2).expand(1, batch, heads, rows, keys))
    half = word[0] >> (torch.arange(rows)[:, None] % 2 * 16) & 0xFFFF
    return half < keep_below


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    mask_block_size: int = 1,
) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    batch, heads, rows, dim = query.shape
    keys = key.size(2)
    key, value = (t.repeat_interleave(heads // t.size(1), 1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2)).to(wide) * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    diagonal = keys - rows if bottom_right else 0
    offset = torch.arange(keys) - (torch.arange(rows)[:, None] + diagonal)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[..., None, None] * offset.abs()
    if attn_mask is not None:
        if mask_block_size > 1:
            attn_mask = attn_mask.repeat_interleave(mask_block_size, -2).repeat_interleave(mask_block_size, -1)
            attn_mask = attn_mask[..., :rows, :keys]
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    right = 0 if is_causal else window_right
    if right >= 0:
        scores = scores.masked_fill(offset > right, -math.inf)
    if window_left >= 0:
        scores = scores.masked_fill(offset < -window_left, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[..., None, None].expand(batch, heads, rows, 1)], -1)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)[..., :keys]
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), -math.inf)
    if dropout_seed is not None:
        keep_below = round((1 - dropout_p) * 65536)
        weights = weights * kept(int(dropout_seed), keep_below, batch, heads, rows, keys) * (65536 / keep_below)
    return (weights.to(dtype) @ value).to(dtype), lse


def differentiate(
    tensors: dict[str, Tensor | None], options: dict[str, Any], grads: tuple[Tensor, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """out, lse and the gradient of every floating tensor, all computed in `dtype`."""
    leaves = {
        name: t.to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t
        for name, t in tensors.items()
    }
    out, lse = attention(**leaves, **options)
    wanted = [name for name, t in leaves.items() if t is not None and t.requires_grad]
    loss = (out * grads[0].to(out.dtype)).sum() + torch.where(lse == -math.inf, 0.0, lse * grads[1].to(lse.dtype)).sum()
    found = torch.autograd.grad(loss, [leaves[name] for name in wanted], allow_unused=True)
    results = {"out": out, "lse": lse}
    for name, grad in zip(wanted, found, strict=True):
        results[name] = torch.zeros_like(leaves[name]) if grad is None else grad
    return results
