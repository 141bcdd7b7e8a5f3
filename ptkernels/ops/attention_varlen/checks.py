"""Validation of packed attention's arguments. Reads no data: what ``cu_seqlens`` hold the operator checks."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.attention.checks import DTYPES, MAX_HEAD_DIM
from ptkernels.ops.attention.options import KEEP_ALL, Options, compute_dtype

OP = "attention_varlen"
_LARGEST = sys.float_info.max


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(name: str, tensor: Any, dims: int, form: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{OP}: {name}: got {type(tensor).__name__}, expected torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{OP}: {name}: got layout {tensor.layout}, expected torch.strided (a dense tensor)")
    if tensor.dim() != dims:
        raise ValueError(f"{OP}: {name}: got shape {list(tensor.shape)}, expected {dims} dimensions: {form}")


def _check_operands(query: Any, key: Any, value: Any) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, 3, "[tokens, heads, head_dim]")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{OP}: {name}: got dtype {_name(tensor.dtype)}, expected one of {', '.join(map(_name, DTYPES))}"
            )
        if tensor.dtype != query.dtype:
            raise TypeError(f"{OP}: {name}: got dtype {_name(tensor.dtype)}, expected {_name(query.dtype)} like query")
        if tensor.device != query.device:
            raise ValueError(f"{OP}: {name}: got device {tensor.device}, expected {query.device} like query")
        if not 1 <= tensor.size(2) <= MAX_HEAD_DIM:
            raise ValueError(f"{OP}: {name}: got head dim {tensor.size(2)}, expected 1 to {MAX_HEAD_DIM}")
    if key.size(2) != query.size(2):
        raise ValueError(f"{OP}: key: got head dim {key.size(2)}, expected {query.size(2)} like query")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(f"{OP}: value: got {list(value.shape[:2])} tokens and heads, expected {list(key.shape[:2])}")
    heads, kv_heads = query.size(1), key.size(1)
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(f"{OP}: key: got {kv_heads} heads, expected a divisor of query's {heads}")


def _check_sequences(query: Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, lengths: dict[str, Any]) -> None:
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_tensor(name, tensor, 1, "[sequences + 1]")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{OP}: {name}: got dtype {_name(tensor.dtype)}, expected int32 or int64")
        if tensor.device != query.device:
            raise ValueError(f"{OP}: {name}: got device {tensor.device}, expected {query.device} like query")
        if tensor.size(0) < 1:
            raise ValueError(f"{OP}: {name}: got shape [0], expected [sequences + 1]")
    if cu_seqlens_k.size(0) != cu_seqlens_q.size(0):
        got, expected = cu_seqlens_k.size(0) - 1, cu_seqlens_q.size(0) - 1
        raise ValueError(f"{OP}: cu_seqlens_k: got {got} sequences, expected {expected} like cu_seqlens_q")
    for name, length in lengths.items():
        if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
            raise TypeError(f"{OP}: {name}: got {type(length).__name__}, expected int")


def _check_relative_bias(query: Tensor, sequences: int, tensor: Tensor, queries: int, keys: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{OP}: relative_bias: got {type(tensor).__name__}, expected torch.Tensor")
    if queries < 0 or keys < 0:
        raise ValueError(
            f"{OP}: relative_bias: got a value without max_seqlen_q and max_seqlen_k, expected both: they say which "
            "number belongs to which distance"
        )
    expected = [query.size(1), max(queries + keys - 1, 0)]
    if list(tensor.shape) not in (expected, [sequences, *expected]):
        raise ValueError(
            f"{OP}: relative_bias: got shape {list(tensor.shape)}, expected {expected}, a number for every distance "
            f"from key to query, or {[sequences, *expected]}"
        )
    _check_wide("relative_bias", tensor, query)


def _check_wide(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != compute_dtype(query.dtype):
        raise TypeError(f"{OP}: {name}: got dtype {_name(tensor.dtype)}, expected {_name(compute_dtype(query.dtype))}")
    if tensor.device != query.device:
        raise ValueError(f"{OP}: {name}: got device {tensor.device}, expected {query.device} like query")


def _check_options(query: Tensor, sequences: int, options: Options) -> None:
    for name, flag in (("is_causal", options.is_causal), ("bottom_right", options.bottom_right)):
        if not isinstance(flag, bool):
            raise TypeError(f"{OP}: {name}: got {type(flag).__name__}, expected bool")
    for name, low, high in (("dropout_p", 0.0, 1.0), ("softcap", 0.0, _LARGEST), ("scale", -_LARGEST, _LARGEST)):
        number = getattr(options, name)
        if number is None and name == "scale":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{OP}: {name}: got {type(number).__name__}, expected float")
        if not low <= number <= high:
            raise ValueError(f"{OP}: {name}: got {number}, expected a number from {low} to {high}")
    for name, tensor in (("alibi_slopes", options.alibi_slopes), ("sinks", options.sinks)):
        if tensor is None:
            continue
        heads = query.size(1)
        if list(tensor.shape) not in ([heads], [sequences, heads]):
            raise ValueError(
                f"{OP}: {name}: got shape {list(tensor.shape)}, expected [{heads}] or [{sequences}, {heads}]"
            )
        _check_wide(name, tensor, query)
    if options.keep_below != KEEP_ALL and options.dropout_seed is not None and options.dropout_seed.dim() > 1:
        raise ValueError(f"{OP}: dropout_seed: expected an int64 tensor of shape [] or [a divisor of the sequences]")


def check_inputs(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    *,
    options: Options,
) -> None:
    """Raise the precise error for the first argument of :func:`ptkernels.attention_varlen` that is wrong.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that attention does not take.
        ValueError: a shape, a device or a number is out of range.
    """
    _check_operands(query, key, value)
    _check_sequences(query, cu_seqlens_q, cu_seqlens_k, {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k})
    _check_options(query, cu_seqlens_q.size(0) - 1, options)
    if options.relative_bias is not None:
        _check_relative_bias(query, cu_seqlens_q.size(0) - 1, options.relative_bias, max_seqlen_q, max_seqlen_k)
