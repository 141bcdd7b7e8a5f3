"""Fused scaled dot product attention with the semantics of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ptkernels._backend import state as _state
from ptkernels._distributed import is_distributed
from ptkernels.ops.attention import checks, reference, register, routing, shapes
from ptkernels.ops.attention.library import attention_op
from ptkernels.ops.attention.options import is_triangle, resolve

__all__ = ["attention"]

# The overload's own callable: one Python frame less than the overload.
_op = attention_op._op
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_in_transform = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state
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
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    mask_block_size: int = 1,
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
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    mask_block_size: int = 1,
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
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    mask_block_size: int = 1,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Fused attention, ``softmax(scale * query @ key^T + attn_mask) @ value``, in memory linear in the lengths.

    A drop-in for :func:`torch.nn.functional.scaled_dot_product_attention` with its argument order, and with more:

    ``scores[i, j] = cap(scale * query[i] @ key[j]) - alibi_slope * |i + diagonal - j| + relative_bias[j - i + Lq - 1]
    + attn_mask[i, j]``, of which row ``i`` sees ``i + diagonal - left <= j <= i + diagonal + right``. ``diagonal`` is
    0, so that the first row is aligned with the first key, unless ``attn_mask`` is
    ``torch.nn.attention.bias.causal_lower_right``: then it is ``Lk - Lq``, so that the last row is aligned with the
    last key, as in FlashAttention-2.

    Args:
        query: ``[..., Hq, Lq, D]``, float64, float32, bfloat16 or float16, with any strides and at least two
            dimensions. Leading dimensions broadcast as in ``torch.matmul``; without ``enable_gqa`` so do the heads.
            Or a jagged nested tensor ``[batch, heads, jagged, D]``, as key and value then are, without a mask: see
            :func:`ptkernels.attention_varlen`, which it runs.
        key: ``[..., Hkv, Lk, D]``, dtype and device of ``query``.
        value: ``[..., Hkv, Lk, Dv]``. ``D`` and ``Dv`` are 1 to 512 and may differ.
        attn_mask: broadcastable to the scores ``[..., Hq, Lq, Lk]``. Boolean, where True means attend, or added to
            the scores, in the query's dtype or in float32, and then differentiable. Or a triangle of torch, which costs
            no memory: ``causal_upper_left(Lq, Lk)`` is ``is_causal=True``, ``causal_lower_right(Lq, Lk)`` hides
            ``j > i + Lk - Lq``; rows that see no key are empty (see below), where torch gives NaN. Default: no mask.
        dropout_p: probability of dropping a weight, applied whenever it is above 0: pass 0.0 in evaluation. Rounded to
            a multiple of 2^-16, by which what is kept is scaled up, so that the expectation is exact.
        is_causal: row ``i`` attends to keys ``j <= i`` only (aligned top left, also where ``Lq != Lk``). Together with
            ``attn_mask``, which torch refuses, both apply.
        scale: factor of the scores. Default: ``1 / sqrt(D)``.
        enable_gqa: let ``Hq / Hkv`` consecutive query heads share each key and value head. Without it, unequal head
            counts are an error unless they broadcast, that is unless one of them is 1.
        window: ``(left, right)``, how many keys before and after its own a row sees; None or -1 for no bound. Blocks of
            scores outside of it are not computed. Default: no bounds.
        softcap: replaces scores by ``softcap * tanh(scores / softcap)``, before all that is added to them. Default:
            0.0, none.
        alibi_slopes: ``[Hq]`` or ``[..., Hq]``, float32 or the query's dtype: how much a head's scores fall per key of
            distance to ``i + diagonal``. Differentiable. Default: none.
        sinks: ``[Hq]`` or ``[..., Hq]``, the same dtypes: logit of a key without a value, which takes its share of the
            softmax and is part of ``lse``. Differentiable; -inf is no sink. Default: none.
        relative_bias: ``[Hq, Lq + Lk - 1]`` or ``[..., Hq, Lq + Lk - 1]``, the same dtypes: added to the scores by
            distance, ``j - i`` at place ``j - i + Lq - 1``, without ever becoming a matrix. Differentiable, gradient of
            the same size. :func:`ptkernels.t5_relative_bias` makes it from T5's table. Default: none.
        mask_block_size: above 1, ``attn_mask`` is boolean with one element per block of so many queries and as many
            keys, broadcastable to ``[..., Hq, ceil(Lq / size), ceil(Lk / size)]``. Blocks that it hides are not
            computed: sparse patterns, local and global ones for instance, cost what they let through. Default: 1, an
            element for every pair.
        return_lse: also return the log-sum-exp of every row of scores.

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
        Rows with no key to attend to (all masked, or ``Lk == 0``) give out 0, lse -inf and zero gradients; with a sink,
        lse is the sink, and its gradient is that of lse.

        Time is ``O(D + Dv)`` per pair of a row and a key in its window, per head, forward and backward; memory beyond
        the results is ``O(Lq + Lk)``. The gradient of ``attn_mask`` has the size of ``attn_mask``, and costs no more.
        Softmax and every accumulation run in float32, in float64 for float64. Results do not depend on the number
        of threads; in :func:`ptkernels.batch_invariant` neither on anything else in the call, at 1.0 to 1.04 times the
        time of a prefill and 1.2 to 1.9 times that of decoding. The algorithm is the online softmax of Milakov and
        Gimelshein (2018), tiled as in FlashAttention (Dao et al., 2022; Dao, 2023).

        Dropout takes one seed from torch's default generator on the CPU per call. Which weights it drops is a function
        of the seed and their place alone, by Philox (Salmon et al., 2011): the backward and activation checkpointing
        drop what the forward did, as does :func:`ptkernels.reference.attention` after the same ``torch.manual_seed``.

        Double backward and forward-mode differentiation run on the reference in ``O(Lq * Lk)`` memory, with a warning;
        so do devices without a kernel and, on CUDA, every option that torch does not have.
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
        >>> ptk.attention(query, key, value, is_causal=True, window=(16, 0), sinks=torch.zeros(8)).shape
        torch.Size([2, 8, 100, 64])
    """
    # The first attempt checks nothing that the operator checks itself. Whatever goes wrong in it is left to the second,
    # which handles every case and words every error.
    is_plain = window is None and alibi_slopes is None and sinks is None and relative_bias is None
    is_plain = is_plain and not softcap and not dropout_p and mask_block_size == 1
    is_plain = is_plain and (attn_mask is None or attn_mask.__class__ is Tensor) and query.__class__ is Tensor
    if is_plain and _state.backend is None and not _state.batch_invariant and not _is_compiling():
        try:
            shape = query.shape
            if len(shape) == 4 and (enable_gqa or shape[1] == key.shape[1]):
                if _in_transform() or forward_ad._current_level >= 0:
                    result = _op(query, key, value, attn_mask, is_causal, scale)
                elif (
                    _is_grad_enabled()
                    and (
                        query.requires_grad
                        or key.requires_grad
                        or value.requires_grad
                        or (attn_mask is not None and attn_mask.requires_grad)
                    )
                    and _tracing_state() is None  # torch.jit.trace writes down operators, and does not differentiate
                ):
                    result = register.record(query, key, value, attn_mask, is_causal, scale)
                else:
                    # Nothing to record: the autograd kernel, which is Python, would double the latency.
                    with _BelowAutograd():
                        result = _op(query, key, value, attn_mask, is_causal, scale)
                return result if return_lse else result[0]  # type: ignore[no-any-return]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # what bad arguments raise and no more: checkpointing, for one, stops a recomputation by an exception
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias, mask_block_size)
    out, lse = _attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *beyond)
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
    window: Sequence[int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    relative_bias: Tensor | None,
    mask_block_size: int,
) -> tuple[Tensor, Tensor]:
    if isinstance(query, Tensor) and query.is_nested:
        checks.refuse_nested(relative_bias, mask_block_size)
        named = {"window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
        return _nested(query, key, value, attn_mask, is_causal, enable_gqa, dropout_p=dropout_p, scale=scale, **named)
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias, mask_block_size)
    if is_distributed(query):
        checks.check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *beyond)
        return _distributed(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *beyond)
    query, key, value, attn_mask = register.autocast_if_enabled(query, key, value, attn_mask)
    args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *beyond)
    if (
        dropout_p
        or softcap
        or mask_block_size != 1
        or any(given is not None for given in (window, alibi_slopes, sinks, relative_bias))
        or is_triangle(attn_mask)
    ):
        checks.check_inputs(*args)
    try:
        mask, options = resolve(query.dtype, attn_mask, dropout_p, is_causal, scale, *beyond)
        if routing.runs_on_reference(query, key, value, mask, options):
            checks.check_inputs(*args)
            # Autocast has been applied; inside the composition it would round the weights as well.
            with torch.autocast(query.device.type, enabled=False):
                return reference.attention_with(query, key, value, mask, options, enable_gqa)
        call = shapes.normalize(query, key, value, mask, options, enable_gqa)
        if routing.runs_on_triton(query.device.type):
            op = routing.triton_op()
            return call.restore(*op(call.query, call.key, call.value, call.attn_mask, *call.options.shared))
        return call.restore(*attention_op(call.query, call.key, call.value, call.attn_mask, *call.options))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        checks.check_inputs(*args)
        raise


def _nested(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    from ptkernels.ops.attention_varlen import attention_varlen, jagged  # which is built on this module

    call = jagged.pack(*args, **options)
    out, lse = attention_varlen(*call.operands, **call.kwargs, return_lse=True)
    return call.restore(out), call.restore(lse.t().contiguous())


def _distributed(*args: Any) -> tuple[Tensor, Tensor]:
    from ptkernels.integrations import dtensor

    names = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "window"]
    names += ["softcap", "alibi_slopes", "sinks", "relative_bias", "mask_block_size"]
    options = dict(zip(names, args, strict=True))
    operands = {name: options.pop(name) for name in (*names[:4], *names[10:13])}
    result: tuple[Tensor, Tensor] = dtensor.attention(operands, {**options, "return_lse": True})
    return result
