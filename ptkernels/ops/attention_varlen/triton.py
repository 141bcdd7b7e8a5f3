"""``ptkernels::attention_varlen`` and its backward on a GPU, by attention's Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels._triton.dispatch import Launcher, identity
from ptkernels.ops.attention import triton as launch
from ptkernels.ops.attention_varlen.checks import OP


def _call(query: Tensor, key: Tensor, cu_seqlens: Sequence[Tensor], bounds: Sequence[int], options: Any) -> launch.Call:
    """The options with the sequences. A bound that was not given is that of one sequence of all tokens.

    Offsets are checked where they are, without waiting: on a GPU, wrong ones are an assertion of the device.
    """
    *shared, relative_bias = (*options, None)[:11]
    if relative_bias is not None:
        raise ValueError(f"{OP}: relative_bias: got a value, expected None: the Triton kernels have none")
    longest = [bound if bound >= 0 else tensor.size(0) for bound, tensor in zip(bounds, (query, key), strict=True)]
    for name, offsets, tensor, bound in zip("qk", cu_seqlens, (query, key), longest, strict=True):
        lengths = offsets.diff()
        ends = (offsets.select(0, 0) == 0) & (offsets.select(0, offsets.size(0) - 1) == tensor.size(0))
        fits = ends & ((lengths >= 0) & (lengths <= bound)).all()
        torch._assert_async(
            fits, f"{OP}: cu_seqlens_{name}: expected offsets from 0 to {tensor.size(0)}, at most {bound} apart"
        )
    return launch.Call(*shared)._replace(
        cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1], max_seqlen_q=longest[0], max_seqlen_k=longest[1]
    )


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = -1,
    max_seqlen_k: int = -1,
    *options: Any,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of checked arguments."""
    call = _call(query, key, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), options)
    return launch.varlen_forward(query, key, value, call, wrap)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    output_mask: Sequence[bool],
    *options: Any,
    wrap: Launcher = identity,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, alibi_slopes, sinks and no relative_bias, None where not asked for."""
    call = _call(query, key, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), options)
    needed = (*output_mask[:3], False, *output_mask[3:5])
    grads = launch.varlen_backward(grad_out, grad_lse, query, key, value, out, lse, call, needed, wrap)
    others = (None if grad is None else grad.to(lse.dtype) for grad in (grads.alibi_slopes, grads.sinks))
    return (*grads[:3], *others, None)
