"""Masks with one element per block of queries and keys: what they stand for, and what they leave uncomputed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import each_dtype, operands, results_and_gradients
from torch import Tensor

import ptkernels as ptk

pytestmark = pytest.mark.usefixtures("strict")


def local_and_global(queries: int, keys: int, size: int) -> Tensor:
    """Every block sees its neighbours and the first block, which sees everything."""
    i, j = torch.arange(math.ceil(queries / size))[:, None], torch.arange(math.ceil(keys / size))
    return ((i - j).abs() <= 1) | (i == 0) | (j == 0)


def pairs(mask: Tensor, queries: int, keys: int, size: int) -> Tensor:
    return mask[..., torch.arange(queries)[:, None] // size, torch.arange(keys) // size]


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 2.0}, {"dropout_p": 0.3}], ids=str)
@pytest.mark.parametrize("size", [1, 3, 16, 64, 100, 256, 4096, 2**62])
@pytest.mark.parametrize(("lq", "lk"), [(700, 1100), (3, 900), (1, 5)])
def test_is_a_mask_of_pairs(lq: int, lk: int, size: int, options: dict[str, Any]) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in operands(lq, lk, dtype=torch.float64))
    blocks = local_and_global(lq, lk, size)
    found = []
    for mask in ({"attn_mask": blocks, "mask_block_size": size}, {"attn_mask": pairs(blocks, lq, lk, size)}):
        torch.manual_seed(3)
        found.append(results_and_gradients(ptk.attention, inputs, **mask, **options))
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


def test_a_mask_for_every_head() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(300, 500, dtype=torch.float64))
    blocks = torch.rand(*query.shape[:2], math.ceil(300 / 50), 10) < 0.4
    found = [
        results_and_gradients(ptk.attention, (query, key, value), **mask)
        for mask in ({"attn_mask": blocks, "mask_block_size": 50}, {"attn_mask": pairs(blocks, 300, 500, 50)})
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@each_dtype
def test_hidden_blocks_are_not_computed(dtype: torch.dtype) -> None:
    """NaN in keys and values reaches every row that computes with them, masked or not: here it reaches none."""
    size = 256
    query, key, value = (tensor.to(dtype) for tensor in operands(600, 1024, dtype=torch.float64))
    blocks = torch.tensor([True, False, True, False]).expand(3, 4)
    for poisoned in (key, value):
        poisoned[..., 336:448, :] = math.nan  # whole tiles of every kernel within the second block
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    out, lse, *grads = results_and_gradients(ptk.attention, inputs, attn_mask=blocks, mask_block_size=size)
    assert all(bool(tensor.isfinite().all()) for tensor in (out, lse, *grads))
    seen = torch.cat([torch.arange(size), torch.arange(2 * size, 3 * size)])
    expected = ptk.attention(query, key[..., seen, :], value[..., seen, :])
    torch.testing.assert_close(out, expected, rtol=0.02 if dtype.itemsize == 2 else 1e-5, atol=1e-3)


@each_dtype
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs = tuple(tensor.to(dtype).requires_grad_() for tensor in operands(400, 900, dtype=torch.float64))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        blocks = local_and_global(400, 900, 64)
        found.append(results_and_gradients(ptk.attention, inputs, attn_mask=blocks, mask_block_size=64))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])


def test_with_weights_and_nested_tensors() -> None:
    query, key, value = operands(10, 12, dtype=torch.float64)
    blocks = {"attn_mask": local_and_global(10, 12, 4), "mask_block_size": 4}
    weights = ptk.attention_weights(query, key, **blocks)
    torch.testing.assert_close(weights @ value, ptk.attention(query, key, value, **blocks))
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 4), torch.randn(5, 2, 4)], layout=torch.jagged)
    nested = nested.transpose(1, 2)
    with pytest.raises(ValueError, match="attention: mask_block_size: got 4, expected 1 beside nested tensors"):
        ptk.attention(nested, nested, nested, mask_block_size=4)
