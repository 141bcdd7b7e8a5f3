"""The matrix of weights that attention never forms, for those who want to look at it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptkernels.ops.attention import checks, reference
from ptkernels.ops.attention.options import compute_dtype, resolve


def attention_weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
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
) -> Tensor:
    """The weights with which :func:`ptkernels.attention` sums the values, before dropout.

    For visualisation and analysis: the result has ``Lq * Lk`` numbers per head, and torch's own operators need several
    times that in memory and time. A fused kernel is fast because it never forms this matrix, so none computes it;
    ``attention`` beside it still runs fused.

    Args:
        query, key, attn_mask, is_causal, scale, enable_gqa, window, softcap, alibi_slopes, sinks, relative_bias,
            mask_block_size: as in :func:`ptkernels.attention`, of which every shape, dtype and device is taken.

    Returns:
        ``[..., Hq, Lq, Lk]`` in the query's dtype, computed in float32 (float64 for float64), differentiable in every
        tensor argument any number of times. Rows sum to 1, or to what sinks leave them; rows without a key are 0.

    Raises:
        TypeError, ValueError: as :func:`ptkernels.attention`.

    Example:
        >>> import torch, ptkernels as ptk
        >>> query, key, value = torch.randn(3, 1, 4, 10, 16).unbind()
        >>> weights = ptk.attention_weights(query, key, is_causal=True)
        >>> weights.shape
        torch.Size([1, 4, 10, 10])
        >>> torch.testing.assert_close(weights @ value, ptk.attention(query, key, value, is_causal=True))
    """
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias, mask_block_size)
    checks.check_inputs(query, key, key, attn_mask, 0.0, is_causal, scale, enable_gqa, *beyond)
    mask, options = resolve(query.dtype, attn_mask, 0.0, is_causal, scale, *beyond)
    wide = compute_dtype(query.dtype)
    shared = reference.share_heads(key, query.size(-3)) if enable_gqa else key
    # Inside autocast the product would be rounded before the softmax.
    with torch.autocast(query.device.type, enabled=False):
        scores = reference.scaled_scores(query.to(wide), shared.to(wide), options.scale)
        return reference.softmax_of_scores(scores, mask, options).weights.to(query.dtype)
