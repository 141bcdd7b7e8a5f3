"""Windows, causal triangles, softcap, ALiBi, sinks and learned masks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from attention_cases import LENGTHS, assert_as_reference, each_dtype, operands, results_and_gradients
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import ptkernels as ptk

pytestmark = [pytest.mark.usefixtures("strict"), pytest.mark.filterwarnings("ignore:Lower right")]


def leaves(lq: int, lk: int, **options: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_() for tensor in operands(lq, lk, dtype=torch.float64, **options))


def band(lq: int, lk: int, left: int | None, right: int | None, diagonal: int = 0) -> Tensor:
    """What a window shows, spelled out."""
    offset = torch.arange(lk) - torch.arange(lq)[:, None] - diagonal
    shown = torch.ones(lq, lk, dtype=torch.bool)
    if left is not None:
        shown &= offset >= -left
    if right is not None:
        shown &= offset <= right
    return shown


# Windows


WINDOWS = [(0, 0), (3, None), (None, 2), (17, 5), (300, 300), (None, None)]


@pytest.mark.parametrize(("lq", "lk"), [*LENGTHS, (2, 700), (300, 610)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_window_is_a_band(lq: int, lk: int, is_causal: bool) -> None:
    inputs = leaves(lq, lk)
    for left, right in WINDOWS:
        shown = band(lq, lk, left, 0 if is_causal else right)
        actual = results_and_gradients(ptk.attention, inputs, window=(left, right), is_causal=is_causal)
        expected = results_and_gradients(ptk.attention, inputs, attn_mask=shown)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_minus_one_is_no_bound() -> None:
    query, key, value = operands(33, 47)
    expected = ptk.attention(query, key, value, window=(5, None))
    assert torch.equal(ptk.attention(query, key, value, window=(5, -1)), expected)
    assert torch.equal(ptk.attention(query, key, value, window=[None, -1]), ptk.attention(query, key, value))


@pytest.mark.parametrize(("lq", "lk"), [*LENGTHS, (2, 700), (300, 610)])
def test_causal_triangles_of_torch(lq: int, lk: int) -> None:
    """Both corners, alone and with a window that counts from the triangle's diagonal."""
    inputs = leaves(lq, lk)
    for triangle, diagonal in ((causal_upper_left(lq, lk), 0), (causal_lower_right(lq, lk), lk - lq)):
        for left in (None, 9):
            shown = band(lq, lk, left, 0, diagonal)
            actual = results_and_gradients(ptk.attention, inputs, attn_mask=triangle, window=(left, None))
            expected = results_and_gradients(ptk.attention, inputs, attn_mask=shown)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(
                ptk.reference.attention(*inputs, attn_mask=triangle, window=(left, None)), actual[0]
            )
        if lq <= lk:
            torch.testing.assert_close(
                ptk.attention(*inputs, attn_mask=triangle), F.scaled_dot_product_attention(*inputs, triangle)
            )


def test_triangle_under_autocast_and_compile() -> None:
    query, key, value = operands(9, 12)
    triangle = causal_lower_right(9, 12)
    expected = ptk.attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), triangle)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ptk.attention(query, key, value, triangle), expected)


@each_dtype
def test_nothing_outside_a_window_is_read(dtype: torch.dtype) -> None:
    """NaN beyond the blocks that a band touches reaches neither outputs nor gradients."""
    query, key, value = (tensor.requires_grad_() for tensor in operands(1024, 1024, dtype=dtype))
    clean = ptk.attention(query, key, value, window=(16, 0))
    with torch.no_grad():
        key[:, :, :256] = math.nan
        value[:, :, :256] = math.nan
    out = ptk.attention(query, key, value, window=(16, 0))
    assert torch.equal(out[:, :, 512:], clean[:, :, 512:])
    grads = torch.autograd.grad(out[:, :, 512:].sum(), (query, key, value))
    assert grads[0][:, :, 512:].isfinite().all()


# Softcap, ALiBi, sinks


@pytest.mark.parametrize(("lq", "lk"), [(1, 7), (33, 47), (130, 70), (3, 600)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 3)}], ids=str)
def test_shaped_scores(lq: int, lk: int, options: dict[str, Any]) -> None:
    inputs = leaves(lq, lk)
    slopes = torch.rand(2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(lq, lk, dtype=torch.float64)
    assert_as_reference(inputs, softcap=0.7, **options)
    assert_as_reference(inputs, alibi_slopes=slopes, **options)
    assert_as_reference(inputs, sinks=sinks, **options)
    assert_as_reference(inputs, softcap=2.0, alibi_slopes=slopes, sinks=sinks, attn_mask=mask, **options)


def test_softcap_bounds_scores() -> None:
    """By its formula, and exactly linear where scores are small."""
    query, key, value = operands(5, 9, dtype=torch.float64)
    lse = ptk.attention(query * 1e6, key, value, softcap=3.0, return_lse=True)[1]
    assert lse.abs().max() <= 3.0 + math.log(9)
    capped = ptk.attention(query * 1e-9, key, value, softcap=30.0)
    torch.testing.assert_close(capped, ptk.attention(query * 1e-9, key, value), rtol=1e-13, atol=1e-13)


def test_slopes_of_alibi_are_a_mask() -> None:
    query, key, value = operands(19, 31, dtype=torch.float64)
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    for triangle, diagonal in ((None, 0), (causal_lower_right(19, 31), 12)):
        distance = (torch.arange(31) - torch.arange(19)[:, None] - diagonal).abs()
        bias = -slopes[:, None, None] * distance
        if triangle is not None:
            bias = bias.masked_fill(~band(19, 31, None, 0, diagonal), -math.inf)
        torch.testing.assert_close(
            ptk.attention(query, key, value, triangle, alibi_slopes=slopes), ptk.attention(query, key, value, bias)
        )


def test_sink_is_a_key_without_a_value() -> None:
    query, key, value = operands(7, 11, dtype=torch.float64)
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    out, lse = ptk.attention(query, key, value, sinks=sinks, return_lse=True)
    mask = torch.cat([torch.zeros(2, 7, 11, dtype=torch.float64), sinks[:, None, None].expand(2, 7, 1)], -1)
    longer = [F.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value)]
    expected = ptk.attention(query, *longer, mask, return_lse=True)
    torch.testing.assert_close((out, lse), expected)


def test_sinks_of_rows_without_keys() -> None:
    """Out 0, lse the sink, and only the sink has a gradient; -inf is no sink."""
    inputs = leaves(5, 7)
    keep = torch.ones(5, 7, dtype=torch.bool)
    keep[2] = False
    sinks = torch.tensor([1.5, -math.inf], dtype=torch.float64, requires_grad=True)
    out, lse, grad_query, _, _, grad_sinks = results_and_gradients(ptk.attention, inputs, attn_mask=keep, sinks=sinks)
    assert (out[:, :, 2] == 0).all()
    assert (lse[:, 0, 2] == 1.5).all()
    assert (lse[:, 1, 2] == -math.inf).all()
    assert (grad_query[:, :, 2] == 0).all()
    assert grad_sinks[1] == 0
    torch.testing.assert_close(
        ptk.attention(*inputs, sinks=torch.full((2,), -math.inf, dtype=torch.float64)), ptk.attention(*inputs)
    )


@each_dtype
def test_large_sinks_and_masks_keep_derivatives_in_line(dtype: torch.dtype) -> None:
    """Rows whose lse is far from 0, where weights have to be summed again."""
    inputs = tuple(tensor.requires_grad_() for tensor in operands(9, 40, dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    sinks = torch.full((2,), -1e4, dtype=wide, requires_grad=True)
    mask = torch.full((9, 40), -1e4, dtype=torch.float32)
    out = ptk.attention(*inputs, attn_mask=mask, sinks=sinks)
    grad_value, grad_sinks = torch.autograd.grad(out[..., 3, :].sum(), (inputs[2], sinks))
    weights = grad_value[..., 0].double().sum(-1)
    # The row's mass is split between keys and sink.
    assert ((weights > 0.5) & (weights < 1.0)).all()
    assert grad_sinks.isfinite().all()


def test_values_per_head_take_any_rank() -> None:
    slopes, sinks = torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    query = torch.randn(2, 4, 3, 5, 8, dtype=torch.float64)
    out = ptk.attention(query, query, query, alibi_slopes=slopes, sinks=sinks.expand(2, 4, 3))
    each = [
        ptk.attention(query[i, j], query[i, j], query[i, j], alibi_slopes=slopes, sinks=sinks)
        for i, j in itertools.product(range(2), range(4))
    ]
    torch.testing.assert_close(out.flatten(0, 1), torch.stack(each))
    assert each[0].shape == (3, 5, 8)


# Learned masks


MASK_SHAPES = [
    (2, 3, 37, 41),
    (1, 3, 37, 41),
    (2, 1, 37, 41),
    (1, 1, 37, 41),
    (3, 37, 41),
    (37, 41),
    (2, 3, 1, 41),
    (3, 1, 41),
    (41,),
    (2, 3, 37, 1),
    (37, 1),
    (1, 1),
    (),
]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_mask_gradient(shape: tuple[int, ...], kv_heads: int) -> None:
    query = torch.randn(2, 3, 37, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, 41, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = (query, key, value)
    assert_as_reference(inputs, attn_mask=mask, enable_gqa=True)
    assert_as_reference(inputs, attn_mask=mask, enable_gqa=True, is_causal=True, dropout_p=0.3, softcap=1.0)


@pytest.mark.parametrize("shape", [(3, 600, 1100), (1, 1, 600, 1100), (1100,)], ids=str)
def test_mask_gradient_over_parts_of_the_keys(shape: tuple[int, ...]) -> None:
    """With few heads, keys are dealt out too: the same bits for any number of threads."""
    inputs = tuple(torch.randn(2, 3, length, 8, requires_grad=True) for length in (600, 1100, 1100))
    mask = torch.randn(shape, requires_grad=True)
    torch.set_num_threads(1)
    first = results_and_gradients(ptk.attention, inputs, attn_mask=mask)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results_and_gradients(ptk.attention, inputs, attn_mask=mask), first))
    wide = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    exact = results_and_gradients(ptk.reference.attention, wide, attn_mask=mask.detach().double().requires_grad_())
    torch.testing.assert_close(first[-1].double(), exact[-1], rtol=1e-4, atol=1e-5)


@each_dtype
def test_mask_gradient_has_the_dtype_of_the_mask(dtype: torch.dtype) -> None:
    query, key, value = operands(5, 7, dtype=dtype)
    for mask_dtype in (dtype, torch.float32):
        mask = torch.randn(5, 7, dtype=mask_dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(ptk.attention(query, key, value, mask).sum(), mask)
        assert grad.dtype == mask_dtype
        assert grad.shape == mask.shape


def test_only_the_mask_needs_a_gradient() -> None:
    query, key, value = operands(5, 7, dtype=torch.float64)
    mask = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: ptk.attention(query, key, value, m), (mask,))
    assert torch.autograd.gradcheck(lambda m: torch.ops.ptkernels.attention(query, key, value, m), (mask,))


def test_mask_gradient_through_an_expanded_mask() -> None:
    """What was expanded before the call is full size to it, and summed by autograd behind it."""
    inputs = leaves(5, 7)
    mask = torch.randn(7, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(ptk.attention(*inputs, given).sin().sum(), mask)[0]
        for given in (mask, mask.expand(2, 2, 5, 7))
    ]
    torch.testing.assert_close(grads[0], grads[1])
