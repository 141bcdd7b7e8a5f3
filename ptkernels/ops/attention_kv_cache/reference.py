"""Attention with a key-value cache in plain torch: the oracle, one sequence at a time.

slots of sequence b      cache_leftpad[b] <= j < total[b],   total = cache_seqlens + new keys
query i                  stands at slot position[i] = total - Lq + i
scores[i, j]             softcap(scale * query[i] @ key[j]) - slope * |position[i] - j|, -inf where j is not seen
out                      softmax(scores) @ value, a sink counting as one more score without a value
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ptkernels.ops.attention.options import compute_dtype
from ptkernels.ops.attention.reference import default_scale

INT8_MAX, E4M3_MAX = 127.0, 448.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first values of each row of ``x``, two for every angle of the row: ``[length, pairs]``."""
    pairs = cos.size(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(pairs, -1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat((joined, rest), -1)


def quantize(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes of rows ``[heads, length, dim]`` and their scales: the heads' own where given, else the rows' largest."""
    largest = INT8_MAX if dtype == torch.int8 else E4M3_MAX
    x = x.float()
    if scale is None:
        scale = x.abs().amax(-1) / largest
        scale = torch.where(scale == 0, 1.0, scale)
    else:
        scale = scale[:, None].expand(x.shape[:-1])
    codes = (x / scale[..., None]).clamp(-largest, largest)
    return (codes.round().nan_to_num(0.0) if dtype == torch.int8 else codes).to(dtype), scale


class _Slots:
    """Where the slots of one sequence lie in a cache, or in its scales: row of the cache and place in it."""

    def __init__(self, blocks: Tensor, page: int, begin: int, end: int) -> None:
        slots = torch.arange(begin, end, device=blocks.device)
        self.row, self.place = blocks.long()[slots // max(page, 1)], slots % max(page, 1)

    def read(self, cache: Tensor) -> Tensor:
        """``[heads, slots, ...]``."""
        bits = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
        return bits[self.row, :, self.place].movedim(0, 1).contiguous().view(cache.dtype)

    def write(self, cache: Tensor, values: Tensor) -> None:
        if cache.dtype == torch.float8_e4m3fn:  # has no indexed assignment
            cache, values = cache.view(torch.uint8), values.contiguous().view(torch.uint8)
        cache[self.row, :, self.place] = values.movedim(1, 0).to(cache.dtype)


def _append(slots: _Slots, new: Tensor, cache: Tensor, scale: Tensor | None) -> None:
    if scale is None:
        slots.write(cache, new)
        return
    codes, scales = quantize(new, cache.dtype, scale if scale.dim() == 1 else None)
    slots.write(cache, codes)
    if scale.dim() == 3:
        slots.write(scale, scales)


def _read(slots: _Slots, cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    values = slots.read(cache).to(dtype)
    if scale is None:
        return values
    scales = slots.read(scale) if scale.dim() == 3 else scale[:, None]
    return values * scales[..., None].to(dtype)


def _visible(distance: Tensor, is_causal: bool, window: tuple[int, int] | None) -> Tensor:
    """Which slots a query sees, from how far they lie before it."""
    seen = torch.ones_like(distance, dtype=torch.bool)
    left, right = window or (-1, -1)
    if is_causal:
        seen &= distance >= 0
    if left >= 0:
        seen &= distance <= left
    if right >= 0:
        seen &= -distance <= right
    return seen


def attention_with_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch :func:`ptkernels.attention_with_kv_cache`: same arguments, results and effect on the cache.

    Computes in float64 for float64 queries and in float32 otherwise; what it stores has the bits that the operator
    stores. Runs without recording gradients.

    Example:
        >>> import torch, ptkernels as ptk
        >>> cache = torch.zeros(1, 1, 4, 2)
        >>> new = torch.ones(1, 1, 1, 2)
        >>> ptk.reference.attention_with_kv_cache(new, cache, cache.clone(), new, new, cache_seqlens=1)
        tensor([[[[0.8044, 0.8044]]]])
        >>> cache[0, 0, :, 0]
        tensor([0., 1., 0., 0.])
    """
    return append_and_attend(
        query,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        return_lse=return_lse,
        product_dtype=compute_dtype(query.dtype),
    )


@torch.no_grad()
def append_and_attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    product_dtype: torch.dtype,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention_with_kv_cache` with the operands and results of both products rounded to a dtype."""
    batch, heads, length, _ = query.shape
    dtype, new = compute_dtype(query.dtype), 0 if k is None else k.size(2)
    seqlens = [cache_seqlens] * batch if isinstance(cache_seqlens, int) else cache_seqlens.tolist()
    leftpads = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    rows = torch.arange(batch, device=query.device) if cache_batch_idx is None else cache_batch_idx
    table = rows[:, None] if block_table is None else block_table
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads).to(dtype)
    sink = query.new_full((heads,), -math.inf, dtype=dtype) if sinks is None else sinks.to(dtype)

    out = query.new_empty(batch, length, heads, v_cache.size(3)).transpose(1, 2)
    lse = query.new_empty(batch, heads, length, dtype=dtype)
    for b, (filled, leftpad) in enumerate(zip(seqlens, leftpads, strict=True)):
        total = filled + new
        rows_q = query[b].to(dtype)
        if k is not None and v is not None:
            rows_k = k[b].to(dtype)
            if rotary_cos is not None and rotary_sin is not None:
                cos, sin = rotary_cos[filled:total].to(dtype), rotary_sin[filled:total].to(dtype)
                rows_k = rotate(rows_k, cos, sin, rotary_interleaved)
                turned = slice(None) if is_causal or _is_limited(window) else slice(0, 1)
                rows_q = rotate(rows_q, cos[turned], sin[turned], rotary_interleaved)
            slots = _Slots(table[b], k_cache.size(2), filled, total)
            _append(slots, rows_k, k_cache, k_scale)
            _append(slots, v[b].to(dtype), v_cache, v_scale)
        slots = _Slots(table[b], k_cache.size(2), leftpad, total)
        keys = _read(slots, k_cache, k_scale, dtype).to(product_dtype)
        values = _read(slots, v_cache, v_scale, dtype).to(product_dtype)

        position = torch.arange(total - length, total, device=query.device)
        distance = position[:, None] - torch.arange(leftpad, total, device=query.device)
        kv_heads, used = keys.shape[:2]
        rows_of_head = heads // max(kv_heads, 1) * length
        grouped = rows_q.to(product_dtype).reshape(kv_heads, rows_of_head, rows_q.size(-1))
        scores = (grouped @ keys.mT).to(dtype).view(heads, length, used) * default_scale(query, scale)
        if softcap > 0.0:
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[b, :, None, None] * distance.abs()
        scores = scores.masked_fill(~_visible(distance, is_causal, window), -math.inf)
        scores = torch.cat((scores, sink[:, None, None].expand(-1, length, 1)), -1)
        empty = (scores == -math.inf).all(-1)
        weights = torch.softmax(scores, -1)[..., :-1].masked_fill(empty[..., None], 0.0)
        weighed = weights.to(product_dtype).reshape(kv_heads, rows_of_head, used) @ values
        out[b] = weighed.reshape(out[b].shape).to(query.dtype)
        lse[b] = torch.logsumexp(scores, -1).masked_fill(empty, -math.inf)
    return (out, lse) if return_lse else out


def _is_limited(window: Sequence[int] | None) -> bool:
    return window is not None and max(window) >= 0
