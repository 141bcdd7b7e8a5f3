"""Launching the Triton kernels that decode: into how many pieces to cut a cache, and how to add them up."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ptkernels import _triton
from ptkernels.ops.attention import triton_decode_kernels as kernels
from ptkernels.ops.attention.triton import UNBOUNDED, Launcher, Tile, _identity

# A GPU is full with two programs on each of its multiprocessors; 132 is what an H100 has.
_PROGRAMS = 264


def tile(dtype: torch.dtype, dim: int, dim_v: int, rows: int) -> Tile:
    """Rows are the queries that share a key head; tiles do not depend on the length of the cache."""
    widest = max(_triton.power_of_2(dim), _triton.power_of_2(dim_v))
    m = _triton.power_of_2(rows)
    if dtype == torch.float32:
        return Tile(m, 32 if widest <= 128 else 16, 4, 1)
    return Tile(m, {16: 64, 32: 64, 64: 64, 128: 64, 256: 32, 512: 16}[widest], 4, 3 if widest <= 128 else 1)


def splits_for(programs: int, longest: int, block: int) -> int:
    """Pieces of the longest sequence: as many as fill the GPU, none of them shorter than four blocks."""
    wanted = max(1, _PROGRAMS // max(programs, 1))
    return max(1, min(wanted, math.ceil(longest / (4 * block)), 128))


def decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    scale: float | None = None,
    window_left: int = UNBOUNDED,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    splits: int | None = None,
    wrap: Launcher = _identity,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of queries that are the last of their sequences, aligned bottom right and causal.

    Args:
        query: ``[batch, heads, len_q, dim]``, any strides; len_q * heads / kv_heads at most 128.
        k_cache: ``[batch, kv_heads, room, dim]``, or ``[pages, kv_heads, page_size, dim]`` with ``block_table``.
        v_cache: the same of the values, ``dim_v`` wide.
        lengths: int32 ``[batch]``: keys of each sequence that exist, those of the queries included.
        block_table: int32 ``[batch, pages of the longest sequence]``.
        splits: pieces that a sequence is cut into. Default: as many as fill the GPU.
    """
    batch, heads, len_q, dim = query.shape
    kv_heads, page_size, dim_v = k_cache.size(1), k_cache.size(2), v_cache.size(-1)
    group = heads // max(kv_heads, 1)
    out = query.new_empty(batch, heads, len_q, dim_v)
    lse = query.new_empty(batch, heads, len_q, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    block = tile(query.dtype, dim, dim_v, len_q * group)
    longest = page_size * (1 if block_table is None else block_table.size(1))
    pieces = splits or splits_for(batch * kv_heads, longest, block.n)
    partial = lse.new_empty(batch, heads, len_q, pieces, dim_v)
    partial_lse = lse.new_empty(batch, heads, len_q, pieces)
    table = lengths if block_table is None else block_table
    wrap(kernels.decode)[(pieces, kv_heads, batch)](
        query, k_cache, v_cache, table, lengths, partial, partial_lse, *query.stride(), *k_cache.stride(),
        *v_cache.stride(), table.stride(0), heads, group, len_q, page_size, window_left,
        1.0 / math.sqrt(dim) if scale is None else scale, softcap,
        D=dim, DV=dim_v, PAGED=block_table is not None, LEFT=window_left != UNBOUNDED, SOFTCAP=softcap != 0.0,
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
