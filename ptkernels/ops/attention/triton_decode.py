"""Launching the Triton kernels of a cache: appending to it, and attending to it in pieces that are added up after."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton.dispatch import Launcher, identity
from ptkernels.ops.attention import triton_decode_kernels as kernels
from ptkernels.ops.attention.triton import UNBOUNDED, Tile

# A GPU is full with two programs on each of its multiprocessors; 132 is what an H100 has.
_PROGRAMS = 264


class Cache(NamedTuple):
    """Where the keys and values of sequences are, and how many of them; what the options of a call add to that."""

    keys: Tensor
    """``[entries, kv_heads, room, dim]``, or pages of that shape with ``block_table``; values likewise."""
    values: Tensor
    lengths: Tensor
    """Integers ``[batch]``: slots that hold something, without those that a call has just ``added``."""
    block_table: Tensor | None = None
    rows: Tensor | None = None
    """Integers ``[batch]``: the entry of each sequence."""
    left_pad: Tensor | None = None
    key_scale: Tensor | None = None
    """float32, of int8 caches: ``[kv_heads]``, or ``[entries, kv_heads, room]``."""
    value_scale: Tensor | None = None

    @property
    def room(self) -> int:
        """Slots that a sequence can have."""
        pages = 1 if self.block_table is None else self.block_table.size(1)
        return self.keys.size(2) * pages

    @property
    def kind(self) -> int:
        if self.key_scale is None:
            return int(kernels.NO_SCALE.value)
        return int((kernels.SCALE_PER_HEAD if self.key_scale.dim() == 1 else kernels.SCALE_PER_SLOT).value)


def _scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    if scale is None:
        return 0, 0, 0
    return (0, scale.stride(0), 0) if scale.dim() == 1 else (scale.stride(0), scale.stride(1), scale.stride(2))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def tile(dtype: torch.dtype, dim: int, dim_v: int, rows: int) -> Tile:
    """Rows are the queries that share a key head; tiles do not depend on the length of the cache."""
    widest = max(_triton.power_of_2(dim), _triton.power_of_2(dim_v))
    m = min(_triton.power_of_2(rows), 64)
    if dtype == torch.float32:
        return Tile(m, 32 if widest <= 128 else 16, 4, 1)
    return Tile(m, {16: 64, 32: 64, 64: 64, 128: 64, 256: 32, 512: 16}[widest], 4, 3 if widest <= 128 else 1)


def splits_for(programs: int, longest: int, block: int) -> int:
    """Pieces of the longest sequence: as many as fill the GPU, none of them shorter than four blocks."""
    wanted = max(1, _PROGRAMS // max(programs, 1))
    return max(1, min(wanted, math.ceil(longest / (4 * block)), 128))


def decode(
    query: Tensor,
    cache: Cache,
    *,
    added: int = 0,
    scale: float | None = None,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    splits: int | None = None,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of queries ``[batch, heads, len_q, dim]`` that are the last of their sequences.

    Args:
        query: any strides.
        cache: what they attend to.
        added: slots behind ``cache.lengths`` that hold something as well.
        window_right: 0 for causal attention.
        splits: pieces that a sequence is cut into. Default: as many as fill the GPU.
    """
    batch, heads, len_q, dim = query.shape
    kv_heads, page_size, dim_v = cache.keys.size(1), cache.keys.size(2), cache.values.size(-1)
    group = heads // max(kv_heads, 1)
    out = query.new_empty(batch, len_q, heads, dim_v).transpose(1, 2)
    lse = query.new_empty(batch, heads, len_q, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    block = tile(query.dtype, dim, dim_v, len_q * group)
    row_tiles = math.ceil(len_q * group / block.m)
    pieces = splits or splits_for(batch * kv_heads * row_tiles, cache.room, block.n)
    partial = lse.new_empty(batch, heads, len_q, pieces, dim_v)
    partial_lse = lse.new_empty(batch, heads, len_q, pieces)
    lengths = cache.lengths
    slopes = (0, 0) if alibi_slopes is None else alibi_slopes.expand(batch, heads).stride()
    wrap(kernels.decode)[(pieces * row_tiles, kv_heads, batch)](
        query, cache.keys, cache.values, _or(cache.block_table, lengths), _or(cache.rows, lengths), lengths,
        _or(cache.left_pad, lengths), _or(alibi_slopes, lse), _or(cache.key_scale, lse), _or(cache.value_scale, lse),
        partial, partial_lse, *query.stride(), *cache.keys.stride(), *cache.values.stride(),
        0 if cache.block_table is None else cache.block_table.stride(0), *slopes, *_scale_strides(cache.key_scale),
        *_scale_strides(cache.value_scale), heads, group, len_q, added, cache.room, page_size, cache.keys.size(0),
        pieces, window_left, window_right, 1.0 / math.sqrt(dim) if scale is None else scale, softcap,
        D=dim, DV=dim_v, PAGED=cache.block_table is not None, HAS_INDEX=cache.rows is not None,
        HAS_PAD=cache.left_pad is not None, LEFT=window_left != UNBOUNDED, RIGHT=window_right != UNBOUNDED,
        SOFTCAP=softcap != 0.0, ALIBI=alibi_slopes is not None, KIND=cache.kind,
        PRECISION=_triton.dot_precision(query.dtype), BLOCK_M=block.m, BLOCK_N=block.n,
        BLOCK_D=_triton.power_of_2(dim), BLOCK_DV=_triton.power_of_2(dim_v),
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    wrap(kernels.combine)[(batch * heads * len_q,)](
        partial, partial_lse, lse if sinks is None else sinks, out, lse, pieces, heads, len_q,
        DV=dim_v, SINK=sinks is not None, BLOCK_S=_triton.power_of_2(pieces, 1), BLOCK_DV=_triton.power_of_2(dim_v),
        num_warps=4,
    )  # fmt: skip
    return out, lse


class Rotary(NamedTuple):
    """Angles ``[positions, pairs]`` of the slots, and which values of a row are a pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def _rotary_arguments(rotary: Rotary | None, dummy: Tensor) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any], int]:
    if rotary is None:
        return (dummy, dummy, 0), {"PAIRS": 0, "INTERLEAVED": False}, 0
    cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
    constants = {"PAIRS": cos.size(1), "INTERLEAVED": rotary.interleaved}
    return (cos, sin, cos.size(0)), constants, cos.size(1)


def rotate(query: Tensor, lengths: Tensor, rotary: Rotary, fixed: bool, wrap: Launcher = identity) -> Tensor:
    """Queries by the angles of slots ``lengths`` and on, or, ``fixed``, all by that of the first."""
    batch, heads, rows, dim = query.shape
    out = query.new_empty(query.shape)
    if out.numel() > 0:
        angles, constants, stride = _rotary_arguments(rotary, query)
        wrap(kernels.rotate)[(rows, heads, batch)](
            query, out, lengths, *angles, *query.stride(), stride, heads, rows, D=dim, **constants, FIXED=fixed,
            BLOCK_D=_triton.power_of_2(dim), num_warps=1,
        )  # fmt: skip
    return out


def append(
    new: Tensor,
    target: Tensor,
    scale: Tensor | None,
    cache: Cache,
    rotary: Rotary | None = None,
    wrap: Launcher = identity,
) -> None:
    """Write rows ``[batch, kv_heads, n, dim]`` behind ``cache.lengths`` into ``target``, its keys or values."""
    batch, kv_heads, rows, dim = new.shape
    if new.numel() == 0:
        return
    lengths = cache.lengths
    angles, constants, stride = _rotary_arguments(rotary, new)
    kind = kernels.NO_SCALE.value
    if scale is not None:
        kind = (kernels.SCALE_PER_HEAD if scale.dim() == 1 else kernels.SCALE_PER_SLOT).value
    wrap(kernels.append)[(rows, kv_heads, batch)](
        new, target, new if scale is None else scale, lengths, _or(cache.block_table, lengths),
        _or(cache.rows, lengths), *angles, cache.room, target.size(2), target.size(0), *new.stride(), *target.stride(),
        *_scale_strides(scale), 0 if cache.block_table is None else cache.block_table.stride(0), stride, D=dim,
        **constants, PAGED=cache.block_table is not None, HAS_INDEX=cache.rows is not None, KIND=kind,
        BLOCK_D=_triton.power_of_2(dim), num_warps=1,
    )  # fmt: skip
