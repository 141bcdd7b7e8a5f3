"""Peers of the convolutions: torch in both memory formats and compiled, ONNX Runtime, OpenVINO.

The engines, and Inductor with freezing, hold the weights as constants: they fold the normalisation and pack once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ptkernels.cli.bench.gate import Part, whole
from ptkernels.cli.bench.problem import Contender, Peer, Problem, UnsupportedError
from ptkernels.nn.conv import ACTIVATIONS
from ptkernels.ops.conv_bn_relu.spec import composition

from .engines import OnnxSession, OpenVinoRequest, onnx_type, openvino_type

CHANNELS_LAST, CONTIGUOUS, COMPILE = "torch-channels-last", "torch-contiguous", "torch-compile"
ONNX, OPENVINO = "onnxruntime", "openvino"


def peers() -> list[Peer]:
    return [
        Peer(CHANNELS_LAST, _torch_version, _channels_last),
        Peer(CONTIGUOUS, _torch_version, _contiguous),
        Peer(COMPILE, _torch_version, _compile),
        Peer(ONNX, _onnxruntime_version, _onnxruntime),
        Peer(OPENVINO, _openvino_version, _openvino),
    ]


def parts(problem: Problem, flops: float) -> list[Part]:
    """An image at a time with given statistics; those of the batch need all of it."""
    if problem.backward or problem.named["training"]:
        return whole(problem)
    images = problem.named["input"].size(0)
    kept = max(1, min(images, int(images * flops / max(problem.case.work_flops, 1))))
    named = {**problem.named, "input": problem.named["input"][:kept]}
    return [Part(named, lambda index, tensor: tensor[:kept])]


def _torch_version() -> str:
    return torch.__version__


def _in_format(problem: Problem, name: str, memory_format: torch.memory_format) -> Contender:
    """The composition with input and weight in a memory format, gradients included."""
    named = dict(problem.named)
    for key in ("input", "weight"):
        tensor = named[key].detach().clone(memory_format=memory_format)
        named[key] = tensor.requires_grad_(named[key].requires_grad)
    if not problem.backward:
        return Contender(name, lambda: composition(**named), lambda: (composition(**named),))
    leaves = [named[leaf] for leaf in problem.leaf_names]
    flowing = problem.cotangents((composition(**named),))[0].contiguous(memory_format=memory_format)

    def step() -> tuple[Tensor, ...]:
        result = composition(**named)
        return (result, *torch.autograd.grad(result, leaves, flowing))

    return Contender(name, step, step)


def _channels_last(problem: Problem, threads: int) -> Contender:
    return _in_format(problem, CHANNELS_LAST, torch.channels_last)


def _contiguous(problem: Problem, threads: int) -> Contender:
    return _in_format(problem, CONTIGUOUS, torch.contiguous_format)


def _module(problem: Problem) -> nn.Module:
    """The layer as models write it, in evaluation."""
    named = problem.named
    weight = named["weight"].detach()
    out_channels, in_channels, *kernel = weight.shape
    conv = nn.Conv2d(
        in_channels * named["groups"], out_channels, tuple(kernel), named["stride"], named["padding"],
        groups=named["groups"], bias=False,
    )  # fmt: skip
    conv.weight.data = weight.clone()
    eps = named.get("eps", 1e-5)
    norm: Any = nn.BatchNorm2d(out_channels, eps)
    if named["norm"] == "group":
        norm = nn.GroupNorm(named["num_groups"], out_channels, eps)
    else:
        norm.running_mean, norm.running_var = named["running_mean"].clone(), named["running_var"].clone()
    norm.weight.data, norm.bias.data = named["bn_weight"].detach().clone(), named["bn_bias"].detach().clone()
    before = ACTIVATIONS[named["pre_activation"]]()
    layer: Any = nn.Sequential(before, conv, norm, ACTIVATIONS[named["activation"]]())
    plain: nn.Module = layer.to(problem.case.dtype, memory_format=torch.channels_last).eval()
    return plain


def _compile(problem: Problem, threads: int) -> Contender:
    from torch._inductor import config

    # Worker processes would compete with the contenders that are being timed.
    config.compile_threads = 1
    torch.compiler.reset()
    if problem.backward:
        return problem.contender(COMPILE, torch.compile(composition, fullgraph=True, dynamic=False))
    with config.patch(freezing=True), torch.no_grad():
        layer: Any = torch.compile(_module(problem), fullgraph=True, dynamic=False)
        x = problem.named["input"]
        layer(x)

    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)  # type: ignore[no-any-return]

    return Contender(COMPILE, call, lambda: (call(),), "freezing")


def _onnxruntime_version() -> str:
    import onnx  # noqa: F401 - a graph is needed as much as the runtime
    import onnxruntime

    return str(onnxruntime.__version__)


def _folded(problem: Problem) -> tuple[Tensor, Tensor]:
    """Weight and bias with the normalisation folded in, float32."""
    named = problem.named
    factor = named["bn_weight"] * (named["running_var"] + named.get("eps", 1e-5)).rsqrt()
    weight = named["weight"] * factor[:, None, None, None]
    return weight.detach().contiguous(), (named["bn_bias"] - named["running_mean"] * factor).detach()


def _require_float32(problem: Problem) -> None:
    problem.require_forward()
    if problem.named["norm"] != "batch" or problem.named["pre_activation"] != "none":
        raise UnsupportedError("timed with a folded batch normalisation behind a convolution only")
    if problem.case.dtype != torch.float32:
        raise UnsupportedError("timed in float32 only")


def _onnxruntime(problem: Problem, threads: int) -> Contender:
    _require_float32(problem)
    from onnx import helper, numpy_helper

    named = problem.named
    weight, bias = _folded(problem)
    shape = [*composition(**named).shape]
    kind = onnx_type(torch.float32)
    nodes = [
        helper.make_node(
            "Conv", ["x", "w", "b"], ["z"], strides=[named["stride"]] * 2, pads=[named["padding"]] * 4,
            group=named["groups"], kernel_shape=list(weight.shape[2:]),
        )
    ]  # fmt: skip
    constants = [("w", weight), ("b", bias)]
    if named["activation"] == "relu6":
        nodes.append(helper.make_node("Clip", ["z", "low", "high"], ["y"]))
        constants += [("low", torch.tensor(0.0)), ("high", torch.tensor(6.0))]
    elif named["activation"] == "leaky_relu":
        nodes.append(helper.make_node("LeakyRelu", ["z"], ["y"], alpha=named["negative_slope"]))
    else:
        nodes.append(helper.make_node("Relu" if named["activation"] == "relu" else "Identity", ["z"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "conv",
        [helper.make_tensor_value_info("x", kind, list(named["input"].shape))],
        [helper.make_tensor_value_info("y", kind, shape)],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants],
    )
    session = OnnxSession(graph, {"": 17}, {"x": named["input"]}, threads)

    def outputs() -> tuple[Tensor, ...]:
        session.run()
        return (session.output(),)

    return Contender(ONNX, session.run, outputs)


def _openvino_version() -> str:
    import openvino

    return str(openvino.__version__)


def _openvino(problem: Problem, threads: int) -> Contender:
    """Given and returning channels last, which spares it two transpositions."""
    _require_float32(problem)
    import numpy
    import openvino
    import openvino.opset13 as ops

    named = problem.named
    weight, bias = _folded(problem)
    pixels = named["input"].permute(0, 2, 3, 1)
    x = ops.parameter(list(pixels.shape), openvino_type(torch.float32))
    planes = ops.transpose(x, numpy.array([0, 3, 1, 2]))
    geometry = ([named["stride"]] * 2, [named["padding"]] * 2, [named["padding"]] * 2, [1, 1])
    if named["groups"] > 1:
        kernel = ops.constant(weight.unflatten(0, (named["groups"], -1)).numpy())
        y = ops.group_convolution(planes, kernel, *geometry)
    else:
        y = ops.convolution(planes, ops.constant(weight.numpy()), *geometry)
    y = ops.add(y, ops.constant(bias.reshape(1, -1, 1, 1).numpy()))
    if named["activation"] == "leaky_relu":
        y = ops.prelu(y, ops.constant(numpy.array([named["negative_slope"]], numpy.float32)))
    elif named["activation"] != "none":
        y = ops.relu(y) if named["activation"] == "relu" else ops.clamp(y, 0.0, 6.0)
    model = openvino.Model([ops.transpose(y, numpy.array([0, 2, 3, 1]))], [x])
    request = OpenVinoRequest(model, [pixels], torch.float32, threads)

    def outputs() -> tuple[Tensor, ...]:
        request.run()
        return (request.output().permute(0, 3, 1, 2),)

    return Contender(OPENVINO, request.run, outputs)
