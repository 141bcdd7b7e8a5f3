"""Derivatives of every operator: of any order, in both modes, mapped, checkpointed, and only those that are needed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_checks import (
    INDEX_DTYPES,
    Recorder,
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

from ptkernels._registry import OpSpec, Sample


def of_gradient_inputs(spec: OpSpec, sample: Sample) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The call as a function of its differentiable arguments alone, and those."""
    inputs = leaves(spec, sample)

    def call(*tensors: Tensor) -> Any:
        bound = bind(spec, sample, **dict(zip(inputs, tensors, strict=True)))
        return spec.function(*bound.args, **bound.kwargs)

    return call, tuple(inputs.values())


@each_differentiable_op
def test_gradcheck(spec: OpSpec) -> None:
    for sample in samples_of(spec.name, torch.float64, "gradcheck").values():
        function, inputs = of_gradient_inputs(spec, sample)
        torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)


@each_differentiable_op
@pytest.mark.parametrize(
    "fast_mode", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["projected", "complete"]
)
def test_gradgradcheck(spec: OpSpec, fast_mode: bool) -> None:
    for sample in samples_of(spec.name, torch.float64, "gradcheck").values():
        function, inputs = of_gradient_inputs(spec, sample)
        torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=fast_mode)


def scalar_functions(spec: OpSpec, sample: Sample) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """Ours and the reference as nonlinear scalar functions of the differentiable arguments."""
    inputs = leaves(spec, sample)

    def make(function: Callable[..., Any]) -> Callable[..., Tensor]:
        def scalar(*tensors: Tensor) -> Tensor:
            bound = bind(spec, sample, **dict(zip(inputs, tensors, strict=True)))
            results = outputs(function(*bound.args, **bound.kwargs))
            return torch.stack([result.sin().sum() for result in results]).sum()

        return scalar

    return make(spec.function), make(spec.reference), [tensor.detach() for tensor in inputs.values()]


def third_order(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    value = function(*inputs)
    for _ in range(2):
        grads = torch.autograd.grad(value, inputs, create_graph=True)
        value = torch.stack([grad.cos().sum() for grad in grads]).sum()
    return torch.autograd.grad(value, inputs)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, *x: torch.func.grad(f, argnums=(0, 1, 2))(*x),
    "jvp": lambda f, *x: torch.func.jvp(f, x, tuple(t.cos() for t in x))[1],
    "jacrev": lambda f, *x: torch.func.jacrev(f, argnums=1)(*x),
    "jacfwd": lambda f, *x: torch.func.jacfwd(f, argnums=2)(*x),
    "hessian": lambda f, *x: torch.func.hessian(f, argnums=(0, 1))(*x),
    "jacrev of jacrev": lambda f, *x: torch.func.jacrev(torch.func.jacrev(f), argnums=(0, 2))(*x),
    "jacrev of jacfwd": lambda f, *x: torch.func.jacrev(torch.func.jacfwd(f))(*x),
    "vmap of grad": lambda f, *x: torch.vmap(torch.func.grad(f))(*(torch.stack([t, t.sin(), -t]) for t in x)),
    "grad of vmap": lambda f, *x: torch.func.grad(
        lambda t: torch.vmap(f, (0, *(None for _ in x[1:])))(t, *x[1:]).cos().sum()
    )(torch.stack([x[0], x[0].sin()])),
    "third order": third_order,
}


@each_differentiable_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(spec: OpSpec, transform: str) -> None:
    for sample in itertools.islice(samples_of(spec.name, torch.float64, "gradcheck").values(), 0, None, 2):
        ours, reference, inputs = scalar_functions(spec, sample)
        apply = TRANSFORMS[transform]
        torch.testing.assert_close(apply(ours, *inputs), apply(reference, *inputs), rtol=1e-9, atol=1e-9)


@each_differentiable_op
def test_only_needed_gradients_are_computed(spec: OpSpec) -> None:
    sample = sample_of(spec, torch.float32, level="gradcheck")
    full = value_and_gradients(spec.function, spec, sample)
    backward = next(name for name in spec.torch_ops if "backward" in name)
    for needed in itertools.product((False, True), repeat=len(sample.grad_inputs)):
        inputs = {
            name: tensor.requires_grad_(need)
            for (name, tensor), need in zip(
                ((name, tensor.detach()) for name, tensor in leaves(spec, sample).items()), needed, strict=True
            )
        }
        bound = bind(spec, sample, **inputs)
        results = outputs(spec.function(*bound.args, **bound.kwargs))
        assert all(result.requires_grad == any(needed) for result in results)
        if not any(needed):
            assert all(result.grad_fn is None for result in results)
            continue
        generator = torch.Generator().manual_seed(1)
        with Recorder() as recorder:
            torch.autograd.backward(results, [torch.randn(result.shape, generator=generator) for result in results])
        computed = [grads for name, grads in recorder.calls if name == backward]
        if computed and isinstance(computed[0], (tuple, list)):
            # One entry per gradient asked for, or one per argument, None where it was not.
            assert sum(grad is not None for grad in computed[0]) == sum(needed)
        else:  # a backward that gives the first gradient alone: the others need no kernel
            assert bool(computed) == needed[0]
        for name, tensor in inputs.items():
            assert (tensor.grad is not None) == tensor.requires_grad
            if tensor.requires_grad:
                assert torch.equal(tensor.grad, full[f"gradient of {name}"])


@each_op
def test_nothing_is_recorded_without_grad(spec: OpSpec) -> None:
    sample = sample_of(spec, torch.float32)
    bound = bind(spec, sample, **leaves(spec, sample))
    with torch.no_grad():
        assert all(result.grad_fn is None for result in outputs(spec.function(*bound.args, **bound.kwargs)))
    with torch.inference_mode():
        assert all(result.is_inference() for result in outputs(spec.function(*bound.args, **bound.kwargs)))


@each_differentiable_op
def test_gradient_of_any_layout(spec: OpSpec) -> None:
    """Gradients that arrive expanded, as from sum(), or transposed."""
    sample = sample_of(spec, torch.float32, level="gradcheck")
    inputs = leaves(spec, sample)
    bound = bind(spec, sample, **inputs)
    result = outputs(spec.function(*bound.args, **bound.kwargs))[0]
    dense = torch.randn(result.shape)
    for grad in (
        torch.ones(()).expand(result.shape),
        dense.mT.contiguous().mT,
        torch.stack([dense, dense], -1)[..., 0],
    ):
        actual = torch.autograd.grad(result, list(inputs.values()), grad, retain_graph=True)
        expected = torch.autograd.grad(result, list(inputs.values()), grad.contiguous(), retain_graph=True)
        assert all(map(torch.equal, actual, expected))


@each_differentiable_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(spec: OpSpec, use_reentrant: bool) -> None:
    sample = sample_of(spec, torch.float32, level="gradcheck")

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            lambda *tensors: spec.function(*tensors, **kwargs), *args, use_reentrant=use_reentrant
        )

    plain = value_and_gradients(spec.function, spec, sample)
    if use_reentrant:  # which refuses torch.autograd.grad
        inputs = leaves(spec, sample)
        bound = bind(spec, sample, **inputs)
        results = outputs(checkpointed(*bound.args, **bound.kwargs))
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(results, [torch.randn(result.shape, generator=generator) for result in results])
        again = {f"gradient of {name}": tensor.grad for name, tensor in inputs.items()}
    else:
        again = value_and_gradients(checkpointed, spec, sample)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in again.items())


# Mapped dimensions of three tensors, and of others where there are any.
MAPPED = [
    (0, 0, 0, None, None, None),
    (1, -1, 0, 0, 0, 0),
    (0, None, None, 1, None, 1),
    (None, 2, None, -1, -1, None),
    (None, None, 0, None, 0, None),
]


@each_differentiable_op
@pytest.mark.parametrize("mapped", MAPPED, ids=str)
def test_vmap_is_one_call(spec: OpSpec, mapped: tuple[int | None, ...]) -> None:
    size = 3
    for sample in samples_of(spec.name, torch.float64, "gradcheck").values():
        arguments = bind(spec, sample).arguments
        tensors = {n: v for n, v in arguments.items() if isinstance(v, Tensor) and v.dtype not in INDEX_DTYPES}
        dims = (*mapped, *[None] * len(tensors))[: len(tensors)]
        in_dims = tuple(
            None if dim is None else min(dim, tensor.dim()) for dim, tensor in zip(dims, tensors.values(), strict=True)
        )

        def call(*values: Tensor, sample: Sample = sample, names: tuple[str, ...] = tuple(tensors)) -> Any:
            bound = bind(spec, sample, **dict(zip(names, values, strict=True)))
            return outputs(spec.function(*bound.args, **bound.kwargs))

        stacked = [
            value if dim is None else torch.stack([value.roll(shift, -1) for shift in range(size)], dim)
            for value, dim in zip(tensors.values(), in_dims, strict=True)
        ]
        with Recorder() as recorder:
            actual = torch.vmap(call, in_dims)(*stacked)
        inside = spec.one_call_under_vmap
        is_one = all(dim is None or inside is None or n in inside for n, dim in zip(tensors, in_dims, strict=True))
        calls = [name for name, _ in recorder.calls if name in spec.torch_ops]
        assert calls == [spec.torch_ops[0]] * (1 if is_one else size)
        for index in range(size):
            single = [v if dim is None else v.select(dim, index) for v, dim in zip(stacked, in_dims, strict=True)]
            for many, one in zip(actual, call(*single), strict=True):
                torch.testing.assert_close(many[index], one, rtol=1e-12, atol=1e-12)
