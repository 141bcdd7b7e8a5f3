"""What torch's subsystems need to know about ``ptkernels::quantized_linear`` beyond its kernels.

The product is linear in its input, so each of the two operators is the other's derivative, to any order. Where the
input is quantized, derivatives are those of the product with the input itself (the straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import Function, apply, below_autograd, forward_of_function, has_tangent
from ptkernels._triton import dispatch
from ptkernels.ops.quantized_matmul import reference
from ptkernels.ops.quantized_matmul.checks import check_op_inputs
from ptkernels.ops.quantized_matmul.formats import dequantize
from ptkernels.ops.quantized_matmul.library import LinearArguments, backward_op, linear_op
from ptkernels.ops.quantized_matmul.weight import OP

FORWARD_MODE = "forward-mode differentiation has no kernel"


def _fake_linear(*args: Any, **kwargs: Any) -> Tensor:
    given = LinearArguments(*args, **kwargs)
    x, codes, counts = given.input, given.codes, given.counts
    check_op_inputs("input", x, codes, given.scales, given.code_format, given.group_size, x.size(1))
    rows = codes.size(0) if counts is None else codes.size(0) // counts.size(0)
    columns = rows // 2 if given.activation == "swiglu" else rows
    return x.new_empty(x.size(0), columns, dtype=given.out_dtype or x.dtype)


def _fake_backward(
    grad_out: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code_format: str,
    group_size: int,
    in_features: int,
    counts: Tensor | None = None,
) -> Tensor:
    check_op_inputs("grad_out", grad_out, codes, scales, code_format, group_size, in_features)
    return grad_out.new_empty(grad_out.size(0), in_features)


class _Linear(Function):
    """The operator without an activation."""

    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        input: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        code_format: str,
        group_size: int,
        quantize_input: bool,
        input_scale: Tensor | None,
        out_dtype: torch.dtype | None,
        counts: Tensor | None,
    ) -> Tensor:
        args = (input, codes, scales, zeros, bias, residual, code_format, group_size, quantize_input, input_scale)
        ctx.save_for_backward(codes, scales, zeros, counts)
        ctx.options = (code_format, group_size, input.size(1))
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (input, bias, residual))
        out: Tensor = forward_of_function(linear_op, keyset, *args, "none", out_dtype, counts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input_dtype, bias_dtype, residual_dtype = ctx.dtypes
        grad_input = grad_bias = grad_residual = None
        *weight, counts = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            grad_input = backward_op(grad, *weight, *ctx.options, counts).to(input_dtype)
        if ctx.needs_input_grad[5]:
            grad_bias = _sum_rows(grad, counts).to(bias_dtype)
        if ctx.needs_input_grad[6]:
            grad_residual = grad.to(residual_dtype)
        return None, grad_input, None, None, None, grad_bias, grad_residual, *(None,) * 6


def _sum_rows(grad: Tensor, counts: Tensor | None) -> Tensor:
    """Gradient of the bias: sums over all rows, or over each expert's."""
    wide = reference.compute_dtype(grad.dtype)
    if counts is None:
        return grad.sum(0, dtype=wide)
    expert = torch.repeat_interleave(counts, output_size=grad.size(0)).to(grad.device)
    return grad.new_zeros(counts.size(0), grad.size(1), dtype=wide).index_add(0, expert, grad.to(wide)).flatten()


class _LinearBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        grad_out: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        code_format: str,
        group_size: int,
        in_features: int,
        counts: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(codes, scales, zeros, counts)
        ctx.options = (code_format, group_size)
        args = (grad_out, codes, scales, zeros, code_format, group_size, in_features, counts)
        grad_input: Tensor = forward_of_function(backward_op, keyset, *args)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, scales, zeros, counts = ctx.saved_tensors
        grad_grad = linear_op(grad, codes, scales, zeros, None, None, *ctx.options, counts=counts)
        return None, grad_grad, *(None,) * 7


def _autograd_linear(
    keyset: Any,
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    code_format: str = "s8",
    group_size: int = -1,
    quantize_input: bool = False,
    input_scale: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    weight = (codes, scales, zeros)
    if has_tangent(input, bias, residual):
        _backend.fallback(OP, FORWARD_MODE)
        options: Any = (code_format, group_size, quantize_input, input_scale, activation, out_dtype, counts)
        return reference.product(input, *weight, bias, residual, *options)
    recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(
        *(tensor for tensor in (input, bias, residual) if tensor is not None)
    )
    options = (code_format, group_size, quantize_input, input_scale)
    if not recorded:
        args = (input, *weight, bias, residual, *options, activation, out_dtype, counts)
        out: Tensor = below_autograd(linear_op, keyset, *args)
        return out
    if activation == "none":
        recorded_out: Tensor = apply(_Linear, keyset, input, *weight, bias, residual, *options, out_dtype, counts)
        return recorded_out
    # The derivative needs what went into the activation, which a fused kernel does not keep.
    wide = reference.compute_dtype(input.dtype)
    sums: Tensor = apply(_Linear, keyset, input, *weight, bias, residual, *options, wide, counts)
    return reference.activate(sums, activation).to(input.dtype if out_dtype is None else out_dtype)


def _autograd_backward(
    keyset: Any,
    grad_out: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code_format: str,
    group_size: int,
    in_features: int,
    counts: Tensor | None = None,
) -> Tensor:
    if has_tangent(grad_out):
        _backend.fallback(OP, FORWARD_MODE)
        wide = reference.compute_dtype(grad_out.dtype)
        weight = dequantize(codes, scales, zeros, code_format, group_size, in_features, wide)
        rows = [grad_out.size(0)] if counts is None else counts.tolist()
        parts = zip(grad_out.to(wide).split(rows), weight.chunk(len(rows)), strict=True)
        return torch.cat([part @ matrix for part, matrix in parts]).to(grad_out.dtype)
    args = (grad_out, codes, scales, zeros, code_format, group_size, in_features, counts)
    if torch.is_grad_enabled() and grad_out.requires_grad:
        recorded: Tensor = apply(_LinearBackward, keyset, *args)
        return recorded
    out: Tensor = below_autograd(backward_op, keyset, *args)
    return out


def uncovered(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> str | None:
    """Why a derivative that this call needs is beyond the kernels, or None where they cover it."""
    return FORWARD_MODE if has_tangent(x, bias, residual) else None


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast does for torch's own linear layers: to the region's dtype, float64 not at all."""
    dtype = torch.get_autocast_dtype(device_type)
    if tensors[0] is None or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(
        tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor for tensor in tensors
    )


def autocast_if_enabled(*tensors: Any) -> tuple[Any, ...]:
    """Apply the enclosing autocast region, if any, to arguments that are not known to be tensors yet."""
    if not all(tensor is None or isinstance(tensor, Tensor) for tensor in tensors) or tensors[0] is None:
        return tensors
    device_type = tensors[0].device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    return autocast(device_type, *tensors)


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    def kernel(
        input: Tensor,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        *options: Any,
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            cast = autocast(device_type, input, bias, residual)
            result: Tensor = linear_op(cast[0], codes, scales, zeros, *cast[1:], *options)
            return result

    return kernel


def _mapped_first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _each(size: int, dims: tuple[Any, ...], args: tuple[Any, ...], op: Callable[..., Tensor]) -> tuple[Tensor, int]:
    """One call per index: what is left where the weight itself is mapped."""
    results = [
        op(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, dims, strict=True)))
        for index in range(size)
    ]
    return torch.stack(results), 0


def _vmap_linear(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    """The mapped dimension becomes rows of the input, so that one kernel call serves all of it."""
    size = info.batch_size
    dims = tuple(in_dims) + (None,) * (len(args) - len(in_dims))
    mapped = dict(enumerate(dims))
    grouped = len(args) > 12 and args[12] is not None
    if grouped or any(mapped.get(index) is not None for index in (1, 2, 3, 9)):
        return _each(size, dims, args, linear_op)
    padded = (*args, *(None,) * (6 - len(args)))
    input = _mapped_first(padded[0], mapped[0], size)
    bias, residual = padded[4], padded[5]
    rows = input.size(1)
    if residual is not None:
        residual = _mapped_first(residual, mapped[5], size)
    if mapped.get(4) is not None:
        shift = bias.movedim(mapped[4], 0).unsqueeze(1).expand(-1, rows, -1)
        wide = reference.compute_dtype(input.dtype)
        residual = shift if residual is None else shift.to(wide) + residual.to(wide)
        bias = None
    residual = None if residual is None else residual.flatten(0, 1)
    out = linear_op(input.flatten(0, 1), *padded[1:4], bias, residual, *args[6:])
    return out.unflatten(0, (size, rows)), 0


def _vmap_backward(info: Any, in_dims: tuple[Any, ...], grad_out: Tensor, *args: Any) -> tuple[Tensor, int]:
    grouped = len(args) > 6 and args[6] is not None
    if grouped or any(dim is not None for dim in in_dims[1:4]):
        return _each(info.batch_size, in_dims, (grad_out, *args), backward_op)
    grad = _mapped_first(grad_out, in_dims[0], info.batch_size)
    return backward_op(grad.flatten(0, 1), *args).unflatten(0, grad.shape[:2]), 0


def _fake_embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code_format: str,
    group_size: int,
    in_features: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(indices.size(0), in_features, dtype=out_dtype)


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::quantized_embedding", _fake_embedding, lib=_library)
torch.library.register_fake("ptkernels::quantized_linear", _fake_linear, lib=_library)
torch.library.register_fake("ptkernels::_quantized_linear_backward", _fake_backward, lib=_library)
dispatch.implement(_library, linear_op, "ptkernels.ops.quantized_matmul.triton", "linear")
dispatch.implement(_library, backward_op, "ptkernels.ops.quantized_matmul.triton", "linear_backward")
_library.impl("quantized_linear", _autograd_linear, "Autograd", with_keyset=True)
_library.impl("_quantized_linear_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("ptkernels::quantized_linear", _vmap_linear, lib=_library)
torch.library.register_vmap("ptkernels::_quantized_linear_backward", _vmap_backward, lib=_library)
_library.impl("quantized_linear", _autocast_kernel("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("quantized_linear", _autocast_kernel("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
