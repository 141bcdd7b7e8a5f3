"""Between the shapes that users pass and the four dimensions that the operator takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Normalized(NamedTuple):
    """Operands of the operator, and the leading shape of its results where that is not the operator's own."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    lead: Sequence[int] | None

    def restore(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Results of the operator in the shape that the caller's operands imply; always views."""
        if self.lead is None:
            return out, lse
        return out.view(*self.lead, *out.shape[-2:]), lse.view(*self.lead, lse.size(-1))


def lead_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> Sequence[int]:
    """Leading dimensions of the result, heads included: broadcast, except that grouped heads follow the query."""
    kept = -3 if enable_gqa else -2
    lead = query.shape[:kept]
    if not lead == key.shape[:kept] == value.shape[:kept]:
        lead = torch.broadcast_shapes(lead, key.shape[:kept], value.shape[:kept])
    return (*lead, query.size(-3)) if enable_gqa else lead


def normalize(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> Normalized:
    """Bring checked operands of any rank to ``[batch, heads, length, dim]``, copying only where no view does."""
    if query.dim() == 4 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return Normalized(query, key, value, attn_mask, None)
    lead = lead_shape(query, key, value, enable_gqa)
    if attn_mask is not None and attn_mask.dim() > len(lead) + 2:
        raise ValueError("attn_mask has more dimensions than the scores")
    if len(lead) < 2 and not enable_gqa:
        # One leading dimension is more often a batch than heads, and as a batch its result is contiguous.
        operands = [_fold(tensor.unsqueeze(-3), lead) for tensor in (query, key, value)]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        return Normalized(operands[0], operands[1], operands[2], attn_mask, lead)

    batch, heads = lead[:-1], lead[-1]
    # The operator reads a shared key and value head once for all of its query heads; expanded ones it would read again.
    if not enable_gqa and not (_heads(key) == 1 and _heads(value) == 1):
        key, value = (tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:]) for tensor in (key, value))
    if not enable_gqa:
        query = query.expand(*query.shape[:-3], heads, *query.shape[-2:])
    if attn_mask is not None and attn_mask.dim() > 3 and len(batch) > 1:
        is_shared = all(size == 1 for size in attn_mask.shape[:-3])
        attn_mask = attn_mask.reshape(attn_mask.shape[-3:]) if is_shared else _fold(attn_mask, batch)
    return Normalized(_fold(query, batch), _fold(key, batch), _fold(value, batch), attn_mask, lead)


def _heads(tensor: Tensor) -> int:
    return tensor.size(-3) if tensor.dim() > 2 else 1


def _fold(tensor: Tensor, batch: Sequence[int]) -> Tensor:
    """Broadcast the dimensions before the last three to ``batch`` and merge them into one."""
    last = tensor.shape[-3:] if tensor.dim() > 2 else (1, *tensor.shape)
    return tensor.expand(*batch, *last).reshape(math.prod(batch), *last)
