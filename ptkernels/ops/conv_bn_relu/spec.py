"""The entry of conv_bn_relu in the table of operators: samples, PyTorch's own version, shapes of real models."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, Tolerances, register
from ptkernels.ops.conv_bn_relu import conv_bn_relu, explain, reference, routing

_GRAD_INPUTS = ("input", "weight", "bias", "bn_weight", "bn_bias", "residual")


def _channels_last(tensor: Tensor) -> Tensor:
    """Same values, channels innermost; of a line of three dimensions a view that is not dense."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _every_other(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1)), math.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "channels_last": _channels_last,
    "every_other": _every_other,
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
}


@dataclass(frozen=True)
class _Case:
    name: str
    channels: tuple[int, int] = (4, 6)
    space: tuple[int, ...] = (7, 9)
    kernel: tuple[int, ...] = (3, 3)
    batch: int = 2
    norm: str = "batch"
    """``batch`` statistics, ``running`` ones, or ``none``."""
    affine: bool = True
    bias: bool = True
    residual: bool = False
    activation: str = "silu"
    """Smooth by default: where a 16-bit sum falls on the other side of a corner, the whole gradient changes."""
    layout: str = "contiguous"
    options: tuple[tuple[str, Any], ...] = ()

    def sample(self, dtype: torch.dtype, device: str, requires_grad: bool) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

        def given(tensor: Tensor) -> Tensor:
            return tensor.to(dtype).requires_grad_(requires_grad)

        options = dict(self.options)
        ins, outs = self.channels
        fan_in = ins // options.get("groups", 1) * math.prod(self.kernel)
        input = draw(self.batch, ins, *self.space)
        weight = draw(outs, ins // options.get("groups", 1), *self.kernel) / math.sqrt(fan_in)
        input = _LAYOUTS[self.layout](input.to(dtype)).detach().requires_grad_(requires_grad)
        bias = given(draw(outs)) if self.bias else None
        kwargs: dict[str, Any] = {"activation": self.activation, **options}
        grad_inputs = ["input", "weight"] + ["bias"] * self.bias
        if self.norm != "none" and self.affine:
            kwargs |= {"bn_weight": given(draw(outs) * 0.5 + 1), "bn_bias": given(draw(outs) * 0.3)}
            grad_inputs += ["bn_weight", "bn_bias"]
        if self.norm == "running":
            kwargs |= {"running_mean": draw(outs).to(dtype), "running_var": (draw(outs).square() + 0.5).to(dtype)}
        if self.norm == "batch":
            kwargs["training"] = True
        if self.residual:
            shape = conv_shape(input, weight, options)
            kwargs["residual"] = _LAYOUTS[self.layout](given(draw(*shape)).detach()).requires_grad_(requires_grad)
            grad_inputs.append("residual")
        return Sample(
            self.name, (input, weight.to(dtype).requires_grad_(requires_grad), bias), kwargs, tuple(grad_inputs)
        )


def conv_shape(input: Tensor, weight: Tensor, options: dict[str, Any]) -> tuple[int, ...]:
    """Shape of a convolution's result."""
    names = ("stride", "padding", "dilation", "groups")
    given = {name: options[name] for name in names if name in options}
    convolution = reference.CONVOLUTIONS[input.dim()]
    return tuple(convolution(input.to("meta"), weight.to("meta"), **given).shape)


def _options(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


_SMALL = _Case("small", channels=(2, 2), space=(3, 4), kernel=(2, 2), batch=2)

# Activations without corners, where finite differences must not straddle one.
_GRADCHECK = [
    replace(_SMALL, name="plain", norm="none", activation="tanh"),
    replace(_SMALL, name="training", activation="silu"),
    replace(_SMALL, name="running", norm="running", activation="gelu", bias=False),
    replace(_SMALL, name="residual", residual=True, activation="mish", options=_options(padding=1, stride=2)),
    replace(_SMALL, name="depthwise", activation="sigmoid", options=_options(groups=2, padding=1)),
    replace(_SMALL, name="line", space=(6,), kernel=(2,), activation="elu", affine=False, options=_options(dilation=2)),
    replace(_SMALL, name="volume", space=(2, 3, 2), kernel=(1, 2, 2), norm="none", activation="hardswish"),
    replace(_SMALL, name="channels-last", layout="channels_last", activation="tanh", options=_options(padding=1)),
    replace(_SMALL, name="recompute", activation="silu", options=_options(recompute=True)),
]

_CONVOLUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("3x3", {"channels": (16, 24)}, {"padding": 1}),
    ("1x1", {"channels": (33, 40), "kernel": (1, 1)}, {}),
    ("1x1-stride-2", {"channels": (33, 40), "kernel": (1, 1)}, {"stride": 2}),
    ("stem", {"channels": (3, 32), "space": (19, 21), "kernel": (7, 7)}, {"stride": 2, "padding": 3}),
    ("strides", {"channels": (5, 7), "space": (11, 13)}, {"stride": (2, 3), "padding": (1, 2)}),
    ("dilated", {"channels": (5, 7), "space": (11, 13)}, {"dilation": (2, 3), "padding": 2, "stride": 2}),
    ("stride-above-kernel", {"channels": (5, 7), "kernel": (2, 2), "space": (9, 11)}, {"stride": 3}),
    ("same", {"channels": (3, 5), "kernel": (2, 4)}, {"padding": "same"}),
    ("grouped", {"channels": (12, 18)}, {"groups": 3, "padding": 1}),
    ("depthwise", {"channels": (37, 37), "space": (9, 14)}, {"groups": 37, "padding": 1}),
    ("depthwise-stride-2", {"channels": (16, 16), "kernel": (5, 5)}, {"groups": 16, "padding": 2, "stride": 2}),
    ("multiplier", {"channels": (4, 8)}, {"groups": 4, "padding": 1}),
    ("line", {"channels": (7, 9), "space": (23,), "kernel": (5,)}, {"padding": 2}),
    ("volume", {"channels": (3, 5), "space": (5, 6, 7), "kernel": (3, 3, 3)}, {"padding": 1, "stride": (1, 2, 2)}),
    ("one-pixel", {"channels": (40, 50), "space": (1, 1), "batch": 5}, {"padding": 1}),
    ("deep", {"channels": (200, 20), "space": (6, 5)}, {"padding": 1}),
]

_QUICK = [
    *(
        _Case(f"{name}-{norm}", norm=norm, residual=norm != "none", bias=norm == "none", options=_options(**o), **sizes)
        for name, sizes, o in _CONVOLUTIONS
        for norm in ("batch", "none")
    ),
    *(
        _Case(f"{name}-channels-last", layout="channels_last", residual=True, options=_options(**o), **sizes)
        for name, sizes, o in _CONVOLUTIONS
        if name in ("3x3", "1x1", "depthwise", "volume", "grouped", "line")
    ),
    *(
        _Case(name.replace("_", "-"), activation=name, norm=norm, residual=True)
        for name, norm in zip(reference.ACTIVATIONS, ("running", "batch", "none") * 4, strict=False)
    ),
    _Case("no-affine", affine=False),
    _Case("no-affine-running", affine=False, norm="running"),
    _Case("leaky-0.2", activation="leaky_relu", options=_options(negative_slope=0.2)),
    _Case("recompute", residual=True, options=_options(recompute=True)),
    _Case("every-other", layout="every_other", residual=True),
    _Case("expanded", layout="expanded", norm="running", residual=True),
    _Case("no-batch", batch=0, norm="running", residual=True),
    _Case("no-batch-no-norm", batch=0, norm="none"),
]

_FULL = [
    *_QUICK,
    _Case("64x56x56", channels=(64, 64), space=(56, 56), options=_options(padding=1), bias=False),
    _Case(
        "512x7x7", channels=(512, 512), space=(7, 7), options=_options(padding=1), bias=False, layout="channels_last"
    ),
    _Case("2048x1", channels=(2048, 130), space=(3, 3), kernel=(1, 1), bias=False, residual=True),
    _Case("resnext", channels=(128, 128), space=(14, 14), options=_options(padding=1, groups=32), bias=False),
    _Case("depthwise-144", channels=(144, 144), space=(28, 28), options=_options(padding=1, groups=144), bias=False),
    _Case("first", channels=(3, 64), space=(112, 112), kernel=(7, 7), options=_options(padding=3, stride=2)),
]

_CASES: dict[Level, list[_Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny, ``quick`` has every feature and known trap, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    cases = [
        replace(_SMALL, name="op-plain", norm="none"),
        replace(_SMALL, name="op-training", residual=True, activation="silu", layout="channels_last"),
        replace(_SMALL, name="op-running", norm="running", bias=False),
    ]
    for index, case in enumerate(cases):
        sample = case.sample(dtype, device, requires_grad=True)
        names = ("bn_weight", "bn_bias", "running_mean", "running_var", "residual")
        tensors = [*sample.args, *(sample.kwargs.get(name) for name in names)]
        training = case.norm == "batch"
        options = (training, 1e-5, [1, 1], [0, 0], [1, 1], 1, case.activation, 0.01)
        yield "ptkernels::conv_bn_relu", (*tensors, *options, index == 1)
        detached = [None if tensor is None else tensor.detach() for tensor in tensors]
        out, conv, mean, var = torch.ops.ptkernels.conv_bn_relu(*detached, *options, True)
        statistics = (mean, var) if training else tuple(detached[5:7])
        wanted = [tensor is not None for tensor in (*tensors[:5], tensors[7])]
        wanted[1] = index != 2
        yield (
            "ptkernels::_conv_bn_relu_backward",
            (torch.randn_like(out).requires_grad_(), *tensors[:5], *statistics, tensors[7], conv, *options, wanted),
        )


_TORCH_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu6": lambda u, slope: F.relu6(u),
    "elu": lambda u, slope: F.elu(u),
    "silu": lambda u, slope: F.silu(u),
    "gelu": lambda u, slope: F.gelu(u),
    "mish": lambda u, slope: F.mish(u),
    "hardswish": lambda u, slope: F.hardswish(u),
    "none": lambda u, slope: u,
    "relu": lambda u, slope: torch.relu(u),
    "leaky_relu": F.leaky_relu,
    "sigmoid": lambda u, slope: torch.sigmoid(u),
    "tanh": lambda u, slope: torch.tanh(u),
}


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
    dilation: Any = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
) -> Tensor:
    """Torch's convolution, batch normalisation, addition and activation, one after the other, as models write them."""
    u = reference.CONVOLUTIONS[input.dim()](input, weight, bias, stride, padding, dilation, groups)
    if training or running_mean is not None:
        u = F.batch_norm(u, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if residual is not None:
        u = u + residual
    return _TORCH_ACTIVATIONS[activation](u, negative_slope)


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    trains = direction == "forward+backward"
    ins, outs, groups, kernel = (shape[name] for name in ("C", "O", "groups", "K"))

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=generator.device)

    fan_in = ins // groups * kernel * kernel
    input = draw(shape["N"], ins, shape["H"], shape["H"]).to(dtype, memory_format=torch.channels_last)
    weight = (draw(outs, ins // groups, kernel, kernel) / math.sqrt(fan_in)).to(dtype)
    vectors = [draw(outs) * 0.2 + 1, draw(outs) * 0.2, draw(outs) * 0.1, draw(outs).square() * 0.2 + 0.5]
    bn_weight, bn_bias, mean, var = (vector.to(dtype) for vector in vectors)
    kwargs = {
        "training": trains,
        "stride": shape["S"],
        "padding": (kernel - 1) // 2,
        "groups": groups,
        "activation": shape["activation"],
    }
    for tensor in (input, weight, bn_weight, bn_bias):
        tensor.requires_grad_(trains)
    statistics = (None, None) if trains else (mean, var)
    return (input, weight, None, bn_weight, bn_bias, *statistics), kwargs


def _bench_case(name: str, model: str, shape: dict[str, Any], dtype: torch.dtype, direction: Direction) -> BenchCase:
    n, ins, outs, size, kernel, stride = (shape[key] for key in ("N", "C", "O", "H", "K", "S"))
    result = (size + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
    taps = ins // shape["groups"] * kernel * kernel
    flops = 2 * n * outs * result * result * taps
    given, made, weights = n * ins * size * size, n * outs * result * result, outs * taps
    traffic = (given + made + weights) * dtype.itemsize
    if direction == "forward+backward":
        # Two more products; the backward reads the gradient, the convolution's result, input and weight, and writes the
        # gradients of the last two. The forward also writes the convolution's result.
        flops *= 3
        traffic += (made + 2 * made + 2 * given + 2 * weights) * dtype.itemsize
    return BenchCase(
        name, model, shape, dtype, direction, partial(_make_inputs, shape, dtype, direction), flops, traffic
    )


# name, model, in and out channels, size of the input, kernel, stride, groups, activation
_LAYERS: list[tuple[str, str, int, int, int, int, int, int, str]] = [
    ("stem-224", "ResNet-50", 3, 64, 224, 7, 2, 1, "relu"),
    ("64-56-3x3", "ResNet-50", 64, 64, 56, 3, 1, 1, "relu"),
    ("64-256-56-1x1", "ResNet-50", 64, 256, 56, 1, 1, 1, "relu"),
    ("128-28-3x3", "ResNet-50", 128, 128, 28, 3, 1, 1, "relu"),
    ("256-512-56-1x1-s2", "ResNet-50", 256, 512, 56, 1, 2, 1, "none"),
    ("256-14-3x3", "ResNet-50", 256, 256, 14, 3, 1, 1, "relu"),
    ("1024-256-14-1x1", "ResNet-50", 1024, 256, 14, 1, 1, 1, "relu"),
    ("512-7-3x3", "ResNet-50", 512, 512, 7, 3, 1, 1, "relu"),
    ("128-112-3x3", "VGG-16", 128, 128, 112, 3, 1, 1, "relu"),
    ("512-28-3x3", "VGG-16", 512, 512, 28, 3, 1, 1, "relu"),
    ("32-112-dw", "MobileNetV2", 32, 32, 112, 3, 1, 32, "relu6"),
    ("144-56-dw-s2", "MobileNetV2", 144, 144, 56, 3, 2, 144, "relu6"),
    ("384-14-dw", "MobileNetV2", 384, 384, 14, 3, 1, 384, "relu6"),
    ("24-144-56-1x1", "MobileNetV2", 24, 144, 56, 1, 1, 1, "relu6"),
    ("64-128-56-3x3-s2", "ResNet-18", 64, 128, 56, 3, 2, 1, "relu"),
    ("512-2048-7-1x1", "ResNet-50", 512, 2048, 7, 1, 1, 1, "relu"),
    ("3-64-224-3x3", "VGG-16", 3, 64, 224, 3, 1, 1, "relu"),
    ("672-14-5x5-dw", "EfficientNet-Lite0", 672, 672, 14, 5, 1, 672, "relu6"),
    ("1152-7-5x5-dw", "EfficientNet-Lite0", 1152, 1152, 7, 5, 1, 1152, "relu6"),
    ("112-672-14-1x1", "EfficientNet-Lite0", 112, 672, 14, 1, 1, 1, "relu6"),
    ("32-32-3x3", "ConvNet (CIFAR-10)", 32, 32, 32, 3, 1, 1, "relu"),
    ("128-8-3x3", "ConvNet (CIFAR-10)", 128, 128, 8, 3, 1, 1, "relu"),
    ("64-128-32-4x4-s2", "DCGAN", 64, 128, 32, 4, 2, 1, "leaky_relu"),
]


def bench_cases() -> list[BenchCase]:
    """Layers of named models: inference with 1, 8 and 32 images, training with 8."""
    cases = []
    for name, model, ins, outs, size, kernel, stride, groups, activation in _LAYERS:
        layer = {"C": ins, "O": outs, "H": size, "K": kernel, "S": stride, "groups": groups, "activation": activation}
        for dtype in (torch.float32, torch.bfloat16):
            for images in (1, 8, 32):
                shape = {"N": images, **layer}
                cases.append(_bench_case(f"{name}-n{images}", model, shape, dtype, "forward"))
            cases.append(_bench_case(f"{name}-n8", model, {"N": 8, **layer}, dtype, "forward+backward"))
    return cases


SPEC = register(
    OpSpec(
        name="conv_bn_relu",
        function=conv_bn_relu,
        reference=reference.conv_bn_relu,
        baseline=composition,
        torch_ops=("ptkernels::conv_bn_relu", "ptkernels::_conv_bn_relu_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=explain,
        tolerances=Tolerances(gradient=3.0),
        kept_by_autocast=("bn_weight", "bn_bias", "running_mean", "running_var"),
        peers={"torch eager": composition},
    )
)
