"""Packed sequences and jagged nested tensors, beyond the contract of every operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DTYPES, each_dtype, results_and_gradients
from torch import Tensor

import ptkernels as ptk
from ptkernels.errors import FallbackError
from ptkernels.ops.attention_varlen.spec import offsets

LENGTHS = [([5], [9]), ([3, 0, 70], [8, 4, 33]), ([0, 0], [0, 0]), ([1, 130, 2], [300, 1, 0])]


def packed(
    lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, ...]:
    sizes = ((sum(lengths_q), heads), (sum(lengths_k), kv_heads), (sum(lengths_k), kv_heads))
    return tuple(torch.randn(*size, 16, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)


def varlen(lengths_q: list[int], lengths_k: list[int], **fixed: Any) -> Any:
    def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        return ptk.attention_varlen(query, key, value, offsets(lengths_q), offsets(lengths_k), **fixed, **options)

    return call


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (20, 3)}, {"softcap": 1.0}], ids=str)
def test_every_sequence_is_attention(lengths_q: list[int], lengths_k: list[int], options: dict[str, Any]) -> None:
    inputs = packed(lengths_q, lengths_k)
    out, lse = varlen(lengths_q, lengths_k)(*inputs, **options, return_lse=True)
    rows, keys = offsets(lengths_q).tolist(), offsets(lengths_k).tolist()
    for i in range(len(lengths_q)):
        query, key, value = (
            tensor[cut].transpose(0, 1).unsqueeze(0)
            for tensor, cut in zip(
                inputs, (slice(*rows[i : i + 2]), slice(*keys[i : i + 2]), slice(*keys[i : i + 2])), strict=True
            )
        )
        alone, lse_alone = ptk.attention(query, key, value, enable_gqa=True, **options, return_lse=True)
        torch.testing.assert_close(out[rows[i] : rows[i + 1]].transpose(0, 1), alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[:, rows[i] : rows[i + 1]], lse_alone[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("lengths_q", "lengths_k"), LENGTHS, ids=str)
def test_gradients_with_every_option(lengths_q: list[int], lengths_k: list[int]) -> None:
    inputs = packed(lengths_q, lengths_k)
    slopes = torch.rand(len(lengths_q), 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    named = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 2.0, "window": (30, None), "dropout_p": 0.2}
    found = []
    for function in (ptk.attention_varlen, ptk.reference.attention_varlen):

        def call(*tensors: Tensor, function: Any = function, **options: Any) -> Any:
            return function(*tensors, offsets(lengths_q), offsets(lengths_k), bottom_right=True, **options)

        torch.manual_seed(1)
        found.append(results_and_gradients(call, inputs, **named))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_derivatives_of_second_order() -> None:
    inputs = packed([2, 3], [3, 1])
    assert torch.autograd.gradgradcheck(varlen([2, 3], [3, 1], is_causal=True), inputs, fast_mode=True)


@each_dtype
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    lengths_q, lengths_k = [5, 130, 0, 64], [1300, 40, 3, 64]
    inputs, found = packed(lengths_q, lengths_k, dtype), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results_and_gradients(varlen(lengths_q, lengths_k), inputs, window=(100, 100)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_int32_and_strided_offsets() -> None:
    inputs = packed([3, 4], [3, 4])
    expected = varlen([3, 4], [3, 4])(*inputs)
    strided = torch.stack([offsets([3, 4]), torch.full((3,), 99)], -1)[:, 0]
    for given in (offsets([3, 4], torch.int32), strided):
        assert torch.equal(ptk.attention_varlen(*inputs, given, given), expected)


def test_no_sequences() -> None:
    inputs = packed([], [])
    out, lse = varlen([], [])(*inputs, return_lse=True)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (4, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 8])}, RuntimeError, "cu_seqlens_q: got 0 to 8, expected 0 to 7"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 7])}, RuntimeError, "cu_seqlens_q: got 1 to 7, expected 0 to 7"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 7])}, RuntimeError, "cu_seqlens_k: got 7 after 9, expected numbers that"),
        ({"cu_seqlens_k": torch.tensor([0, 7])}, ValueError, "cu_seqlens_k: got 1 sequences, expected 2"),
        ({"cu_seqlens_k": torch.tensor([0.0, 3.0, 7.0])}, TypeError, "cu_seqlens_k: got dtype float32, expected int32"),
        ({"cu_seqlens_q": torch.tensor([[0, 3, 7]])}, ValueError, r"cu_seqlens_q: got shape \[1, 3\], expected 1"),
        ({"cu_seqlens_q": [0, 3, 7]}, TypeError, "cu_seqlens_q: got list, expected torch.Tensor"),
        ({"max_seqlen_q": 3}, RuntimeError, "max_seqlen_q: got 3, expected at least 4, the longest sequence"),
        ({"max_seqlen_k": 1.5}, TypeError, "max_seqlen_k: got float, expected int"),
        ({"query": torch.randn(7, 16)}, ValueError, r"query: got shape \[7, 16\], expected 3 dimensions"),
        ({"query": None}, TypeError, "query: got NoneType, expected torch.Tensor"),
        ({"key": torch.randn(7, 3, 16)}, ValueError, "value: got .* tokens and heads"),
        ({"query": torch.randn(7, 3, 16)}, ValueError, "key: got 2 heads, expected a divisor of query's 3"),
        ({"value": torch.randn(7, 2, 16).half()}, TypeError, "value: got dtype float16, expected float32"),
        ({"sinks": torch.randn(3)}, ValueError, r"sinks: got shape \[3\], expected \[4\] or \[2, 4\]"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p: got 2.0, expected a number from 0.0 to 1.0"),
        ({"is_causal": 1}, TypeError, "is_causal: got int, expected bool"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key, value = packed([3, 4], [3, 4], torch.float32)
    good = {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": offsets([3, 4]),
        "cu_seqlens_k": offsets([3, 4]),
    }
    with pytest.raises(error, match=f"^attention_varlen: {message}"):
        ptk.attention_varlen(**(good | changes))


@pytest.mark.usefixtures("strict")
def test_strict_refuses_the_reference() -> None:
    inputs = packed([3, 4], [3, 4])
    (grad,) = torch.autograd.grad(varlen([3, 4], [3, 4])(*inputs).sin().sum(), inputs[:1], create_graph=True)
    with pytest.raises(FallbackError, match=r"^attention_varlen: .*double backward has no kernel"):
        grad.sum().backward()


# Jagged nested tensors


def nested(lengths: list[int], heads: int, like: Tensor | None = None) -> Tensor:
    if like is not None:
        values = torch.randn(sum(lengths), heads, 16, dtype=torch.float64)
        return torch.nested.nested_tensor_from_jagged(values, like.offsets()).requires_grad_()
    rows = [torch.randn(length, heads, 16, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


def test_jagged_is_packed() -> None:
    query, key = nested([3, 9, 1], 4), nested([7, 2, 5], 2)
    value = nested([7, 2, 5], 2, like=key)
    operands = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    out, lse = ptk.attention(*operands, is_causal=True, enable_gqa=True, window=(4, None), return_lse=True)
    assert out.shape == operands[0].shape
    flat = [tensor.values().detach().requires_grad_() for tensor in (query, key, value)]
    expected, expected_lse = ptk.attention_varlen(
        *flat, query.offsets(), key.offsets(), is_causal=True, window=(4, None), return_lse=True
    )
    torch.testing.assert_close(out.transpose(1, 2).values(), expected)
    torch.testing.assert_close(lse.transpose(1, 2).values(), expected_lse.t())
    grads = torch.autograd.grad(out.transpose(1, 2).values().sin().sum(), (query, key, value))
    wanted = torch.autograd.grad(expected.sin().sum(), flat)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.values(), want)
    assert ptk.explain(ptk.attention, *operands, enable_gqa=True).backend == "cpu"


def test_jagged_agrees_with_torch_and_compiles() -> None:
    query = nested([3, 9, 1], 4)

    def call(tensor: Tensor, function: Any = ptk.attention) -> Tensor:
        heads_first = tensor.transpose(1, 2)
        return function(heads_first, heads_first, heads_first)

    out = call(query)
    expected = call(query, torch.nn.functional.scaled_dot_product_attention)
    for mine, theirs in zip(out.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(query)
    assert all(map(torch.equal, compiled.unbind(), out.unbind()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jagged_in_every_dtype(dtype: torch.dtype) -> None:
    query = nested([3, 9, 1], 4).to(dtype).transpose(1, 2)
    assert ptk.attention(query, query, query, dropout_p=0.1).dtype == dtype


def test_jagged_errors() -> None:
    query = nested([3, 9, 1], 4).transpose(1, 2)
    dense = torch.randn(3, 4, 5, 16, dtype=torch.float64)
    for operands, options, error, message in (
        ((query, dense, dense), {}, TypeError, "key: expected a nested tensor"),
        ((query, query, query), {"attn_mask": torch.ones(1, 1)}, ValueError, "attn_mask: got a mask, expected None"),
        ((query, nested([3, 9, 1], 2).transpose(1, 2), nested([9, 3, 1], 2).transpose(1, 2)), {}, ValueError, "value"),
        ((query.transpose(1, 2),) * 3, {}, ValueError, "query: got shape .*, expected .batch, heads, jagged"),
    ):
        with pytest.raises(error, match=f"^attention: {message}"):
            ptk.attention(*operands, **options)
