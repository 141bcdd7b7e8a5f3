"""Ring attention: what test_context_parallel.py compares with one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptkernels.integrations import context_parallel

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# Too short for every process to have some of it, odd, empty.
CU_SEQLENS = torch.tensor([0, 13, 13, 18, 19, 43])


def operands(dtype: torch.dtype, packed: bool, keys: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = int(CU_SEQLENS[-1])
    shapes = [(2, 4, 24, 8), (2, 2, keys, 8), (2, 2, keys, 5), (2, 4, 24, 5)]
    if packed:
        shapes = [(tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 5), (tokens, 4, 5)]
    # Some scores far from 0: the backward recomputes the weights of such rows differently.
    query, *rest = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return [20 * query, *rest]


def differentiated(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of query, key and value, the last tensor being that of the result."""
    *inputs, grad_out = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def padded(dtype: torch.dtype, is_causal: bool, keys: int = 24) -> list[Tensor]:
    parts = [context_parallel.shard_sequence(tensor) for tensor in operands(dtype, False, keys)]
    found = differentiated(partial(context_parallel.ring_attention, is_causal=is_causal), parts)
    return [context_parallel.gather_sequence(tensor) for tensor in found]


def packed(dtype: torch.dtype, is_causal: bool) -> list[Tensor]:
    def attend(*parts: Tensor) -> Tensor:
        return context_parallel.ring_attention_varlen(*parts, CU_SEQLENS, is_causal=is_causal)

    parts = [context_parallel.shard_packed(tensor, CU_SEQLENS) for tensor in operands(dtype, True)]
    assert context_parallel.shard_cu_seqlens(CU_SEQLENS)[-1] == len(parts[0])
    return [context_parallel.gather_packed(tensor, CU_SEQLENS) for tensor in differentiated(attend, parts)]


JOBS: dict[str, Callable[[], Any]] = {"ring, more keys": partial(padded, torch.float64, False, keys=40)}
for dtype in DTYPES:
    for is_causal in (False, True):
        case = f"{dtype}, {'causal' if is_causal else 'all'}"
        JOBS[f"ring, {case}"] = partial(padded, dtype, is_causal)
        JOBS[f"ring of packed sequences, {case}"] = partial(packed, dtype, is_causal)
