"""Sessions of ONNX Runtime and OpenVINO whose inputs and outputs stay in place between calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ptkernels.cli.bench.problem import UnsupportedError, dtype_name

if TYPE_CHECKING:
    import onnx
    import openvino

_ONNX_TYPES = {"float64": "DOUBLE", "float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "bool": "BOOL"}
_OPENVINO_TYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "bool": "boolean"}


def onnx_type(dtype: torch.dtype) -> int:
    """The ONNX element type of a torch dtype."""
    import onnx

    return int(getattr(onnx.TensorProto, _ONNX_TYPES[dtype_name(dtype)]))


def openvino_type(dtype: torch.dtype) -> Any:
    """The OpenVINO element type of a torch dtype."""
    import openvino

    return getattr(openvino.Type, _OPENVINO_TYPES[dtype_name(dtype)])


class OnnxSession:
    """An ONNX graph with one output, its inputs and output bound to fixed memory.

    Raises:
        UnsupportedError: ONNX Runtime has no CPU kernel for a node of the graph.
    """

    def __init__(self, graph: onnx.GraphProto, opsets: dict[str, int], inputs: dict[str, Tensor], threads: int) -> None:
        import onnxruntime
        from onnx import helper

        imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # Its threads would otherwise keep a core busy while the next contender is being timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the pybind exception types of onnxruntime share no public base class
            raise UnsupportedError(str(error).splitlines()[0]) from error
        self._binding = self._session.io_binding()
        for name, tensor in inputs.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(tensor.detach().contiguous().numpy())
            self._binding.bind_ortvalue_input(name, value)
        output = self._session.get_outputs()[0]
        numpy_dtype = next(iter(inputs.values())).detach().numpy().dtype
        self._output = onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, numpy_dtype)
        self._binding.bind_ortvalue_output(output.name, self._output)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def output(self) -> Tensor:
        return torch.from_numpy(self._output.numpy().copy())


class OpenVinoRequest:
    """A compiled OpenVINO model with one output and fixed input tensors, computing in ``dtype``.

    Raises:
        UnsupportedError: OpenVINO cannot compile the model.
    """

    def __init__(
        self, model: openvino.Model, inputs: Sequence[Tensor], dtype: torch.dtype, threads: int, **options: str | int
    ) -> None:
        import openvino

        # Left alone, OpenVINO computes float32 models in bfloat16 on machines that are faster at it.
        precision = {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            **options,
        }
        try:
            self._request = openvino.Core().compile_model(model, "CPU", properties).create_infer_request()
        except RuntimeError as error:
            raise UnsupportedError(str(error).splitlines()[0]) from error
        self._dtype = dtype
        self._kept = [tensor.detach().contiguous() for tensor in inputs]
        for index, tensor in enumerate(self._kept):
            self._request.set_input_tensor(index, _openvino_tensor(tensor))

    def run(self) -> None:
        self._request.infer()

    def output(self) -> Tensor:
        data = self._request.get_output_tensor(0).data.copy()
        if self._dtype == torch.bfloat16:
            # numpy has no bfloat16: OpenVINO hands out its bits under another 16-bit type.
            return torch.from_numpy(data.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(data)


def _openvino_tensor(tensor: Tensor) -> openvino.Tensor:
    import openvino

    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return openvino.Tensor(bits, openvino.Shape(list(tensor.shape)), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)
