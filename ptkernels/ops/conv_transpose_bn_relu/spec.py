"""The entry of conv_transpose_bn_relu in the table of operators: samples, PyTorch's own version, layers of models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, Tolerances, register
from ptkernels.ops.conv_bn_relu import reference as conv_reference
from ptkernels.ops.conv_bn_relu import routing
from ptkernels.ops.conv_bn_relu.spec import (
    SMALL,
    TORCH_ACTIVATIONS,
    VARIANTS,
    Case,
    after_convolution,
    direct_calls,
    options_of,
)
from ptkernels.ops.conv_transpose_bn_relu import conv_transpose_bn_relu, explain, reference

_small = replace(SMALL, transposed=True, kernel=(3, 2))

_GRADCHECK = [
    replace(_small, name="plain", norm="none", activation="tanh"),
    replace(_small, name="training", options=options_of(stride=2, padding=1, output_padding=1)),
    replace(_small, name="running", norm="running", activation="gelu", bias=False),
    replace(_small, name="residual", residual=True, activation="mish", options=options_of(padding=(1, 0), stride=2)),
    replace(_small, name="depthwise", activation="sigmoid", options=options_of(groups=2, stride=2)),
    replace(_small, name="line", space=(5,), kernel=(2,), activation="elu", affine=False, options=options_of(stride=3)),
    replace(_small, name="volume", space=(2, 3, 2), kernel=(1, 2, 2), norm="none", options=options_of(dilation=2)),
    replace(_small, name="channels-last", layout="channels_last", activation="tanh", options=options_of(stride=2)),
    replace(_small, name="group", channels=(2, 4), norm="group", options=options_of(num_groups=2, stride=2)),
    replace(_small, name="pre-activation", options=options_of(pre_activation="silu", stride=2, recompute=True)),
]

_CONVOLUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("4x4-stride-2", {"channels": (24, 16), "kernel": (4, 4)}, {"stride": 2, "padding": 1}),
    ("2x2-stride-2", {"channels": (16, 8), "kernel": (2, 2)}, {"stride": 2}),
    ("3x3-stride-2", {"channels": (9, 5)}, {"stride": 2, "padding": 1, "output_padding": 1}),
    ("3x3", {"channels": (18, 20)}, {"padding": 1}),
    ("1x1", {"channels": (33, 40), "kernel": (1, 1)}, {}),
    ("from-one-pixel", {"channels": (30, 20), "space": (1, 1), "kernel": (4, 4), "batch": 5}, {}),
    ("strides", {"channels": (5, 7)}, {"stride": (2, 3), "padding": (1, 0), "output_padding": (0, 2)}),
    ("dilated", {"channels": (5, 7)}, {"dilation": (2, 3), "padding": 2, "stride": 2, "output_padding": 1}),
    ("output-padding-of-dilation", {"channels": (5, 7)}, {"dilation": 3, "output_padding": 2}),
    ("stride-above-kernel", {"channels": (5, 7), "kernel": (2, 2)}, {"stride": 3, "output_padding": 2}),
    ("padding-above-kernel", {"channels": (3, 4), "space": (9, 8)}, {"padding": 4, "stride": 2}),
    ("grouped", {"channels": (12, 18)}, {"groups": 3, "padding": 1, "stride": 2}),
    ("depthwise", {"channels": (37, 37), "kernel": (4, 4)}, {"groups": 37, "padding": 1, "stride": 2}),
    ("line", {"channels": (7, 9), "space": (23,), "kernel": (5,)}, {"padding": 2, "stride": 4}),
    ("volume", {"channels": (5, 3), "space": (3, 4, 5), "kernel": (3, 3, 3)}, {"padding": 1, "stride": (1, 2, 2)}),
]

_QUICK = [
    *(
        Case(
            f"{name}-{norm}",
            norm=norm,
            residual=norm != "none",
            bias=norm == "none",
            options=options_of(**o),
            transposed=True,
            **sizes,
        )
        for name, sizes, o in _CONVOLUTIONS
        for norm in ("batch", "none")
    ),
    *(
        Case(
            f"{name}-channels-last",
            norm="running",
            layout="channels_last",
            residual=True,
            options=options_of(**o),
            transposed=True,
            **sizes,
        )
        for name, sizes, o in _CONVOLUTIONS
        if name in ("4x4-stride-2", "3x3", "1x1", "depthwise", "volume", "grouped", "line")
    ),
    Case("every-other", layout="every_other", residual=True, transposed=True),
    Case("no-batch", batch=0, norm="running", residual=True, transposed=True),
    Case("recompute", residual=True, options=options_of(recompute=True, stride=2), transposed=True),
    Case("leaky-0.2", activation="leaky_relu", options=options_of(negative_slope=0.2), transposed=True),
    *(Case(name, options=options_of(**options), transposed=True, **fields) for name, fields, options in VARIANTS),
]

_FULL = [
    *_QUICK,
    Case(
        "generator",
        channels=(128, 64),
        space=(16, 16),
        kernel=(4, 4),
        bias=False,
        options=options_of(stride=2, padding=1),
        transposed=True,
    ),
]

_CASES: dict[Level, list[Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny, ``quick`` has every feature and known trap, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    cases = [
        replace(_small, name="op-plain", norm="none"),
        replace(_small, name="op-training", layout="channels_last"),
    ]
    yield from direct_calls(cases, (True, [0, 0], 0, "none"), dtype, device)
    images = [replace(_small, name="op-images", norm="instance")]
    yield from direct_calls(images, (True, [0, 0], -1, "silu"), dtype, device)


def composition(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
    norm: str = "batch",
    num_groups: int | None = None,
    pre_activation: str = "none",
) -> Tensor:
    """Torch's transposed convolution, normalisation, addition and activation, one after the other."""
    x = TORCH_ACTIVATIONS[pre_activation](input, negative_slope)
    convolution = conv_reference.TRANSPOSED[input.dim()]
    u = convolution(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return after_convolution(
        u, bn_weight, bn_bias, running_mean, running_var, residual, training, momentum, eps, activation, negative_slope,
        norm, num_groups,
    )  # fmt: skip


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    trains = direction == "forward+backward"
    ins, outs, kernel = (shape[name] for name in ("C", "O", "K"))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    input = draw(shape["N"], ins, shape["H"], shape["H"]).to(dtype, memory_format=torch.channels_last)
    weight = (draw(ins, outs, kernel, kernel) / math.sqrt(ins * kernel * kernel / shape["S"] ** 2)).to(dtype)
    vectors = [draw(outs) * 0.2 + 1, draw(outs) * 0.2, draw(outs) * 0.1, draw(outs).square() * 0.2 + 0.5]
    bn_weight, bn_bias, mean, var = (vector.to(dtype) for vector in vectors)
    for tensor in (input, weight, bn_weight, bn_bias):
        tensor.requires_grad_(trains)
    kwargs = {"training": trains, "stride": shape["S"], "padding": shape["P"], "activation": shape["activation"]}
    return (input, weight, None, bn_weight, bn_bias, *((None, None) if trains else (mean, var))), kwargs


def _bench_case(name: str, model: str, shape: dict[str, Any], dtype: torch.dtype, direction: Direction) -> BenchCase:
    n, ins, outs, size, kernel, stride = (shape[key] for key in ("N", "C", "O", "H", "K", "S"))
    result = (size - 1) * stride - 2 * shape["P"] + kernel
    # Every input meets every tap but those whose result is cut off.
    flops = 2 * n * ins * size * size * outs * kernel * kernel
    given, made, weights = n * ins * size * size, n * outs * result * result, ins * outs * kernel * kernel
    traffic = (given + made + weights) * dtype.itemsize
    if direction == "forward+backward":
        # As of a convolution: two more products, and what they and the normalisation read and write.
        flops *= 3
        traffic += (made + 2 * made + 2 * given + 2 * weights) * dtype.itemsize
    return BenchCase(
        name, model, shape, dtype, direction, partial(_make_inputs, shape, dtype, direction), flops, traffic
    )


# name, model, in and out channels, size of the input, kernel, stride, padding, activation
_LAYERS: list[tuple[str, str, int, int, int, int, int, int, str]] = [
    ("512-256-8-4x4-s2", "DCGAN generator", 512, 256, 8, 4, 2, 1, "relu"),
    ("128-64-32-4x4-s2", "DCGAN generator", 128, 64, 32, 4, 2, 1, "relu"),
    ("128-64-64-2x2-s2", "U-Net", 128, 64, 64, 2, 2, 0, "relu"),
]


def bench_cases() -> list[BenchCase]:
    """Layers of named models: inference with 1 and 8 images, training with 8."""
    cases = []
    for name, model, ins, outs, size, kernel, stride, padding, activation in _LAYERS:
        layer = {"C": ins, "O": outs, "H": size, "K": kernel, "S": stride, "P": padding, "activation": activation}
        for dtype in (torch.float32, torch.bfloat16):
            for images in (1, 8):
                cases.append(_bench_case(f"{name}-n{images}", model, {"N": images, **layer}, dtype, "forward"))
            cases.append(_bench_case(f"{name}-n8", model, {"N": 8, **layer}, dtype, "forward+backward"))
    return cases


SPEC = register(
    OpSpec(
        name="conv_transpose_bn_relu",
        function=conv_transpose_bn_relu,
        reference=reference.conv_transpose_bn_relu,
        baseline=composition,
        torch_ops=("ptkernels::conv_bn_relu", "ptkernels::_conv_bn_relu_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=explain,
        tolerances=Tolerances(gradient=3.0),
        kept_by_autocast=("bn_weight", "bn_bias", "running_mean", "running_var"),
    )
)
