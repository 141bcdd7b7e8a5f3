"""Attention in plain torch: the oracle, and the composition that runs where no kernel can.

    scores = scale * query @ key^T + attn_mask          masked and causally hidden entries are -inf
    weights = softmax(scores)                           0 in rows where every score is -inf
    out = dropout(weights) @ value,  lse = logsumexp(scores)

A row in which every score is -inf has no softmax. It is defined here as weights 0, lse -inf, and zero derivatives of
every order. The usual formulas give NaN for it (exp(-inf - -inf)), and a NaN selected away by ``torch.where`` still
reaches the gradient as 0 * NaN, so such rows are set to a constant *before* the softmax.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


def share_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads so that query head ``h`` meets head ``h // (heads / kv_heads)``."""
    return tensor.repeat_interleave(heads // max(tensor.size(-3), 1), -3)


def scaled_scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """``scale * query @ key^T``; leading dimensions broadcast."""
    return (query @ key.transpose(-2, -1)) * default_scale(query, scale)


def default_scale(query: Tensor, scale: float | None) -> float:
    """``scale``, or ``1 / sqrt(head_dim)`` for None."""
    return 1.0 / math.sqrt(query.size(-1)) if scale is None else scale


def softmax_of_scores(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Weights ``[..., Lq, Lk]`` and log-sum-exp ``[..., Lq]`` of scores, once they are masked."""
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)

    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(empty.squeeze(-1), -math.inf)
    return weights, lse


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
    """Plain torch :func:`ptkernels.attention`: same arguments, shapes and results, ``O(Lq * Lk)`` memory.

    Computes in float64 for float64 inputs and in float32 otherwise, and rounds ``out`` to the query's dtype at the end.
    Differentiable in every tensor argument, the mask included, any number of times in forward and reverse mode.
    ``dropout_p`` draws from torch's generator of the query's device, one number per score.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x = torch.ones(1, 1, 3, 2)
        >>> out, lse = ptk.reference.attention(x, x, x, is_causal=True, scale=0.0, return_lse=True)
        >>> lse.exp()
        tensor([[[1., 2., 3.]]])
    """
    dtype = query.dtype
    query, key, value = (tensor.to(compute_dtype(dtype)) for tensor in (query, key, value))
    if enable_gqa:
        key, value = share_heads(key, query.size(-3)), share_heads(value, query.size(-3))
    weights, lse = softmax_of_scores(scaled_scores(query, key, scale), attn_mask, is_causal)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    out = (weights @ value).to(dtype)
    return (out, lse.expand(out.shape[:-1])) if return_lse else out


def attention_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """First derivatives of four-dimensional attention, written so that they can be differentiated further.

    With P the weights, dP = dO V^T, and D = rowsum(P * dP):
    dS = P * (dP - D + dlse),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO.
    """
    dtype, batch, heads = query.dtype, query.size(0), query.size(1)
    wide = compute_dtype(dtype)
    grad_out, query = grad_out.to(wide), query.to(wide)
    shared_key, shared_value = (share_heads(tensor.to(wide), heads) for tensor in (key, value))

    weights, lse = softmax_of_scores(scaled_scores(query, shared_key, scale), attn_mask, is_causal)
    grad_weights = grad_out @ shared_value.transpose(-2, -1)
    grad_scores = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    if grad_lse is not None:
        # lse is the constant -inf in rows without a score, and what its gradient holds there may be NaN.
        grad_scores = grad_scores + grad_lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    grad_scores = weights * grad_scores * default_scale(query, scale)

    def sum_shared(grad: Tensor, like: Tensor) -> Tensor:
        kv_heads = like.size(1)
        return grad.reshape(batch, kv_heads, heads // max(kv_heads, 1), *like.shape[-2:]).sum(2).to(dtype)

    return (
        (grad_scores @ shared_key).to(dtype),
        sum_shared(grad_scores.transpose(-2, -1) @ query, key),
        sum_shared(weights.transpose(-2, -1) @ grad_out, value),
    )
