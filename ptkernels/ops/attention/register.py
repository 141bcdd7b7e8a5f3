"""What torch's subsystems need to know about ``ptkernels::attention`` beyond its kernels.

Autograd is registered by hand: the kernel that ``torch.library.register_autograd`` generates refuses every functorch
transform and drops forward-mode tangents of inputs that do not require grad. The autocast kernels are written by hand
because ``torch.library.register_autocast`` casts to one fixed dtype instead of the region's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from ptkernels import _backend
from ptkernels._autograd import Function, apply, below_autograd, forward_of_function, has_tangent, in_transform
from ptkernels.ops.attention import batching, reference
from ptkernels.ops.attention.checks import OP, check_backward_inputs, check_op_inputs
from ptkernels.ops.attention.library import attention_op, backward_op

_FORWARD_MODE = "forward-mode differentiation has no kernel"

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _heads_inside(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """The kernels' layout: shape ``[batch, heads, length, dim]`` over memory ``[batch, length, heads, dim]``."""
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _fake_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    check_op_inputs(query, key, value, attn_mask, scale)
    batch, heads, length, _ = query.shape
    lse = query.new_empty(batch, heads, length, dtype=reference.compute_dtype(query.dtype))
    return _heads_inside(query, batch, heads, length, value.size(-1)), lse


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    check_backward_inputs(grad_out, grad_lse, query, key, value, out, lse, attn_mask, scale)
    inputs = (query, key, value)
    grads = [
        _heads_inside(tensor, *tensor.shape) if needed else None
        for tensor, needed in zip(inputs, output_mask, strict=True)
    ]
    return grads[0], grads[1], grads[2]


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward_of_function(attention_op, keyset, query, key, value, attn_mask, is_causal, scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, attn_mask)
        ctx.options = (is_causal, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        query, key, value, out, lse, attn_mask = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        if grad_out is None:
            grad_out = out.new_zeros(()).expand_as(out)
        needed = ctx.needs_input_grad[1:4]
        args = (grad_out, grad_lse, query, key, value, out, lse, attn_mask, *ctx.options, needed)
        if torch.is_grad_enabled() or in_transform() or torch.compiler.is_compiling():
            grads = backward_op(*args)
        else:
            grads = below_autograd(backward_op, None, *args)
        return (None, *grads, None, None, None)


class _AttentionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: Any,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        output_mask: tuple[bool, bool, bool],
    ) -> Gradients:
        args = (grad_out, grad_lse, query, key, value, out, lse, attn_mask, is_causal, scale, output_mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_out, grad_lse, query, key, value, attn_mask)
        ctx.options = (is_causal, scale)
        grads: Gradients = forward_of_function(backward_op, keyset, *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # The gradients are functions of grad_out, grad_lse, query, key and value alone: out and lse are intermediate
        # results of those, and a derivative through them as well would count the same path twice.
        given = [index for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return (None,) * 12
        _backend.fallback(OP, "double backward has no kernel")
        grad_out, grad_lse, query, key, value, attn_mask = ctx.saved_tensors

        def gradients(
            grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_lse: Tensor | None = None
        ) -> tuple[Tensor, ...]:
            results = reference.attention_gradients(grad_out, grad_lse, query, key, value, attn_mask, *ctx.options)
            return tuple(results[index] for index in given)

        primals = (grad_out, query, key, value, *(() if grad_lse is None else (grad_lse,)))
        pullback: Any = torch.func.vjp(gradients, *primals)[1]
        grad_grad_out, *grad_qkv, grad_grad_lse = (*pullback(tuple(grads[index] for index in given)), None)[:5]
        return (None, grad_grad_out, grad_grad_lse, *grad_qkv, *(None,) * 6)


def _autograd_attention(
    keyset: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    if reason := uncovered(query, key, value, attn_mask):
        check_op_inputs(query, key, value, attn_mask, scale)
        _backend.fallback(OP, reason)
        return reference.attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True, return_lse=True
        )
    if torch.is_grad_enabled() and torch._C._any_requires_grad(query, key, value):
        result: tuple[Tensor, Tensor] = apply(_Attention, keyset, query, key, value, attn_mask, is_causal, scale)
    else:
        result = below_autograd(attention_op, keyset, query, key, value, attn_mask, is_causal, scale)
    return result


def record(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Call the operator where a gradient will be needed, outside functorch transforms and forward-mode levels.

    Unless something above autograd wants to see the call, it is recorded without the dispatcher's detour through
    :func:`_autograd_attention`, which does the same.
    """
    seen_above = torch._C._is_any_autocast_enabled() or has_torch_function((query, key, value, attn_mask))
    if seen_above or (attn_mask is not None and attn_mask.requires_grad):
        result: tuple[Tensor, Tensor] = attention_op(query, key, value, attn_mask, is_causal, scale)
    else:
        result = _Attention.apply(None, query, key, value, attn_mask, is_causal, scale)  # type: ignore[attr-defined]
    return result


def _autograd_backward(
    keyset: Any,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    output_mask: tuple[bool, bool, bool] = (True, True, True),
) -> Gradients:
    differentiated = (grad_out, grad_lse, query, key, value)
    if has_tangent(*differentiated):
        _backend.fallback(OP, _FORWARD_MODE)
        results = reference.attention_gradients(*differentiated, attn_mask, is_causal, scale)
        grads = [grad if needed else None for grad, needed in zip(results, output_mask, strict=True)]
        return grads[0], grads[1], grads[2]
    args = (*differentiated, out, lse, attn_mask, is_causal, scale, output_mask)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*differentiated):
        result: Gradients = apply(_AttentionBackward, keyset, *args)
    else:
        result = below_autograd(backward_op, keyset, *args)
    return result


def uncovered(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why a derivative that this call needs is beyond the kernels, or None where they cover it."""
    if attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled():
        return "the gradient of attn_mask has no kernel"
    return _FORWARD_MODE if has_tangent(query, key, value, attn_mask) else None


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as autocast does for torch's own attention: floating tensors to the region's dtype, float64 not at all."""
    if tensors[0] is None or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.device.type == device_type
        else tensor
        for tensor in tensors
    )


def autocast_if_enabled(*tensors: Any) -> tuple[Any, ...]:
    """Apply the enclosing autocast region, if any, to arguments that are not known to be tensors yet."""
    if not all(isinstance(tensor, Tensor) or (index == 3 and tensor is None) for index, tensor in enumerate(tensors)):
        return tensors
    device_type = tensors[0].device.type
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return tensors
    return autocast(device_type, *tensors)


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Callable[..., tuple[Tensor, Tensor]]:
    def kernel(
        query: Tensor, key_: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            cast = autocast(device_type, query, key_, value, attn_mask)
            result: tuple[Tensor, Tensor] = attention_op(*cast, *options)
            return result

    return kernel


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::attention", _fake_attention, lib=_library)
torch.library.register_fake("ptkernels::_attention_backward", _fake_backward, lib=_library)
_library.impl("attention", _autograd_attention, "Autograd", with_keyset=True)
_library.impl("_attention_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("ptkernels::attention", batching.vmap_attention, lib=_library)
torch.library.register_vmap("ptkernels::_attention_backward", batching.vmap_backward, lib=_library)
_library.impl("_attention_backward", batching.legacy_vmap_backward, "Batched")
_library.impl("attention", _autocast_kernel("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("attention", _autocast_kernel("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
