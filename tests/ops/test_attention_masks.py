"""Masks of every shape and spelling, and causality."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_cases import LENGTHS, each_dtype, exact, operands

import ptkernels as ptk

MASK_SHAPES = [
    tuple(size if kept else 1 for size, kept in zip((2, 3, 5, 7), pattern, strict=True))[-rank or 4 :]
    for rank in range(1, 5)
    for pattern in itertools.product((False, True), repeat=4)
    if not any(pattern[: 4 - rank])
]


@pytest.mark.parametrize("shape", [(), *dict.fromkeys(MASK_SHAPES)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "float32 beside bfloat16"])
def test_mask_broadcasts(shape: tuple[int, ...], kind: str) -> None:
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    query, key, value = (tensor.to(dtype) for tensor in operands(5, 7, heads=3))
    mask = torch.rand(shape) < 0.6 if kind == "bool" else torch.randn(shape)
    out, lse = ptk.attention(query, key, value, mask, return_lse=True)
    full = mask.expand(2, 3, 5, 7).contiguous()
    expected, expected_lse = ptk.attention(query, key, value, full, return_lse=True)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact(query, key, value, attn_mask=full), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows_dim", ["contiguous", "transposed", "every other", "offset"])
def test_mask_of_any_strides(rows_dim: str) -> None:
    query, key, value = operands(33, 47)
    mask = torch.rand(33, 47) < 0.5
    view = {
        "contiguous": lambda: mask,
        "transposed": lambda: mask.t().contiguous().t(),
        "every other": lambda: torch.stack([mask, ~mask], -1)[..., 0],
        "offset": lambda: torch.cat([~mask[:, :1], mask], 1)[:, 1:],
    }[rows_dim]()
    assert torch.equal(ptk.attention(query, key, value, view), ptk.attention(query, key, value, mask))


@each_dtype
@pytest.mark.parametrize("spelling", ["bool", "minus infinity"])
def test_rows_without_keys(dtype: torch.dtype, spelling: str) -> None:
    """Output 0, lse -inf and gradients 0; rows beside them are not touched, and nothing is NaN."""
    query, key, value = (tensor.requires_grad_() for tensor in operands(37, 41, dtype=dtype))
    keep = torch.rand(37, 41) < 0.5
    keep[[0, 5, 36]] = False
    keep[3, 0] = True
    mask = keep if spelling == "bool" else torch.zeros(37, 41, dtype=dtype).masked_fill(~keep, -math.inf)
    out, lse = ptk.attention(query, key, value, mask, return_lse=True)
    dead = ~keep.any(-1)
    assert torch.equal(lse == -math.inf, dead.expand_as(lse))
    assert (out[..., dead, :] == 0).all()
    assert out.isfinite().all()
    assert out[..., ~dead, :].any(-1).all()

    grad_lse = torch.ones_like(lse).masked_fill(dead, math.nan)  # what a loss that uses lse = -inf sends back
    grads = torch.autograd.grad((out, lse), (query, key, value), (torch.ones_like(out), grad_lse))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][..., dead, :] == 0).all()
    alive = [
        tensor.detach()[..., ~dead, :].requires_grad_() if tensor is query else tensor for tensor in (query, key, value)
    ]
    alone = ptk.attention(*alive, keep[~dead], return_lse=True)
    torch.testing.assert_close(out[..., ~dead, :], alone[0], rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-3)
    expected = torch.autograd.grad(alone, alive, [torch.ones_like(result) for result in alone])
    tolerance = 2e-2 if dtype.itemsize == 2 else 1e-4
    for grad, want in zip(grads[1:], expected[1:], strict=True):
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance)


@each_dtype
def test_no_keys_at_all(dtype: torch.dtype) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(5, 0, dtype=dtype))
    out, lse = ptk.attention(query, key, value, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + lse.exp().sum(), (query, key, value))
    assert (grads[0] == 0).all()
    assert grads[1].shape == key.shape


@each_dtype
@pytest.mark.parametrize("lowest", [-1e4, -1e9, torch.finfo(torch.float32).min], ids=str)
def test_rows_masked_by_a_large_number_are_not_masked(lowest: float, dtype: torch.dtype) -> None:
    """A finite bias on a whole row cancels out, but for what rounding loses, and derivatives agree with the output.

    lse holds no more of such a row than the bias: a backward that rebuilds its weights from lse gives them a sum of
    Lk instead of 1. Weights are read off the gradient of value here, as d sum(out[row]) / d value[j] = weights[row, j].
    """
    row = 2
    query, key, value = (tensor.requires_grad_() for tensor in operands(9, 40, dtype=dtype))
    mask = torch.zeros(9, 40)
    mask[row] = lowest
    mask[4, ::2] = lowest
    out, lse = ptk.attention(query, key, value, mask, return_lse=True)
    assert lse.isfinite().all()
    grad = torch.zeros_like(out)
    grad[..., row, :] = 1.0
    grad_query, grad_key, grad_value = (
        tensor.double() for tensor in torch.autograd.grad(out, (query, key, value), grad)
    )
    tolerance = 1e-3 if dtype.itemsize > 2 else 2e-2
    weights = grad_value[..., :1].mT
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=tolerance, atol=0)
    torch.testing.assert_close((weights @ value.double())[..., 0, :], out[..., row, :].double(), rtol=0, atol=tolerance)

    grad_weights = value.detach().double().sum(-1)[..., None, :]
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True)) / math.sqrt(query.size(-1))
    expected = (grad_scores @ key.double(), grad_scores.mT @ query.double()[..., row : row + 1, :])
    for actual, want in zip((grad_query[..., row : row + 1, :], grad_key), expected, strict=True):
        torch.testing.assert_close(actual, want, rtol=0, atol=tolerance * want.abs().max().item())


# Causality


@pytest.mark.parametrize(("lq", "lk"), LENGTHS)
@pytest.mark.parametrize("mask", [None, "last block"])
@each_dtype
def test_future_keys_do_not_leak(lq: int, lk: int, mask: str | None, dtype: torch.dtype) -> None:
    """Whatever stands at key j, rows before j give the same bits, and so does the gradient of earlier keys."""
    query, key, value = operands(lq, lk, dtype=dtype)
    keep = None
    if mask is not None:
        keep = torch.ones(lq, lk, dtype=torch.bool)
        keep[:, -min(lk, 32) :: 2] = False
        keep[:, 0] = True
    before = ptk.attention(query, key, value, keep, is_causal=True)
    for j in {1, lk // 2, lk - 1, min(lq, lk) - 1} & set(range(1, lk)):
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[..., j:, :] = 50 * torch.randn(changed_key[..., j:, :].shape).to(dtype)
        changed_value[..., j:, :] = 1e4
        after = ptk.attention(query, changed_key, changed_value, keep, is_causal=True)
        assert torch.equal(after[..., :j, :], before[..., :j, :])
        if mask is None and lq > j:
            assert not torch.equal(after[..., j:, :], before[..., j:, :])


@pytest.mark.parametrize(("lq", "lk"), LENGTHS)
def test_causal_is_a_lower_triangle_from_the_top_left(lq: int, lk: int) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(lq, lk, dtype=torch.float64))
    triangle = torch.ones(lq, lk, dtype=torch.bool).tril()
    bias = torch.randn(lq, lk, dtype=torch.float64)
    for mask in (None, torch.rand(2, 1, lq, lk) < 0.5, bias):
        both = triangle if mask is None else triangle & mask if mask.dtype == torch.bool else None
        if both is None:
            both = bias.masked_fill(~triangle, -math.inf)
        actual = ptk.attention(query, key, value, mask, is_causal=True, return_lse=True)
        expected = ptk.attention(query, key, value, both, return_lse=True)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(actual[0])
        for ours, want in zip(
            torch.autograd.grad(actual[0], (query, key, value), grad),
            torch.autograd.grad(expected[0], (query, key, value), grad),
            strict=True,
        ):
            torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)


def test_causal_gradients_do_not_leak() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(113, 203))
    out = ptk.attention(query, key, value, is_causal=True)
    grads = torch.autograd.grad(out[..., :40, :].sum(), (query, key, value))
    assert not grads[0][..., 40:, :].any()
    assert not grads[1][..., 40:, :].any()
    assert not grads[2][..., 40:, :].any()
    assert grads[2][..., :40, :].any(-1).all()
