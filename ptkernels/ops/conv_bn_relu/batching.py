"""vmap rules of conv_bn_relu: the mapped dimension becomes groups of channels, and one kernel call serves all of it.

Groups keep what each call of the mapped function has of its own: weights, vectors per channel, statistics of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels.ops.conv_bn_relu.library import backward_op, conv_op
from ptkernels.ops.conv_bn_relu.variant import Variant, complete_backward, complete_forward

Dims = tuple[int | None, ...]


def _merge(tensor: Tensor | None, dim: int | None, size: int, into: int) -> Tensor | None:
    """The mapped dimension in front of dimension ``into``, merged with it."""
    if tensor is None:
        return None
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.movedim(0, into).flatten(into, into + 1)


def _split(tensor: Tensor | None, size: int, into: int) -> Tensor | None:
    return None if tensor is None else tensor.unflatten(into, (size, tensor.size(into) // size))


def _with_groups(variant: Variant, size: int) -> Variant:
    """Of all calls together."""
    return variant._replace(num_groups=variant.num_groups * (size if variant.num_groups > 0 else 1))


def vmap_conv(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """Rule of ``ptkernels::conv_bn_relu`` for ``torch.vmap``."""
    size = info.batch_size
    # Activations have their channels in dimension 1, everything else in 0.
    tensors = [_merge(args[i], in_dims[i], size, 1 if i in (0, 7) else 0) for i in range(8)]
    training, *options, groups, activation, slope, saves = complete_forward(args)[8:17]
    variant = _with_groups(Variant(*complete_forward(args)[17:]), size)
    out, conv, mean, var = conv_op(*tensors, training, *options, groups * size, activation, slope, saves, *variant)
    # Statistics of images have their groups behind the images.
    into = 1 if variant.num_groups else 0 if training else None
    results = (
        _split(out, size, 1),
        _split(conv, size, 1) if saves else conv,
        *(statistic if into is None else _split(statistic, size, into) for statistic in (mean, var)),
    )
    return results, (1, 1 if saves else None, into, into)


def vmap_backward(info: Any, in_dims: Dims, *args: Any) -> tuple[tuple[Tensor | None, ...], Dims]:
    """Rule of ``ptkernels::_conv_bn_relu_backward`` for ``torch.vmap``."""
    size = info.batch_size
    *options, groups, activation, slope, needed = complete_backward(args)[10:19]
    variant = _with_groups(Variant(*complete_backward(args)[19:]), size)
    behind = (0, 1, 6, 7, 8, 9) if variant.num_groups else (0, 1, 8, 9)
    tensors = [_merge(args[i], in_dims[i], size, 1 if i in behind else 0) for i in range(10)]
    grads = backward_op(*tensors, *options, groups * size, activation, slope, needed, *variant)
    into = (1, 0, 0, 0, 0, 1)
    split = tuple(_split(grad, size, dim) for grad, dim in zip(grads, into, strict=True))
    return split, tuple(None if grad is None else dim for grad, dim in zip(grads, into, strict=True))


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
        grads, dims = vmap_backward(_Info(size), (0,) * len(plain), *plain)
        return tuple(
            None if grad is None or dim is None else torch._add_batch_dim(grad, dim, level)
            for grad, dim in zip(grads, dims, strict=True)
        )
    finally:
        torch._C._vmapmode_increment_nesting()
