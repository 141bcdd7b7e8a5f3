"""vmap rules of attention: the mapped dimension becomes part of the batch, so that one kernel call serves all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels.ops.attention.library import attention_op, backward_op

Dims = tuple[int | None, ...]


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _merge(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    return None if tensor is None else _mapped_first(tensor, dim, size).flatten(0, 1)


def _merge_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """The mask for a merged batch; one that does not depend on the batch stays as small as it is."""
    if mask is None or (dim is None and (mask.dim() < 4 or mask.size(0) == 1)):
        return mask
    mask = _mapped_first(mask, dim, size)
    mask = mask.reshape(size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _merge_all(tensors: tuple[Tensor | None, ...], dims: Dims, size: int) -> tuple[list[Tensor | None], int]:
    """Merged operands, and the batch size that each call of the mapped function sees."""
    batch = next(
        _mapped_first(tensor, dim, size).size(1)
        for tensor, dim in zip(tensors, dims, strict=True)
        if tensor is not None
    )
    return [_merge(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)], batch


def vmap_attention(
    info: Any,
    in_dims: Dims,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *options: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Rule of ``ptkernels::attention`` for ``torch.vmap``."""
    size = info.batch_size
    operands, batch = _merge_all((query, key, value), in_dims[:3], size)
    mask = None if attn_mask is None else _merge_mask(attn_mask, in_dims[3], size, batch)
    out, lse = attention_op(*operands, mask, *options)
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


def vmap_backward(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Tensor | None, ...], Dims]:
    """Rule of ``ptkernels::_attention_backward`` for ``torch.vmap``."""
    size = info.batch_size
    operands, batch = _merge_all(args[:7], in_dims[:7], size)
    mask = _merge_mask(args[7], in_dims[7], size, batch) if len(args) > 7 else None
    grads = backward_op(*operands, mask, *args[8:])
    unmerged = tuple(None if grad is None else grad.unflatten(0, (size, batch)) for grad in grads)
    return unmerged, tuple(None if grad is None else 0 for grad in grads)


class _Info(NamedTuple):
    batch_size: int


def legacy_vmap_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The same under the older vmap behind ``torch.autograd.grad(is_grads_batched=True)``.

    Its own fallback, a loop, refuses operators that may return None.
    """
    level = torch._C._vmapmode_decrement_nesting() + 1
    try:
        # A tensor that is not mapped at this level comes back with a dimension of the size given, 1.
        plain = [torch._remove_batch_dim(arg, level, 1, 0) if isinstance(arg, Tensor) else arg for arg in args]
        size = max(arg.size(0) for arg in plain if isinstance(arg, Tensor))
        plain = [arg.expand(size, *arg.shape[1:]) if isinstance(arg, Tensor) else arg for arg in plain]
        grads, _ = vmap_backward(_Info(size), (0,) * len(plain), *plain)
        return tuple(None if grad is None else torch._add_batch_dim(grad, 0, level) for grad in grads)
    finally:
        torch._C._vmapmode_increment_nesting()
