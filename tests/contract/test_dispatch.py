"""What else of torch sees every operator (autocast, subclasses, modes, profiler), and that its table is well formed."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from op_checks import (
    DTYPES,
    Recorder,
    bind,
    each_differentiable_op,
    each_op,
    leaves,
    outputs,
    sample_of,
    samples_of,
    tensors_in,
)
from torch import Tensor

from ptkernels._registry import OpSpec


@each_differentiable_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(spec: OpSpec, dtype: torch.dtype) -> None:
    for sample in samples_of(spec.name, torch.float32, "quick").values():
        cast = {
            name: value.to(dtype).requires_grad_(name in sample.grad_inputs)  # as below: some fuse less for gradients
            for name, value in bind(spec, sample).arguments.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name not in spec.kept_by_autocast
        }
        bound = bind(spec, sample, **cast)
        torch.manual_seed(0)
        expected = outputs(spec.function(*bound.args, **bound.kwargs))
        inputs = leaves(spec, sample)
        bound = bind(spec, sample, **inputs)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype):
            actual = outputs(spec.function(*bound.args, **bound.kwargs))
        assert all(map(torch.equal, actual, expected)), sample.name
        grads = torch.autograd.grad(actual, list(inputs.values()), [torch.ones_like(result) for result in actual])
        assert all(grad.dtype == torch.float32 for grad in grads)


@each_differentiable_op
def test_autocast_leaves_float64_and_its_own_dtype(spec: OpSpec) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        sample = sample_of(spec, dtype)
        expected = outputs(spec.function(*sample.args, **sample.kwargs))
        with torch.autocast("cpu", torch.bfloat16):
            actual = outputs(spec.function(*sample.args, **sample.kwargs))
            with torch.autocast("cpu", enabled=False):
                again = outputs(spec.function(*sample.args, **sample.kwargs))
        for result, within, same in zip(actual, again, expected, strict=True):
            assert result.dtype == same.dtype
            assert torch.equal(result, same)
            assert torch.equal(within, same)


class Tagged(torch.Tensor):
    """A subclass that sees every call through ``__torch_function__``."""

    seen: list[str] = []  # noqa: RUF012 - one list for the class is what the test reads

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@each_differentiable_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensor_subclasses_see_the_operator(spec: OpSpec, requires_grad: bool) -> None:
    sample = sample_of(spec, torch.float32)
    inputs = {n: t.detach().as_subclass(Tagged).requires_grad_(requires_grad) for n, t in leaves(spec, sample).items()}
    bound = bind(spec, sample, **inputs)
    Tagged.seen.clear()
    results = outputs(spec.function(*bound.args, **bound.kwargs))
    assert any(spec.torch_ops[0].replace("::", ".") in name for name in Tagged.seen)
    assert all(isinstance(result, Tagged) for result in results)


@each_op
@pytest.mark.parametrize("requires_grad", [False, True])
def test_dispatch_modes_and_the_profiler_see_the_operator(spec: OpSpec, requires_grad: bool) -> None:
    sample = sample_of(spec, torch.float32)
    inputs = {name: tensor.detach().requires_grad_(requires_grad) for name, tensor in leaves(spec, sample).items()}
    bound = bind(spec, sample, **inputs)
    with Recorder() as recorder, torch.profiler.profile() as profile:
        spec.function(*bound.args, **bound.kwargs)
    assert [name for name, _ in recorder.calls if name in spec.torch_ops] == [spec.torch_ops[0]]
    assert spec.torch_ops[0] in {event.name for event in profile.events()}


@each_op
def test_reference_and_baseline_take_the_functions_arguments(spec: OpSpec) -> None:
    """By name, as the benchmark's check gives them."""
    names = inspect.signature(spec.function).parameters.keys()
    for other in (spec.reference, spec.baseline):
        parameters = inspect.signature(other).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        assert takes_all or names <= {parameter.name for parameter in parameters}, other


@each_op
def test_every_bench_case_is_well_formed(spec: OpSpec) -> None:
    found = spec.bench_cases()
    assert len({(case.name, case.dtype, case.direction) for case in found}) == len(found)
    smallest = min(found, key=lambda case: case.work_flops)
    args, kwargs = smallest.make(torch.Generator().manual_seed(0))
    again, _ = smallest.make(torch.Generator().manual_seed(0))
    assert all(map(torch.equal, tensors_in(args), tensors_in(again)))
    assert all(arg.dtype == smallest.dtype for arg in args if isinstance(arg, Tensor))
    spec.function(*args, **kwargs)
    assert all(case.work_flops > 0 and case.work_bytes > 0 for case in found)


@each_op
def test_explain_names_a_kernel_of_the_table(spec: OpSpec) -> None:
    names = {kernel.name for kernel in spec.kernels()}
    for dtype in DTYPES:
        sample = sample_of(spec, dtype)
        account = spec.explain(*sample.args, **sample.kwargs)
        assert account.op == spec.name
        assert account.kernel in names or account.backend == "cpu"
        assert str(account).startswith(f"{spec.name}: {account.kernel}")
