"""Validation of the arguments of attention with a cache: every rule once, for the call and for shape propagation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds
from ptkernels.ops.attention.checks import DTYPES, MAX_HEAD_DIM, _dtype_name

OP = "attention_with_kv_cache"
CACHE_DTYPES = (torch.int8, torch.float8_e4m3fn)
MAX_PAGE = 512


def _check_tensor(name: str, value: Any, query: Tensor | None = None) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{OP}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_nested or value.layout is not torch.strided:
        raise TypeError(f"{OP}: {name}: got layout {value.layout}, expected torch.strided (a dense tensor)")
    if query is not None and value.device != query.device:
        raise ValueError(f"{OP}: {name}: got device {value.device}, expected {query.device} like query")


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        expected = " or ".join(_dtype_name(dtype) for dtype in dict.fromkeys(allowed))
        raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(tensor.dtype)}, expected {expected}")


def _check_shape(name: str, tensor: Tensor, *expected: int) -> None:
    if tensor.dim() != len(expected) or not all(
        holds(size == wanted) for size, wanted in zip(tensor.shape, expected, strict=True)
    ):
        raise ValueError(f"{OP}: {name}: got shape {list(tensor.shape)}, expected {list(expected)}")


def _check_rank(name: str, tensor: Tensor, rank: int, form: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{OP}: {name}: got {tensor.dim()} dimensions, expected {rank}: {form}")


def _check_operands(query: Any, k_cache: Any, v_cache: Any) -> None:
    _check_tensor("query", query)
    _check_dtype("query", query, *DTYPES)
    _check_rank("query", query, 4, "[batch, heads, length, dim]")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_tensor(name, cache, query)
        _check_rank(name, cache, 4, "[batch or blocks, kv heads, capacity or page size, dim]")
    _check_dtype("k_cache", k_cache, query.dtype, *CACHE_DTYPES)
    _check_dtype("v_cache", v_cache, k_cache.dtype)
    rows, kv_heads, capacity, _ = k_cache.shape
    _check_shape("k_cache", k_cache, rows, kv_heads, capacity, query.size(3))
    _check_shape("v_cache", v_cache, rows, kv_heads, capacity, v_cache.size(3))
    no_heads = isinstance(kv_heads, int) and kv_heads == 0
    if not holds(query.size(1) == 0 if no_heads else query.size(1) % kv_heads == 0):
        raise ValueError(f"{OP}: k_cache: got {kv_heads} heads, expected a divisor of query's {query.size(1)}")
    for name, dim in (("query", query.size(3)), ("v_cache", v_cache.size(3))):
        if not (holds(dim >= 1) and holds(dim <= MAX_HEAD_DIM)):
            raise ValueError(f"{OP}: {name}: got head dim {dim}, expected 1 to {MAX_HEAD_DIM}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not (holds(cache.size(3) == 1) or holds(cache.stride(3) == 1)):
            raise ValueError(f"{OP}: {name}: got stride {cache.stride(3)} in its last dimension, expected 1")


def _check_scales(query: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Any, v_scale: Any) -> None:
    for name, scale, cache in (("k_scale", k_scale, k_cache), ("v_scale", v_scale, v_cache)):
        if cache.dtype not in CACHE_DTYPES:
            if scale is not None:
                raise ValueError(f"{OP}: {name}: got a tensor, expected None for a cache that is not quantised")
            continue
        if scale is None:
            raise ValueError(f"{OP}: {name}: got None, expected the scales of the {_dtype_name(cache.dtype)} cache")
        _check_tensor(name, scale, query)
        _check_dtype(name, scale, torch.float32)
        if scale.dim() == 1:
            _check_shape(name, scale, cache.size(1))
        else:
            _check_shape(name, scale, *cache.shape[:3])


def _check_new(query: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any, k_scale: Any, v_scale: Any) -> None:
    if (k is None) != (v is None):
        raise ValueError(f"{OP}: {'k' if k is None else 'v'}: got None, expected both of k and v or neither")
    if k is None:
        return
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        _check_tensor(name, new, query)
        _check_dtype(name, new, query.dtype)
        _check_rank(name, new, 4, "[batch, kv heads, new length, dim]")
        _check_shape(name, new, query.size(0), cache.size(1), k.size(2), cache.size(3))
    for name, written in (("k_cache", k_cache), ("v_cache", v_cache), ("k_scale", k_scale), ("v_scale", v_scale)):
        if written is None or written.dim() == 1:
            continue
        for dim in range(written.dim()):
            if written.stride(dim) == 0 and written.size(dim) > 1:
                raise ValueError(
                    f"{OP}: {name}: got stride 0 in dimension {dim}, expected a cache whose elements all lie in places "
                    "of their own"
                )


def _check_placement(
    query: Tensor, k_cache: Tensor, cache_seqlens: Any, block_table: Any, cache_batch_idx: Any, cache_leftpad: Any
) -> None:
    batch = query.size(0)
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt, Tensor)):
        raise TypeError(f"{OP}: cache_seqlens: got {type(cache_seqlens).__name__}, expected torch.Tensor or int")
    per_sequence = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    if isinstance(cache_seqlens, (int, torch.SymInt)):
        del per_sequence["cache_seqlens"]
    for name, value in per_sequence.items():
        if value is not None:
            _check_tensor(name, value, query)
            _check_dtype(name, value, torch.int32, torch.int64)
            _check_shape(name, value, batch)
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(
                f"{OP}: cache_batch_idx: got a tensor, expected None where block_table says where sequences lie"
            )
        _check_tensor("block_table", block_table, query)
        _check_dtype("block_table", block_table, torch.int32, torch.int64)
        _check_rank("block_table", block_table, 2, "[batch, blocks of a sequence]")
        _check_shape("block_table", block_table, batch, block_table.size(1))
        page = k_cache.size(2)
        if not (holds(page >= 1) and holds(page <= MAX_PAGE)):
            raise ValueError(f"{OP}: k_cache: got page size {page}, expected 1 to {MAX_PAGE}")
    elif cache_batch_idx is None and not holds(k_cache.size(0) == batch):
        raise ValueError(
            f"{OP}: k_cache: got batch size {k_cache.size(0)}, expected {batch} like query; cache_batch_idx chooses "
            "rows of a larger cache"
        )


def _check_rotary(query: Tensor, k: Tensor | None, cos: Any, sin: Any, interleaved: Any) -> None:
    if not isinstance(interleaved, bool):
        raise TypeError(f"{OP}: rotary_interleaved: got {type(interleaved).__name__}, expected bool")
    if (cos is None) != (sin is None):
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{OP}: {missing}: got None, expected both of rotary_cos and rotary_sin or neither")
    if cos is None:
        return
    if k is None:
        raise ValueError(f"{OP}: rotary_cos: got a tensor, expected None without new keys")
    if not holds(k.size(2) == query.size(2)):
        raise ValueError(f"{OP}: k: got length {k.size(2)}, expected query's {query.size(2)} where both are rotated")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_tensor(name, table, query)
        _check_rank(name, table, 2, "[positions, rotary dim / 2]")
    _check_dtype("rotary_cos", cos, torch.float32, query.dtype)
    _check_dtype("rotary_sin", sin, cos.dtype)
    _check_shape("rotary_sin", sin, *cos.shape)
    if not holds(2 * cos.size(1) <= query.size(3)):
        raise ValueError(f"{OP}: rotary_cos: got {cos.size(1)} angles, expected at most half of {query.size(3)}")


def _check_options(
    query: Tensor, scale: Any, is_causal: Any, window: Any, softcap: Any, alibi_slopes: Any, sinks: Any
) -> None:
    if not isinstance(is_causal, bool):
        raise TypeError(f"{OP}: is_causal: got {type(is_causal).__name__}, expected bool")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if name == "scale" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{OP}: {name}: got {type(number).__name__}, expected float")
        if isinstance(number, (int, float)) and not math.isfinite(number):
            raise ValueError(f"{OP}: {name}: got {number}, expected a finite number")
    if isinstance(softcap, (int, float)) and softcap < 0:
        raise ValueError(f"{OP}: softcap: got {softcap}, expected a finite number that is not negative")
    if window is not None and not (
        isinstance(window, (tuple, list))
        and len(window) == 2
        and all(isinstance(side, (int, torch.SymInt)) and not isinstance(side, bool) for side in window)
    ):
        raise TypeError(f"{OP}: window: got {window!r}, expected None or a pair of ints, (left, right)")
    if alibi_slopes is not None:
        _check_tensor("alibi_slopes", alibi_slopes, query)
        _check_dtype("alibi_slopes", alibi_slopes, torch.float32)
        _check_shape("alibi_slopes", alibi_slopes, *query.shape[1 if alibi_slopes.dim() == 1 else 0 : 2])
    if sinks is not None:
        _check_tensor("sinks", sinks, query)
        _check_dtype("sinks", sinks, torch.float32)
        _check_shape("sinks", sinks, query.size(1))


def check_inputs(
    query: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    *,
    cache_seqlens: Any,
    block_table: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    rotary_interleaved: Any = False,
    scale: Any = None,
    is_causal: Any = True,
    window: Any = None,
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """Raise the precise error for the first argument that is wrong by its type, dtype, shape, device or strides.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that the operator does not take.
        ValueError: a shape, a device or a number is out of range.
    """
    _check_operands(query, k_cache, v_cache)
    _check_scales(query, k_cache, v_cache, k_scale, v_scale)
    _check_new(query, k_cache, v_cache, k, v, k_scale, v_scale)
    _check_placement(query, k_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad)
    _check_rotary(query, k, rotary_cos, rotary_sin, rotary_interleaved)
    _check_options(query, scale, is_causal, window, softcap, alibi_slopes, sinks)


def check_values(
    query: Tensor,
    k_cache: Tensor,
    k: Tensor | None,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    rotary_cos: Tensor | None,
) -> None:
    """Raise ValueError for the first length, index or left padding that is out of range; arguments are checked ones."""
    batch, new = query.size(0), 0 if k is None else k.size(2)
    page, capacity = k_cache.size(2), k_cache.size(2)
    if block_table is not None:
        capacity *= block_table.size(1)
    seqlens = [cache_seqlens] * batch if isinstance(cache_seqlens, int) else cache_seqlens.tolist()
    leftpads = [0] * batch if cache_leftpad is None else cache_leftpad.tolist()
    for b, (filled, leftpad) in enumerate(zip(seqlens, leftpads, strict=True)):
        if not 0 <= filled <= capacity - new:
            raise ValueError(
                f"{OP}: cache_seqlens: got {filled} for sequence {b}, expected 0 to {capacity - new} (a capacity of "
                f"{capacity}, {new} of it for new keys)"
            )
        if not 0 <= leftpad <= filled:
            raise ValueError(
                f"{OP}: cache_leftpad: got {leftpad} for sequence {b}, expected 0 to its cache_seqlens, {filled}"
            )
    rows = list(range(batch)) if cache_batch_idx is None else cache_batch_idx.tolist()
    written: list[int] = []
    for b, (filled, leftpad) in enumerate(zip(seqlens, leftpads, strict=True)):
        name, used, first = "cache_batch_idx", [rows[b]], 0
        if block_table is not None:
            name, first = "block_table", leftpad // page
            used = block_table[b, first : -(-(filled + new) // page)].tolist()
        for index, row in enumerate(used, start=first):
            if not 0 <= row < k_cache.size(0):
                where = f"sequence {b}" if block_table is None else f"block {index} of sequence {b}"
                raise ValueError(f"{OP}: {name}: got {row} for {where}, expected 0 to {k_cache.size(0) - 1}")
        if new:
            written += used if block_table is None else used[filled // page - first :]
    if len(set(written)) < len(written):
        name = "cache_batch_idx" if block_table is None else "block_table"
        twice = next(row for row in written if written.count(row) > 1)
        raise ValueError(
            f"{OP}: {name}: got row {twice} of the cache twice among those that are appended to, expected each once"
        )
    needed = max(seqlens, default=0) + (new if batch else 0)
    if rotary_cos is not None and rotary_cos.size(0) < needed:
        raise ValueError(f"{OP}: rotary_cos: got {rotary_cos.size(0)} positions, expected at least {needed}")
