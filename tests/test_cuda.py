"""The operators on an NVIDIA GPU. Skipped where there is none; `bench/gpu_check.sh` runs this and more in one go."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_checks import RESULTS, assert_within_rule, differentiate, random_gradients
from torch import Tensor

import ptkernels as ptk
from ptkernels._registry import Level, Sample
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
    return {sample.name: sample for sample in SPEC.samples(dtype, "cuda", False, level)}


def sample_names() -> list[Any]:
    quick = {sample.name for sample in SPEC.samples(torch.float32, "cpu", False, "quick")}
    return [
        pytest.param(sample.name, marks=[] if sample.name in quick else [pytest.mark.slow])
        for sample in SPEC.samples(torch.float32, "cpu", False, "full")
        if not sample.kwargs.keys() & {"relative_bias", "mask_block_size"}  # which have no kernel on cuda
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
def test_every_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    for name in ("1023x1024-causal", "grouped-heads", "dims-192-128", "bool"):
        sample = samples_on_gpu(dtype, "full")[name]
        first, _ = run(sample, dtype)
        for _ in range(250):
            again, _ = run(sample, dtype)
            assert all(torch.equal(getattr(again, result), getattr(first, result)) for result in RESULTS), name


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


@pytest.mark.slow
def test_offsets_beyond_31_bits() -> None:
    """A batch stride of more than 2**31 elements."""
    needed = 3 * 2**32
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    storage = torch.zeros(2**31 + 2**20, device="cuda", dtype=torch.bfloat16)
    wide = storage.as_strided((2, 2, 100, 64), (2**31, 6400, 64, 1)).normal_()
    packed = wide.contiguous()
    assert torch.equal(ptk.attention(wide, wide, wide), ptk.attention(packed, packed, packed))


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
