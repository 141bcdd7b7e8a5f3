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
class Case:
    """A sample, of either convolution."""

    name: str
    channels: tuple[int, int] = (4, 6)
    space: tuple[int, ...] = (11, 13)
    kernel: tuple[int, ...] = (3, 3)
    batch: int = 2
    norm: str = "batch"
    """``batch`` statistics, ``running`` ones, those of ``instance`` or ``group``, or ``none``."""
    affine: bool = True
    bias: bool = True
    residual: bool = False
    activation: str = "silu"
    """Smooth by default: where a 16-bit sum falls on the other side of a corner, the whole gradient changes."""
    layout: str = "contiguous"
    options: tuple[tuple[str, Any], ...] = ()
    transposed: bool = False

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
        groups = options.get("groups", 1)
        channels = (ins, outs // groups) if self.transposed else (outs, ins // groups)
        weight = draw(*channels, *self.kernel) / math.sqrt(fan_in)
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
        if self.norm in ("instance", "group"):
            kwargs["norm"] = self.norm
        if self.residual:
            shape = conv_shape(input, weight, options, self.transposed)
            kwargs["residual"] = _LAYOUTS[self.layout](given(draw(*shape)).detach()).requires_grad_(requires_grad)
            grad_inputs.append("residual")
        args = (input, weight.to(dtype).requires_grad_(requires_grad), bias)
        # The first dimension of a transposed convolution's weight is that of the input's channels.
        batched = tuple(name for name in ("input", "residual") if name in grad_inputs) if self.transposed else None
        return Sample(self.name, args, kwargs, tuple(grad_inputs), batched)


def conv_shape(input: Tensor, weight: Tensor, options: dict[str, Any], transposed: bool) -> tuple[int, ...]:
    """Shape of a convolution's result."""
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    given = {name: options[name] for name in names if name in options}
    convolution = (reference.TRANSPOSED if transposed else reference.CONVOLUTIONS)[input.dim()]
    return tuple(convolution(input.to("meta"), weight.to("meta"), **given).shape)


def options_of(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


SMALL = Case("small", channels=(2, 2), space=(3, 4), kernel=(2, 2), batch=2)

# Activations without corners, where finite differences must not straddle one.
_GRADCHECK = [
    replace(SMALL, name="plain", norm="none", activation="tanh"),
    replace(SMALL, name="training", activation="silu"),
    replace(SMALL, name="running", norm="running", activation="gelu", bias=False),
    replace(SMALL, name="residual", residual=True, activation="mish", options=options_of(padding=1, stride=2)),
    replace(SMALL, name="depthwise", activation="sigmoid", options=options_of(groups=2, padding=1)),
    replace(
        SMALL, name="line", space=(6,), kernel=(2,), activation="elu", affine=False, options=options_of(dilation=2)
    ),
    replace(SMALL, name="volume", space=(2, 3, 2), kernel=(1, 2, 2), norm="none", activation="hardswish"),
    replace(SMALL, name="channels-last", layout="channels_last", activation="tanh", options=options_of(padding=1)),
    replace(SMALL, name="recompute", activation="silu", options=options_of(recompute=True)),
    replace(SMALL, name="group", channels=(2, 4), norm="group", residual=True, options=options_of(num_groups=2)),
    replace(SMALL, name="pre-activation", norm="running", options=options_of(pre_activation="gelu", padding=1)),
    replace(SMALL, name="instance", norm="instance", layout="channels_last", activation="tanh"),
    replace(
        SMALL,
        name="group-pre-activation",
        channels=(2, 4),
        norm="group",
        affine=False,
        options=options_of(num_groups=2, pre_activation="silu", recompute=True),
    ),
]

# Gradients for up to 128 positions, and no more than channels of the result, have kernels of their own.
_CONVOLUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("3x3", {"channels": (16, 24)}, {"padding": 1}),
    ("3x3-few", {"channels": (16, 48), "space": (4, 5)}, {"padding": 1}),
    ("strides-few", {"channels": (5, 80)}, {"stride": (2, 3), "padding": (1, 2)}),
    ("1x1", {"channels": (33, 40), "kernel": (1, 1)}, {}),
    ("1x1-stride-2", {"channels": (33, 40), "kernel": (1, 1)}, {"stride": 2}),
    ("stem", {"channels": (3, 32), "space": (19, 21), "kernel": (7, 7)}, {"stride": 2, "padding": 3}),
    ("strides", {"channels": (5, 7), "batch": 4}, {"stride": (2, 3), "padding": (1, 2)}),
    ("dilated", {"channels": (5, 7), "batch": 6}, {"dilation": (2, 3), "padding": 2, "stride": 2}),
    ("stride-above-kernel", {"channels": (5, 7), "kernel": (2, 2), "batch": 9}, {"stride": 3}),
    ("same", {"channels": (3, 5), "kernel": (2, 4)}, {"padding": "same"}),
    ("grouped", {"channels": (12, 18)}, {"groups": 3, "padding": 1}),
    ("depthwise", {"channels": (37, 37), "space": (9, 14)}, {"groups": 37, "padding": 1}),
    ("depthwise-stride-2", {"channels": (16, 16), "kernel": (5, 5)}, {"groups": 16, "padding": 2, "stride": 2}),
    ("multiplier", {"channels": (4, 8)}, {"groups": 4, "padding": 1}),
    ("line", {"channels": (7, 9), "space": (67,), "kernel": (5,)}, {"padding": 2}),
    (
        "volume",
        {"channels": (3, 5), "space": (5, 6, 7), "kernel": (3, 3, 3), "batch": 3},
        {"padding": 1, "stride": (1, 2, 2)},
    ),
    ("one-pixel", {"channels": (40, 50), "space": (1, 1), "batch": 5}, {"padding": 1}),
    ("deep", {"channels": (200, 20), "space": (6, 5)}, {"padding": 1}),
]

# What follows and precedes a convolution of either kind.
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("instance", {"norm": "instance"}, {}),
    ("instance-residual", {"norm": "instance", "layout": "channels_last", "residual": True}, {}),
    ("group", {"norm": "group", "channels": (16, 24)}, {"num_groups": 6}),
    ("group-one", {"norm": "group", "residual": True, "affine": False}, {"num_groups": 1}),
    ("group-channels-last", {"norm": "group", "layout": "channels_last"}, {"num_groups": 2}),
    ("group-recompute", {"norm": "group", "residual": True, "bias": False}, {"num_groups": 3, "recompute": True}),
    ("group-line", {"norm": "group", "space": (23,), "kernel": (3,)}, {"num_groups": 3}),
    ("group-volume", {"norm": "group", "space": (4, 5, 6), "kernel": (3, 2, 2)}, {"num_groups": 2}),
    ("group-large", {"norm": "group", "channels": (17, 40), "space": (21, 19)}, {"num_groups": 5, "padding": 1}),
    ("group-depthwise", {"norm": "group", "channels": (12, 12)}, {"num_groups": 4, "groups": 12, "padding": 1}),
    ("group-no-batch", {"norm": "group", "batch": 0, "residual": True}, {"num_groups": 2}),
    ("pre-none", {"norm": "none"}, {"pre_activation": "silu"}),
    ("pre-batch", {"activation": "none", "bias": False}, {"pre_activation": "mish", "padding": 1}),
    ("pre-running", {"norm": "running", "layout": "channels_last"}, {"pre_activation": "gelu", "stride": 2}),
    ("pre-every-other", {"layout": "every_other", "residual": True}, {"pre_activation": "tanh"}),
    ("pre-line", {"space": (23,), "kernel": (3,)}, {"pre_activation": "sigmoid"}),
    ("pre-volume", {"space": (4, 5, 6), "kernel": (3, 2, 2), "norm": "none"}, {"pre_activation": "elu"}),
    ("pre-relu", {"activation": "none"}, {"pre_activation": "relu"}),
    ("pre-group", {"norm": "group", "layout": "channels_last"}, {"num_groups": 2, "pre_activation": "silu"}),
]

_QUICK = [
    *(
        Case(
            f"{name}-{norm}", norm=norm, residual=norm != "none", bias=norm == "none", options=options_of(**o), **sizes
        )
        for name, sizes, o in _CONVOLUTIONS
        for norm in ("batch", "none")
    ),
    *(
        Case(f"{name}-channels-last", layout="channels_last", residual=True, options=options_of(**o), **sizes)
        for name, sizes, o in _CONVOLUTIONS
        if name in ("3x3", "3x3-few", "1x1", "depthwise", "volume", "grouped", "line")
    ),
    *(
        Case(name.replace("_", "-"), space=(7, 9), activation=name, norm=norm, residual=True)
        for name, norm in zip(reference.ACTIVATIONS, ("running", "batch", "none") * 4, strict=False)
    ),
    Case("no-affine", affine=False),
    Case("no-affine-running", affine=False, norm="running"),
    Case("leaky-0.2", activation="leaky_relu", options=options_of(negative_slope=0.2)),
    Case("recompute", residual=True, options=options_of(recompute=True)),
    Case("every-other", layout="every_other", residual=True),
    Case("expanded", layout="expanded", norm="running", residual=True),
    Case("no-batch", batch=0, norm="running", residual=True),
    Case("no-batch-no-norm", batch=0, norm="none"),
    *(Case(name, options=options_of(**options), **fields) for name, fields, options in VARIANTS),
]

_FULL = [
    *_QUICK,
    Case("64x56x56", channels=(64, 64), space=(56, 56), options=options_of(padding=1), bias=False),
    Case(
        "512x7x7", channels=(512, 512), space=(7, 7), options=options_of(padding=1), bias=False, layout="channels_last"
    ),
    Case("2048x1", channels=(2048, 130), space=(3, 3), kernel=(1, 1), bias=False, residual=True),
    Case("resnext", channels=(128, 128), space=(14, 14), options=options_of(padding=1, groups=32), bias=False),
    Case("depthwise-144", channels=(144, 144), space=(28, 28), options=options_of(padding=1, groups=144), bias=False),
    Case("first", channels=(3, 64), space=(112, 112), kernel=(7, 7), options=options_of(padding=3, stride=2)),
    Case("u-net", channels=(64, 64), space=(48, 48), norm="group", options=options_of(padding=1, num_groups=8)),
    Case("darts", channels=(144, 36), space=(32, 32), kernel=(1, 1), options=options_of(pre_activation="relu")),
]

_CASES: dict[Level, list[Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny, ``quick`` has every feature and known trap, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    cases = [
        replace(SMALL, name="op-plain", norm="none"),
        replace(SMALL, name="op-training", residual=True, activation="silu", layout="channels_last"),
        replace(SMALL, name="op-running", norm="running", bias=False),
    ]
    yield from direct_calls(cases, (), dtype, device)
    images = [replace(SMALL, name="op-images", channels=(2, 4), norm="group", residual=True, activation="silu")]
    yield from direct_calls(images, (False, None, 2, "tanh"), dtype, device)


def direct_calls(
    cases: list[Case], variant: tuple[Any, ...], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Arguments of the operator and of its backward; ``variant`` are the last of them."""
    for index, case in enumerate(cases):
        sample = case.sample(dtype, device, requires_grad=True)
        names = ("bn_weight", "bn_bias", "running_mean", "running_var", "residual")
        tensors = [*sample.args, *(sample.kwargs.get(name) for name in names)]
        training = case.norm == "batch"
        options = (training, 1e-5, [1, 1], [0, 0], [1, 1], 1, case.activation, 0.01)
        yield "ptkernels::conv_bn_relu", (*tensors, *options, index == 1, *variant)
        detached = [None if tensor is None else tensor.detach() for tensor in tensors]
        out, conv, mean, var = torch.ops.ptkernels.conv_bn_relu(*detached, *options, True, *variant)
        statistics = tuple(detached[5:7]) if mean.numel() == 0 else (mean, var)
        wanted = [tensor is not None for tensor in (*tensors[:5], tensors[7])]
        wanted[1] = index != 2
        yield (
            "ptkernels::_conv_bn_relu_backward",
            (
                torch.randn_like(out).requires_grad_(),
                *(*tensors[:5], *statistics, tensors[7], conv),
                *(*options, wanted, *variant),
            ),
        )


TORCH_ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
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
    norm: str = "batch",
    num_groups: int | None = None,
    pre_activation: str = "none",
) -> Tensor:
    """Torch's convolution, normalisation, addition and activation, one after the other, as models write them."""
    x = TORCH_ACTIVATIONS[pre_activation](input, negative_slope)
    u = reference.CONVOLUTIONS[input.dim()](x, weight, bias, stride, padding, dilation, groups)
    return after_convolution(
        u, bn_weight, bn_bias, running_mean, running_var, residual, training, momentum, eps, activation, negative_slope,
        norm, num_groups,
    )  # fmt: skip


def after_convolution(
    u: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    negative_slope: float,
    norm: str,
    num_groups: int | None,
) -> Tensor:
    """Torch's functions for what follows a convolution."""
    if norm == "group":
        assert num_groups is not None
        u = F.group_norm(u, num_groups, bn_weight, bn_bias, eps)
    elif norm == "instance":
        u = F.instance_norm(u, None, None, bn_weight, bn_bias, True, momentum, eps)
    elif training or running_mean is not None:
        u = F.batch_norm(u, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
    if residual is not None:
        u = u + residual
    return TORCH_ACTIVATIONS[activation](u, negative_slope)


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
    more: dict[str, Any] = {key: shape[key] for key in ("norm", "num_groups", "pre_activation") if key in shape}
    vectors = [draw(outs) * 0.2 + 1, draw(outs) * 0.2, draw(outs) * 0.1, draw(outs).square() * 0.2 + 0.5]
    bn_weight, bn_bias, mean, var = (vector.to(dtype) for vector in vectors)
    kwargs = {
        "training": trains and "norm" not in shape,
        "stride": shape["S"],
        "padding": (kernel - 1) // 2,
        "groups": groups,
        "activation": shape["activation"],
        **more,
    }
    for tensor in (input, weight, bn_weight, bn_bias):
        tensor.requires_grad_(trains)
    statistics = (None, None) if trains or "norm" in shape else (mean, var)
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
    ("64-64-gn8", "U-Net (GroupNorm)", 64, 64, 64, 3, 1, 1, "relu"),
    ("144-32-relu-1x1", "DARTS", 144, 36, 32, 1, 1, 1, "none"),
]


# Of the last two, what they have instead of a batch normalisation or before the convolution.
_MORE: dict[str, dict[str, Any]] = {
    "64-64-gn8": {"norm": "group", "num_groups": 8},
    "144-32-relu-1x1": {"pre_activation": "relu"},
}


def bench_cases() -> list[BenchCase]:
    """Layers of named models: inference with 1, 8 and 32 images, training with 8."""
    cases = []
    for name, model, ins, outs, size, kernel, stride, groups, activation in _LAYERS:
        layer = {"C": ins, "O": outs, "H": size, "K": kernel, "S": stride, "groups": groups, "activation": activation}
        layer |= _MORE.get(name, {})
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
