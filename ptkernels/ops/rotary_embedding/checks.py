"""Validation of rotary_embedding's arguments: every rule once, for the public function and for shape propagation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds

OP = "rotary_embedding"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _same(sizes: Any, expected: Any) -> bool:
    return len(sizes) == len(expected) and all(holds(a == b) for a, b in zip(sizes, expected, strict=True))


def _check_tensor(name: str, value: Any, like: Tensor | None, dtype: torch.dtype | None) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{OP}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_nested or value.layout is not torch.strided:
        raise TypeError(f"{OP}: {name}: got a nested or sparse tensor, expected a dense one")
    if dtype is None and value.dtype not in DTYPES:
        raise TypeError(
            f"{OP}: {name}: got dtype {_name(value.dtype)}, expected one of {', '.join(map(_name, DTYPES))}"
        )
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{OP}: {name}: got dtype {_name(value.dtype)}, expected {_name(dtype)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{OP}: {name}: got device {value.device}, expected {like.device} like query")


def _check_tables(cos: Any, sin: Any, query: Tensor) -> None:
    _check_tensor("cos", cos, query, None)
    _check_tensor("sin", sin, query, cos.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{OP}: {name}: got a tensor that requires grad, expected {name}.detach()")
    if cos.dim() != 2 or not holds(2 * cos.size(1) <= query.size(3)):
        raise ValueError(f"{OP}: cos: got shape {list(cos.shape)}, expected [positions, up to {query.size(3) // 2}]")
    if not _same(sin.shape, cos.shape):
        raise ValueError(f"{OP}: sin: got shape {list(sin.shape)}, expected {list(cos.shape)} like cos")


def _check_positions(positions: Any, cos: Tensor, query: Tensor) -> None:
    batch, _, length, _ = query.shape
    if positions is None:
        if not holds(length <= cos.size(0)):
            raise ValueError(f"{OP}: cos: got {cos.size(0)} positions, expected at least {length}, the length of query")
        return
    _check_tensor("positions", positions, query, torch.int64)
    if not (_same(positions.shape, (length,)) or _same(positions.shape, (batch, length))):
        raise ValueError(
            f"{OP}: positions: got shape {list(positions.shape)}, expected [{length}] or [{batch}, {length}]"
        )


def check_inputs(
    query: Any,
    key: Any,
    cos: Any,
    sin: Any,
    positions: Any = None,
    query_norm_weight: Any = None,
    key_norm_weight: Any = None,
    interleaved: Any = False,
    norm_eps: Any = 1e-6,
) -> None:
    """Raise the precise error for the first argument of :func:`ptkernels.rotary_embedding` that is wrong.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that is not taken.
        ValueError: a shape, a device or a number is out of range.
    """
    _check_tensor("query", query, None, None)
    _check_tensor("key", key, query, query.dtype)
    for name, tensor in (("query", query), ("key", key)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{OP}: {name}: got {tensor.dim()} dimensions, expected 4: [batch, heads, length, head_dim]"
            )
    if not all(holds(key.size(dim) == query.size(dim)) for dim in (0, 2, 3)):
        batch, _, length, dim = query.shape
        raise ValueError(
            f"{OP}: key: got shape {list(key.shape)}, expected [{batch}, heads, {length}, {dim}] like query"
        )
    _check_tables(cos, sin, query)
    _check_positions(positions, cos, query)
    for name, weight in (("query_norm_weight", query_norm_weight), ("key_norm_weight", key_norm_weight)):
        if weight is None:
            continue
        _check_tensor(name, weight, query, query.dtype)
        if not _same(weight.shape, (query.size(3),)):
            raise ValueError(f"{OP}: {name}: got shape {list(weight.shape)}, expected [{query.size(3)}]")
    if not isinstance(interleaved, bool):
        raise TypeError(f"{OP}: interleaved: got {type(interleaved).__name__}, expected bool")
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, (int, float)):
        raise TypeError(f"{OP}: norm_eps: got {type(norm_eps).__name__}, expected float")
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"{OP}: norm_eps: got {norm_eps}, expected a finite number, 0 or more")
