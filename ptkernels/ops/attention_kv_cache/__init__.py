"""Attention of new queries to a cache of keys and values, which new keys and values are appended to in place."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ptkernels.ops.attention_kv_cache import reference, routing
from ptkernels.ops.attention_kv_cache.library import append_op, attend_op

__all__ = ["attention_with_kv_cache"]


@overload
def attention_with_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_with_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_with_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Append keys and values to a cache, then attend to all of it: one step of decoding, or one chunk of a prefill.

    Follows ``flash_attn_with_kvcache`` in what its arguments mean, with the dimensions of
    :func:`ptkernels.attention`, heads before length. A cache kept as ``[batch, length, heads, dim]`` is passed as
    ``cache.transpose(1, 2)``; no layout of queries or caches is copied.

    Args:
        query: ``[B, Hq, Lq, D]``, float64, float32, bfloat16 or float16, any strides. Query ``i`` stands at slot
            ``total - Lq + i`` of its sequence, ``total`` being the slots filled once the new keys are in.
        k_cache: ``[Bc, Hkv, capacity, D]``, or ``[blocks, Hkv, page, D]`` with ``block_table`` (pages of 1 to 512
            slots). The query's dtype, int8 or float8_e4m3fn. Any strides, except that the last is 1.
        v_cache: ``[..., Dv]`` with the other sizes and the dtype of ``k_cache``. ``D`` and ``Dv`` are 1 to 512.
        k: ``[B, Hkv, Lnew, D]`` in the query's dtype, any strides: written to slots ``cache_seqlens`` to
            ``cache_seqlens + Lnew - 1`` **in place**. Default: nothing is appended.
        v: ``[B, Hkv, Lnew, Dv]``, together with ``k``.
        cache_seqlens: slots filled before this call, an int32 or int64 tensor ``[B]`` or one int for all sequences.
            The caller advances it.
        block_table: int32 or int64 ``[B, n]``: slot ``j`` of sequence ``b`` is slot ``j % page`` of block
            ``block_table[b, j // page]``. Entries of pages without a slot to read are ignored.
        cache_batch_idx: int32 or int64 ``[B]``, the row of the cache that holds each sequence. Default: row ``b``.
        cache_leftpad: int32 or int64 ``[B]``, slots at the front of each sequence that hold nothing. Default: 0.
        rotary_cos: ``[positions, R / 2]`` in float32 or the query's dtype. The first ``R`` values of queries and new
            keys are rotated by the angles of their slots (left padding counts), keys before they are stored. Needs new
            keys, as many as queries. With neither ``is_causal`` nor ``window``, all queries take the angle of slot
            ``cache_seqlens``.
        rotary_sin: like ``rotary_cos``.
        rotary_interleaved: rotate pairs ``(0, 1), (2, 3), ...`` (GPT-J) instead of ``(0, R / 2), (1, R / 2 + 1), ...``
            (GPT-NeoX, Llama).
        scale: factor of the scores. Default: ``1 / sqrt(D)``.
        is_causal: a query sees slots up to its own (aligned bottom right).
        window: ``(left, right)``, the slots before and after its own that a query sees; negative is no limit.
        softcap: scores become ``softcap * tanh(score / softcap)``. Default: 0.0, not at all.
        alibi_slopes: float32 ``[Hq]`` or ``[B, Hq]``; ``slope * |distance|`` is subtracted from the scores.
        sinks: float32 ``[Hq]``, a score per head that takes weight and has no value.
        k_scale: of a quantised ``k_cache``, required, float32; a stored code counts as ``code * scale``. ``[Hkv]``:
            one scale per head, chosen by the caller. ``[Bc, Hkv, capacity]`` (paged: ``[blocks, Hkv, page]``): one per
            slot and head, which appending chooses from the row's largest magnitude and writes **in place**.
        v_scale: the same for ``v_cache``.
        return_lse: also return the log-sum-exp of every row of scores, sink included.

    Returns:
        ``out`` of shape ``[B, Hq, Lq, Dv]`` in the query's dtype, laid out so that ``out.transpose(1, 2).flatten(2)``
        copies nothing. With ``return_lse`` also ``lse``, ``[B, Hq, Lq]``, natural logarithm, float32 (float64 for
        float64).

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type that the operator does not take.
        ValueError: shapes, devices, lengths or indices do not fit; the message names the argument. The cache is then
            unchanged.
        RuntimeError: gradients are recorded and an argument requires grad. The operator is for inference.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.
        ptkernels.errors.BackendError: the backend asked for cannot run the call.

    Note:
        Slots outside ``[cache_leftpad, total)`` are never read. A query that sees no slot gives out 0 and lse -inf (a
        sink: the sink). What is appended has the bits of a plain assignment, or of the composition in float32 where it
        is rotated or quantised (int8: nearest, clamped to 127; float8: clamped to 448; a NaN makes the scale of its
        slot NaN, is stored as NaN in float8, and as 0 in int8 with a scale per head).

        Time is ``O(Lq * total * (D + Dv))`` per head. Up to 16 rows of a key head, counting the queries of all the
        heads that share it, read every stored row once, which is what bounds decoding; more are tiled like
        :func:`ptkernels.attention`, with a packed copy of one head per thread. Arithmetic is float32 (float64 for
        float64), except that bfloat16 products use the bfloat16 instructions of the machine where there are any.
        Inside :func:`ptkernels.batch_invariant` a query has the bits that it has in a prefill, at some cost.
        Results do not depend on the number of threads: keys are split at fixed slots (Flash-Decoding; Dao et al., 2023)
        and partial results merged in order. Paged caches are those of Kwon et al. (2023), rotation that of Su et al.
        (2021). Autocast leaves the call as it is.

    Example:
        >>> import torch, ptkernels as ptk
        >>> k_cache, v_cache = (torch.zeros(2, 4, 128, 64) for _ in range(2))
        >>> filled = torch.tensor([100, 7])
        >>> query, k, v = (torch.randn(2, heads, 1, 64) for heads in (8, 4, 4))
        >>> out = ptk.attention_with_kv_cache(query, k_cache, v_cache, k, v, cache_seqlens=filled)
        >>> out.shape, torch.equal(k_cache[1, :, 7], k[1, :, 0])
        (torch.Size([2, 8, 1, 64]), True)
    """
    arguments = {
        "query": query,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "cache_seqlens": cache_seqlens,
        "block_table": block_table,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "scale": scale,
        "is_causal": is_causal,
        "window": window,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    if routing.runs_on_reference(query, v_cache):
        routing.check_all(**arguments)
        return reference.attention_with_kv_cache(**arguments, return_lse=return_lse)  # type: ignore[arg-type]
    # The first attempt checks nothing that the operators check themselves, before they write anything.
    try:
        left, right = (-1, -1) if window is None else window
        seqlens = cache_seqlens
        if isinstance(seqlens, (int, torch.SymInt)) and not isinstance(seqlens, bool):
            seqlens = torch.full((query.size(0),), seqlens, dtype=torch.int64, device=query.device)
        place = (seqlens, block_table, cache_batch_idx, cache_leftpad)
        options = (scale, is_causal, left, right, softcap, alibi_slopes, sinks, k_scale, v_scale)
        if k is None and v is None and rotary_cos is None and rotary_sin is None:
            out, lse = attend_op(query, k_cache, v_cache, *place, *options)
        else:
            rotary = (rotary_cos, rotary_sin, rotary_interleaved)
            out, lse = append_op(query, k_cache, v_cache, k, v, *place, *rotary, *options)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        routing.check_all(**arguments)
        raise
    return (out, lse) if return_lse else out
