"""The operator's entry in the table: sample calls, PyTorch's own version, bench shapes of real models."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, register
from ptkernels.ops.quantized_matmul import quantized_linear, reference, routing
from ptkernels.ops.quantized_matmul.formats import SCHEMES
from ptkernels.ops.quantized_matmul.quantize import quantize_weight
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight


def _layout_transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def _layout_every_other(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1)), math.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _layout_misaligned(tensor: Tensor) -> Tensor:
    storage = tensor.new_full((*tensor.shape[:-1], tensor.size(-1) + 3), math.nan)
    view = storage[..., 1 : 1 + tensor.size(-1)]
    view.copy_(tensor)
    return view


def _layout_expanded(tensor: Tensor) -> Tensor:
    return tensor[..., :1, :].expand_as(tensor)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": _layout_transposed,
    "every_other": _layout_every_other,
    "misaligned": _layout_misaligned,
    "expanded": _layout_expanded,
}


@dataclass(frozen=True)
class _Case:
    name: str
    lead: tuple[int, ...]
    n: int
    k: int
    scheme: str
    group_size: int | None = None
    symmetric: bool = True
    extras: bool = True
    activation: str | None = None
    layout: str = "contiguous"

    def weight(self, device: str) -> QuantizedWeight:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        weight = torch.randn(self.n, self.k, generator=generator, device=device) / max(self.k, 1) ** 0.5
        step = 3.0 / 127 if SCHEMES[self.scheme].is_static else None
        return quantize_weight(weight, self.scheme, self.group_size, symmetric=self.symmetric, input_scale=step)

    def sample(self, dtype: torch.dtype, device: str, requires_grad: bool) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()) + 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        x = _LAYOUTS[self.layout](draw(*self.lead, self.k)).detach().requires_grad_(requires_grad)
        if not self.extras:
            kwargs = {} if self.activation is None else {"activation": self.activation}
            return Sample(self.name, (x, self.weight(device)), kwargs, ("x",))
        bias = draw(self.n).requires_grad_(requires_grad)
        residual = _LAYOUTS[self.layout](draw(*self.lead, self.n)).detach().requires_grad_(requires_grad)
        options: dict[str, Any] = {"residual": residual}
        if self.activation is not None:
            options["activation"] = self.activation
        names = ("x", "bias", "residual")
        return Sample(self.name, (x, self.weight(device), bias), options, names, batch_inputs=("x", "residual"))


_GRADCHECK = [
    _Case("int8", (3,), 4, 16, "int8_weight_only"),
    _Case("int8-few-rows", (2, 3), 5, 18, "int8_weight_only", 16),
    _Case("int4-gelu", (3,), 4, 20, "int4_weight_only", 16, symmetric=False, activation="gelu"),
    _Case("fp8", (2,), 3, 7, "fp8"),
    _Case("nf4-swiglu", (5,), 4, 16, "nf4", activation="swiglu"),
    _Case("mxfp4-silu", (2,), 3, 33, "mxfp4", activation="silu"),
    _Case("int2-gelu-tanh", (3,), 3, 20, "int2_weight_only", 16, activation="gelu_tanh"),
    _Case("int8-transposed", (3,), 4, 16, "int8_weight_only", layout="transposed"),
]

_QUICK = [
    *(
        _Case(f"{scheme}-{rows}", (rows,), 70, 256 if rows == 3 else 161, scheme)
        for scheme in SCHEMES
        for rows in (1, 3, 37)
    ),
    *(
        _Case(f"{scheme}-zero-points-{rows}", (rows,), 34, 192, scheme, 32, symmetric=False)
        for scheme in ("int4_weight_only", "int4_int8", "int3_weight_only", "int2_weight_only")
        for rows in (2, 20)
    ),
    *(
        _Case(f"{scheme}-group-{group}-{rows}", (rows,), 20, 320, scheme, group)
        for scheme, group in (
            ("int8_weight_only", 32),
            ("int8_dynamic", 64),
            ("int8_dynamic", 16),
            ("int4_weight_only", 64),
            ("int4_weight_only", -1),
            ("int4_int8", 32),
        )
        for rows in (4, 18)
    ),
    *(
        _Case(f"{scheme}-{activation}", (9,), 66, 48, scheme, activation=activation)
        for scheme in ("int8_dynamic", "int4_weight_only")
        for activation in ("relu", "gelu", "gelu_tanh", "silu", "swiglu")
    ),
    _Case("swiglu-one-row", (1,), 130, 64, "int8_dynamic", activation="swiglu"),
    _Case("swiglu-many-rows", (40,), 260, 64, "int8_dynamic", activation="swiglu"),
    _Case("int8-many-rows", (300,), 130, 520, "int8_dynamic"),
    _Case("plain-input-only", (11,), 40, 64, "int8_weight_only", extras=False),
    *(
        _Case(f"{scheme}-{layout}", (2, 5), 24, 96, scheme, layout=layout)
        for scheme in ("int8_dynamic", "int4_weight_only")
        for layout in _LAYOUTS
        if layout != "contiguous"
    ),
    _Case("vector", (), 9, 32, "int8_dynamic"),
    _Case("no-rows", (0, 3), 9, 32, "int8_dynamic"),
    _Case("no-columns", (3,), 0, 32, "int4_weight_only"),
    _Case("no-depth", (6,), 9, 0, "int8_weight_only"),
]

_FULL = [
    *_QUICK,
    *(
        _Case(f"{scheme}-{rows}x{n}x{k}", (rows,), n, k, scheme)
        for scheme in ("int8_dynamic", "int4_weight_only", "int4_int8", "nf4")
        for rows, n, k in ((1, 257, 1031), (4, 129, 2048), (5, 128, 640), (259, 300, 1100))
    ),
]

_CASES: dict[Level, list[_Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny and differentiable, ``quick`` has every feature, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    cases = [
        _Case("op-int8", (3,), 5, 24, "int8_dynamic"),
        _Case("op-int4", (6,), 4, 32, "int4_weight_only", 16, symmetric=False, activation="swiglu"),
        _Case("op-static", (2,), 3, 17, "int8_static", activation="relu"),
    ]
    for case in cases:
        sample = case.sample(dtype, device, requires_grad=True)
        x, weight, bias = sample.args
        stored = (weight.codes, weight.scales, weight.zeros)
        spec = weight.spec
        options = (spec.code.name, weight.group_size, spec.quantizes_input, weight.input_scale)
        activation = case.activation or "none"
        yield (
            "ptkernels::quantized_linear",
            (x, *stored, bias, sample.kwargs["residual"], *options, activation, None),
        )
        grad = torch.randn(x.size(0), case.n, device=device).to(dtype).requires_grad_()
        yield "ptkernels::_quantized_linear_backward", (grad, *stored, *options[:2], case.k)
    stacked = quantize_weight(torch.randn(2, 3, 24, device=device), "int8_dynamic")
    x = torch.randn(5, 24, device=device).to(dtype).requires_grad_()
    stored, counts = (stacked.codes, stacked.scales, None), torch.tensor([2, 3])
    yield (
        "ptkernels::quantized_linear",
        (x, *stored, None, None, "s8", -1, True, None, "none", None, counts),
    )
    grad = torch.randn(5, 3, device=device).to(dtype).requires_grad_()
    yield "ptkernels::_quantized_linear_backward", (grad, *stored, "s8", -1, 24, counts)


def composition(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """PyTorch's own linear layer, in the dtype of the input, on the dequantized weight and the rounded input."""
    value = reference.straight_through(x, qweight.input_scale) if qweight.spec.quantizes_input else x
    weight = qweight.dequantize(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if counts is None:
        out = F.linear(value, weight, bias)
    else:
        biases = [None] * len(weight) if bias is None else bias
        out = torch.cat(list(map(F.linear, value.split(counts.tolist()), weight, biases)))
    if residual is not None:
        out = out + residual.to(x.dtype)
    return reference.activate(out, activation).to(x.dtype if out_dtype is None else out_dtype)


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    device = generator.device
    weight = torch.randn(shape["N"], shape["K"], generator=generator, device=device) / shape["K"] ** 0.5
    x = torch.randn(shape["M"], shape["K"], generator=generator, device=device).to(dtype)
    qweight = quantize_weight(weight, shape["scheme"], shape["group"])
    return (x.requires_grad_(direction == "forward+backward"), qweight), {}


def _bench_case(name: str, model: str, shape: dict[str, Any], dtype: torch.dtype, direction: Direction) -> BenchCase:
    m, n, k = shape["M"], shape["N"], shape["K"]
    scheme = SCHEMES[shape["scheme"]]
    groups = 1 if shape["group"] == -1 else -(-k // shape["group"])
    flops = 2 * m * n * k
    traffic = n * scheme.code.row_bytes(k) + 4 * n * groups + m * (k + n) * dtype.itemsize
    if direction == "forward+backward":
        flops, traffic = 2 * flops, 2 * traffic
    make = partial(_make_inputs, shape, dtype, direction)
    multiplied = torch.int8 if scheme.quantizes_input and direction == "forward" else None
    return BenchCase(
        name, f"{model} {scheme.name}", shape, dtype, direction, make, flops, traffic, multiplied=multiplied
    )


_BENCH_LAYERS = [
    ("bert-ffn", "BERT-base", 3072, 768),
    ("bert-ffn-down", "BERT-base", 768, 3072),
    ("llama-attention", "Llama-2-7B", 4096, 4096),
    ("llama-ffn", "Llama-2-7B", 11008, 4096),
    ("llama-3-ffn", "Llama-3-8B", 14336, 4096),
]
_BENCH_SCHEMES = [("int8_dynamic", -1), ("int8_weight_only", -1), ("int4_weight_only", 128), ("int4_int8", 128)]


def bench_cases() -> list[BenchCase]:
    """Layers of named models for generation (one row), small batches and prompts, and their input's gradient."""
    cases = []
    for layer, model, n, k in _BENCH_LAYERS:
        for scheme, group in _BENCH_SCHEMES:
            for rows in (1, 4, 16, 64, 256, 1024):
                shape = {"M": rows, "N": n, "K": k, "scheme": scheme, "group": group}
                for dtype in (torch.float32, torch.bfloat16):
                    cases.append(_bench_case(f"{layer}-{scheme}-{rows}", model, shape, dtype, "forward"))
            shape = {"M": 256, "N": n, "K": k, "scheme": scheme, "group": group}
            cases.append(_bench_case(f"{layer}-{scheme}-train", model, shape, torch.float32, "forward+backward"))
    return cases


SPEC = register(
    OpSpec(
        name=routing.NAME,
        function=quantized_linear,
        reference=reference.quantized_linear,
        baseline=composition,
        torch_ops=("ptkernels::quantized_linear", "ptkernels::_quantized_linear_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=routing.explain,
        peers={"torch composition": composition},
    )
)
