"""Attention's Triton kernels as operators that ``torch.compile`` sees through, and the choice to run on them.

``ptkernels::_attention_triton`` takes what ``ptkernels::attention`` takes. Its first derivatives are kernels too, of a
bias, slopes and sinks as well; a second derivative, forward mode and functorch transforms are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ptkernels import _triton
from ptkernels._triton.dispatch import identity
from ptkernels.ops.attention import triton as launch

_wrap = identity if _triton.interpreted() else wrap_triton


@triton_op("ptkernels::_attention_triton", mutates_args={})
def attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    mask_block_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of checked arguments."""
    call = launch.Call(
        is_causal, scale, alibi_slopes, sinks, dropout_seed, window_left, window_right, bottom_right, softcap,
        dropout_p, mask_block_size=mask_block_size,
    )  # fmt: skip
    return launch.forward(query, key, value, attn_mask, call, _wrap)


@triton_op("ptkernels::_attention_backward_triton", mutates_args={})
def backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    output_mask: Sequence[bool],
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    bottom_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    mask_block_size: int = 1,
) -> list[Tensor]:
    """Gradients of query, key, value, attn_mask, alibi_slopes and sinks: those that ``output_mask`` asks for."""
    call = launch.Call(
        is_causal, scale, alibi_slopes, sinks, dropout_seed, window_left, window_right, bottom_right, softcap,
        dropout_p, mask_block_size=mask_block_size,
    )  # fmt: skip
    grads = launch.backward(grad_out, grad_lse, query, key, value, out, lse, attn_mask, call, tuple(output_mask), _wrap)
    return [grad for grad in grads if grad is not None]


_FIRST_GRADIENTS = (0, 1, 2, 3, 6, 7)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, is_causal, scale, slopes, sinks, seed, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, mask, slopes, sinks, seed)
    ctx.options = (is_causal, scale, *rest)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, out, lse, mask, slopes, sinks, seed = ctx.saved_tensors
    flags = ctx.needs_input_grad  # shorter than the arguments where a call leaves defaults out
    grads: list[Tensor | None] = [None] * len(flags)
    needed = [index < len(flags) and bool(flags[index]) for index in _FIRST_GRADIENTS]
    if grad_out is None and grad_lse is None:
        return tuple(grads)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    is_causal, scale, *rest = ctx.options
    found = backward_op(
        grad_out, grad_lse, query, key, value, out, lse, needed, mask, is_causal, scale, slopes, sinks, seed, *rest
    )
    for index, grad in zip((i for i, need in zip(_FIRST_GRADIENTS, needed, strict=True) if need), found, strict=True):
        grads[index] = grad
    return tuple(grads)


attention_op.register_autograd(_backward, setup_context=_setup_context)
