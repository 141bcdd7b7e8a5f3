"""What torch's subsystems need to know about the operators on a cache beyond their kernels.

They are for inference: no derivative is defined, and a call that would need one is refused, never cut off silently.
Autograd sits in front for that, and to count the versions of the tensors that appending changes. Autocast leaves the
operators alone: a cache has the dtype that it was made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ptkernels._autograd import below_autograd, has_tangent
from ptkernels._triton import dispatch
from ptkernels.ops.attention.options import compute_dtype
from ptkernels.ops.attention_kv_cache.checks import OP, check_inputs
from ptkernels.ops.attention_kv_cache.library import append_op, attend_op

Result = tuple[Tensor, Tensor]


def _empty_results(query: Tensor, v_cache: Tensor) -> Result:
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, v_cache.size(3)).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=compute_dtype(query.dtype))


def _fake_attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Result:
    check_inputs(
        query,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return _empty_results(query, v_cache)


def _fake_append(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Result:
    check_inputs(
        query,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        block_table=block_table,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return _empty_results(query, v_cache)


def refuse_derivatives(named: Sequence[tuple[str, Any]]) -> None:
    """Raise where a result would have to be differentiated.

    Raises:
        RuntimeError: gradients are recorded and a tensor requires grad, or forward-mode differentiation goes through.
    """
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            continue
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"{OP}: {name}: got a tensor that requires grad, expected none (the operator is for inference): "
                f"call it under torch.no_grad() or pass {name}.detach()"
            )
        if has_tangent(tensor):
            raise RuntimeError(
                f"{OP}: {name}: got a tensor with a tangent, expected none (the operator is for inference)"
            )


def count_versions(*written: Tensor | None) -> None:
    """Tell autograd that tensors have changed, as built-in in-place operators do."""
    for tensor in written:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


_ATTEND_NAMES = tuple(argument.name for argument in attend_op._schema.arguments)
_APPEND_NAMES = tuple(argument.name for argument in append_op._schema.arguments)


def _may_need_derivatives(*args: Any) -> bool:
    """A look at all arguments at once, which is what most calls pay."""
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))


def _autograd_attend(keyset: Any, *args: Any) -> Result:
    if _may_need_derivatives(*args):
        refuse_derivatives(tuple(zip(_ATTEND_NAMES, args, strict=False)))
    result: Result = below_autograd(attend_op, keyset, *args)
    return result


def _autograd_append(keyset: Any, *args: Any) -> Result:
    if _may_need_derivatives(*args):
        refuse_derivatives(tuple(zip(_APPEND_NAMES, args, strict=False)))
    result: Result = below_autograd(append_op, keyset, *args)
    scales = args[_APPEND_NAMES.index("k_scale") :]
    count_versions(args[1], args[2], *(scale for scale in scales if scale is not None and scale.dim() == 3))
    return result


_library = torch.library.Library("ptkernels", "FRAGMENT")
torch.library.register_fake("ptkernels::attention_with_kv_cache", _fake_attend, lib=_library)
torch.library.register_fake("ptkernels::attention_with_kv_cache_append", _fake_append, lib=_library)
dispatch.implement(_library, attend_op, "ptkernels.ops.attention_kv_cache.triton", "attend")
dispatch.implement(_library, append_op, "ptkernels.ops.attention_kv_cache.triton", "append_and_attend")
_library.impl("attention_with_kv_cache", _autograd_attend, "Autograd", with_keyset=True)
_library.impl("attention_with_kv_cache_append", _autograd_append, "Autograd", with_keyset=True)
