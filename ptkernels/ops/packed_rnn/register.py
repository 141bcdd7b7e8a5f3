"""What torch's subsystems need to know about ``ptkernels::packed_rnn`` beyond its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import Function, apply, below_autograd, forward_of_function, has_tangent, in_transform
from ptkernels._triton import dispatch
from ptkernels.ops.packed_rnn import batching, reference
from ptkernels.ops.packed_rnn.checks import OP, check_backward, check_layer
from ptkernels.ops.packed_rnn.library import backward_op, rnn_op

FORWARD_MODE = "forward-mode differentiation has no kernel"

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Extras = tuple[Any, ...]
"""``all_cells`` and the fields of ``reference.Options``, as both operators end with them."""

_NO_EXTRAS: Extras = (False, *reference.PLAIN)
_SAVED_GATES = {
    "lstm": 4,
    "gru": 4,
    "tanh": 0,
    "relu": 0,
    "peephole_lstm": 4,
    "reset_before_gru": 3,
    "layer_norm_lstm": 8,
    "layer_norm_gru": 6,
}
_SAVED_STATISTICS = {"layer_norm_lstm": 3, "layer_norm_gru": 2}


def saved_shapes(input: Tensor, mode: str, directions: int, hidden: int) -> tuple[list[Any], list[Any]]:
    """Of the gates and the cells that the forward keeps for the backward."""
    rows = math.prod(input.shape[:-1])  # Size.numel() would specialise symbolic sizes
    gates = [directions, rows, _SAVED_GATES[mode], hidden] if _SAVED_GATES[mode] else [0]
    cells = (hidden if reference.has_cells(mode) else 0) + _SAVED_STATISTICS.get(mode, 0)
    has_none = not reference.has_cells(mode) and mode not in _SAVED_STATISTICS
    return gates, [0] if has_none else [directions, rows, cells]


def _fake_rnn(
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool = False,
    save: bool = False,
    recompute: bool = False,
    all_cells: bool = False,
    *options: Any,
) -> Results:
    hidden, outputs = check_layer(
        OP, input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional, all_cells, *options
    )
    directions = 2 if bidirectional else 1
    gates, cells = saved_shapes(input, mode, directions, hidden) if save else ([0], [0])
    return (
        input.new_empty(*input.shape[:-1], directions * (outputs + (hidden if all_cells else 0))),
        input.new_empty(directions, batch_size, outputs),
        input.new_empty([directions, batch_size, hidden] if reference.has_cells(mode) else [0]),
        input.new_empty(gates),
        input.new_empty(cells, dtype=reference.compute_dtype(input.dtype)),
    )


def _fake_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool,
    output_mask: Sequence[bool],
    all_cells: bool = False,
    *options: Any,
) -> list[Tensor]:
    hidden, outputs = check_layer(
        OP, input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional, all_cells, *options
    )
    directions = 2 if bidirectional else 1
    check_backward(
        (grad_output, grad_h_n, grad_c_n),
        input,
        output,
        gates,
        cells,
        saved_shapes(input, mode, directions, hidden),
        (
            (*input.shape[:-1], directions * (outputs + (hidden if all_cells else 0))),
            (directions, batch_size, outputs),
            (directions, batch_size, hidden),
        ),
    )
    tensors = (input, *state, *params)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in zip(tensors, output_mask, strict=True) if wanted]


class _PackedRnn(Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        sizes: Tensor | None,
        sorted_indices: Tensor | None,
        states: int,
        options: tuple[int, str, str, bool],
        recompute: bool,
        extras: Extras,
        input: Tensor,
        *tensors: Tensor,
    ) -> Results:
        state, params = list(tensors[:states]), list(tensors[states:])
        results: Results = forward_of_function(
            rnn_op, keyset, input, sizes, sorted_indices, state, params, *options, not recompute, False, *extras
        )
        output, _, c_n, gates, cells = results
        ctx.set_materialize_grads(False)
        *others, seed = extras
        ctx.save_for_backward(input, *tensors, output, gates, cells, sizes, sorted_indices, seed)
        ctx.states, ctx.options, ctx.recompute, ctx.extras = states, options, recompute, others
        ctx.mark_non_differentiable(gates, cells, *([] if reference.has_cells(options[2]) else [c_n]))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        input, *tensors, output, gates, cells, sizes, sorted_indices, seed = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[7:])
        results: list[Tensor | None] = [None] * len(needed)
        if any(grad is not None for grad in grads[:3]):
            state, params = tensors[: ctx.states], tensors[ctx.states :]
            extras = (*ctx.extras, seed)
            if ctx.recompute:
                # An intermediate result of the same inputs, as what a forward saves is: nothing is differentiated here.
                with torch.no_grad():
                    *_, gates, cells = rnn_op(
                        input, sizes, sorted_indices, state, params, *ctx.options, True, False, *extras
                    )
            saved = (output, gates, cells)
            rest = (*saved, *ctx.options, needed, *extras)
            args = (*grads[:3], input, sizes, sorted_indices, state, params, *rest)
            if torch.is_grad_enabled() or in_transform() or torch.compiler.is_compiling():
                found = iter(backward_op(*args))
            else:
                found = iter(below_autograd(backward_op, None, *args))
            results = [next(found) if wanted else None for wanted in needed]
        return (*[None] * 7, *results)


class _PackedRnnBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        saved: tuple[Tensor, Tensor, Tensor],
        sizes: Tensor | None,
        sorted_indices: Tensor | None,
        states: int,
        options: tuple[int, str, str, bool],
        output_mask: list[bool],
        extras: Extras,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        input: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        state, params = list(tensors[:states]), list(tensors[states:])
        grads = (grad_output, grad_h_n, grad_c_n)
        args = (*grads, input, sizes, sorted_indices, state, params, *saved, *options, output_mask, *extras)
        ctx.set_materialize_grads(False)
        *others, seed = extras
        ctx.save_for_backward(*grads, input, *tensors, sizes, sorted_indices, seed)
        ctx.states, ctx.options, ctx.output_mask, ctx.extras = states, options, output_mask, others
        return tuple(forward_of_function(backward_op, keyset, *args))

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> tuple[Any, ...]:
        # The gradients are functions of the incoming ones, input, states and parameters; what the forward saved is an
        # intermediate result of those, and a derivative through it as well would count the same path twice.
        *grads, input = ctx.saved_tensors[:4]
        *tensors, sizes, sorted_indices, seed = ctx.saved_tensors[4:]
        given = [index for index, grad in enumerate(grad_grads) if grad is not None]
        present = [index for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return (None,) * (12 + len(tensors))
        _backend.fallback(OP, "double backward has no kernel")
        wanted = [index for index, asked in enumerate(ctx.output_mask) if asked]

        def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
            flowing: list[Tensor | None] = [None] * 3
            for index, grad in zip(present, primals, strict=False):
                flowing[index] = grad
            data, *others = primals[len(present) :]
            state, params = others[: ctx.states], others[ctx.states :]
            of_cells = reference.Options(*ctx.extras[1:])._replace(seed=seed)
            place = (sizes, sorted_indices, *ctx.options, ctx.extras[0], of_cells)
            found = reference.gradients(flowing, data, state, params, *place)
            return tuple(found[wanted[index]] for index in given)

        primals = (*(grads[index] for index in present), input, *tensors)
        pullback: Any = torch.func.vjp(gradients, *primals)[1]
        found = list(pullback(tuple(grad_grads[index] for index in given)))
        of_grads: list[Tensor | None] = [None] * 3
        for index in present:
            of_grads[index] = found.pop(0)
        return (None,) * 8 + (*of_grads, *found)


def _by_default(
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool = False,
    save: bool = False,
    recompute: bool = False,
    *extras: Any,
) -> tuple[int, str, str, bool, bool, Extras]:
    """What a call of the operator left out."""
    return batch_size, layout, mode, bidirectional, recompute, (*extras, *_NO_EXTRAS[len(extras) :])


def _autograd_rnn(
    keyset: Any,
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: list[Tensor] | None,
    params: list[Tensor],
    *options: Any,
) -> Results:
    state = [] if state is None else state  # which AOTInductor makes of an empty list
    batch_size, layout, mode, bidirectional, recompute, extras = _by_default(*options)
    place = (batch_size, layout, mode, bidirectional)
    tensors = (input, *state, *params)
    if has_tangent(*tensors):
        check_layer(OP, input, sizes, sorted_indices, state, params, *place, *extras)
        _backend.fallback(OP, FORWARD_MODE)
        others = (extras[0], reference.Options(*extras[1:]))
        output, h_n, c_n = reference.layer(input, sizes, sorted_indices, state, params, *place, *others)
        gates, cells = input.new_empty(0), input.new_empty(0, dtype=reference.compute_dtype(input.dtype))
        return output, h_n, c_n, gates, cells
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        result: Results = apply(
            _PackedRnn, keyset, sizes, sorted_indices, len(state), place, recompute, extras, *tensors
        )
    else:
        result = below_autograd(rnn_op, keyset, input, sizes, sorted_indices, state, params, *options)
    return result


def _autograd_backward(
    keyset: Any,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: list[Tensor],
    params: list[Tensor],
    *others: Any,
) -> list[Tensor]:
    output, gates, cells, batch_size, layout, mode, bidirectional, output_mask, *rest = others
    options = (batch_size, layout, mode, bidirectional)
    extras: Any = (*rest, *_NO_EXTRAS[len(rest) :])
    grads = (grad_output, grad_h_n, grad_c_n)
    differentiated = (*grads, input, *state, *params)
    if has_tangent(*differentiated):
        _backend.fallback(OP, FORWARD_MODE)
        found = reference.gradients(
            grads, input, state, params, sizes, sorted_indices, *options, extras[0], reference.Options(*extras[1:])
        )
        return [grad for grad, wanted in zip(found, output_mask, strict=True) if wanted]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*differentiated):
        head = ((output, gates, cells), sizes, sorted_indices, len(state), options, output_mask, extras)
        return list(apply(_PackedRnnBackward, keyset, *head, *differentiated))
    args = (*grads, input, sizes, sorted_indices, state, params, *others)
    result: list[Tensor] = below_autograd(backward_op, keyset, *args)
    return result


def autocast(device_type: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cast to the region's dtype, as autocast does for torch's own layers; float64 inputs are left alone."""
    if not tensors or tensors[0].dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [
        tensor.to(dtype) if tensor.is_floating_point() and tensor.device.type == device_type else tensor
        for tensor in tensors
    ]


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Results]:
    def kernel(
        input: Tensor,
        sizes: Tensor | None,
        sorted_indices: Tensor | None,
        state: list[Tensor],
        params: list[Tensor],
        *options: Any,
    ) -> Results:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            first, *others = autocast(device_type, (input, *state, *params))
            states, weights = others[: len(state)], others[len(state) :]
            result: Results = rnn_op(first, sizes, sorted_indices, states, weights, *options)
            return result

    return kernel


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::packed_rnn", _fake_rnn, lib=_library)
torch.library.register_fake("ptkernels::_packed_rnn_backward", _fake_backward, lib=_library)
dispatch.implement(_library, rnn_op, "ptkernels.ops.packed_rnn.triton", "rnn", "sees_through")
dispatch.implement(_library, backward_op, "ptkernels.ops.packed_rnn.triton", "rnn_backward", "sees_through")
_library.impl("packed_rnn", _autograd_rnn, "Autograd", with_keyset=True)
_library.impl("_packed_rnn_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("ptkernels::packed_rnn", batching.vmap_rnn, lib=_library)
torch.library.register_vmap("ptkernels::_packed_rnn_backward", batching.vmap_backward, lib=_library)
_library.impl("_packed_rnn_backward", batching.legacy_vmap_backward, "Batched")
_library.impl("packed_rnn", _autocast_kernel("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("packed_rnn", _autocast_kernel("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
