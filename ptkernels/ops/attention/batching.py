"""vmap rules of attention: the mapped dimension becomes part of the batch, so that one kernel call serves all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels.ops.attention.library import attention_op, backward_op
from ptkernels.ops.attention.options import (
    OUTPUT_MASK,
    Options,
    backward_options,
    backward_tail,
    complete_backward,
)

Dims = tuple[int | None, ...]


def mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensor with the mapped dimension in front, expanded where it is not mapped."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _merge(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    return None if tensor is None else mapped_first(tensor, dim, size).flatten(0, 1)


def _merge_mask(mask: Tensor | None, dim: int | None, size: int, batch: int, keep_shared: bool) -> Tensor | None:
    """The mask for a merged batch; one that does not depend on the batch stays as small as it is, where it may."""
    if mask is None or (keep_shared and dim is None and (mask.dim() < 4 or mask.size(0) == 1)):
        return mask
    mask = mapped_first(mask, dim, size)
    mask = mask.reshape(size, *(1,) * (5 - mask.dim()), *mask.shape[1:])
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _merge_head_values(
    tensor: Tensor | None, dim: int | None, size: int, batch: int, keep_shared: bool, own: int = 1
) -> Any:
    """Values per head, of ``own`` dimensions or one more for the batch, for a merged batch."""
    if tensor is None or (keep_shared and dim is None and tensor.dim() == own):
        return tensor
    tensor = mapped_first(tensor, dim, size)
    last = tensor.shape[-own:]
    return tensor.reshape(size, -1, *last).expand(size, batch, *last).flatten(0, 1)


def merge_options(options: Options, dims: Options, size: int, batch: int, keep_shared: bool = True) -> Options:
    """The options of mapped calls for their merged batch; values shared by all may stay so where ``keep_shared``."""
    seed = options.dropout_seed
    if seed is not None:
        # A seed for every mapped call: the batch counts from 0 in each of them.
        seed = mapped_first(seed, dims.dropout_seed, size).reshape(-1)  # type: ignore[arg-type]
    slopes, sinks = (
        _merge_head_values(tensor, dim, size, batch, keep_shared)  # type: ignore[arg-type]
        for tensor, dim in zip(options.tensors, dims.tensors, strict=True)
    )
    relative: Any = dims.relative_bias
    relative = _merge_head_values(options.relative_bias, relative, size, batch, keep_shared, own=2)
    return options._replace(alibi_slopes=slopes, sinks=sinks, dropout_seed=seed, relative_bias=relative)


def _merge_all(tensors: tuple[Tensor | None, ...], dims: Dims, size: int) -> tuple[list[Tensor | None], int]:
    """Merged operands, and the batch size that each call of the mapped function sees."""
    batch = next(
        mapped_first(tensor, dim, size).size(1) for tensor, dim in zip(tensors, dims, strict=True) if tensor is not None
    )
    return [_merge(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)], batch


def vmap_attention(
    info: Any,
    in_dims: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *options: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Rule of ``ptkernels::attention`` for ``torch.vmap``."""
    size = info.batch_size
    operands, batch = _merge_all((query, key, value), in_dims[:3], size)
    mask = None if attn_mask is None else _merge_mask(attn_mask, in_dims[3], size, batch, True)
    merged = merge_options(Options(*options), Options(*in_dims[4:]), size, batch) if options else ()
    out, lse = attention_op(*operands, mask, *merged)
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


def _unmerge_shared(grad: Tensor | None, shape: Sequence[int], size: int, batch: int) -> Tensor | None:
    """The gradient, per mapped call, of something of that shape that was expanded to the merged batch."""
    if grad is None:
        return None
    grad = grad.unflatten(0, (size, batch))
    if len(shape) < grad.dim() - 1 or shape[0] == 1:
        grad = grad.sum(1, keepdim=True)
    return grad.reshape(size, *shape)


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor | None, ...], Dims]:
    """Rule of ``ptkernels::_attention_backward`` for ``torch.vmap``."""
    size = info.batch_size
    args = complete_backward(args)
    dims = complete_backward(in_dims, filling=None)
    operands, batch = _merge_all(args[:7], dims[:7], size)
    attn_mask, options, wanted = args[7], backward_options(args), args[OUTPUT_MASK]
    is_shared = not any(wanted[3:])
    mask = _merge_mask(attn_mask, dims[7], size, batch, is_shared)
    merged = merge_options(options, backward_options(dims), size, batch, is_shared)
    grads = list(backward_op(*operands, mask, *backward_tail(merged, wanted)))
    given = (attn_mask, *options.learned)
    mapped = (dims[7], *backward_options(dims).learned)
    for index, grad in enumerate(grads):
        if grad is not None and index < 3:
            grads[index] = grad.unflatten(0, (size, batch))
        elif grad is not None:
            tensor: Any = given[index - 3]
            dim: Any = mapped[index - 3]
            shape = tensor.shape if dim is None else tensor.movedim(dim, 0).shape[1:]
            grads[index] = _unmerge_shared(grad, shape, size, batch)
    return tuple(grads), tuple(None if grad is None else 0 for grad in grads)


class _Info(NamedTuple):
    batch_size: int


def legacy_vmap(rule: Any, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    """A rule under the older vmap behind ``torch.autograd.grad(is_grads_batched=True)``.

    Its own fallback, a loop, refuses operators that may return None.
    """
    level = torch._C._vmapmode_decrement_nesting() + 1
    try:
        # A tensor that is not mapped at this level comes back with a dimension of the size given, 1.
        plain = [torch._remove_batch_dim(arg, level, 1, 0) if isinstance(arg, Tensor) else arg for arg in args]
        size = max(arg.size(0) for arg in plain if isinstance(arg, Tensor))
        plain = [arg.expand(size, *arg.shape[1:]) if isinstance(arg, Tensor) else arg for arg in plain]
        grads, _ = rule(_Info(size), (0,) * len(plain), *plain)
        return tuple(None if grad is None else torch._add_batch_dim(grad, 0, level) for grad in grads)
    finally:
        torch._C._vmapmode_increment_nesting()


def legacy_vmap_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The same as :func:`vmap_backward` under the older vmap."""
    return legacy_vmap(vmap_backward, args)
