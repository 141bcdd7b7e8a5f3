"""What torch's subsystems need to know about ``ptkernels::conv_bn_relu`` beyond its kernels.

The operator is pure: running statistics are updated by the public function, from the mean and variance it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import Function, apply, below_autograd, forward_of_function, has_tangent, in_transform
from ptkernels._triton import dispatch
from ptkernels.ops.conv_bn_relu import batching, reference
from ptkernels.ops.conv_bn_relu.checks import check_backward_inputs, check_op_inputs
from ptkernels.ops.conv_bn_relu.library import backward_op, conv_op
from ptkernels.ops.conv_bn_relu.variant import Variant, complete_backward, complete_forward

FORWARD_MODE = "forward-mode differentiation has no kernel"

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

# Positions in the operator's arguments of what is differentiated: all but the running statistics.
_DIFFERENTIATED = (0, 1, 2, 3, 4, 7)
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(tensor: Tensor) -> bool:
    """As the kernels decide the layout of results."""
    memory_format = _FORMATS.get(tensor.dim())
    if memory_format is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=memory_format)


def _empty(like: Tensor, shape: Any, channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    batch, channels, *space = shape
    dense = like.new_empty(batch, *space, channels)
    return dense.movedim(-1, 1)


def _fake_conv(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = complete_forward(args)
    input, training, save_conv, variant = args[0], args[8], args[16], Variant(*args[17:])
    shape = check_op_inputs(*(*args[:16], variant))
    out = _empty(input, shape, _is_channels_last(input))
    wide = reference.compute_dtype(input.dtype)
    size = [shape[1] if training else 0]
    if variant.num_groups:
        size = [shape[0], shape[1] if variant.num_groups == -1 else variant.num_groups]
    vector = [input.new_empty(size, dtype=wide) for _ in range(2)]
    is_plain = not (variant.transposed or variant.num_groups) and variant.pre_activation == "none"
    rows = not (is_plain and _keeps_planes(input, args[1], shape, args[10], args[11], args[13]))
    conv = _empty(input, shape, rows) if save_conv else input.new_empty(0, dtype=wide)
    return out, conv, vector[0], vector[1]


def _keeps_planes(
    input: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> bool:
    """Whether the convolution's result is channels-first: the rule of ``conv_layout()`` in ``conv_bn_relu.h``."""
    if input.device.type != "cpu" or _is_channels_last(input) or any(number != 1 for number in stride):
        return False
    size, taps = math.prod(shape[2:]), math.prod(weight.shape[2:])
    if groups == 1:
        return taps == 1 and size > 1 and size == math.prod(input.shape[2:])
    is_flat = len(shape) < 5 or (input.size(2) == 1 and weight.size(2) == 1 and padding[0] == 0)
    return groups == input.size(1) == shape[1] and is_flat and size >= 196


def _fake_backward(*args: Any) -> Gradients:
    args = complete_backward(args)
    grad_out, *tensors, conv, training = args[:11]
    *options, needed = args[11:19]
    input, weight, bias, bn_weight, bn_bias, _, _, residual = tensors
    variant = Variant(*args[19:])
    # Statistics of images, which are no running ones, have a shape of their own.
    given = (*tensors[:5], None, None, residual) if variant.num_groups else tensors
    shape = check_op_inputs(*(*given, training, *options, variant))
    check_backward_inputs(variant.op, grad_out, conv, shape, input)
    channels_last = _is_channels_last(input)

    def vector(like: Tensor | None, wanted: bool) -> Tensor | None:
        return like.new_empty(shape[1]) if wanted and like is not None else None

    return (
        _empty(input, input.shape, channels_last) if needed[0] else None,
        weight.new_empty(weight.shape) if needed[1] else None,
        vector(bias, needed[2]),
        vector(bn_weight, needed[3]),
        vector(bn_bias, needed[4]),
        _empty(input, shape, channels_last) if needed[5] else None,
    )


class _Call(NamedTuple):
    """What a call has beside its tensors, in one object: a Function pays for each of its arguments."""

    keyset: Any
    save_conv: bool
    training: bool
    options: tuple[Any, ...]
    """From eps to negative_slope, as both operators take them."""
    variant: tuple[Any, ...]
    beside: list[Tensor]
    """Filled with what the operator returns beside the result, which has no derivative."""


class _ConvBNReLU(Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> Tensor:
        results: tuple[Tensor, Tensor, Tensor, Tensor] = forward_of_function(
            conv_op, call.keyset, *tensors, call.training, *call.options, call.save_conv, *call.variant
        )
        out, conv, mean, var = results
        call.beside.extend((conv, mean, var))
        ctx.set_materialize_grads(False)
        ctx.call = call
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual = tensors
        if call.training or call.variant[2]:  # num_groups
            running_mean, running_var = mean, var
        kept = conv if call.save_conv else None
        ctx.save_for_backward(
            input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, kept
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 9
        call, needs = ctx.call, ctx.needs_input_grad
        needed = [*needs[1:6], needs[8]]
        args = (grad_out, *ctx.saved_tensors, call.training, *call.options, needed, *call.variant)
        grads: Gradients
        if torch.is_grad_enabled() or in_transform() or torch.compiler.is_compiling():
            grads = backward_op(*args)
        else:
            grads = below_autograd(backward_op, None, *args)
        return (None, *grads[:5], None, None, grads[5])


class _ConvBNReLUBackward(Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Gradients:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:9])
        ctx.training, ctx.options, ctx.variant, ctx.arguments = args[10], args[11:18], Variant(*args[19:]), len(args)
        grads: Gradients = forward_of_function(backward_op, keyset, *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # The gradients are functions of grad_out and the operands alone: statistics of the batch and the convolution
        # are intermediate results, and a derivative through them as well would count the same path twice.
        given = [index for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return tuple(None for _ in range(1 + ctx.arguments))
        _backend.fallback(ctx.variant.op, "double backward has no kernel")
        grad_out, *operands, mean, var, residual = ctx.saved_tensors
        tensors = (*operands, residual)
        fixed = (None, None) if ctx.training or ctx.variant.num_groups else (mean, var)
        present = [index for index, tensor in enumerate(tensors) if tensor is not None]

        def gradients(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            full: list[Tensor | None] = list(tensors)
            for index, value in zip(present, values, strict=True):
                full[index] = value
            results = reference.gradients(grad, tuple(full), fixed, (ctx.training, *ctx.options, *ctx.variant))
            return tuple(results[index] for index in given)  # type: ignore[misc]

        primals = (grad_out, *(tensors[index] for index in present))
        pullback: Any = torch.func.vjp(gradients, *primals)[1]
        grad_grad_out, *found = pullback(tuple(grads[index] for index in given))
        second = dict(zip(present, found, strict=True))
        operand_grads = [second.get(index) for index in range(5)]
        tail = (None,) * (ctx.arguments - 9)
        return (None, grad_grad_out, *operand_grads, None, None, second.get(5), *tail)


def needs_conv(args: tuple[Any, ...], variant: Variant) -> bool:
    """Whether the backward looks at the convolution's result: a convolution alone passes its gradient on as it is."""
    return (
        args[14] != "none" or args[8] is True or args[5] is not None or args[7] is not None or variant.num_groups != 0
    )


def record(args: tuple[Any, ...], save_conv: bool, variant: Variant) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator with a derivative, for plain tensors outside of any transform; arguments as it takes them.

    Where autocast has nothing to do, what the dispatcher would call is called: it would turn every argument into
    Python's and back once more.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    if torch.is_autocast_enabled(args[0].device.type):
        result = conv_op(*args, save_conv, *variant)
    else:
        result = _recorded(None, args, save_conv, variant)
    return result


def _recorded(
    keyset: Any, args: tuple[Any, ...], save_conv: bool, variant: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _Call(keyset, save_conv, args[8], args[9:16], variant, [])
    out = apply(_ConvBNReLU, call, *args[:8])
    conv, mean, var = call.beside
    return out, conv, mean, var


def _autograd_conv(keyset: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = complete_forward(args)
    args, save_conv, variant = args[:16], bool(args[16]), Variant(*args[17:])
    differentiated = [args[index] for index in _DIFFERENTIATED]
    if has_tangent(*differentiated):
        check_op_inputs(*(*args, variant))
        _backend.fallback(variant.op, FORWARD_MODE)
        out, z, mean, var = reference.forward(*args, *variant)
        none = z.new_empty(0)
        conv = z.to(args[0].dtype).detach() if save_conv else none
        measures = args[8] or variant.num_groups
        return out, conv, *((mean, var) if measures and mean is not None and var is not None else (none, none.clone()))
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*differentiated):
        result = _recorded(keyset, args, save_conv, variant)
    else:
        result = below_autograd(conv_op, keyset, *args, save_conv, *variant)
    return result


def _autograd_backward(keyset: Any, *args: Any) -> Gradients:
    args = complete_backward(args)
    grad_out, *operands = args[:6]
    mean, var, residual, _, training, *options, needed = args[6:19]
    variant = Variant(*args[19:])
    differentiated = (grad_out, *operands, residual)
    if has_tangent(*differentiated):
        _backend.fallback(variant.op, FORWARD_MODE)
        fixed = (None, None) if training or variant.num_groups else (mean, var)
        found = reference.gradients(grad_out, (*operands, residual), fixed, (training, *options, *variant))
        grads = [grad if wanted else None for grad, wanted in zip(found, needed, strict=True)]
        return grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*differentiated):
        result: Gradients = apply(_ConvBNReLUBackward, keyset, *args)
    else:
        result = below_autograd(backward_op, keyset, *args)
    return result


def autocast(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast as autocast does for torch's convolutions; vectors of the normalisation keep their precision."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    return tuple(cast(value) if index in (0, 1, 2, 7) else value for index, value in enumerate(args))


def autocast_if_enabled(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Apply the enclosing autocast region, if any, to arguments that are not known to be tensors yet."""
    if not isinstance(args[0], Tensor):
        return args
    device_type = args[0].device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return args
    return autocast(device_type, args)


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return conv_op(*autocast(device_type, args))

    return kernel


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::conv_bn_relu", _fake_conv, lib=_library)
torch.library.register_fake("ptkernels::_conv_bn_relu_backward", _fake_backward, lib=_library)
dispatch.implement(_library, conv_op, "ptkernels.ops.conv_bn_relu.triton", "conv_bn_relu")
dispatch.implement(_library, backward_op, "ptkernels.ops.conv_bn_relu.triton", "conv_bn_relu_backward")
_library.impl("conv_bn_relu", _autograd_conv, "Autograd", with_keyset=True)
_library.impl("_conv_bn_relu_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("ptkernels::conv_bn_relu", batching.vmap_conv, lib=_library)
torch.library.register_vmap("ptkernels::_conv_bn_relu_backward", batching.vmap_backward, lib=_library)
_library.impl("_conv_bn_relu_backward", batching.legacy_vmap_backward, "Batched")
_library.impl("conv_bn_relu", _autocast_kernel("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("conv_bn_relu", _autocast_kernel("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
