"""The operators on an NVIDIA GPU. Skipped where there is none; `bench/gpu_check.sh` runs this and more in one go."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import op_checks as contract
import pytest
import torch
from kernel_checks import RESULTS, assert_within_rule, covered, differentiate, random_gradients
from torch import Tensor

import ptkernels as ptk
from ptkernels import _registry
from ptkernels._registry import Level, Sample
from ptkernels.ops.attention.options import Options
from ptkernels.ops.attention.spec import SPEC

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("strict", "_full_precision_products")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def _full_precision_products() -> Iterator[None]:
    """The peer's error sets the bound; TF32 would widen it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@functools.cache
def samples_on_gpu(dtype: torch.dtype, level: Level) -> dict[str, Sample]:
    return {sample.name: sample for sample in covered(SPEC.samples(dtype, "cuda", False, level))}


def sample_names() -> list[Any]:
    quick = {sample.name for sample in SPEC.samples(torch.float32, "cpu", False, "quick")}
    return [
        pytest.param(sample.name, marks=[] if sample.name in quick else [pytest.mark.slow])
        for sample in covered(SPEC.samples(torch.float32, "cpu", False, "full"))
    ]


def run(sample: Sample, dtype: torch.dtype) -> Any:
    grads = random_gradients(*ptk.attention(*sample.args, **sample.kwargs, return_lse=True))
    return differentiate(ptk.attention, sample, dtype, grads), grads


def operands(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size, device="cuda", dtype=dtype) for size in sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sample_names())
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    sample = samples_on_gpu(dtype, "full")[name]
    ours, grads = run(sample, dtype)
    assert_within_rule(SPEC, ours, sample, dtype, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["attention_varlen", "attention_with_kv_cache"])
def test_packed_sequences_and_caches_match_the_reference(name: str, dtype: torch.dtype) -> None:
    spec = _registry.get(name)
    with ptk.backend("cuda"):
        for sample in covered(spec.samples(dtype, "cuda", False, "quick")):
            ours = contract.value_and_gradients(spec.function, spec, sample)
            contract.assert_results_within_rule(spec, sample, dtype, ours)


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "attention_with_kv_cache"])
def test_compiles_whole_and_gives_the_same_bits(name: str) -> None:
    spec = _registry.get(name)
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    with ptk.backend("cuda"):
        for sample in covered(spec.samples(torch.float32, "cuda", False, "gradcheck")):
            torch._dynamo.reset()
            expected = contract.value_and_gradients(spec.function, spec, sample)
            actual = contract.value_and_gradients(compiled, spec, sample)
            assert all(torch.equal(actual[result], tensor) for result, tensor in expected.items()), sample.name


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    spec = _registry.get(name)
    for sample in covered(spec.samples(torch.float64, "cuda", False, "gradcheck")):
        inputs = contract.leaves(spec, sample)

        def call(*tensors: Tensor, sample: Sample = sample, names: tuple[str, ...] = tuple(inputs)) -> Any:
            bound = contract.bind(spec, sample, **dict(zip(names, tensors, strict=True)))
            return spec.function(*bound.args, **bound.kwargs)

        torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize(("heads", "len_q"), [(2, 83), (8, 19)])  # the latter share tiles on sm_90a
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_has_the_masks_of_the_cpu(dtype: torch.dtype, heads: int, len_q: int) -> None:
    """With equal scores and the identity for values, out shows which weights were kept."""
    keys = 64
    query, key = torch.zeros(4, heads, len_q, 16, dtype=dtype), torch.zeros(4, 2, keys, 16, dtype=dtype)
    value = torch.eye(keys, dtype=dtype).repeat(4, 2, 1, 1)
    rest = Options(dropout_seed=torch.tensor([3, 4]), dropout_p=0.4)
    on_cpu, on_gpu = (
        torch.ops.ptkernels.attention(query.to(device), key.to(device), value.to(device), None, *rest)[0].cpu()
        for device in ("cpu", "cuda")
    )
    assert torch.equal(on_gpu != 0, on_cpu != 0)
    assert 0.5 < (on_cpu != 0).float().mean().item() < 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    for name in ("1023x1024-causal", "grouped-heads", "dims-192-128", "bool", "everything"):
        sample = samples_on_gpu(dtype, "full")[name]
        first, _ = run(sample, dtype)
        for _ in range(250):
            again, _ = run(sample, dtype)
            results = (*RESULTS[:2], *sample.grad_inputs)
            assert all(torch.equal(getattr(again, result), getattr(first, result)) for result in results), name


def test_agrees_with_the_cpu() -> None:
    query, key, value = operands((2, 4, 65, 48), (2, 2, 70, 48), (2, 2, 70, 33), dtype=torch.float64)
    on_gpu = ptk.attention(query, key, value, is_causal=True, enable_gqa=True)
    on_cpu = ptk.attention(query.cpu(), key.cpu(), value.cpu(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-12, atol=1e-12)
    assert on_gpu.stride() == on_cpu.stride()


def test_runs_on_the_current_stream() -> None:
    """Work queued before on the same stream is seen, without the host waiting for it."""
    query, key, value = operands(*[(1, 8, 512, 64)] * 3)
    expected = ptk.attention(query + 1, key, value)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        out = ptk.attention(query + 1, key, value)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_streams_side_by_side(dtype: torch.dtype) -> None:
    """Neither touches what the other computes with: tensors, scratch memory, numbers that came from the host."""
    problems = [operands(*[(2, 4, length, 64)] * 3, dtype=dtype) for length in (700, 333)]

    def step(problem: tuple[Tensor, ...], seed: int) -> list[Tensor]:
        torch.manual_seed(seed)  # of dropout
        leaves = [tensor.detach().requires_grad_() for tensor in problem]
        out = ptk.attention(*leaves, is_causal=True, dropout_p=0.2)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = [[step(problem, seed) for seed in range(20)] for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    found: list[list[list[Tensor]]] = [[] for _ in problems]
    for seed in range(20):
        for problem, stream, results in zip(problems, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(problem, seed))
    torch.cuda.synchronize()
    for ours, wanted in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_is_captured_in_a_graph(dtype: torch.dtype) -> None:
    leaves = [
        tensor.requires_grad_() for tensor in operands((1, 4, 100, 64), (1, 2, 130, 64), (1, 2, 130, 64), dtype=dtype)
    ]

    def step() -> list[Tensor]:
        out = ptk.attention(*leaves, is_causal=True, enable_gqa=True, softcap=5.0)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # loading a kernel's code is not allowed during capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.randn_like(leaf))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_is_captured_in_a_graph() -> None:
    query, key, value = operands(*[(1, 4, 100, 64)] * 3)
    ptk.attention(query, key, value)  # loading a kernel's code is not allowed during capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ptk.attention(query, key, value, is_causal=True)
    query.copy_(torch.randn_like(query))
    graph.replay()
    assert torch.equal(out, ptk.attention(query, key, value, is_causal=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs() -> None:
    query, key, value = (tensor.to("cuda:1") for tensor in operands(*[(1, 2, 33, 16)] * 3))
    with torch.cuda.device(0):
        out = ptk.attention(query, key, value)
    assert out.device == query.device
    torch.testing.assert_close(out.cpu(), ptk.attention(query.cpu(), key.cpu(), value.cpu()))


def test_memory_is_linear_in_the_lengths() -> None:
    def extra(length: int) -> int:
        tensors = [t.requires_grad_() for t in operands(*[(1, 2, length, 64)] * 3, dtype=torch.bfloat16)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ptk.attention(*tensors).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert extra(16384) < 5 * extra(4096)


def skip_without_memory(needed: int) -> None:
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")


def with_gradients(*tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = ptk.attention(*leaves, return_lse=True)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_31_bits(dtype: torch.dtype) -> None:
    """A batch stride of more than 2**31 elements."""
    skip_without_memory(5 * 2**31)
    storage = torch.zeros(2**31 + 2**20, device="cuda", dtype=dtype)
    wide = storage.as_strided((2, 2, 100, 64), (2**31, 6400, 64, 1)).normal_()
    packed = wide.contiguous()
    assert all(
        torch.equal(a, b) for a, b in zip(with_gradients(*[wide] * 3), with_gradients(*[packed] * 3), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_2_to_31_elements(dtype: torch.dtype) -> None:
    """In queries, outputs and the gradient of the queries: the last rows are what they are alone."""
    heads, length, last = 2, 2**24 + 256, 512
    skip_without_memory(6 * heads * length * 64 * dtype.itemsize)
    assert heads * length * 64 > 2**31
    query = torch.randn(1, heads, length, 64, device="cuda", dtype=dtype)
    key, value = operands(*[(1, heads, 33, 64)] * 2, dtype=dtype)
    rows = slice(length - last, None)  # whole tiles of every kernel
    whole, alone = with_gradients(query, key, value), with_gradients(query[:, :, rows].contiguous(), key, value)
    assert all(torch.equal(ours[:, :, rows], wanted) for ours, wanted in zip(whole[:3], alone[:3], strict=True))


def test_operands_on_two_devices_are_refused() -> None:
    query, key, value = operands(*[(1, 2, 5, 4)] * 3)
    with pytest.raises(ValueError, match=r"attention: key: got .*cpu"):
        ptk.attention(query, key.cpu(), value)
    with pytest.raises(RuntimeError, match="attention: key: got a tensor on another device"):
        torch.ops.ptkernels.attention(query, key.cpu(), value)


def test_explain_names_the_library() -> None:
    assert "cuda" in ptk.explain(ptk.attention, *operands(*[(1, 2, 5, 4)] * 3)).kernel


def test_decoding_is_captured_in_a_graph() -> None:
    """A step reads its lengths on the device: the graph replays at any of them."""
    query, k, v = operands((2, 8, 1, 64), (2, 2, 1, 64), (2, 2, 1, 64), dtype=torch.bfloat16)
    caches = operands((2, 2, 512, 64), (2, 2, 512, 64), dtype=torch.bfloat16)
    filled = torch.tensor([100, 7], device="cuda")
    expected = [cache.clone() for cache in caches]
    with torch.no_grad():
        ptk.attention_with_kv_cache(query, *(cache.clone() for cache in caches), k, v, cache_seqlens=filled)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ptk.attention_with_kv_cache(query, *caches, k, v, cache_seqlens=filled)
        filled.copy_(torch.tensor([300, 0]))
        graph.replay()
        wanted = ptk.attention_with_kv_cache(query, *expected, k, v, cache_seqlens=filled)
    assert torch.equal(out, wanted)
    assert torch.equal(caches[0], expected[0])
