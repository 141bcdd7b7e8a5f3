"""vmap rules of rotary_embedding: mapped queries and keys become part of the batch, all else is a call for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.attention.batching import legacy_vmap, mapped_first
from ptkernels.ops.rotary_embedding.library import backward_op, rotary_op

Dims = tuple[int | None, ...]


def _each(op: Any, size: int, args: tuple[Any, ...], dims: Any) -> tuple[tuple[Tensor | None, ...], Dims]:
    """One call for every mapped index."""
    calls = [
        op(
            *(
                arg.select(dim, index) if isinstance(arg, Tensor) and dim is not None else arg
                for arg, dim in zip(args, dims, strict=True)
            )
        )
        for index in range(size)
    ]
    results = tuple(None if column[0] is None else torch.stack(column) for column in zip(*calls, strict=True))
    return results, tuple(None if result is None else 0 for result in results)


def _merged(args: tuple[Any, ...], dims: Any, size: int, operands: int, positions: int) -> tuple[list[Any], int]:
    """Arguments for a merged batch, of which the first ``operands`` are mapped; and the batch of each call."""
    first = [mapped_first(arg, dim, size) for arg, dim in zip(args[:operands], dims[:operands], strict=True)]
    batch = first[0].size(1)
    merged = [tensor.flatten(0, 1) for tensor in first] + list(args[operands:])
    if merged[positions] is not None and merged[positions].dim() == 2:
        merged[positions] = merged[positions].repeat(size, 1)
    return merged, batch


def vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor | None, ...], Dims]:
    """Rule of ``ptkernels::rotary_embedding`` for ``torch.vmap``."""
    size = info.batch_size
    args = (*args, *(None, None, None, False, 1e-6)[len(args) - 4 :])
    in_dims = (*in_dims, *(None,) * (9 - len(in_dims)))
    if any(isinstance(arg, Tensor) and dim is not None for arg, dim in zip(args[2:], in_dims[2:], strict=True)):
        return _each(rotary_op, size, args, in_dims)
    merged, batch = _merged(args, in_dims, size, 2, 4)
    query, key = rotary_op(*merged)
    return (query.unflatten(0, (size, batch)), key.unflatten(0, (size, batch))), (0, 0)


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor | None, ...], Dims]:
    """Rule of ``ptkernels::_rotary_embedding_backward`` for ``torch.vmap``."""
    size = info.batch_size
    is_mapped = any(isinstance(arg, Tensor) and dim is not None for arg, dim in zip(args[4:], in_dims[4:], strict=True))
    if is_mapped or any(args[11][2:]):
        return _each(backward_op, size, args, in_dims)
    merged, batch = _merged(args, in_dims, size, 4, 6)
    grads = [None if grad is None else grad.unflatten(0, (size, batch)) for grad in backward_op(*merged)]
    return tuple(grads), tuple(None if grad is None else 0 for grad in grads)


def legacy_vmap_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The same under the older vmap behind ``torch.autograd.grad(is_grads_batched=True)``."""
    return legacy_vmap(vmap_backward, args)
