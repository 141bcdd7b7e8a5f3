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
from ptkernels.ops.attention.options import (
    OUTPUT_MASK,
    Options,
    backward_options,
    complete_backward,
    compute_dtype,
    is_triangle,
)

FORWARD_MODE = "forward-mode differentiation has no kernel"

Gradients = tuple[Tensor | None, ...]


def _heads_inside(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    """The kernels' layout: shape ``[batch, heads, length, dim]`` over memory ``[batch, length, heads, dim]``."""
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _fake_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any
) -> tuple[Tensor, Tensor]:
    check_op_inputs(query, key, value, attn_mask, Options(*options))
    batch, heads, length, _ = query.shape
    lse = query.new_empty(batch, heads, length, dtype=compute_dtype(query.dtype))
    return _heads_inside(query, batch, heads, length, value.size(-1)), lse


def _fake_backward(*args: Any) -> Gradients:
    args = complete_backward(args)
    _, _, query, key, value, _, _, attn_mask = args[:8]
    options, wanted = backward_options(args), [*args[OUTPUT_MASK], *(False,) * 4]
    check_backward_inputs(*args[:8], options=options)
    grads = [
        _heads_inside(t, *t.shape) if needed else None for t, needed in zip((query, key, value), wanted, strict=False)
    ]
    for tensor, needed in zip((attn_mask, *options.learned), wanted[3:], strict=False):
        dtype = compute_dtype(query.dtype)
        grads.append(tensor.new_empty(tensor.shape, dtype=dtype) if needed and tensor is not None else None)
    return tuple(grads)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any, keyset: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward_of_function(attention_op, keyset, query, key, value, attn_mask, *options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, lse, attn_mask, *options[2:5], *options[10:11])
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, out, lse, attn_mask, *others = ctx.saved_tensors
        if grad_out is None:
            grad_out = out.new_zeros(()).expand_as(out)
        needed = ctx.needs_input_grad
        # Before the first option beyond torch's own, at 7, there is nothing else to say.
        wanted = needed[1:4]
        if needed[4] or len(needed) > 7:
            wanted = (*needed[1:5], *(*needed[7:9], False, False)[:2], *needed[15:16])
        given = (*ctx.options, *Options()[len(ctx.options) : 2])
        args = (grad_out, grad_lse, query, key, value, out, lse, attn_mask, *given[:2], wanted)
        args = (*args, *others[:3], *given[5:10], *others[3:], *given[11:])
        if torch.is_grad_enabled() or in_transform() or torch.compiler.is_compiling():
            grads = backward_op(*args)
        else:
            grads = below_autograd(backward_op, None, *args)
        grad_mask = None if grads[3] is None else grads[3].to(attn_mask.dtype)
        every = (None, *grads[:3], grad_mask, None, None, *grads[4:6], *(None,) * 6, grads[6], None)
        return every[: len(needed)]


class _AttentionBackward(Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Gradients:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:5], args[7], *args[11:14], args[19])
        ctx.options = backward_options(args)
        grads: Gradients = forward_of_function(backward_op, keyset, *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # The gradients are functions of grad_out, grad_lse and the operands alone: out and lse are intermediate
        # results of those, and a derivative through them as well would count the same path twice.
        given = [index for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        _backend.fallback(OP, "double backward has no kernel")
        *operands, attn_mask, slopes, sinks, seed, relative = ctx.saved_tensors
        saved = {0: operands[0], 1: operands[1], 2: operands[2], 3: operands[3], 4: operands[4]}
        saved |= {7: attn_mask, 11: slopes, 12: sinks, 19: relative}
        # Positions among the arguments of what a derivative can be taken of.
        places = [at for at, t in saved.items() if t is not None and t.is_floating_point()]

        def gradients(*primals: Tensor) -> tuple[Any, ...]:
            now = saved | dict(zip(places, primals, strict=True))
            options = ctx.options._replace(
                alibi_slopes=now[11], sinks=now[12], dropout_seed=seed, relative_bias=now[19]
            )
            results = reference.attention_gradients(*(now[at] for at in (0, 1, 2, 3, 4, 7)), options=options)
            return tuple(results[index] for index in given)

        pullback: Any = torch.func.vjp(gradients, *(saved[at] for at in places))[1]
        results = dict(zip(places, pullback(tuple(grads[index] for index in given)), strict=True))
        return (None, *(results.get(at) for at in range(len(ctx.needs_input_grad) - 1)))


def uncovered(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Options) -> str | None:
    """Why a derivative that this call needs is beyond the kernels, or None where they cover it."""
    return FORWARD_MODE if has_tangent(query, key, value, attn_mask, *options.learned) else None


def _autograd_attention(
    keyset: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *options: Any
) -> tuple[Tensor, Tensor]:
    full = Options(*options)
    if reason := uncovered(query, key, value, attn_mask, full):
        check_op_inputs(query, key, value, attn_mask, full)
        _backend.fallback(OP, reason)
        return reference.attention_with(query, key, value, attn_mask, full)
    differentiable = (query, key, value, attn_mask, *full.learned)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in differentiable):
        result: tuple[Tensor, Tensor] = apply(_Attention, keyset, query, key, value, attn_mask, *options)
    else:
        result = below_autograd(attention_op, keyset, query, key, value, attn_mask, *options)
    return result


def record(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """Call the operator where a gradient will be needed, outside functorch transforms and forward-mode levels.

    Unless something above autograd wants to see the call, it is recorded without the dispatcher's detour through
    :func:`_autograd_attention`, which does the same.
    """
    seen_above = torch._C._is_any_autocast_enabled() or has_torch_function((query, key, value, attn_mask))
    if seen_above:
        result: tuple[Tensor, Tensor] = attention_op(query, key, value, attn_mask, *options)
    else:
        result = _Attention.apply(None, query, key, value, attn_mask, *options)  # type: ignore[attr-defined]
    return result


def _autograd_backward(keyset: Any, *args: Any) -> Gradients:
    args = complete_backward(args)
    options = backward_options(args)
    differentiated = (*args[:5], args[7], *options.learned)
    if has_tangent(*differentiated):
        _backend.fallback(OP, FORWARD_MODE)
        results = reference.attention_gradients(*(args[at] for at in (0, 1, 2, 3, 4, 7)), options=options)
        wanted = (*args[OUTPUT_MASK], *(False,) * 4)
        return tuple(grad if needed else None for grad, needed in zip(results, wanted, strict=False))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiated):
        result: Gradients = apply(_AttentionBackward, keyset, *args)
    else:
        result = below_autograd(backward_op, keyset, *args)
    return result


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
    if is_triangle(tensors[3]):
        return (*autocast_if_enabled(*tensors[:3], None)[:3], tensors[3])
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
