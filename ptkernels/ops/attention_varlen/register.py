"""What torch's subsystems need to know about ``ptkernels::attention_varlen`` beyond its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import Function, apply, below_autograd, forward_of_function, has_tangent, in_transform
from ptkernels._triton import dispatch
from ptkernels.ops.attention.options import Options, compute_dtype
from ptkernels.ops.attention.register import FORWARD_MODE, autocast
from ptkernels.ops.attention_varlen import batching, reference
from ptkernels.ops.attention_varlen.checks import OP, check_inputs
from ptkernels.ops.attention_varlen.library import varlen_backward_op, varlen_op

Gradients = tuple[Tensor | None, ...]

# Positions: of the options among the forward's arguments; of output_mask and the options among the backward's.
_OPTIONS, _OUTPUT_MASK, _BACKWARD_OPTIONS = 7, 11, 12


# Among the options: the places of those that have a gradient.
_LEARNED = tuple(map(Options._fields.index, ("alibi_slopes", "sinks", "relative_bias")))


def _tensors(options: Options) -> tuple[Tensor | None, ...]:
    return (*options.learned, options.dropout_seed)


def _with_tensors(options: Options, tensors: Sequence[Tensor | None] = (None,) * 4) -> Options:
    slopes, sinks, relative, seed = tensors
    return options._replace(alibi_slopes=slopes, sinks=sinks, relative_bias=relative, dropout_seed=seed)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    query, _, value = args[:3]
    options = Options(*args[_OPTIONS:])
    check_inputs(*args[:_OPTIONS], options=options)
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.size(2))
    return out, query.new_empty(heads, tokens, dtype=compute_dtype(query.dtype))


def _fake_backward(*args: Any) -> Gradients:
    query, options, wanted = args[2], Options(*args[_BACKWARD_OPTIONS:]), args[_OUTPUT_MASK]
    check_inputs(*args[2:5], *args[7:_OUTPUT_MASK], options=options)
    found = [(tensor, tensor.dtype) for tensor in args[2:5]]
    found += [(tensor, compute_dtype(query.dtype)) for tensor in options.learned]
    return tuple(
        tensor.new_empty(tensor.shape, dtype=dtype) if needed and tensor is not None else None
        for (tensor, dtype), needed in zip(found, wanted, strict=True)
    )


class _Varlen(Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward_of_function(varlen_op, keyset, *args)
        ctx.set_materialize_grads(False)
        options = Options(*args[_OPTIONS:])
        ctx.save_for_backward(*args[:5], out, lse, *_tensors(options))
        ctx.lengths, ctx.options = args[5:7], _with_tensors(options)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return (None,) * len(needed)
        query, key, value, cu_seqlens_q, cu_seqlens_k, out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = out.new_zeros(()).expand_as(out)
        options = _with_tensors(ctx.options, tensors)
        # The keyset comes first among the inputs.
        wanted = [*needed[1:4], *(needed[_OPTIONS + 1 + place] for place in _LEARNED)]
        args = (grad_out, grad_lse, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.lengths, wanted)
        if torch.is_grad_enabled() or in_transform() or torch.compiler.is_compiling():
            grads = varlen_backward_op(*args, *options.packed)
        else:
            grads = below_autograd(varlen_backward_op, None, *args, *options.packed)
        found: dict[int, Tensor | None] = dict(zip((1, 2, 3), grads[:3], strict=True))
        found |= {_OPTIONS + 1 + place: grad for place, grad in zip(_LEARNED, grads[3:], strict=True)}
        return tuple(found.get(at) for at in range(len(needed)))


class _VarlenBackward(Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Gradients:
        ctx.set_materialize_grads(False)
        options = Options(*args[_BACKWARD_OPTIONS:])
        ctx.save_for_backward(*args[:5], *args[7:9], *_tensors(options))
        ctx.longest, ctx.options = args[9], _with_tensors(options)
        grads: Gradients = forward_of_function(varlen_backward_op, keyset, *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # The gradients are functions of grad_out, grad_lse and the operands alone, not of out and lse as well.
        given = [index for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        _backend.fallback(OP, "double backward has no kernel")
        operands, packing = ctx.saved_tensors[:5], (*ctx.saved_tensors[5:7], ctx.longest)
        *learned, seed = ctx.saved_tensors[7:]
        learned_places = [_BACKWARD_OPTIONS + place for place in _LEARNED]
        saved = dict(enumerate(operands)) | dict(zip(learned_places, learned, strict=True))
        places = [at for at, tensor in saved.items() if tensor is not None]

        def gradients(*primals: Tensor) -> tuple[Any, ...]:
            now = saved | dict(zip(places, primals, strict=True))
            options = _with_tensors(ctx.options, [*(now[at] for at in learned_places), seed])
            results = reference.attention_varlen_gradients(*(now[at] for at in range(5)), *packing, options=options)
            return tuple(results[index] for index in given)

        pullback: Any = torch.func.vjp(gradients, *(saved[at] for at in places))[1]
        results = dict(zip(places, pullback(tuple(grads[index] for index in given)), strict=True))
        return (None, *(results.get(at) for at in range(len(ctx.needs_input_grad) - 1)))


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _autograd_forward(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    options = Options(*args[_OPTIONS:])
    args = (*args[:_OPTIONS], *options.packed)
    differentiable = (*args[:3], *options.learned)
    if has_tangent(*differentiable):
        check_inputs(*args[:_OPTIONS], options=options)
        _backend.fallback(OP, FORWARD_MODE)
        return reference.attention_varlen_with(*args[:6], options=options)
    if _needs_grad(*differentiable):
        result: tuple[Tensor, Tensor] = apply(_Varlen, keyset, *args)
    else:
        result = below_autograd(varlen_op, keyset, *args)
    return result


def _autograd_backward(keyset: Any, *args: Any) -> Gradients:
    options = Options(*args[_BACKWARD_OPTIONS:])
    args = (*args[:_BACKWARD_OPTIONS], *options.packed)
    differentiable = (*args[:5], *options.learned)
    if has_tangent(*differentiable):
        _backend.fallback(OP, FORWARD_MODE)
        results = reference.attention_varlen_gradients(*args[:5], *args[7:10], options=options)
        return tuple(grad if needed else None for grad, needed in zip(results, args[_OUTPUT_MASK], strict=True))
    if _needs_grad(*differentiable):
        result: Gradients = apply(_VarlenBackward, keyset, *args)
    else:
        result = below_autograd(varlen_backward_op, keyset, *args)
    return result


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Callable[..., tuple[Tensor, Tensor]]:
    def kernel(query: Tensor, key_: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            result: tuple[Tensor, Tensor] = varlen_op(*autocast(device_type, query, key_, value), *rest)
            return result

    return kernel


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::attention_varlen", _fake_forward, lib=_library)
torch.library.register_fake("ptkernels::_attention_varlen_backward", _fake_backward, lib=_library)
dispatch.implement(_library, varlen_op, "ptkernels.ops.attention_varlen.triton", "forward")
dispatch.implement(_library, varlen_backward_op, "ptkernels.ops.attention_varlen.triton", "backward")
_library.impl("attention_varlen", _autograd_forward, "Autograd", with_keyset=True)
_library.impl("_attention_varlen_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("ptkernels::attention_varlen", batching.vmap_forward, lib=_library)
torch.library.register_vmap("ptkernels::_attention_varlen_backward", batching.vmap_backward, lib=_library)
_library.impl("_attention_varlen_backward", batching.legacy_vmap_backward, "Batched")
_library.impl("attention_varlen", _autocast_kernel("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("attention_varlen", _autocast_kernel("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
