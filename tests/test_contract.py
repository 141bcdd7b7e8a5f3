"""What every operator promises, checked for each from its specification alone."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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


class Recorder(TorchDispatchMode):
    """Names and results of the operators a call reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.name(), result))
        return result


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


# Tensors of these hold where things are, not values.
INDEX_DTYPES = (torch.int32, torch.int64)


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
