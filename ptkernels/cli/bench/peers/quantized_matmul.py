"""Peers of the quantized linear layer: dense products, PyTorch's own quantized layers, ONNX Runtime's 4-bit product.

Quantized peers round the input (and its sums) on grids of their own, so they are held to a share of the largest result
instead of to our bound: enough to catch one that computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels.cli.bench.gate import Part, whole
from ptkernels.cli.bench.problem import Contender, Peer, Problem, UnsupportedError
from ptkernels.ops.quantized_matmul.formats import unpack_codes
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight

from .engines import OnnxSession, OpenVinoRequest, onnx_type, openvino_type

_NOISE = 0.05


def peers() -> list[Peer]:
    return [
        Peer("torch-dense", _torch_version, _dense),
        Peer("torch-dynamic", _torch_version, _quantize_dynamic),
        Peer("torch-int8pack", _torch_version, _int8pack),
        Peer("torch-int4pack", _torch_version, _int4pack),
        Peer("onednn-qlinear", _torch_version, _qlinear),
        Peer("onnxruntime", _onnxruntime_version, _onnxruntime),
        Peer("openvino", _openvino_version, _openvino),
    ]


def parts(problem: Problem, flops: float) -> list[Part]:
    return whole(problem)


def _torch_version() -> str:
    return torch.__version__


def _weight(problem: Problem, *schemes: str) -> QuantizedWeight:
    weight = problem.named["qweight"]
    if schemes:
        problem.require_forward()
        if weight.scheme not in schemes:
            raise UnsupportedError(f"does not do {weight.scheme}")
    return weight  # type: ignore[no-any-return]


def _noisy(name: str, call: Callable[[], Tensor], detail: str = "") -> Contender:
    return Contender(name, call, lambda: (call(),), detail, _NOISE)


def _dense(problem: Problem, threads: int) -> Contender:
    """What the layer costs unquantized, in the case's dtype; the gradient of the input too."""
    dense = _weight(problem).dequantize(problem.case.dtype)

    def linear(x: Tensor, *_: Any) -> Tensor:
        return F.linear(x, dense)

    contender = problem.contender("torch-dense", linear)
    return Contender("torch-dense", contender.call, contender.outputs, "unquantized", _NOISE)


def _quantize_dynamic(problem: Problem, threads: int) -> Contender:
    weight = _weight(problem, "int8_dynamic")
    if problem.case.dtype != torch.float32:
        raise UnsupportedError("float32 only")
    linear = torch.nn.Linear(weight.in_features, weight.out_features, bias=False)
    linear.weight.data = weight.dequantize()
    model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear})
    x = problem.named["x"]
    return _noisy("torch-dynamic", lambda: model(x), torch.backends.quantized.engine)


def _int8pack(problem: Problem, threads: int) -> Contender:
    weight, x = _weight(problem, "int8_weight_only"), problem.named["x"]
    scales = weight.scales[:, 0].to(x.dtype)
    return _noisy("torch-int8pack", lambda: torch._weight_int8pack_mm(x, weight.codes, scales))


def _int4pack(problem: Problem, threads: int) -> Contender:
    weight, x = _weight(problem, "int4_weight_only"), problem.named["x"]
    codes = unpack_codes(weight.codes, weight.spec.code, weight.in_features).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = weight.scales.T.to(x.dtype)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _noisy("torch-int4pack", lambda: multiply(x, packed, weight.group_size, both))


def _qlinear(problem: Problem, threads: int) -> Contender:
    """Gets its input quantized already: only the product is timed."""
    weight, x = _weight(problem, "int8_dynamic"), problem.named["x"]
    step = float(x.abs().max()) / 127
    codes = (x.float() / step).round().add(128).clamp(0, 255).to(torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight.codes, None)
    scales, zeros = weight.scales[:, 0].contiguous(), torch.zeros(weight.out_features, dtype=torch.int64)
    multiply: Any = torch.ops.onednn.qlinear_pointwise
    out: tuple[Any, ...] = (None, 1.0, 0, x.dtype, "none", [], "")
    return _noisy(
        "onednn-qlinear", lambda: multiply(codes, step, 128, packed, scales, zeros, *out), "input quantized ahead"
    )


def _onnxruntime_version() -> str:
    import onnx  # noqa: F401  the graphs are built with it
    import onnxruntime

    return str(onnxruntime.__version__)


def _onnxruntime(problem: Problem, threads: int) -> Contender:
    """MatMulNBits, with 8-bit input where the scheme has that; DynamicQuantizeMatMul for 8-bit weights."""
    from onnx import helper, numpy_helper

    weight, x = _weight(problem, "int4_weight_only", "int4_int8", "int8_dynamic"), problem.named["x"]
    if problem.case.dtype != torch.float32:
        raise UnsupportedError("float32 only")
    if weight.scheme == "int8_dynamic":
        return _onnx_contender(
            helper.make_node("DynamicQuantizeMatMul", ["x", "codes", "scales"], ["out"], domain="com.microsoft"),
            [
                numpy_helper.from_array(weight.codes.T.contiguous().numpy(), "codes"),
                numpy_helper.from_array(weight.scales.flatten().numpy(), "scales"),
            ],
            x,
            weight,
            threads,
        )
    groups = weight.scales.size(1)
    codes = weight.codes.view(weight.out_features, groups, -1)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scales"],
        ["out"],
        domain="com.microsoft",
        K=weight.in_features,
        N=weight.out_features,
        bits=4,
        block_size=weight.group_size,
        accuracy_level=4 if weight.spec.quantizes_input else 1,
    )
    constants = [
        numpy_helper.from_array(codes.numpy(), "codes"),
        numpy_helper.from_array(weight.scales.flatten().numpy(), "scales"),
    ]
    return _onnx_contender(node, constants, x, weight, threads)


def _onnx_contender(node: Any, constants: list[Any], x: Tensor, weight: QuantizedWeight, threads: int) -> Contender:
    from onnx import helper

    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", onnx_type(x.dtype), list(x.shape))],
        [helper.make_tensor_value_info("out", onnx_type(x.dtype), [x.size(0), weight.out_features])],
        constants,
    )
    session = OnnxSession(graph, {"": 21, "com.microsoft": 1}, {"x": x}, threads)

    def outputs() -> tuple[Tensor, ...]:
        session.run()
        return (session.output(),)

    return Contender("onnxruntime", session.run, outputs, node.op_type, _NOISE)


def _openvino_version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]


def _openvino(problem: Problem, threads: int) -> Contender:
    """A product with weights that are decompressed in the graph, which its CPU plugin fuses."""
    import numpy
    import openvino
    from openvino import opset13 as ops

    weight, x = _weight(problem), problem.named["x"]
    problem.require_forward()
    if weight.spec.code.name not in ("s8", "u4") or weight.zeros is not None:
        raise UnsupportedError(f"does not do {weight.scheme}")
    rows, columns, groups = weight.out_features, weight.in_features, weight.scales.size(1)
    # Two's complement instead of an offset of 8.
    data, kind = (weight.codes, "i8") if weight.spec.code.name == "s8" else (weight.codes ^ 0x88, "i4")
    shape = openvino.Shape([rows, groups, columns // groups])
    codes = ops.constant(openvino.Tensor(data.contiguous().numpy(), shape, getattr(openvino.Type, kind)))
    scales = ops.constant(weight.scales.unsqueeze(-1).numpy())
    decoded = ops.multiply(ops.convert(codes, "f32"), scales)
    matrix = ops.reshape(decoded, ops.constant(numpy.array([rows, columns])), False)
    input = ops.parameter(list(x.shape), openvino_type(x.dtype), name="x")
    wide = input if x.dtype == torch.float32 else ops.convert(input, "f32")
    product = ops.matmul(wide, matrix, False, True)
    out = product if x.dtype == torch.float32 else ops.convert(product, openvino_type(x.dtype))
    model = openvino.Model([out], [input], "linear")
    span = columns // groups if weight.spec.quantizes_input else 0
    request = OpenVinoRequest(model, [x], x.dtype, threads, DYNAMIC_QUANTIZATION_GROUP_SIZE=span)

    def outputs() -> tuple[Tensor, ...]:
        request.run()
        return (request.output(),)

    return Contender("openvino", request.run, outputs, "", _NOISE)
