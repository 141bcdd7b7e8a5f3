"""Biases by distance, T5's among them, and the matrix of weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import LENGTHS, assert_as_reference, each_dtype, operands, results_and_gradients
from torch import Tensor

import ptkernels as ptk

pytestmark = pytest.mark.usefixtures("strict")


def leaves(lq: int, lk: int, **options: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_() for tensor in operands(lq, lk, dtype=torch.float64, **options))


def matrix(bias: Tensor, lq: int, lk: int) -> Tensor:
    """The mask that a bias by distance stands for, spelled out row by row."""
    return torch.stack([bias[..., lq - 1 - i : lq - 1 - i + lk] for i in range(lq)], -2)


@pytest.mark.parametrize(("lq", "lk"), [*LENGTHS, (2, 700), (300, 1100)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 3), "softcap": 2.0}], ids=str)
def test_is_a_mask_of_diagonals(lq: int, lk: int, options: dict[str, Any]) -> None:
    inputs = leaves(lq, lk)
    bias = torch.randn(2, lq + lk - 1, dtype=torch.float64, requires_grad=True)
    *actual, grad = results_and_gradients(ptk.attention, inputs, relative_bias=bias, **options)
    *expected, grad_mask = results_and_gradients(
        ptk.attention, inputs, attn_mask=matrix(bias, lq, lk).detach().requires_grad_(), **options
    )
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    (of_diagonals,) = torch.autograd.grad(matrix(bias, lq, lk), bias, grad_mask)
    torch.testing.assert_close(grad, of_diagonals, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lead", [(), (1,), (2,)], ids=str)
def test_beside_everything_else(lead: tuple[int, ...]) -> None:
    query = torch.randn(2, 4, 37, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, 141, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(*lead, 4, 177, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(4, 37, 141, dtype=torch.float64, requires_grad=True)
    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert_as_reference(
        (query, key, value), enable_gqa=True, relative_bias=bias, attn_mask=mask, alibi_slopes=slopes, dropout_p=0.2
    )


@each_dtype
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    """Few heads and many keys: the keys are dealt out, and with them the parts of every distance's gradient."""
    inputs = tuple(torch.randn(1, 2, length, 8).to(dtype).requires_grad_() for length in (300, 1100, 1100))
    bias = torch.randn(2, 1399).to(dtype).requires_grad_()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results_and_gradients(ptk.attention, inputs, relative_bias=bias))
    assert all(all(map(torch.equal, found[0], other)) for other in found[1:])
    assert found[0][-1].dtype == dtype


def test_of_any_rank() -> None:
    query = torch.randn(2, 4, 3, 5, 8, dtype=torch.float64)
    bias = torch.randn(4, 3, 9, dtype=torch.float64)
    out = ptk.attention(query, query, query, relative_bias=bias)
    for i in range(2):
        for j in range(4):
            each = ptk.attention(query[i, j], query[i, j], query[i, j], relative_bias=bias[j])
            torch.testing.assert_close(out[i, j], each)


def test_vmap_of_the_bias_alone() -> None:
    query, key, value = leaves(5, 7)
    biases = torch.randn(3, 2, 11, dtype=torch.float64)

    def gradient(bias: Tensor) -> Tensor:
        return torch.func.grad(lambda b: ptk.attention(query, key, value, relative_bias=b).sin().sum())(bias)

    torch.testing.assert_close(torch.vmap(gradient)(biases), torch.stack([gradient(bias) for bias in biases]))


def written_out_bucket(offset: int, buckets: int, bidirectional: bool, max_distance: int) -> int:
    first = 0
    if bidirectional:
        buckets //= 2
        first = buckets if offset > 0 else 0
        distance = abs(offset)
    else:
        distance = max(-offset, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    return first + min(
        exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)), buckets - 1
    )


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20)])
def test_buckets_of_t5(bidirectional: bool, buckets: int, max_distance: int) -> None:
    table = torch.arange(buckets, dtype=torch.float64)[:, None].expand(buckets, 2)
    options: dict[str, Any] = {"bidirectional": bidirectional, "max_distance": max_distance}
    bias = ptk.t5_relative_bias(table, 200, 170, **options)
    # Where a logarithm is a whole number, rounding decides: T5's own float32 and the formula may differ there.
    expected = [written_out_bucket(offset, buckets, bidirectional, max_distance) for offset in range(-199, 170)]
    assert (bias[0] - torch.tensor(expected)).abs().max() <= 1
    assert (bias[0] != torch.tensor(expected)).sum() <= 4
    # One query that stands behind 199 others sees what the last row of the matrix sees.
    last = ptk.t5_relative_bias(table, 1, 170, query_offset=199, **options)
    assert torch.equal(last, bias[:, :170])


def test_bias_of_transformers() -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(d_model=16, d_kv=8, num_heads=2)
    for is_decoder in (False, True):
        config.is_decoder = is_decoder
        module = t5.T5Attention(config, has_relative_attention_bias=True)
        table = module.relative_attention_bias.weight
        bias = ptk.t5_relative_bias(table, 150, 140, bidirectional=not is_decoder)
        assert torch.equal(matrix(bias, 150, 140), module.compute_bias(150, 140)[0])


def test_gradient_of_the_table() -> None:
    query, key, value = leaves(9, 12)
    table = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)

    def run(table: Tensor) -> Tensor:
        bias = ptk.t5_relative_bias(table, 9, 12, max_distance=10)
        return ptk.attention(query.detach(), key.detach(), value.detach(), relative_bias=bias)

    assert torch.autograd.gradcheck(run, (table,))


def test_one_graph_from_the_table() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(9, 12))
    table = torch.randn(8, 2, requires_grad=True)

    def forward(*inputs: Tensor) -> Tensor:
        return ptk.attention(
            *inputs[:3], relative_bias=ptk.t5_relative_bias(inputs[3], 9, 12, max_distance=10), is_causal=True
        )

    inputs = (query, key, value, table)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    results = [function(*inputs) for function in (forward, compiled)]
    assert torch.equal(*results)
    grads = [torch.autograd.grad(result.sin().sum(), inputs) for result in results]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"table": [1.0]}, TypeError, "table: got list, expected torch.Tensor"),
        ({"table": torch.ones(32)}, ValueError, r"table: got torch.float32 of shape \[32\]"),
        ({"table": torch.ones(32, 2).long()}, ValueError, "table: got torch.int64"),
        ({"query_length": 0}, ValueError, "query_length: got 0"),
        ({"max_distance": 8}, ValueError, "max_distance: got 8 with 32 buckets"),
        ({"table": torch.ones(3, 2)}, ValueError, "with 3 buckets"),
    ],
    ids=str,
)
def test_bad_tables(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"table": torch.ones(32, 2), "query_length": 3, "key_length": 4} | changes
    with pytest.raises(error, match=f"t5_relative_bias: .*{message}"):
        ptk.t5_relative_bias(**arguments)


PACKED = ([0, 5, 5, 42, 43], [0, 60, 71, 72, 172])


@pytest.mark.parametrize("own", [False, True], ids=["shared", "each"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "bottom_right": True}], ids=["full", "causal"])
def test_packed_sequences_have_the_bias_of_the_longest(own: bool, options: dict[str, Any]) -> None:
    """Every sequence alone, with its part of the bias: values, gradients, and the gradients' sum."""
    offsets = [torch.tensor(ends) for ends in PACKED]
    longest_q, longest_k = 40, 101
    query, key, value = (torch.randn(n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (43, 172, 172))
    lead = (4,) if own else ()
    bias = torch.randn(*lead, 2, longest_q + longest_k - 1, dtype=torch.float64, requires_grad=True)
    out = ptk.attention_varlen(
        query, key, value, *offsets, longest_q, longest_k, relative_bias=bias, scale=0.4, **options
    )
    parts = []
    for index in range(4):
        rows, keys = (slice(*ends[index : index + 2]) for ends in PACKED)
        q, k, v = (t.transpose(0, 1) for t in (query[rows], key[keys], value[keys]))
        lq, lk = q.size(1), k.size(1)
        of_sequence = (bias[index] if own else bias)[:, longest_q - lq : longest_q + lk - 1]
        mask = matrix(of_sequence, lq, lk) if lq else bias.new_zeros(2, 0, lk)
        if options:
            mask = mask.masked_fill(torch.ones(lq, lk).triu(lk - lq + 1).bool(), -math.inf)
        parts.append(ptk.attention(q, k, v, mask, scale=0.4).transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    grad, leaves_ = torch.randn_like(out), (query, key, value, bias)
    actual = torch.autograd.grad(out, leaves_, grad)
    torch.testing.assert_close(actual, torch.autograd.grad(expected, leaves_, grad), rtol=1e-11, atol=1e-11)


def test_t5_packed_is_t5_padded() -> None:
    table = torch.randn(32, 2, requires_grad=True)
    offsets, lengths = torch.tensor([0, 30, 47]), (30, 17)
    packed = torch.randn(47, 2, 16)
    bias = ptk.t5_relative_bias(table, 30, 30)
    out = ptk.attention_varlen(packed, packed, packed, offsets, offsets, 30, 30, relative_bias=bias, scale=1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), table)
    alone = []
    for begin, length in zip(offsets.tolist(), lengths, strict=False):
        x = packed[begin : begin + length].transpose(0, 1)
        own = ptk.t5_relative_bias(table, length, length)
        alone.append(ptk.attention(x, x, x, relative_bias=own, scale=1.0).transpose(0, 1))
    torch.testing.assert_close(out, torch.cat(alone), rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(torch.cat(alone).square().sum(), table)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "each"])
def test_vmap_of_a_packed_bias(own: bool) -> None:
    offsets = torch.tensor([0, 5, 12])
    x = torch.randn(12, 2, 4, dtype=torch.float64)
    bias = torch.randn(3, *((2,) if own else ()), 2, 15, dtype=torch.float64, requires_grad=True)

    def call(one: Tensor) -> Tensor:
        return ptk.attention_varlen(x, x, x, offsets, offsets, 8, 8, relative_bias=one, is_causal=True)

    mapped, looped = torch.vmap(call)(bias), torch.stack([call(one) for one in bias])
    torch.testing.assert_close(mapped, looped)
    grad = torch.randn_like(looped)
    torch.testing.assert_close(torch.autograd.grad(mapped, bias, grad), torch.autograd.grad(looped, bias, grad))


@pytest.mark.parametrize(
    ("bounds", "shape", "message"),
    [
        ((None, 8), (2, 15), "relative_bias: got a value without max_seqlen_q and max_seqlen_k, expected both"),
        ((8, None), (2, 15), "relative_bias: got a value without max_seqlen_q and max_seqlen_k, expected both"),
        ((8, 8), (2, 14), r"relative_bias: got shape \[2, 14\], expected \[2, 15\].*or \[2, 2, 15\]"),
        ((8, 8), (3, 2, 15), r"relative_bias: got shape \[3, 2, 15\], expected \[2, 15\]"),
    ],
    ids=["no-queries", "no-keys", "distances", "sequences"],
)
def test_bad_packed_biases(bounds: tuple[int | None, int | None], shape: tuple[int, ...], message: str) -> None:
    offsets, x = torch.tensor([0, 5, 12]), torch.randn(12, 2, 4)
    with pytest.raises(ValueError, match=f"attention_varlen: {message}"):
        ptk.attention_varlen(x, x, x, offsets, offsets, *bounds, relative_bias=torch.randn(shape))


def test_not_beside_nested_tensors() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(4, 2, 8)], layout=torch.jagged)
    nested = nested.transpose(1, 2)
    for call in (ptk.attention, lambda *args, **kwargs: ptk.explain(ptk.attention, *args, **kwargs)):
        with pytest.raises(ValueError, match="attention: relative_bias: got a value, expected None beside nested"):
            call(nested, nested, nested, relative_bias=torch.zeros(2, 7))


# Weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"attn_mask": torch.rand(33, 47) < 0.5, "window": (20, 5)},
        {"sinks": torch.ones(2, dtype=torch.float64), "softcap": 1.0},
        {"alibi_slopes": torch.ones(2, dtype=torch.float64), "relative_bias": torch.ones(2, 79, dtype=torch.float64)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_weights_are_those_of_attention(options: dict[str, Any]) -> None:
    query, key, value = leaves(33, 47)
    weights = ptk.attention_weights(query, key, **options)
    expected = ptk.attention(query, key, value, **options)
    torch.testing.assert_close(weights @ value, expected)
    projection = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(weights @ value, (query, key, value), projection),
        torch.autograd.grad(expected, (query, key, value), projection),
    )


@each_dtype
def test_weights_have_the_dtype_of_the_query(dtype: torch.dtype) -> None:
    query, key, _ = operands(5, 7, dtype=dtype)
    query = torch.cat([query, query], 1)
    weights = ptk.attention_weights(query, key, torch.zeros(5, 7, dtype=torch.bool), enable_gqa=True)
    assert weights.dtype == dtype
    assert weights.shape == (2, 4, 5, 7)
    assert (weights == 0).all()


def test_weights_check_their_arguments() -> None:
    query, key, _ = operands(5, 7)
    with pytest.raises(ValueError, match="attention: key: got head dim 3, expected 16 like query"):
        ptk.attention_weights(query, key[..., :3])
    with pytest.raises(TypeError, match="attention: is_causal: got int, expected bool"):
        ptk.attention_weights(query, key, is_causal=1)  # type: ignore[arg-type]
