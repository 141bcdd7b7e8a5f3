"""vmap rules of the recurrent layers.

Mapped data with shared weights is a larger batch, served by one call. Mapped weights (an ensemble) are one call each:
the members share nothing that a joint call could reuse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from ptkernels.ops.packed_rnn.library import backward_op, rnn_op

Dims = Any


def _select(value: Any, dim: int | None, index: int) -> Any:
    return value if dim is None or not isinstance(value, Tensor) else value.select(dim, index)


def _loop(op: Any, size: int, in_dims: Dims, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """One call per member, results stacked."""
    values, spec = _pytree.tree_flatten(args)
    dims = [None if isinstance(dim, str) else dim for dim in _flat_dims(in_dims, args)]
    results = []
    for index in range(size):
        member = [_select(value, dim, index) for value, dim in zip(values, dims, strict=True)]
        results.append(op(*_pytree.tree_unflatten(member, spec)))
    stacked = [torch.stack(tensors) for tensors in zip(*results, strict=True)]
    if isinstance(results[0], list):
        return stacked, [0] * len(stacked)
    return tuple(stacked), (0,) * len(stacked)


def _flat_dims(in_dims: Dims, args: tuple[Any, ...]) -> list[int | None]:
    """One dimension per leaf of the arguments; a list may have one for all its tensors."""
    flat: list[int | None] = []
    for dim, arg in zip(in_dims, args, strict=True):
        leaves = _pytree.tree_leaves(arg) if isinstance(arg, (list, tuple)) else [arg]
        flat += list(dim) if isinstance(dim, (list, tuple)) else [dim] * len(leaves)
    return flat


def _is_mapped(dim: Dims) -> bool:
    return any(one is not None for one in _pytree.tree_leaves(dim, is_leaf=lambda x: x is None))


def _merge(tensor: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """The mapped dimension behind ``axis`` and into it: members of one sequence side by side."""
    if tensor is None:
        return None
    tensor = (
        tensor.unsqueeze(axis + 1).expand(*tensor.shape[: axis + 1], size, *tensor.shape[axis + 1 :])
        if (dim is None)
        else tensor.movedim(dim, axis + 1)
    )
    merged: Tensor = tensor.flatten(axis, axis + 1)
    return merged


def _split(tensor: Tensor, size: int, axis: int) -> Tensor:
    parts: Tensor = tensor.unflatten(axis, (-1, size))
    return parts


def _merge_sizes(sizes: Tensor | None, sorted_indices: Tensor | None, size: int, layout: str) -> tuple[Any, Any]:
    if layout == "packed":
        if sorted_indices is not None:
            sorted_indices = (sorted_indices[:, None] * size + torch.arange(size)).flatten()
        return None if sizes is None else sizes * size, sorted_indices
    return None if sizes is None else sizes.repeat_interleave(size), sorted_indices


def _data_axis(layout: str) -> int:
    """Which dimension of the data holds sequences."""
    return 1 if layout == "time_first" else 0


def vmap_rnn(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """Rule of ``ptkernels::packed_rnn`` for ``torch.vmap``."""
    size = info.batch_size
    input, sizes, sorted_indices, state, params, batch_size, layout, *options = args
    # What zoneout draws depends on which sequence of its call a sequence is.
    drawn = len(options) > 8 and options[8] is not None
    if layout == "varlen" or drawn or any(_is_mapped(in_dims[index]) for index in (1, 2, 4)):
        return _loop(rnn_op, size, in_dims, args)
    axis = _data_axis(layout)
    states = [_merge(t, dim, size, 1) for t, dim in zip(state, in_dims[3] or [None] * len(state), strict=True)]
    new_sizes, new_indices = _merge_sizes(sizes, sorted_indices, size, layout)
    output, h_n, c_n, gates, cells = rnn_op(
        _merge(input, in_dims[0], size, axis),
        new_sizes,
        new_indices,
        states,
        params,
        batch_size * size,
        layout,
        *options,
    )
    results = [_split(output, size, axis)]
    dims = [axis + 1]
    for tensor in (h_n, c_n, gates, cells):
        nothing = tensor.dim() == 1
        results.append(tensor if nothing else _split(tensor, size, 1))
        dims.append(None if nothing else 2)  # type: ignore[arg-type]
    return tuple(results), tuple(dims)


def vmap_backward(info: Any, in_dims: Dims, *args: Any) -> tuple[Any, Any]:
    """Rule of ``ptkernels::_packed_rnn_backward`` for ``torch.vmap``: gradients of weights are one per member."""
    return _loop(backward_op, info.batch_size, in_dims, args)


def legacy_vmap_backward(*args: Any) -> list[Tensor]:
    """The same under the older vmap behind ``torch.autograd.grad(is_grads_batched=True)``."""
    level = torch._C._vmapmode_decrement_nesting() + 1
    try:
        values, spec = _pytree.tree_flatten(args)
        # A tensor that is not mapped at this level comes back with a dimension of the size given, 1.
        plain = [torch._remove_batch_dim(v, level, 1, 0) if isinstance(v, Tensor) else v for v in values]
        size = max(value.size(0) for value in plain if isinstance(value, Tensor))
        results = []
        for index in range(size):
            member = [v[index if v.size(0) > 1 else 0] if isinstance(v, Tensor) else v for v in plain]
            results.append(backward_op(*_pytree.tree_unflatten(member, spec)))
        return [torch._add_batch_dim(torch.stack(grads), 0, level) for grads in zip(*results, strict=True)]
    finally:
        torch._C._vmapmode_increment_nesting()
