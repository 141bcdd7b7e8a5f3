"""Jagged nested tensors: packed sequences that know their own offsets."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels.ops.attention.options import is_triangle

OP = "attention"


class Packed(NamedTuple):
    """Arguments of :func:`ptkernels.attention_varlen`, and what makes its results nested again."""

    operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    kwargs: dict[str, Any]
    query: Any

    def restore(self, result: Tensor) -> Tensor:
        """``[tokens, heads, ...]`` as ``[batch, heads, length, ...]`` with the query's lengths."""
        nested = torch.nested.nested_tensor_from_jagged(result, self.query.offsets())
        return nested.transpose(1, 2)


def _values(name: str, given: Any) -> Tensor:
    if not isinstance(given, Tensor) or not given.is_nested or given.layout is not torch.jagged:
        raise TypeError(f"{OP}: {name}: expected a nested tensor of layout torch.jagged beside nested ones")
    tensor: Any = given  # torch declares none of the methods of nested tensors
    if tensor.dim() != 4 or tensor._ragged_idx != 2:
        raise ValueError(f"{OP}: {name}: got shape {list(tensor.shape)}, expected [batch, heads, jagged length, dim]")
    if tensor.lengths() is not None:
        raise ValueError(f"{OP}: {name}: got a nested tensor with holes, expected {name}.contiguous()")
    values: Tensor = tensor.transpose(1, 2).values()
    return values


def pack(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, enable_gqa: bool, **options: Any) -> Packed:
    """Nested operands as packed ones.

    Raises:
        TypeError: not all operands are jagged.
        ValueError: there is a mask, or shapes do not fit.
    """
    values = [_values(name, tensor) for name, tensor in (("query", query), ("key", key), ("value", value))]
    if is_triangle(attn_mask):
        raise ValueError(f"{OP}: attn_mask: got a triangle of one size, expected is_causal=True beside nested tensors")
    if attn_mask is not None:
        raise ValueError(f"{OP}: attn_mask: got a mask, expected None beside nested tensors")
    if key.offsets() is not value.offsets() and not torch.equal(key.offsets(), value.offsets()):
        raise ValueError(f"{OP}: value: got other lengths than key's, expected the same")
    if not enable_gqa and values[0].size(1) != values[1].size(1):
        raise ValueError(
            f"{OP}: key: got {values[1].size(1)} heads, expected {values[0].size(1)} like query; "
            "enable_gqa=True lets groups of query heads share a key and value head"
        )
    operands = (values[0], values[1], values[2], query.offsets(), key.offsets())
    return Packed(operands, {"is_causal": is_causal, **options}, query)
