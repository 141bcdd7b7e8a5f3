"""Between the shapes that users pass and the four dimensions that the operator takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ptkernels.ops.attention.options import Options


class Normalized(NamedTuple):
    """Operands of the operator, and the leading shape of its results where that is not the operator's own."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    options: Options
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


def split_lead(lead: Sequence[int], enable_gqa: bool, options: Options) -> tuple[Sequence[int], int]:
    """Batch dimensions and number of heads of a result.

    One leading dimension is more often a batch than heads, and as a batch its result is contiguous; it is heads where
    something is given per head.
    """
    has_heads = len(lead) > 1 or enable_gqa or any(tensor is not None for tensor in options.learned)
    return (lead[:-1], lead[-1]) if has_heads and len(lead) > 0 else (lead, 1)


def normalize(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Options, enable_gqa: bool
) -> Normalized:
    """Bring checked operands of any rank to ``[batch, heads, length, dim]``, copying only where no view does."""
    kept = 1 if enable_gqa else 2
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[:kept] == key.shape[:kept] == value.shape[:kept]:
        return Normalized(query, key, value, attn_mask, _fold_options(options, query.shape[:1]), None)
    lead = lead_shape(query, key, value, enable_gqa)
    if attn_mask is not None and attn_mask.dim() > len(lead) + 2:
        raise ValueError("attn_mask has more dimensions than the scores")
    batch, heads = split_lead(lead, enable_gqa, options)
    if batch == lead:
        operands = [_fold(tensor.unsqueeze(-3), lead) for tensor in (query, key, value)]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        return Normalized(operands[0], operands[1], operands[2], attn_mask, _fold_options(options, lead), lead)

    # The operator reads a shared key and value head once for all of its query heads; expanded ones it would read again.
    if not enable_gqa and not (_heads(key) == 1 and _heads(value) == 1):
        key, value = (tensor.expand(*tensor.shape[:-3], heads, *tensor.shape[-2:]) for tensor in (key, value))
    if not enable_gqa:
        query = query.expand(*query.shape[:-3], heads, *query.shape[-2:])
    if attn_mask is not None and attn_mask.dim() > 3 and len(batch) > 1:
        is_shared = all(size == 1 for size in attn_mask.shape[:-3])
        attn_mask = attn_mask.reshape(attn_mask.shape[-3:]) if is_shared else _fold(attn_mask, batch)
    options = _fold_options(options, batch)
    return Normalized(_fold(query, batch), _fold(key, batch), _fold(value, batch), attn_mask, options, lead)


def _heads(tensor: Tensor) -> int:
    return tensor.size(-3) if tensor.dim() > 2 else 1


def _fold(tensor: Tensor, batch: Sequence[int]) -> Tensor:
    """Broadcast the dimensions before the last three to ``batch`` and merge them into one."""
    last = tensor.shape[-3:] if tensor.dim() > 2 else (1, *tensor.shape)
    return tensor.expand(*batch, *last).reshape(math.prod(batch), *last)


def _fold_options(options: Options, batch: Sequence[int]) -> Options:
    """The same for values per head: ``[heads]`` stays, ``[..., heads]`` becomes ``[batch, heads]``."""
    for name, own in (("alibi_slopes", 1), ("sinks", 1), ("relative_bias", 2)):
        tensor = getattr(options, name)
        if tensor is not None and tensor.dim() > own:
            last = tensor.shape[-own:]
            options = options._replace(**{name: tensor.expand(*batch, *last).reshape(math.prod(batch), *last)})
    return options
