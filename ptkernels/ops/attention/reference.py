"""Attention in plain torch: the oracle, and the composition that runs where no kernel can.

    scores = cap(scale * query @ key^T) - slope * |i + diagonal - j| + relative_bias[j - i] + attn_mask,
    cap(x) = softcap * tanh(x / softcap)
    weights = softmax([scores, sink])[:-1]              hidden entries of scores are -inf, weights 0 where all are
    out = dropout(weights) @ value,  lse = logsumexp([scores, sink])

A row in which every score is -inf has no softmax. It is defined here as weights 0, lse -inf, and zero derivatives of
every order. The usual formulas give NaN for it (exp(-inf - -inf)), and a NaN selected away by ``torch.where`` still
reaches the gradient as 0 * NaN, so such rows are set to a constant *before* the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ptkernels._philox import philox
from ptkernels.ops.attention.options import KEEP_ALL, UNBOUNDED, Options, compute_dtype, resolve
from ptkernels.ops.attention.shapes import split_lead


def share_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads so that query head ``h`` meets head ``h // (heads / kv_heads)``."""
    return tensor.repeat_interleave(heads // max(tensor.size(-3), 1), -3)


def scaled_scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """``scale * query @ key^T``; leading dimensions broadcast."""
    return (query @ key.transpose(-2, -1)) * default_scale(query, scale)


def default_scale(query: Tensor, scale: float | None) -> float:
    """``scale``, or ``1 / sqrt(head_dim)`` for None."""
    return 1.0 / math.sqrt(query.size(-1)) if scale is None else scale


class Softmax(NamedTuple):
    """Of one call: ``weights`` before dropout, the weight of the sink where there is one, ``lse``."""

    weights: Tensor
    sink_weights: Tensor | None
    lse: Tensor


def _offsets(scores: Tensor, options: Options) -> Tensor:
    """``j - (i + diagonal)`` for every pair of row and key."""
    queries, keys = scores.shape[-2:]
    rows = torch.arange(queries, device=scores.device) + options.diagonal(queries, keys)
    return torch.arange(keys, device=scores.device) - rows[:, None]


def _places(scores: Tensor) -> Tensor:
    """Where ``relative_bias`` has the number of every pair of row and key: at ``j - i + Lq - 1``."""
    queries, keys = scores.shape[-2:]
    rows = torch.arange(queries, device=scores.device)
    return torch.arange(keys, device=scores.device) - rows[:, None] + queries - 1


def pairs_of_blocks(mask: Tensor, size: int, queries: int, keys: int) -> Tensor:
    """A mask with an element for every pair of row and key, from one with an element for every block of them."""
    if size == 1:
        return mask
    for dim, length in ((-2, queries), (-1, keys)):
        if mask.dim() >= -dim and mask.size(dim) > 1:
            mask = mask.repeat_interleave(size, dim).narrow(dim, 0, length)
    return mask


def softmax_of_scores(scores: Tensor, attn_mask: Tensor | None, options: Options) -> Softmax:
    """Softmax of scaled products, once they are capped, shifted and masked."""
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        distances = _offsets(scores, options).abs().to(scores.dtype)
        scores = scores - options.alibi_slopes.to(scores.dtype)[..., None, None] * distances
    if options.relative_bias is not None:
        scores = scores + options.relative_bias.to(scores.dtype)[..., _places(scores)]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = pairs_of_blocks(attn_mask, options.mask_block_size, *scores.shape[-2:])
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask.to(scores.dtype)
    right = 0 if options.is_causal else options.window_right
    if right != UNBOUNDED:
        scores = scores.masked_fill(_offsets(scores, options) > right, -math.inf)
    if options.window_left != UNBOUNDED:
        scores = scores.masked_fill(_offsets(scores, options) < -options.window_left, -math.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[..., None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], -1)

    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), -math.inf)
    if options.sinks is None:
        return Softmax(weights, None, lse)
    return Softmax(weights[..., :-1], weights[..., -1], lse)


def dropout_keep(seed: Tensor, keep_below: int, shape: tuple[int, int, int, int], first_batch: int = 0) -> Tensor:
    """What dropout keeps of weights ``[batch, heads, Lq, Lk]``: a function of seed and position alone.

    Sixteen bits of Philox decide for one weight: those of counter ``(key, row // 8, head, batch)``, in the place that
    ``row % 8`` says. ``seed`` of shape ``[n]`` gives each of ``n`` equal runs of the batch a seed of its own, in which
    the batch counts from ``first_batch``.
    """
    batch, heads, queries, keys = shape
    device = seed.device
    each = batch // max(seed.numel(), 1)
    seed = seed.reshape(-1, 1).expand(-1, each).reshape(-1, 1, 1, 1)
    counter = (
        torch.arange(keys, device=device),
        torch.arange((queries + 7) // 8, device=device)[:, None],
        torch.arange(heads, device=device)[:, None, None],
        torch.arange(batch, device=device)[:, None, None, None] % max(each, 1) + first_batch,
    )
    words = philox(torch.broadcast_tensors(*counter), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -2)
    return halves.flatten(2, 3)[:, :, :queries] < keep_below


def dropout_factors(weights: Tensor, options: Options, batch: int, heads: int, first_batch: int = 0) -> Tensor | float:
    """0 where a weight is dropped, and the inverse of the share that is kept elsewhere."""
    if options.dropout_seed is None or options.keep_below == KEEP_ALL:
        return 1.0
    shape = (batch, heads, *weights.shape[-2:])
    keep = dropout_keep(options.dropout_seed, options.keep_below, shape, first_batch).to(weights.device)
    return keep.view(weights.shape).to(weights.dtype) * (KEEP_ALL / max(options.keep_below, 1))


def attention_with(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    options: Options,
    enable_gqa: bool = True,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of operands of any rank, with the options of the operator."""
    dtype = query.dtype
    query, key, value = (tensor.to(compute_dtype(dtype)) for tensor in (query, key, value))
    if enable_gqa:
        key, value = share_heads(key, query.size(-3)), share_heads(value, query.size(-3))
    weights, _, lse = softmax_of_scores(scaled_scores(query, key, options.scale), attn_mask, options)
    if options.dropout_seed is not None:
        lead = torch.broadcast_shapes(weights.shape[:-2], value.shape[:-2])
        batch, heads = split_lead(lead, enable_gqa, options)
        weights = weights.expand(*lead, *weights.shape[-2:])
        weights = weights * dropout_factors(weights, options, math.prod(batch), heads, first_batch)
    out = (weights @ value).to(dtype)
    return out, lse.expand(out.shape[:-1])


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
    """Plain torch :func:`ptkernels.attention`: same arguments, shapes and results, ``O(Lq * Lk)`` memory.

    Computes in float64 for float64 inputs and in float32 otherwise, and rounds ``out`` to the query's dtype at the end.
    Differentiable in every tensor argument any number of times in forward and reverse mode. ``dropout_p`` draws the
    seed, and with it the weights to drop, that :func:`ptkernels.attention` draws.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x = torch.ones(1, 1, 3, 2)
        >>> out, lse = ptk.reference.attention(x, x, x, is_causal=True, scale=0.0, return_lse=True)
        >>> lse.exp()
        tensor([[[1., 2., 3.]]])
    """
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias, mask_block_size)
    mask, options = resolve(query.dtype, attn_mask, dropout_p, is_causal, scale, *beyond)
    out, lse = attention_with(query, key, value, mask, options, enable_gqa)
    return (out, lse) if return_lse else out


def attention_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    options: Options,
    first_batch: int = 0,
) -> tuple[Tensor | None, ...]:
    """First derivatives of four-dimensional attention, written so that they can be differentiated further.

    Of query, key, value, attn_mask, alibi_slopes, sinks and relative_bias; None for those that a call does not have.
    With P the weights, M the factors of dropout, and the rest as in the equations of this module:
    dP = M * dO V^T,  D = rowsum(P * dP),  dS = P * (dP - D + dlse),  dsink = P_sink * (dlse - D),
    dslope = -sum(dS * distance),  drelative[d] = sum(dS where j - i is d),  dX = scale * dS * cap',  dQ = dX K,
    dK = dX^T Q,  dV = (M * P)^T dO.
    """
    dtype, batch, heads = query.dtype, query.size(0), query.size(1)
    wide = compute_dtype(dtype)
    grad_out, query = grad_out.to(wide), query.to(wide)
    shared_key, shared_value = (share_heads(tensor.to(wide), heads) for tensor in (key, value))

    products = scaled_scores(query, shared_key, options.scale)
    weights, sink_weights, lse = softmax_of_scores(products, attn_mask, options)
    factors = dropout_factors(weights, options, batch, heads, first_batch)
    grad_weights = (grad_out @ shared_value.transpose(-2, -1)) * factors
    shift = -(weights * grad_weights).sum(-1)
    if grad_lse is not None:
        # lse is the constant -inf in rows without a score, and what its gradient holds there may be NaN.
        shift = shift + grad_lse.masked_fill(lse == -math.inf, 0.0)
    grad_scores = weights * (grad_weights + shift.unsqueeze(-1))

    grad_mask = grad_slopes = grad_sinks = grad_relative = None
    if attn_mask is not None and attn_mask.is_floating_point():
        grad_mask = grad_scores.sum_to_size(attn_mask.shape)
    if options.alibi_slopes is not None:
        distances = _offsets(grad_scores, options).abs().to(wide)
        grad_slopes = -(grad_scores * distances).sum((-2, -1)).sum_to_size(options.alibi_slopes.shape)
    if options.sinks is not None and sink_weights is not None:
        grad_sinks = (sink_weights * shift).sum(-1).sum_to_size(options.sinks.shape)

    if options.relative_bias is not None:
        places = _places(grad_scores).flatten()
        zeros = grad_scores.new_zeros(batch, heads, options.relative_bias.size(-1))
        grad_relative = zeros.index_add(-1, places, grad_scores.flatten(-2)).sum_to_size(options.relative_bias.shape)

    grad_products = grad_scores * default_scale(query, options.scale)
    if options.softcap:
        grad_products = grad_products * (1.0 - torch.tanh(products / options.softcap).square())

    def sum_shared(grad: Tensor, like: Tensor) -> Tensor:
        kv_heads = like.size(1)
        return grad.reshape(batch, kv_heads, heads // max(kv_heads, 1), *like.shape[-2:]).sum(2).to(dtype)

    return (
        (grad_products @ shared_key).to(dtype),
        sum_shared(grad_products.transpose(-2, -1) @ query, key),
        sum_shared((weights * factors).transpose(-2, -1) @ grad_out, value),
        grad_mask,
        grad_slopes,
        grad_sinks,
        grad_relative,
    )
