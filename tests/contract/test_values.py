"""Values and first gradients of every operator against float64, and what a call must not do besides."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from op_checks import (
    DTYPES,
    assert_within_rule,
    bind,
    cases,
    each_op,
    leaves,
    outputs,
    sample_of,
    samples_of,
    value_and_gradients,
)
from torch import Tensor

from ptkernels._registry import OpSpec


@pytest.mark.parametrize(("spec", "dtype", "name"), cases("full"))
def test_values_and_gradients(spec: OpSpec, dtype: torch.dtype, name: str) -> None:
    assert_within_rule(spec, sample_of(spec, dtype, name), dtype)


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_are_left_alone(spec: OpSpec, dtype: torch.dtype) -> None:
    for sample in samples_of(spec.name, dtype, "quick").values():
        inputs = leaves(spec, sample)
        bound = bind(spec, sample, **inputs)
        kept = {name: value for name, value in bound.arguments.items() if name not in spec.mutates}
        tensors = [value for value in kept.values() if isinstance(value, Tensor)]
        before = [tensor.detach().clone() for tensor in tensors]
        versions = [tensor._version for tensor in tensors]
        results = outputs(spec.function(*bound.args, **bound.kwargs))
        grad_outputs = [torch.randn_like(result) for result in results]
        grad_copies = [grad.clone() for grad in grad_outputs]
        if spec.differentiable:
            torch.autograd.grad(results, list(inputs.values()), grad_outputs)
        assert [tensor._version for tensor in tensors] == versions
        assert all(map(torch.equal, tensors, before)), sample.name
        assert all(map(torch.equal, grad_outputs, grad_copies)), sample.name


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_and_every_thread_count_gives_the_same_bits(spec: OpSpec, dtype: torch.dtype) -> None:
    for sample in samples_of(spec.name, dtype, "quick").values():
        torch.set_num_threads(1)
        first = value_and_gradients(spec.function, spec, sample)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = value_and_gradients(spec.function, spec, sample)
            for name, tensor in first.items():
                assert torch.equal(again[name], tensor), f"{sample.name}, {threads} threads: {name}"


@each_op
@pytest.mark.slow
def test_no_race_in_250_repeats(spec: OpSpec) -> None:
    torch.set_num_threads(3)
    for sample in itertools.islice(samples_of(spec.name, torch.bfloat16, "quick").values(), 4, 10):
        first = value_and_gradients(spec.function, spec, sample)
        for _ in range(250):
            again = value_and_gradients(spec.function, spec, sample)
            assert all(torch.equal(again[name], first[name]) for name in first), sample.name


@each_op
def test_inside_a_parallel_region(spec: OpSpec) -> None:
    """Called by every thread of an OpenMP region at once, as a C++ program's loop may: no deadlock, the same bits."""
    maps = Path("/proc/self/maps")  # of Linux
    lines = maps.read_text().splitlines() if maps.exists() else []
    path = next((line.split()[-1] for line in lines if "libgomp" in line), None)
    if path is None:
        pytest.skip("torch was not built with GNU's OpenMP, through which the test opens the region")
    sample = sample_of(spec, torch.float32)
    torch.set_num_threads(3)
    expected = value_and_gradients(spec.function, spec, sample)
    found = []

    def body(_: Any) -> None:
        bound = bind(spec, sample)
        found.append(outputs(spec.function(*bound.args, **bound.kwargs)))

    region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)
    ctypes.CDLL(path).GOMP_parallel(region, None, 4, 0)
    assert len(found) == 4
    for results in found:
        assert all(torch.equal(result, expected[f"output {index}"]) for index, result in enumerate(results))
