"""Rotary position embedding of queries and keys, with the normalisation before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ptkernels._distributed import is_distributed
from ptkernels.ops.rotary_embedding import checks, register, routing
from ptkernels.ops.rotary_embedding.library import rotary_op

__all__ = ["rotary_embedding"]


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r"""Rotate queries and keys by their positions, after an optional RMS normalisation, in one pass.

    Each is ``n = x * rsqrt(mean(x ** 2) + norm_eps) * weight`` (``n = x`` without a weight), of which the pair
    ``(a, b)`` with angle ``t`` becomes ``(a cos t - b sin t, b cos t + a sin t)``. What attention does before its
    scores in Llama (rotation), GPT-NeoX and Phi (of a part of the values), GPT-J (interleaved), Qwen3 and Gemma 3
    (normalisation as well).

    Args:
        query: ``[batch, heads, length, head_dim]``, float64, float32, bfloat16 or float16, with any strides.
        key: ``[batch, kv_heads, length, head_dim]``, dtype and device of ``query``.
        cos, sin: ``[positions, rotary_dim / 2]``, cosines and sines of every position's angles, in one floating dtype,
            as :func:`ptkernels.attention_with_kv_cache` takes them. Values of a row from ``rotary_dim`` on stay as they
            are. Not differentiable.
        positions: int64 ``[length]`` or ``[batch, length]``, the row of ``cos`` and ``sin`` for every token. Default:
            0, 1, 2, ...
        query_norm_weight, key_norm_weight: ``[head_dim]``, in the query's dtype: normalise and scale by it first.
            Default: no normalisation.
        interleaved: pair i is values ``2 i`` and ``2 i + 1``; otherwise ``i`` and ``i + rotary_dim / 2``. Default:
            False.
        norm_eps: added to the mean square. Default: 1e-6.

    Returns:
        The new query and key, in the shape and dtype they came in, laid out in memory as ``[batch, length, heads,
        head_dim]``, where projections leave them. Differentiable in ``query``, ``key`` and the weights; without
        normalisation nothing is saved for the backward but ``cos`` and ``sin``.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type that is not taken.
        ValueError: shapes, devices or numbers do not fit, or ``cos`` or ``sin`` requires grad; the message names the
            argument. Positions beyond the rows of ``cos`` raise RuntimeError, from the kernel that reads them; on a
            GPU, where nothing waits to look at them, they make the values that are rotated NaN.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.

    Note:
        Every value is read once and written once. Computes in float32 (float64 for float64) and rounds once, at the
        end. Gradients of the weights are summed in float64. Results do not depend on the number of threads.

        Double backward and forward-mode differentiation run on the reference, with a warning; so does float64 on a GPU,
        where the kernels are Triton's (not yet run on a GPU). Under autocast query, key and weights are cast as
        products are; angles are not.

        Su et al., *RoFormer*, 2021; Zhang and Sennrich, *Root mean square layer normalization*, 2019.

    Example:
        >>> import torch, ptkernels as ptk
        >>> query, key = torch.randn(2, 8, 10, 64), torch.randn(2, 2, 10, 64)
        >>> angles = torch.outer(torch.arange(10.0), 10000.0 ** (-torch.arange(32) / 32))
        >>> query, key = ptk.rotary_embedding(query, key, angles.cos(), angles.sin())
        >>> query.shape, key.shape
        (torch.Size([2, 8, 10, 64]), torch.Size([2, 2, 10, 64]))
        >>> weight = torch.ones(64)
        >>> normalized, _ = ptk.rotary_embedding(
        ...     query, key, angles.cos(), angles.sin(), query_norm_weight=weight, key_norm_weight=weight
        ... )
        >>> torch.testing.assert_close(normalized.square().mean(-1), torch.ones(2, 8, 10), rtol=1e-4, atol=1e-4)
    """
    if is_distributed(query):
        from ptkernels.integrations import dtensor

        operands = {"query": query, "key": key, "cos": cos, "sin": sin, "positions": positions}
        operands |= {"query_norm_weight": query_norm_weight, "key_norm_weight": key_norm_weight}
        given = {"interleaved": interleaved, "norm_eps": norm_eps}
        return dtensor.rotary_embedding(operands, given)  # type: ignore[no-any-return]
    options = (positions, query_norm_weight, key_norm_weight, interleaved, norm_eps)
    args = register.autocast_if_enabled((query, key, cos, sin, *options))
    checks.check_inputs(*args)
    if routing.runs_on_reference(args[0], args[1], *args[5:7]):
        with torch.autocast(args[0].device.type, enabled=False):
            return register.compose(*args)
    result: tuple[Tensor, Tensor] = rotary_op(*args)
    return result
