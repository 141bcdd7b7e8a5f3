"""Biases by distance, made from what models learn: T5's table of buckets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_OP = "t5_relative_bias"


def _check(table: Tensor, query_length: int, key_length: int, bidirectional: bool, max_distance: int) -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{_OP}: table: got {type(table).__name__}, expected torch.Tensor")
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(
            f"{_OP}: table: got {table.dtype} of shape {list(table.shape)}, expected floating [buckets, heads]"
        )
    for name, length in (("query_length", query_length), ("key_length", key_length)):
        if length < 1:
            raise ValueError(f"{_OP}: {name}: got {length}, expected 1 or more")
    exact = table.size(0) // 2 // (2 if bidirectional else 1)
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{_OP}: max_distance: got {max_distance} with {table.size(0)} buckets, expected at least 2 buckets for "
            f"each direction and more than {exact}, the distances with a bucket of their own"
        )


def t5_buckets(offsets: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """Bucket of every offset ``key - query``: half of them exact, the other half growing as the logarithm."""
    first: Tensor | int = 0
    if bidirectional:
        buckets //= 2
        first = (offsets > 0).long() * buckets
        distance = offsets.abs()
    else:
        distance = (-offsets).clamp(min=0)
    exact = buckets // 2
    growth = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def t5_relative_bias(
    table: Tensor,
    query_length: int,
    key_length: int,
    *,
    bidirectional: bool = True,
    max_distance: int = 128,
    query_offset: int = 0,
) -> Tensor:
    """T5's relative position bias as the ``relative_bias`` of :func:`ptkernels.attention`.

    The matrix ``[heads, query_length, key_length]`` that T5 adds to its scores depends on ``j - i`` alone; this is its
    ``query_length + key_length - 1`` numbers per head.

    Args:
        table: ``[buckets, heads]``, what T5 learns (``relative_attention_bias.weight``), in any floating dtype, on any
            device. Differentiable; its gradient is reduced in a fixed order on the CPU.
        query_length: number of queries.
        key_length: number of keys.
        bidirectional: half of the buckets are for keys after the query, as in an encoder; without it, as in a decoder,
            keys after the query share bucket 0. Default: True.
        max_distance: distances from here on share the last bucket. Default: 128.
        query_offset: position of the first query, where keys come from a cache. Default: 0.

    Returns:
        ``[heads, query_length + key_length - 1]`` in the table's dtype: a bias to add, T5 does not scale its scores.

    Raises:
        TypeError: ``table`` is not a tensor.
        ValueError: its shape or a number does not fit.

    Note:
        Linear time and memory. Buckets as in Raffel et al., *Exploring the limits of transfer learning*, 2020.

    Example:
        >>> import torch, ptkernels as ptk
        >>> query, key, value = torch.randn(3, 1, 8, 100, 64).unbind()
        >>> bias = ptk.t5_relative_bias(torch.randn(32, 8), 100, 100)
        >>> bias.shape
        torch.Size([8, 199])
        >>> ptk.attention(query, key, value, scale=1.0, relative_bias=bias).shape
        torch.Size([1, 8, 100, 64])
    """
    _check(table, query_length, key_length, bidirectional, max_distance)
    offsets = torch.arange(1 - query_length, key_length, device=table.device) - query_offset
    return table[t5_buckets(offsets, table.size(0), bidirectional, max_distance)].t()
