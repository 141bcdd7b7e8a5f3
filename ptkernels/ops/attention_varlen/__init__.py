"""Fused attention over sequences of different lengths, packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ptkernels._distributed import is_distributed
from ptkernels.ops.attention.checks import check_window
from ptkernels.ops.attention.options import resolve
from ptkernels.ops.attention.register import autocast_if_enabled
from ptkernels.ops.attention_varlen import checks, reference, routing
from ptkernels.ops.attention_varlen import register as _register  # noqa: F401 - registers with torch on import
from ptkernels.ops.attention_varlen.library import varlen_op

__all__ = ["attention_varlen"]


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`ptkernels.attention` within each of several sequences that lie one after another, without padding.

    Sequence ``b`` is rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` of the query and ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1]`` of key and value. The two may differ in length, and either may be empty.

    Args:
        query: ``[tokens_q, Hq, D]``, float64, float32, bfloat16 or float16, with any strides.
        key: ``[tokens_k, Hkv, D]``, dtype of ``query``. ``Hkv`` divides ``Hq``; consecutive query heads share a head.
        value: ``[tokens_k, Hkv, Dv]``. ``D`` and ``Dv`` are 1 to 512 and may differ.
        cu_seqlens_q: ``[sequences + 1]``, int32 or int64: 0, then where each sequence ends. The last is ``tokens_q``.
        cu_seqlens_k: the same for key and value.
        max_seqlen_q: an upper bound of the lengths, which is checked. Nothing but the places of ``relative_bias``
            depends on it; other libraries need it.
        max_seqlen_k: the same for key and value.
        dropout_p: as in :func:`ptkernels.attention`.
        is_causal: row ``i`` of a sequence attends to its keys ``j <= i`` only.
        bottom_right: causality, ``window`` and ``alibi_slopes`` count from the last row and key of each sequence
            instead of from the first.
        scale: factor of the scores. Default: ``1 / sqrt(D)``.
        window: as in :func:`ptkernels.attention`.
        softcap: as in :func:`ptkernels.attention`.
        alibi_slopes: ``[Hq]`` or ``[sequences, Hq]``.
        sinks: ``[Hq]`` or ``[sequences, Hq]``.
        relative_bias: ``[Hq, max_seqlen_q + max_seqlen_k - 1]`` or ``[sequences, Hq, ...]``, needs both bounds: added
            to the scores of every sequence by distance, ``j - i`` at place ``j - i + max_seqlen_q - 1``.
            ``ptkernels.t5_relative_bias(table, max_seqlen_q, max_seqlen_k)`` makes it from T5's table. Differentiable.
        return_lse: also return the log-sum-exp of every row.

    Returns:
        ``out`` of shape ``[tokens_q, Hq, Dv]``, contiguous. With ``return_lse`` also ``lse``, ``[Hq, tokens_q]``,
        natural logarithm, float32 (float64 for float64). Both are differentiable.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type attention does not take.
        ValueError: shapes, devices or numbers do not fit; the message names the argument.
        RuntimeError: ``cu_seqlens`` hold numbers that do not fit, or a bound on the lengths is too small.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.
        ptkernels.errors.BackendError: the backend asked for cannot run the call.

    Note:
        Time is ``O(D + Dv)`` times the sum over sequences of the product of their two lengths; memory and numerics are
        those of :func:`ptkernels.attention`, whose kernels it runs. There is no mask: packing replaces it. Double
        backward and forward-mode differentiation run on :func:`ptkernels.reference.attention_varlen`, with a warning.

    Example:
        >>> import torch, ptkernels as ptk
        >>> lengths = torch.tensor([5, 0, 9])
        >>> cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        >>> query, key, value = (torch.randn(14, 4, 32) for _ in range(3))
        >>> ptk.attention_varlen(query, key, value, cu_seqlens, cu_seqlens, is_causal=True).shape
        torch.Size([14, 4, 32])
    """
    if is_distributed(query):
        from ptkernels.integrations import dtensor

        operands: dict[str, Any] = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q}
        operands |= {"cu_seqlens_k": cu_seqlens_k, "alibi_slopes": alibi_slopes, "sinks": sinks}
        operands["relative_bias"] = relative_bias
        given: dict[str, Any] = {
            "max_seqlen_q": max_seqlen_q,
            "max_seqlen_k": max_seqlen_k,
            "dropout_p": dropout_p,
            "scale": scale,
        }
        given |= {"is_causal": is_causal, "bottom_right": bottom_right, "window": window, "softcap": softcap}
        return dtensor.attention_varlen(operands, {**given, "return_lse": return_lse})  # type: ignore[no-any-return]
    query, key, value, _ = autocast_if_enabled(query, key, value, None)
    check_window(window)
    if not isinstance(query, Tensor):
        raise TypeError(f"{checks.OP}: query: got {type(query).__name__}, expected torch.Tensor")
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias)
    _, options = resolve(query.dtype, None, dropout_p, is_causal, scale, *beyond)
    options = options._replace(bottom_right=bottom_right)
    bounds = [-1 if bound is None else bound for bound in (max_seqlen_q, max_seqlen_k)]
    checks.check_inputs(query, key, value, cu_seqlens_q, cu_seqlens_k, bounds[0], bounds[1], options=options)
    if routing.runs_on_reference(query, key, value, options):
        with torch.autocast(query.device.type, enabled=False):
            packing = (cu_seqlens_q, cu_seqlens_k, bounds[0])
            out, lse = reference.attention_varlen_with(query, key, value, *packing, options=options)
    else:
        out, lse = varlen_op(query, key, value, cu_seqlens_q, cu_seqlens_k, bounds[0], bounds[1], *options.packed)
    return (out, lse) if return_lse else out
