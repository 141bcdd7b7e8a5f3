"""Fused scaled dot product attention with the semantics of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ptkernels._backend import state as _state
from ptkernels.ops.attention import checks, reference, register, routing, shapes
from ptkernels.ops.attention.library import attention_op

__all__ = ["attention"]

# The overload's own callable: one Python frame less than the overload.
_op = attention_op._op
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_in_transform = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Fused attention, ``softmax(scale * query @ key^T + attn_mask) @ value``, in memory linear in the lengths.

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention` with its argument order, plus ``return_lse``.

    Args:
        query: ``[..., Hq, Lq, D]``, float64, float32, bfloat16 or float16, with any strides and at least two
            dimensions. Leading dimensions broadcast as in ``torch.matmul``; without ``enable_gqa`` so do the heads.
        key: ``[..., Hkv, Lk, D]``, dtype and device of ``query``.
        value: ``[..., Hkv, Lk, Dv]``. ``D`` and ``Dv`` are 1 to 512 and may differ.
        attn_mask: broadcastable to the scores ``[..., Hq, Lq, Lk]``. Boolean, where True means attend, or added to
            the scaled scores, in the query's dtype or in float32. Default: no mask.
        dropout_p: probability of dropping a weight, applied whenever it is above 0: pass 0.0 in evaluation.
        is_causal: row ``i`` attends to keys ``j <= i`` only (aligned top left, also where ``Lq != Lk``). Together with
            ``attn_mask``, which torch refuses, both apply.
        scale: factor of the scores. Default: ``1 / sqrt(D)``.
        enable_gqa: let ``Hq / Hkv`` consecutive query heads share each key and value head. Without it, unequal head
            counts are an error unless they broadcast, that is unless one of them is 1.
        return_lse: also return the log-sum-exp of every row of masked scores.

    Returns:
        ``out`` of shape ``[..., Hq, Lq, Dv]`` in the query's dtype, laid out so that
        ``out.transpose(-3, -2).flatten(-2)`` copies nothing. With ``return_lse`` also ``lse``, of shape
        ``[..., Hq, Lq]``, natural logarithm, float32 (float64 for float64). Both are differentiable.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type attention does not take.
        ValueError: shapes, devices or numbers do not fit; the message names the argument.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.
        ptkernels.errors.BackendError: the backend asked for cannot run the call.

    Note:
        Rows with no key to attend to (all masked, or ``Lk == 0``) give out 0, lse -inf and zero gradients.

        Time is ``O(Lq * Lk * (D + Dv))`` per head, forward and backward; memory beyond the results is ``O(Lq + Lk)``.
        Softmax and every accumulation run in float32, in float64 for float64. Results do not depend on the number
        of threads. The algorithm is the online softmax of Milakov and Gimelshein (2018), tiled as in FlashAttention
        (Dao et al., 2022; Dao, 2023).

        Dropout, a mask that requires grad, double backward and forward-mode differentiation run on
        :func:`ptkernels.reference.attention` in ``O(Lq * Lk)`` memory, with a warning; so do devices without a kernel.
        ``ptkernels.explain(ptkernels.attention, ...)`` tells what a call will run on. Tensors on the meta device only
        have their shapes propagated.

    Example:
        >>> import torch, ptkernels as ptk
        >>> query, key, value = (torch.randn(2, 8, 100, 64) for _ in range(3))
        >>> ptk.attention(query, key, value, is_causal=True).shape
        torch.Size([2, 8, 100, 64])
        >>> out, lse = ptk.attention(query, key[:, :2], value[:, :2], enable_gqa=True, return_lse=True)
        >>> lse.shape
        torch.Size([2, 8, 100])
    """
    # The first attempt checks nothing that the operator checks itself. Whatever goes wrong in it is left to the second,
    # which handles every case and words every error.
    if not dropout_p and _state.backend is None and not _is_compiling():
        try:
            shape = query.shape
            if len(shape) == 4 and (enable_gqa or shape[1] == key.shape[1]):
                if _in_transform() or forward_ad._current_level >= 0:
                    result = _op(query, key, value, attn_mask, is_causal, scale)
                elif _is_grad_enabled() and (
                    query.requires_grad
                    or key.requires_grad
                    or value.requires_grad
                    or (attn_mask is not None and attn_mask.requires_grad)
                ):
                    result = register.record(query, key, value, attn_mask, is_causal, scale)
                else:
                    # Nothing to record: the autograd kernel, which is Python, would double the latency.
                    with _BelowAutograd():
                        result = _op(query, key, value, attn_mask, is_causal, scale)
                return result if return_lse else result[0]  # type: ignore[no-any-return]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # what bad arguments raise and no more: checkpointing, for one, stops a recomputation by an exception
    out, lse = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return (out, lse) if return_lse else out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor]:
    query, key, value, attn_mask = register.autocast_if_enabled(query, key, value, attn_mask)
    args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if dropout_p:
        checks.check_inputs(*args)
    try:
        if routing.runs_on_reference(query, key, value, attn_mask, dropout_p):
            checks.check_inputs(*args)
            # Autocast has been applied; inside the composition it would round the weights as well.
            with torch.autocast(query.device.type, enabled=False):
                return reference.attention(*args, return_lse=True)
        call = shapes.normalize(query, key, value, attn_mask, enable_gqa)
        if routing.runs_on_triton(query.device.type):
            return call.restore(*routing.triton_attention(*call[:4], is_causal, scale, dropout_p))
        return call.restore(*attention_op(call.query, call.key, call.value, call.attn_mask, is_causal, scale))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        checks.check_inputs(*args)
        raise
