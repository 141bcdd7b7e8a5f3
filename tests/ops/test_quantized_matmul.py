"""Quantized linear layers: formats, accuracy, edge cases, storage. The promises of every operator: tests/contract."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels.ops.quantized_matmul.formats import CODE_FORMATS, SCHEMES, pack_codes, unpack_codes
from ptkernels.ops.quantized_matmul.reference import input_codes

BACKWARD = torch.ops.ptkernels._quantized_linear_backward
DYNAMIC = [name for name, scheme in SCHEMES.items() if not scheme.is_static]


def quantize(weight: Tensor, scheme: str, group_size: int | None = None, **options: Any) -> ptk.QuantizedWeight:
    step = 3.0 / 127 if SCHEMES[scheme].is_static else None
    if SCHEMES[scheme].group_sizes:
        group_size = None
    return ptk.quantize_weight(weight, scheme, group_size, input_scale=step, **options)


def exact_integers(rows: int, columns: int, low: int, high: int) -> Tensor:
    """Rows that reach +-127 / 127ths, so that quantizing them changes nothing and their scale is 1."""
    values = torch.randint(low, high + 1, (rows, columns)).float()
    values[:, 0] = 127.0
    return values


# --- integers


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 33])
@pytest.mark.parametrize("k", [1, 15, 16, 64, 100, 515, 2048])
def test_full_range_integers_are_exact(rows: int, k: int) -> None:
    """Saturating 16-bit sums, the known trap of 8-bit products on AVX2, would show here."""
    x, weight = exact_integers(rows, k, -127, 127), exact_integers(37, k, -127, 127)
    out = ptk.quantized_linear(x.double(), ptk.quantize_weight(weight, "int8_dynamic"))
    assert torch.equal(out, x.double() @ weight.double().T)
    out = ptk.quantized_linear(x, ptk.quantize_weight(weight, "int8_dynamic"))
    assert torch.equal(out, (x.double() @ weight.double().T).float())


def test_extreme_pairs_are_exact() -> None:
    k = 4096
    x, weight = torch.full((7, k), 127.0), torch.full((9, k), 127.0)
    weight[1::2] *= -1
    x[::2] *= -1
    out = ptk.quantized_linear(x, ptk.quantize_weight(weight, "int8_dynamic"))
    assert torch.equal(out, x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_codes_of_the_input_are_the_references(dtype: torch.dtype) -> None:
    """Against the identity the kernel's codes can be read off, ties and all."""
    k = 208
    x = torch.cat([torch.randn(40, k), torch.randint(-9, 10, (24, k)) / 2]).to(dtype)
    identity = ptk.quantize_weight(torch.eye(k), "int8_dynamic")
    codes, scale = input_codes(x)
    for chunk in (slice(None), slice(0, 4), slice(60, 61)):
        out = ptk.quantized_linear(x[chunk], identity, out_dtype=None if dtype == torch.float64 else torch.float32)
        assert torch.equal((out / scale[chunk]).round(), codes[chunk].to(out.dtype))


# --- accuracy: of quantization, apart from the kernels'

SQNR_FLOORS = {  # dB on Gaussian weights and inputs, and with one outlier in a hundred
    "int8_dynamic": (36.0, 28.0),
    "int8_weight_only": (39.0, 31.0),
    "fp8": (30.0, 30.0),
    "fp8_blocks": (30.0, 30.0),
    "int3_weight_only": (11.5, 6.5),
    "int4_weight_only": (17.5, 11.0),
    "int4_int8": (17.5, 11.0),
    "nf4": (19.5, 13.0),
    "mxfp4": (17.0, 15.0),
    "int2_weight_only": (4.0, 2.0),
}


def sqnr(actual: Tensor, expected: Tensor) -> float:
    return 10 * math.log10(float(expected.square().sum() / (actual - expected).square().sum()))


@pytest.mark.parametrize("scheme", SQNR_FLOORS)
def test_quantization_noise_has_a_floor(scheme: str) -> None:
    weight, x = torch.randn(256, 1024), torch.randn(64, 1024)
    spiky = torch.where(torch.rand_like(weight) < 0.01, 5 * weight, weight)
    for tensor, floor in zip((weight, spiky), SQNR_FLOORS[scheme], strict=True):
        assert sqnr(ptk.quantized_linear(x, quantize(tensor, scheme)), x @ tensor.T) > floor


def test_zero_points_help_where_weights_are_one_sided() -> None:
    weight, x = torch.rand(64, 256) + 0.5, torch.randn(16, 256)
    gains = [
        sqnr(ptk.quantized_linear(x, quantize(weight, "int4_weight_only", 32, symmetric=symmetric)), x @ weight.T)
        for symmetric in (True, False)
    ]
    assert gains[1] > gains[0]


# --- formats


@pytest.mark.parametrize("name", ["u4", "u3", "u2"])
@pytest.mark.parametrize("k", [0, 1, 2, 7, 16])
def test_packing_is_undone(name: str, k: int) -> None:
    code = CODE_FORMATS[name]
    values = torch.randint(0, 2**code.bits, (5, k), dtype=torch.uint8)
    packed = pack_codes(values, code)
    assert packed.shape == (5, code.row_bytes(k))
    assert torch.equal(unpack_codes(packed, code, k), values)


def test_layout_of_the_format() -> None:
    """As documented: it outlives releases."""
    weight = torch.tensor([[-8.0, 7.0, 1.0, 0.0] + [0.0] * 12])
    quantized = ptk.quantize_weight(weight, "int4_weight_only", 16)
    assert quantized.scales.tolist() == [[1.0]]
    assert quantized.codes[0, :2].tolist() == [0xF0, 0x89]
    quantized = ptk.quantize_weight(weight.clamp(-2, 1), "int2_weight_only", 16)
    assert quantized.codes[0, :2].tolist() == [0b10111100, 0b10101010]
    assert quantized.tensors()["format"].tolist() == [1, 6, 16, 16]
    quantized = ptk.quantize_weight(weight.clamp(-4, 3), "int3_weight_only", 16)
    assert quantized.codes[0, :3].tolist() == [0b01111000, 0b01001001, 0b10010010]


@pytest.mark.parametrize("rows", [1, 7])
def test_every_8_bit_float_is_decoded(rows: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    values = codes.view(torch.float8_e4m3fn).float()

    def weight(codes: Tensor) -> ptk.QuantizedWeight:
        return ptk.QuantizedWeight(codes, torch.ones(1, 1), None, None, "fp8", -1, 256)

    assert values.isnan().sum() == 2
    assert ptk.quantized_linear(torch.ones(rows, 256), weight(codes)).isnan().all()
    numbers = weight(codes.masked_fill(values.isnan(), 0))
    for column in range(256):
        x = torch.zeros(rows, 256)
        x[:, column] = 1.0
        assert torch.equal(ptk.quantized_linear(x, numbers), values.nan_to_num(0.0)[:, column].expand(rows, 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_representable_weights_are_kept(scheme: str) -> None:
    once = quantize(torch.randn(6, 64), scheme, 32).dequantize()
    torch.testing.assert_close(quantize(once, scheme, 32).dequantize(), once, rtol=1e-6, atol=0)


# --- edge cases


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zero_weights(scheme: str) -> None:
    weight = quantize(torch.zeros(5, 64), scheme, 32)
    assert torch.equal(weight.dequantize(), torch.zeros(5, 64))
    assert torch.equal(ptk.quantized_linear(torch.randn(6, 64), weight), torch.zeros(6, 5))


@pytest.mark.parametrize("scheme", ["int8_weight_only", "int8_dynamic", "fp8", "nf4"])
def test_constant_weights(scheme: str) -> None:
    weight = quantize(torch.full((3, 64), -0.7), scheme, 32)
    torch.testing.assert_close(weight.dequantize(), torch.full((3, 64), -0.7))


@pytest.mark.parametrize("value", [0.0, 1e-40, 3e-31])
@pytest.mark.parametrize("rows", [2, 6])
def test_rows_too_small_for_a_scale_give_the_bias(value: float, rows: int) -> None:
    weight, bias = ptk.quantize_weight(torch.randn(7, 48), "int8_dynamic"), torch.randn(7)
    assert torch.equal(ptk.quantized_linear(torch.full((rows, 48), value), weight, bias), bias.expand(rows, 7))


def test_small_rows_keep_their_precision() -> None:
    weight, x = ptk.quantize_weight(torch.randn(8, 64), "int8_dynamic"), torch.randn(3, 64)
    tiny = ptk.quantized_linear(x * 2.0**-90, weight)
    assert torch.equal(tiny * 2.0**90, ptk.quantized_linear(x, weight))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("scheme", ["int8_dynamic", "int4_int8"])
def test_rows_that_are_not_finite(bad: float, rows: int, scheme: str) -> None:
    weight, x = ptk.quantize_weight(torch.randn(20, 64), scheme, 32), torch.randn(rows, 64)
    clean = ptk.quantized_linear(x, weight)
    x[1, 5] = bad
    out = ptk.quantized_linear(x, weight)
    assert out[1].isnan().all()
    keep = torch.arange(rows) != 1
    assert torch.equal(out[keep], clean[keep])


def test_outlier_sets_the_scale_of_its_row_only() -> None:
    weight, x = ptk.quantize_weight(torch.randn(20, 64), "int8_dynamic"), torch.randn(6, 64)
    clean = ptk.quantized_linear(x, weight)
    x[2, 0] = 1e6
    out = ptk.quantized_linear(x, weight)
    assert torch.equal(out[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    torch.testing.assert_close(out[2], 1e6 * weight.dequantize()[:, 0])


def test_static_scale_saturates() -> None:
    weight = ptk.quantize_weight(torch.eye(16), "int8_static", input_scale=0.1)
    x = torch.tensor([[0.04, 0.06, -0.16, 500.0] + [0.0] * 12])
    expected = torch.tensor([0.0, 0.1, -0.2, 12.7])
    torch.testing.assert_close(ptk.quantized_linear(x, weight)[0, :4], expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    n=st.integers(0, 140),
    k=st.integers(0, 300),
    scheme=st.sampled_from(DYNAMIC),
    group=st.sampled_from([None, -1, 16, 48, 64]),
    symmetric=st.booleans(),
)
def test_any_shape(rows: int, n: int, k: int, scheme: str, group: int | None, symmetric: bool) -> None:
    spec = SCHEMES[scheme]
    symmetric = symmetric or spec.code.name not in ("u4", "u2")
    group = None if spec.group_sizes else group
    weight, x = quantize(torch.randn(n, k), scheme, group, symmetric=symmetric), torch.randn(rows, k)
    out = ptk.quantized_linear(x, weight)
    expected = ptk.reference.quantized_linear(x.double(), weight)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5 * max(k, 1) ** 0.5)
    grad = torch.randn(rows, n)
    args = (weight.codes, weight.scales, weight.zeros, spec.code.name, weight.group_size, k)
    expected = grad.double() @ weight.dequantize(torch.float64)
    torch.testing.assert_close(BACKWARD(grad, *args).double(), expected, rtol=1e-5, atol=1e-5 * max(n, 1) ** 0.5)


# --- dtypes and options


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_mix(out_dtype: torch.dtype) -> None:
    weight = ptk.quantize_weight(torch.randn(12, 40), "int8_weight_only")
    x, bias, residual = torch.randn(6, 40).bfloat16(), torch.randn(12), torch.randn(6, 12).half()
    out = ptk.quantized_linear(x, weight, bias, residual=residual, out_dtype=out_dtype)
    expected = ptk.reference.quantized_linear(x.double(), weight, bias.double(), residual=residual.double())
    assert out.dtype == out_dtype
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps * 10)


def test_gradients_come_in_the_dtypes_of_the_inputs() -> None:
    weight = ptk.quantize_weight(torch.randn(12, 40), "int8_weight_only")
    x = torch.randn(6, 40).bfloat16().requires_grad_()
    bias, residual = torch.randn(12, requires_grad=True), torch.randn(6, 12).half().requires_grad_()
    ptk.quantized_linear(
        x, weight, bias, residual=residual, out_dtype=torch.float32, activation="silu"
    ).sum().backward()
    assert [tensor.grad.dtype for tensor in (x, bias, residual)] == [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("rows", [3, 40])
def test_backward_holds_no_decoded_weight(rows: int) -> None:
    """The kernels' own memory comes from outside torch's allocator; what torch allocates is the gradient alone."""
    weight, grad = ptk.quantize_weight(torch.randn(256, 512), "nf4"), torch.randn(rows, 256)
    with torch.profiler.profile(profile_memory=True) as profile:
        BACKWARD(grad, weight.codes, weight.scales, weight.zeros, "nf4", weight.group_size, 512)
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated <= 2 * rows * 512 * 4


# --- storage


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static", "int4_weight_only"])
def test_weights_survive_storage(scheme: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weight = quantize(torch.randn(10, 64), scheme, 32, symmetric=scheme != "int4_weight_only")
    x = torch.randn(3, 64)
    expected = ptk.quantized_linear(x, weight)
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    safetensors.save_file(weight.tensors(), tmp_path / "w.safetensors")
    copies = [
        torch.load(buffer, weights_only=True),
        pickle.loads(pickle.dumps(weight)),
        copy.deepcopy(weight),
        weight.to("cpu"),
        ptk.QuantizedWeight.from_tensors(weight.tensors()),
        ptk.QuantizedWeight.from_tensors(safetensors.load_file(tmp_path / "w.safetensors")),
    ]
    assert all(torch.equal(ptk.quantized_linear(x, each), expected) for each in copies)


def test_stored_tensors_of_another_version_are_refused() -> None:
    tensors = ptk.quantize_weight(torch.randn(4, 32), "nf4").tensors()
    for index, value, message in ((0, 2, "version 2, expected 1"), (1, 99, "scheme 99"), (3, 40, "codes")):
        changed = tensors["format"].clone()
        changed[index] = value
        with pytest.raises(ValueError, match=message):
            ptk.QuantizedWeight.from_tensors({**tensors, "format": changed})
    with pytest.raises(ValueError, match="got none called scales"):
        ptk.QuantizedWeight.from_tensors({name: tensors[name] for name in ("codes", "format")})


# --- where it runs


@pytest.mark.parametrize(("rows", "kernel"), [(1, "direct"), (4, "direct"), (33, "tiled")])
def test_explain_names_the_kernel(rows: int, kernel: str) -> None:
    weight = ptk.quantize_weight(torch.randn(8, 32), "int8_dynamic")
    account = ptk.explain("quantized_matmul", torch.randn(rows, 32), weight)
    assert account.kernel.endswith(f"{kernel}_int8") or account.kernel.startswith("libptkernels.so")
    assert account.backend == "cpu"


def test_forward_mode_is_announced(strict: None) -> None:
    weight, x = ptk.quantize_weight(torch.randn(8, 32), "int8_weight_only"), torch.randn(2, 32)
    with pytest.raises(ptk.errors.FallbackError, match="forward-mode differentiation has no kernel"):
        torch.func.jvp(lambda t: ptk.quantized_linear(t, weight), (x,), (x,))


def test_reference_backend() -> None:
    weight, x = ptk.quantize_weight(torch.randn(8, 32), "int4_int8"), torch.randn(2, 32)
    with ptk.backend("reference"):
        out = ptk.quantized_linear(x, weight, activation="swiglu")
        assert ptk.explain(ptk.quantized_linear, x, weight).backend == "reference"
    torch.testing.assert_close(out, ptk.quantized_linear(x, weight, activation="swiglu"))


# --- straight through


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static", "int4_int8"])
def test_quantized_input_passes_its_gradient_through(scheme: str) -> None:
    weight = quantize(torch.randn(12, 64), scheme, 32)
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 12, dtype=torch.float64)
    (actual,) = torch.autograd.grad(ptk.quantized_linear(x, weight), x, grad)
    torch.testing.assert_close(actual, grad @ weight.dequantize(torch.float64))
    (expected,) = torch.autograd.grad(ptk.reference.quantized_linear(x, weight), x, grad)
    torch.testing.assert_close(actual, expected)


# --- a small network


def test_argmax_of_a_trained_classifier_is_kept() -> None:
    """An MLP 50-30-20-3 on separable data: nearly every class is kept, and accuracy is within a percent."""
    centres = 2.0 * torch.randn(3, 50)
    labels = torch.randint(0, 3, (1500,))
    data = centres[labels] + torch.randn(1500, 50)
    model = nn.Sequential(nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[:1000]), labels[:1000]).backward()
        optimizer.step()
    expected = model(data[1000:]).argmax(-1)
    for scheme in ("int8_dynamic", "int8_weight_only", "int4_weight_only"):
        quantized = copy.deepcopy(model)
        ptk.nn.quantize_(quantized, scheme, group_size=16 if scheme == "int4_weight_only" else None)
        actual = quantized(data[1000:]).argmax(-1)
        assert (actual == expected).float().mean() > 0.98
        accuracy, before = ((each == labels[1000:]).float().mean() for each in (actual, expected))
        assert accuracy > before - 0.01
