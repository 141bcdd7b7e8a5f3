"""Samples of every operator, and what its results and gradients are held to, from its specification alone."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptkernels._registry import Level, OpSpec, Sample, all_ops

SPECS = list(all_ops().values())


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


each_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


each_differentiable_op = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.differentiable], ids=lambda spec: spec.name
)


@functools.cache
def samples_of(spec_name: str, dtype: torch.dtype, level: Level) -> dict[str, Sample]:
    return {sample.name: sample for sample in all_ops()[spec_name].samples(dtype, "cpu", False, level)}


def cases(level: Level) -> list[Any]:
    """One parameter per operator, dtype and sample; those beyond the quick ones are marked slow."""
    found = []
    for spec, dtype in itertools.product(SPECS, DTYPES):
        quick = samples_of(spec.name, dtype, "quick")
        for name in samples_of(spec.name, dtype, level):
            marks = [] if name in quick else [pytest.mark.slow]
            found.append(pytest.param(spec, dtype, name, id=f"{spec.name}-{name}-{str(dtype)[6:]}", marks=marks))
    return found


def sample_of(spec: OpSpec, dtype: torch.dtype, name: str | None = None, level: Level = "full") -> Sample:
    """The named sample, or one that is plain."""
    found = samples_of(spec.name, dtype, level)
    return found[name] if name is not None else next(iter(found.values()))


def bind(spec: OpSpec, sample: Sample, **changes: Any) -> inspect.BoundArguments:
    """The arguments of a call, those that it may write to as copies of the sample's."""
    bound = inspect.signature(spec.function).bind(*sample.args, **sample.kwargs)
    bound.arguments.update(changes)
    for name in spec.mutates:
        if isinstance(bound.arguments.get(name), Tensor):
            bound.arguments[name] = copy_of(bound.arguments[name])
    return bound


def copy_of(tensor: Tensor) -> Tensor:
    """A copy in the same layout, holes in memory included."""
    size = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.new_zeros(max(size, 0))
    return storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor.detach())


def written(spec: OpSpec, bound: inspect.BoundArguments) -> dict[str, Tensor]:
    """What a call may have written to, by name; float8, which torch hardly computes with, as its codes."""
    found = {name: bound.arguments.get(name) for name in spec.mutates}
    tensors = {f"output {name}": value for name, value in found.items() if isinstance(value, Tensor)}
    return {n: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for n, t in tensors.items()}


def cast_of(spec: OpSpec, sample: Sample, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors that share the dtype of the first one in another dtype, for an operator without gradients."""
    if spec.differentiable or dtype is None:
        return {}
    arguments = bind(spec, sample).arguments
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    own = next(iter(tensors.values())).dtype
    return {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.dtype == own}


def leaves(spec: OpSpec, sample: Sample, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The differentiable arguments as fresh leaves that require grad, strides kept, cast where asked."""
    arguments = bind(spec, sample).arguments
    found = {}
    for name in sample.grad_inputs:
        tensor = arguments[name].detach()
        found[name] = (tensor if dtype is None else tensor.to(dtype)).requires_grad_()
    return found


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def value_and_gradients(
    function: Callable[..., Any], spec: OpSpec, sample: Sample, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs of a call and the gradients of a fixed random projection of them, by name."""
    inputs = leaves(spec, sample, dtype)
    bound = bind(spec, sample, **cast_of(spec, sample, dtype), **inputs)
    torch.manual_seed(0)  # what draws random numbers draws the same ones
    results = outputs(function(*bound.args, **bound.kwargs))
    named = {f"output {index}": result.detach() for index, result in enumerate(results)} | written(spec, bound)
    if not spec.differentiable:
        return named
    generator = torch.Generator().manual_seed(1)
    projections = [torch.randn(result.shape, generator=generator).to(result) for result in results]
    grads = torch.autograd.grad(results, list(inputs.values()), projections)
    return named | {f"gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}


def largest_error(actual: Tensor, expected: Tensor) -> float:
    if actual.numel() == 0:
        return 0.0
    return (actual.double() - expected).abs().max().item()


def magnitude(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_within_rule(spec: OpSpec, sample: Sample, dtype: torch.dtype) -> None:
    assert_results_within_rule(spec, sample, dtype, value_and_gradients(spec.function, spec, sample))


def assert_results_within_rule(spec: OpSpec, sample: Sample, dtype: torch.dtype, ours: dict[str, Tensor]) -> None:
    exact = value_and_gradients(spec.reference, spec, sample, torch.float64)
    peer = value_and_gradients(spec.baseline, spec, sample)
    for name, expected in exact.items():
        assert ours[name].shape == expected.shape
        assert ours[name].isfinite().all(), f"{name}: not finite"
        kind = name.split()[0]
        bound = spec.tolerances.bound(
            peer_error=largest_error(peer[name], expected),
            magnitude=magnitude(expected),
            largest=max(magnitude(tensor) for other, tensor in exact.items() if other.startswith(kind)),
            dtype=dtype,
            gradient=kind == "gradient",
        )
        error = largest_error(ours[name], expected)
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"


class Recorder(TorchDispatchMode):
    """Names and results of the operators a call reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.name(), result))
        return result


# Tensors of these hold where things are, not values.
INDEX_DTYPES = (torch.int32, torch.int64)
