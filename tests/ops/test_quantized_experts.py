"""Stacked expert weights, and embedding tables in codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels.nn import QuantizedEmbedding
from ptkernels.ops.quantized_matmul.formats import SCHEMES

TABLES = [name for name, scheme in SCHEMES.items() if not scheme.quantizes_input]


def stacked(scheme: str = "int4_weight_only", n: int = 24, k: int = 64) -> tuple[ptk.QuantizedWeight, Tensor]:
    weight = torch.randn(3, n, k) / 8
    return ptk.quantize_weight(weight, scheme, 32 if "int4" in scheme else None), weight


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_weight_only", "int4_int8", "fp8_blocks"])
@pytest.mark.parametrize("counts", [[4, 0, 37], [1, 1, 1], [0, 0, 5], [0, 0, 0]])
def test_experts_are_separate_layers(scheme: str, counts: list[int]) -> None:
    """To the last bit: each expert's rows meet its weight as if it were alone."""
    qweight, weight = stacked(scheme)
    x, bias = torch.randn(sum(counts), 64), torch.randn(3, 24)
    residual = torch.randn(sum(counts), 24)
    out = ptk.quantized_linear(
        x, qweight, bias, residual=residual, activation="silu", counts=torch.tensor(counts, dtype=torch.int64)
    )
    alone = [
        ptk.quantized_linear(
            part, ptk.quantize_weight(matrix, scheme, qweight.group_size), shift, residual=added, activation="silu"
        )
        for part, matrix, shift, added in zip(x.split(counts), weight, bias, residual.split(counts), strict=True)
    ]
    assert torch.equal(out, torch.cat(alone))


def test_experts_with_swiglu_match_the_reference() -> None:
    qweight, _ = stacked("int8_weight_only")
    x, counts = torch.randn(30, 64).double(), torch.tensor([7, 0, 23])
    expected = ptk.reference.quantized_linear(x, qweight, activation="swiglu", counts=counts)
    assert expected.shape == (30, 12)
    torch.testing.assert_close(ptk.quantized_linear(x, qweight, activation="swiglu", counts=counts), expected)


def test_gradients_through_experts() -> None:
    qweight, _ = stacked(n=6, k=32)
    counts = torch.tensor([2, 0, 3])
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return ptk.quantized_linear(x, qweight, bias, activation="gelu", counts=counts)

    assert torch.autograd.gradcheck(call, (x, bias))
    assert torch.autograd.gradgradcheck(call, (x, bias))
    grad = torch.autograd.grad(call(x, bias).sum(), bias)[0]
    assert (grad[1] == 0).all()


def test_experts_compile() -> None:
    qweight, _ = stacked()
    x, counts = torch.randn(9, 64), torch.tensor([5, 1, 3])
    expected = ptk.quantized_linear(x, qweight, counts=counts)
    compiled = torch.compile(ptk.quantized_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, qweight, counts=counts), expected)


def test_stacked_weights_are_stored() -> None:
    qweight, weight = stacked()
    assert qweight.shape == weight.shape
    assert qweight.dequantize().shape == weight.shape
    again = ptk.QuantizedWeight.from_tensors(qweight.tensors())
    assert again.experts == 3
    assert torch.equal(again.dequantize(), qweight.dequantize())
    assert repr(qweight).startswith("QuantizedWeight(int4_weight_only, 3x24x64, group_size=32")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "counts: got NoneType, expected an int64 tensor on the CPU"),
        ([1, 2, 3], "counts: got list"),
        (torch.tensor([2.0, 2.0, 1.0]), "counts: got torch.float32"),
        (torch.tensor([5]), r"counts: got shape \[1\], expected \[3\]"),
        (torch.tensor([5, 0, 1]), "counts: got a sum of 6, expected 5"),
        (torch.tensor([6, -1, 0]), "counts: got -1, expected at least 0"),
    ],
)
def test_counts_that_are_wrong(counts: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        ptk.quantized_linear(torch.randn(5, 64), stacked()[0], counts=counts)  # type: ignore[arg-type]


def test_other_arguments_of_experts_that_are_wrong() -> None:
    counts = torch.tensor([2, 2, 1])
    with pytest.raises(ValueError, match=r"bias: got shape \[24\], expected \[3, 24\]"):
        ptk.quantized_linear(torch.randn(5, 64), stacked()[0], torch.randn(24), counts=counts)
    with pytest.raises(ValueError, match="x: got 3 dimensions with a stacked weight"):
        ptk.quantized_linear(torch.randn(1, 5, 64), stacked()[0], counts=counts)
    single = ptk.quantize_weight(torch.randn(4, 64), "int8_dynamic")
    with pytest.raises(ValueError, match="counts: got one with a single weight"):
        ptk.quantized_linear(torch.randn(5, 64), single, counts=counts)


# --- embeddings


@pytest.mark.parametrize("scheme", TABLES)
@pytest.mark.parametrize("k", [1, 33, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_lookups_are_rows_of_the_dequantized_table(scheme: str, k: int, dtype: torch.dtype) -> None:
    table = ptk.quantize_weight(torch.randn(11, k), scheme)
    index = torch.tensor([[3, 10, 3], [0, 1, 2]])
    out = ptk.quantized_embedding(index, table, dtype=dtype)
    assert torch.equal(out, table.dequantize(dtype)[index])


def test_lookups_with_fractional_zero_points() -> None:
    table = ptk.quantization.hqq(torch.randn(7, 70), "int4_weight_only", 32)
    index = torch.arange(7)
    assert torch.equal(ptk.quantized_embedding(index, table), table.dequantize())


def test_embedding_module() -> None:
    embedding = nn.Embedding(50, 96)
    table = QuantizedEmbedding.from_float(embedding, "int8_weight_only")
    index = torch.randint(0, 50, (4, 7))
    assert (table(index) - embedding(index)).abs().max() < 0.02
    assert table.bfloat16().scales.dtype == torch.float32
    other = QuantizedEmbedding.from_float(nn.Embedding(50, 96), "int8_weight_only")
    other.load_state_dict(table.state_dict())
    assert torch.equal(other(index), table(index))
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(index), table(index))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([7]), "input: got index 7, expected 0 to 6"),
        (torch.tensor([-1]), "input: got index -1"),
        (torch.tensor([0.5]), "input: got torch.float32"),
        ([1], "input: got list"),
    ],
)
def test_indices_that_are_wrong(index: object, message: str) -> None:
    table = ptk.quantize_weight(torch.randn(7, 32), "nf4")
    with pytest.raises((TypeError, RuntimeError), match=message):
        ptk.quantized_embedding(index, table)  # type: ignore[arg-type]


def test_tables_that_are_wrong() -> None:
    with pytest.raises(ValueError, match="qweight: got a stack of 3 weights"):
        ptk.quantized_embedding(torch.tensor([0]), stacked()[0])
    with pytest.raises(ValueError, match="QuantizedEmbedding: weight: got QuantizedWeight"):
        QuantizedEmbedding(ptk.quantize_weight(torch.randn(7, 32), "int8_dynamic"))
    with pytest.raises(TypeError, match=r"dtype: got torch\.int8"):
        ptk.quantized_embedding(torch.tensor([0]), ptk.quantize_weight(torch.randn(7, 32), "nf4"), dtype=torch.int8)


@pytest.mark.parametrize("test", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_the_operator_is_registered_as_it_behaves(test: str) -> None:
    table = ptk.quantize_weight(torch.randn(7, 48), "int4_weight_only", 16)
    args = (torch.tensor([6, 1]), table.codes, table.scales, None, "u4", 16, 48, torch.bfloat16)
    torch.library.opcheck(torch.ops.ptkernels.quantized_embedding.default, args, test_utils=test)
