"""What torch's subsystems need to know about ``ptkernels::rotary_embedding`` beyond its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import Function, apply, below_autograd, forward_of_function, has_tangent, in_transform
from ptkernels._triton import dispatch
from ptkernels.ops.rotary_embedding import batching, reference
from ptkernels.ops.rotary_embedding.checks import OP, check_inputs
from ptkernels.ops.rotary_embedding.library import backward_op, rotary_op

FORWARD_MODE = "forward-mode differentiation has no kernel"

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_DEFAULTS = (None, None, None, False, 1e-6)
# Positions among the arguments of the operator, and of its backward, of what is differentiated.
_DIFFERENTIATED = (0, 1, 5, 6)
_DIFFERENTIATED_BACKWARD = (0, 1, 2, 3, 7, 8)


def complete(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of the operator, which dispatch cuts after the last that is not its default, in full."""
    return (*args, *_DEFAULTS[len(args) - 4 :])


def _empty(like: Tensor) -> Tensor:
    """The kernels' layout: shape ``[batch, heads, length, dim]`` over memory ``[batch, length, heads, dim]``."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _fake_rotary(*args: Any) -> tuple[Tensor, Tensor]:
    check_inputs(*args)
    return _empty(args[0]), _empty(args[1])


def _fake_backward(*args: Any) -> Gradients:
    grad_query, grad_key, *given, wanted = args
    check_inputs(*given)
    query, key, query_weight, key_weight = (given[at] for at in _DIFFERENTIATED)
    for name, grad, like in (("grad_query", grad_query, query), ("grad_key", grad_key, key)):
        if grad.shape != like.shape or grad.dtype != like.dtype:
            raise ValueError(
                f"{OP}: {name}: got {grad.dtype} of shape {list(grad.shape)}, expected that of the operand"
            )
    return (
        _empty(query) if wanted[0] else None,
        _empty(key) if wanted[1] else None,
        query_weight.new_empty(query_weight.shape) if wanted[2] else None,
        key_weight.new_empty(key_weight.shape) if wanted[3] else None,
    )


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        query, key = forward_of_function(rotary_op, keyset, *args)
        # A rotation is differentiated without its operand: only normalisation has one to save.
        kept = [args[at] if args[weight] is not None else None for at, weight in ((0, 5), (1, 6))]
        ctx.save_for_backward(*kept, *args[2:7])
        ctx.options = args[7:]
        return query, key

    @staticmethod
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
        needed = [ctx.needs_input_grad[1 + at] for at in _DIFFERENTIATED]
        query, key, *others = ctx.saved_tensors
        operands = (grad_query if query is None else query, grad_key if key is None else key)
        args = (grad_query, grad_key, *operands, *others, *ctx.options, needed)
        grads: Gradients
        if torch.is_grad_enabled() or in_transform() or torch.compiler.is_compiling():
            grads = backward_op(*args)
        else:
            grads = below_autograd(backward_op, None, *args)
        return (None, *grads[:2], None, None, None, *grads[2:], None, None)


class _RotaryBackward(Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Gradients:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:9])
        ctx.options = args[9:11]
        grads: Gradients = forward_of_function(backward_op, keyset, *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = [index for index, grad in enumerate(grads) if grad is not None]
        if not given:
            return (None,) * 13
        _backend.fallback(OP, "double backward has no kernel")
        saved = ctx.saved_tensors
        places = [at for at in _DIFFERENTIATED_BACKWARD if saved[at] is not None]

        def gradients(*primals: Tensor) -> tuple[Any, ...]:
            now = list(saved)
            for at, primal in zip(places, primals, strict=True):
                now[at] = primal
            results = reference.gradients(*now, *ctx.options)
            return tuple(results[index] for index in given)

        pullback: Any = torch.func.vjp(gradients, *(saved[at] for at in places))[1]
        results = dict(zip(places, pullback(tuple(grads[index] for index in given)), strict=True))
        return (None, *(results.get(at) for at in range(12)))


def _autograd_rotary(keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
    args = complete(args)
    differentiated = [args[at] for at in _DIFFERENTIATED]
    if has_tangent(*differentiated):
        check_inputs(*args)
        _backend.fallback(OP, FORWARD_MODE)
        return compose(*args)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*differentiated):
        result: tuple[Tensor, Tensor] = apply(_Rotary, keyset, *args)
    else:
        result = below_autograd(rotary_op, keyset, *args)
    return result


def compose(*args: Any) -> tuple[Tensor, Tensor]:
    """The reference on the operator's arguments."""
    names = ("positions", "query_norm_weight", "key_norm_weight", "interleaved", "norm_eps")
    return reference.rotary_embedding(*args[:4], **dict(zip(names, args[4:], strict=True)))


def _autograd_backward(keyset: Any, *args: Any) -> Gradients:
    differentiated = [args[at] for at in _DIFFERENTIATED_BACKWARD]
    if has_tangent(*differentiated):
        _backend.fallback(OP, FORWARD_MODE)
        found = reference.gradients(*args[:11])
        grads = [grad if wanted else None for grad, wanted in zip(found, args[11], strict=True)]
        return grads[0], grads[1], grads[2], grads[3]
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*differentiated):
        result: Gradients = apply(_RotaryBackward, keyset, *args)
    else:
        result = below_autograd(backward_op, keyset, *args)
    return result


def autocast(device_type: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Cast queries, keys and weights to the region's dtype, as they come from its projections; angles stay."""
    dtype = torch.get_autocast_dtype(device_type)

    def cast(value: Any) -> Any:
        eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible and value.device.type == device_type else value

    return tuple(cast(value) if index in _DIFFERENTIATED else value for index, value in enumerate(args))


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
            return rotary_op(*autocast(device_type, args))

    return kernel


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::rotary_embedding", _fake_rotary, lib=_library)
torch.library.register_fake("ptkernels::_rotary_embedding_backward", _fake_backward, lib=_library)
dispatch.implement(_library, rotary_op, "ptkernels.ops.rotary_embedding.triton", "rotary_embedding")
dispatch.implement(_library, backward_op, "ptkernels.ops.rotary_embedding.triton", "rotary_embedding_backward")
_library.impl("rotary_embedding", _autograd_rotary, "Autograd", with_keyset=True)
_library.impl("_rotary_embedding_backward", _autograd_backward, "Autograd", with_keyset=True)
torch.library.register_vmap("ptkernels::rotary_embedding", batching.vmap_forward, lib=_library)
torch.library.register_vmap("ptkernels::_rotary_embedding_backward", batching.vmap_backward, lib=_library)
_library.impl("_rotary_embedding_backward", batching.legacy_vmap_backward, "Batched")
_library.impl("rotary_embedding", _autocast_kernel("cpu", torch._C.DispatchKey.AutocastCPU), "AutocastCPU")
_library.impl("rotary_embedding", _autocast_kernel("cuda", torch._C.DispatchKey.AutocastCUDA), "AutocastCUDA")
