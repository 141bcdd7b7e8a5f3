"""Every operator under fake and meta tensors, torch.compile, export and AOTInductor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from op_checks import (
    INDEX_DTYPES,
    bind,
    each_differentiable_op,
    each_op,
    leaves,
    outputs,
    sample_of,
    samples_of,
    value_and_gradients,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ptkernels._registry import OpSpec


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_opcheck(spec: OpSpec, dtype: torch.dtype) -> None:
    for qualified, args in spec.torch_op_samples(dtype, "cpu"):
        namespace, name = qualified.split("::")
        torch.library.opcheck(getattr(getattr(torch.ops, namespace), name).default, args)


@each_op
def test_fake_strides_are_the_kernels(spec: OpSpec) -> None:
    """Including for sizes of zero and one, where contiguity says nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for sample in samples_of(spec.name, torch.float32, "quick").values():
        real = value_and_gradients(spec.function, spec, sample)
        inputs = leaves(spec, sample)
        arguments = bind(spec, sample, **inputs).arguments
        with FakeTensorMode() as mode:
            faked = tree_map_only(Tensor, mode.from_tensor, dict(arguments))
            bound = bind(spec, sample, **faked)
            results = outputs(spec.function(*bound.args, **bound.kwargs))
            found = dict(zip((name for name in real if name.startswith("output")), results, strict=False))
            if spec.differentiable:
                cotangents = [torch.empty_like(result) for result in results]
                grads = torch.autograd.grad(results, [faked[name] for name in inputs], cotangents)
                found |= zip((f"gradient of {name}" for name in inputs), grads, strict=True)
        for name, fake in found.items():
            tensor = real[name]
            assert (fake.shape, fake.stride(), fake.dtype) == (tensor.shape, tensor.stride(), tensor.dtype), (
                f"{sample.name}: {name}"
            )


@each_op
def test_meta_tensors_propagate_shapes(spec: OpSpec) -> None:
    sample = sample_of(spec, torch.float32)
    arguments = dict(bind(spec, sample, **leaves(spec, sample)).arguments)
    moved = {name: value for name, value in arguments.items() if name not in spec.host_inputs}
    bound = bind(spec, sample, **{**arguments, **tree_map_only(Tensor, lambda tensor: tensor.to("meta"), moved)})
    results = outputs(spec.function(*bound.args, **bound.kwargs))
    expected = value_and_gradients(spec.function, spec, sample)
    assert all(result.is_meta for result in results)
    assert [result.shape for result in results] == [expected[f"output {i}"].shape for i in range(len(results))]


COMPILE_SAMPLES = slice(0, None, 3)


@each_op
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(spec: OpSpec, backend: str) -> None:
    """One graph, forward and backward, and the bits of the eager call, but for torch's own arithmetic around it."""
    for sample in list(samples_of(spec.name, torch.float32, "gradcheck").values())[COMPILE_SAMPLES]:
        torch._dynamo.reset()
        compiled = torch.compile(spec.function, fullgraph=True, backend=backend)
        expected = value_and_gradients(spec.function, spec, sample)
        actual = value_and_gradients(compiled, spec, sample)
        for name, tensor in expected.items():
            if backend == "inductor":  # which fuses that arithmetic
                torch.testing.assert_close(actual[name], tensor, msg=f"{sample.name}: {name}")
            else:
                assert torch.equal(actual[name], tensor), f"{sample.name}: {name}"
            dims = [dim for dim in range(tensor.dim()) if tensor.size(dim) > 1]  # tracing normalises the others
            assert [actual[name].stride(dim) for dim in dims] == [tensor.stride(dim) for dim in dims]


@each_differentiable_op
def test_compile_with_dynamic_shapes_compiles_once(spec: OpSpec) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(spec.function, fullgraph=True, backend=counter, dynamic=True)
    sample = sample_of(spec, torch.float32, level="gradcheck")
    compilations = 0
    for repeats in (11, 13, 17):  # sizes that coincide with another one would be taken for the same symbol
        given = bind(spec, sample).arguments
        if spec.enlarged is None:
            grown = sample.grad_inputs if sample.batch_inputs is None else sample.batch_inputs
            repeated = {name: torch.cat([given[name].detach()] * repeats) for name in grown}
            for name, value in given.items():
                if isinstance(value, Tensor) and value.dtype in INDEX_DTYPES:
                    repeated[name] = value * repeats
        else:
            repeated = spec.enlarged(dict(given), repeats)
        bound = bind(spec, sample, **repeated)
        expected = outputs(spec.function(*bound.args, **bound.kwargs))
        assert all(map(torch.equal, outputs(compiled(*bound.args, **bound.kwargs)), expected))
        compilations = compilations or counter.frame_count
    assert counter.frame_count == compilations


class Module(torch.nn.Module):
    """An operator with its non-tensor arguments fixed, for export."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.kwargs = kwargs

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, **self.kwargs)


@each_op
@pytest.mark.parametrize("exporter", ["strict", "non-strict"])
def test_export(spec: OpSpec, exporter: str) -> None:
    for sample in list(samples_of(spec.name, torch.float32, "gradcheck").values())[COMPILE_SAMPLES]:
        module = Module(spec.function, sample.kwargs)
        program = torch.export.export(module, sample.args, strict=exporter == "strict")
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert any(target.startswith("ptkernels.") for target in targets), targets
        expected = outputs(module(*sample.args))
        assert all(map(torch.equal, outputs(program.module()(*sample.args)), expected))
        lowered = program.run_decompositions()
        assert all(map(torch.equal, outputs(lowered.module()(*sample.args)), expected))


@each_op
@pytest.mark.slow
def test_aot_inductor(spec: OpSpec, tmp_path: Path) -> None:
    sample = sample_of(spec, torch.float32, level="gradcheck")
    module = Module(spec.function, sample.kwargs)
    program = torch.export.export(module, sample.args)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "op.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    assert all(map(torch.equal, outputs(loaded(*sample.args)), outputs(module(*sample.args))))


@each_differentiable_op
def test_compile_under_autocast(spec: OpSpec) -> None:
    sample = sample_of(spec, torch.float32, level="gradcheck")

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return spec.function(*args, **kwargs)

    torch._dynamo.reset()
    expected = value_and_gradients(autocast, spec, sample)
    actual = value_and_gradients(torch.compile(autocast, fullgraph=True, backend="aot_eager"), spec, sample)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
