"""vmap rules of packed attention: mapped calls become further sequences, so that one kernel call serves all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.attention.batching import legacy_vmap, mapped_first, merge_options
from ptkernels.ops.attention.options import Options
from ptkernels.ops.attention_varlen.library import varlen_backward_op, varlen_op


def _merge(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    return None if tensor is None else mapped_first(tensor, dim, size).flatten(0, 1)


def _merge_lse(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """``[size, heads, tokens]`` to ``[heads, size * tokens]``."""
    return None if tensor is None else mapped_first(tensor, dim, size).transpose(0, 1).flatten(1, 2)


def _merge_offsets(cu_seqlens: Tensor, dim: int | None, size: int, tokens: int) -> Tensor:
    mapped = mapped_first(cu_seqlens, dim, size)
    first = torch.arange(size, device=cu_seqlens.device, dtype=cu_seqlens.dtype)[:, None] * tokens
    last = mapped.new_full((1,), size * tokens)
    return torch.cat([(mapped[:, :-1] + first).flatten(), last])


def vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Rule of ``ptkernels::attention_varlen`` for ``torch.vmap``."""
    size = info.batch_size
    tokens, keys = (mapped_first(args[i], in_dims[i], size).size(1) for i in (0, 1))
    operands = [_merge(tensor, dim, size) for tensor, dim in zip(args[:3], in_dims[:3], strict=True)]
    offsets = [_merge_offsets(args[3], in_dims[3], size, tokens), _merge_offsets(args[4], in_dims[4], size, keys)]
    sequences = args[3].numel() // (1 if in_dims[3] is None else size) - 1
    options = merge_options(Options(*args[7:]), Options(*in_dims[7:]), size, sequences)
    out, lse = varlen_op(*operands, *offsets, *args[5:7], *options.packed)
    return (out.unflatten(0, (size, tokens)), lse.unflatten(1, (size, tokens))), (0, 1)


def vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """Rule of ``ptkernels::_attention_varlen_backward`` for ``torch.vmap``."""
    size = info.batch_size
    tokens, keys = (mapped_first(args[i], in_dims[i], size).size(1) for i in (2, 3))
    grad_out, query, key, value, out = (_merge(args[i], in_dims[i], size) for i in (0, 2, 3, 4, 5))
    grad_lse, lse = (_merge_lse(args[i], in_dims[i], size) for i in (1, 6))
    offsets = [_merge_offsets(args[7], in_dims[7], size, tokens), _merge_offsets(args[8], in_dims[8], size, keys)]
    sequences = args[7].numel() // (1 if in_dims[7] is None else size) - 1
    given, dims = Options(*args[12:]), Options(*in_dims[12:])
    options = merge_options(given, dims, size, sequences, keep_shared=not any(args[11][3:]))
    grads = varlen_backward_op(grad_out, grad_lse, query, key, value, out, lse, *offsets, *args[9:12], *options.packed)
    results = [
        None if grad is None else grad.unflatten(0, (size, length))
        for grad, length in zip(grads[:3], (tokens, keys, keys), strict=True)
    ]
    for grad, tensor, dim, own in zip(grads[3:], given.learned, dims.learned, (1, 1, 2), strict=True):
        if grad is not None and tensor is not None:
            grad = grad.unflatten(0, (size, sequences))
            is_shared = tensor.dim() - (dim is not None) == own
            grad = grad.sum(1) if is_shared else grad
        results.append(grad)
    return tuple(results), tuple(None if grad is None else 0 for grad in results)


def legacy_vmap_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The same under the older vmap behind ``torch.autograd.grad(is_grads_batched=True)``."""
    return legacy_vmap(vmap_backward, args)
