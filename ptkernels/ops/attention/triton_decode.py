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
    """float32, of int8 and float8 caches: ``[kv_heads]``, or ``[entries, kv_heads, room]``."""
    value_scale: Tensor | None = None

    @property
    def room(self) -> int:
        """Slots that a sequence can have."""
        pages = 1 if self.block_table is None else self.block_table.size(1)
        return self.keys.size(2) * pages


class Rotary(NamedTuple):
    """Angles ``[positions, pairs]`` of the slots, and which values of a row are a pair."""

    cos: Tensor
    sin: Tensor
    interleaved: bool
    stands_still: bool = False
    """Whether all queries take the angle of the first."""


def _kind(scale: Tensor | None) -> int:
    if scale is None:
        return int(kernels.NO_SCALE.value)
    return int((kernels.SCALE_PER_HEAD if scale.dim() == 1 else kernels.SCALE_PER_SLOT).value)


def _as_codes(cache: Tensor) -> Tensor:
    """Float8 as its codes, which every GPU reads."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def _code(cache: Tensor, arch: int) -> int:
    if cache.dtype != torch.float8_e4m3fn:
        return int(kernels.INT8.value)
    return int((kernels.NATIVE_E4M3 if _triton.has_float8(arch) else kernels.E4M3).value)


def _scale_strides(scale: Tensor | None) -> tuple[int, int, int]:
    if scale is None:
        return 0, 0, 0
    return (0, scale.stride(0), 0) if scale.dim() == 1 else (scale.stride(0), scale.stride(1), scale.stride(2))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _rotary_arguments(rotary: Rotary | None, dummy: Tensor) -> tuple[tuple[Tensor, Tensor, int, int], dict[str, Any]]:
    """Tables, their stride and positions; and what is compiled in."""
    if rotary is None:
        return (dummy, dummy, 0, 0), {"PAIRS": 0, "INTERLEAVED": False}
    cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
    return (cos, sin, cos.size(1), cos.size(0)), {"PAIRS": cos.size(1), "INTERLEAVED": rotary.interleaved}


def tile(dtype: torch.dtype, dim: int, dim_v: int, rows: int) -> Tile:
    """Rows are the queries that share a key head; tiles do not depend on the length of the cache."""
    widest = max(_triton.power_of_2(dim), _triton.power_of_2(dim_v))
    if dtype == torch.float64:
        return Tile(16, 16, 4, 1)
    if dtype == torch.float32:
        # Products in IEEE float32 are made of registers alone, which hold no more rows.
        return Tile(16, 32, 8, 2) if widest <= 128 else Tile(16, 16, 16, 2)
    m = min(_triton.power_of_2(rows), 64 if widest <= 256 else 32)
    return Tile(m, {16: 64, 32: 64, 64: 64, 128: 64, 256: 32, 512: 16}[widest], 8, 2 if widest <= 128 else 1)


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
    rotary: Rotary | None = None,
    splits: int | None = None,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of queries ``[batch, heads, len_q, dim]`` that are the last of their sequences.

    Args:
        query: any strides.
        cache: what they attend to.
        added: slots behind ``cache.lengths`` that hold something as well.
        window_right: 0 for causal attention.
        rotary: rotates the queries by the angles of slots ``cache.lengths`` and on.
        splits: pieces that a sequence is cut into. Default: as many as fill the GPU.
    """
    batch, heads, len_q, dim = query.shape
    kv_heads, page_size, dim_v = cache.keys.size(1), cache.keys.size(2), cache.values.size(-1)
    group = heads // max(kv_heads, 1)
    out = query.new_empty(batch, len_q, heads, dim_v).transpose(1, 2)
    lse = query.new_empty(batch, heads, len_q, dtype=_triton.sum_dtype(query.dtype))
    if out.numel() == 0:
        return out, lse
    block = tile(query.dtype, dim, dim_v, len_q * group)
    (cos, sin, *table), turns = _rotary_arguments(rotary, lse)
    row_tiles = math.ceil(len_q * group / block.m)
    pieces = splits or splits_for(batch * kv_heads * row_tiles, cache.room, block.n)
    partial = lse.new_empty(batch, heads, len_q, pieces, dim_v)
    partial_lse = lse.new_empty(batch, heads, len_q, pieces)
    lengths = cache.lengths
    scale = 1.0 / math.sqrt(dim) if scale is None else scale
    numbers = _triton.number(scale, query), _triton.number(softcap, query)
    slopes = (0, 0) if alibi_slopes is None else alibi_slopes.expand(batch, heads).stride()
    wrap(kernels.decode)[(pieces * row_tiles, kv_heads, batch)](
        query, _as_codes(cache.keys), _as_codes(cache.values), _or(cache.block_table, lengths),
        _or(cache.rows, lengths), lengths, _or(cache.left_pad, lengths), _or(alibi_slopes, lse),
        _or(cache.key_scale, lse), _or(cache.value_scale, lse),
        cos, sin, partial, partial_lse, *query.stride(), *cache.keys.stride(), *cache.values.stride(),
        0 if cache.block_table is None else cache.block_table.stride(0), *slopes, *_scale_strides(cache.key_scale),
        *_scale_strides(cache.value_scale), *table, heads, group, len_q, added, cache.room, page_size,
        cache.keys.size(0), pieces, window_left, window_right, *numbers, D=dim, DV=dim_v,
        PAGED=cache.block_table is not None, HAS_INDEX=cache.rows is not None,
        HAS_PAD=cache.left_pad is not None, LEFT=window_left != UNBOUNDED, RIGHT=window_right != UNBOUNDED,
        SOFTCAP=softcap != 0.0, ALIBI=alibi_slopes is not None, KIND=_kind(cache.key_scale),
        CODE=_code(cache.keys, _triton.arch_of(query)), **turns, FIXED=rotary is not None and rotary.stands_still,
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
    (cos, sin, stride_cos, positions), turns = _rotary_arguments(rotary, new)
    wrap(kernels.append)[(rows, kv_heads, batch)](
        new, _as_codes(target), new if scale is None else scale, lengths, _or(cache.block_table, lengths),
        _or(cache.rows, lengths), cos, sin, positions, cache.room, target.size(2), target.size(0), *new.stride(),
        *target.stride(), *_scale_strides(scale), 0 if cache.block_table is None else cache.block_table.stride(0),
        stride_cos, D=dim, **turns, PAGED=cache.block_table is not None, HAS_INDEX=cache.rows is not None,
        KIND=_kind(scale), CODE=_code(target, 0), BLOCK_D=_triton.power_of_2(dim), num_warps=1,
    )  # fmt: skip
