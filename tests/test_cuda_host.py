"""The CUDA kernels run on the CPU, thread by thread (cuda_host/cuda_host.h): their logic, where there is no GPU."""

from __future__ import annotations

import itertools
import math
import mmap
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import ON_CUDA, RESULTS, assert_within_rule, random_gradients
from torch import Tensor

from ptkernels._registry import Sample
from ptkernels.ops.attention.spec import SPEC

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
SELECTION = ("113x203-causal", "dim-111", "dim-512", "dims-192-128", "grouped-heads", "empty-rows", "bias", "no-keys")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    torch_dir = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("cuda_host") / "libattention_host.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    # Traps on an index outside a tile and on a misaligned 16-byte access, which a GPU would answer with a fault.
    flags += ["-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error"]
    includes = [f"-I{ROOT}", "-isystem", str(torch_dir / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    source = str(ROOT / "tests/cuda_host/attention_host.cpp")
    link = ["-o", str(library), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    subprocess.run([COMPILER, *flags, *includes, source, *link], check=True)
    torch.ops.load_library(library)
    return torch.ops.ptkernels_cuda_host


def options(sample: Sample) -> tuple[Tensor | None, bool, float | None]:
    return sample.kwargs.get("attn_mask"), sample.kwargs.get("is_causal", False), sample.kwargs.get("scale")


def forward(host: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    return host.attention(*(tensor.detach() for tensor in sample.args), *options(sample))


def gradients_for(host: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    return random_gradients(*forward(host, sample))


def on_host(
    host: Any, sample: Sample, grads: tuple[Tensor, Tensor], wanted: tuple[bool, bool, bool] = (True, True, True)
) -> SimpleNamespace:
    operands = [tensor.detach() for tensor in sample.args]
    out, lse = forward(host, sample)
    gradients = host._attention_backward(*grads, *operands, out, lse, *options(sample), wanted)
    return SimpleNamespace(out=out, lse=lse, **dict(zip(("query", "key", "value"), gradients[:3], strict=True)))


def contract_samples() -> Iterator[Any]:
    """Every quick sample in float32; the other dtypes, which differ in tile shape or in conversion, on a selection."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for sample in SPEC.samples(dtype, "cpu", False, "quick"):
            if set(sample.kwargs) - ON_CUDA:
                continue
            if dtype == torch.float32 or sample.name in SELECTION:
                yield pytest.param(sample, dtype, id=f"{str(dtype)[6:]}-{sample.name}")


@pytest.mark.parametrize(("sample", "dtype"), list(contract_samples()))
def test_matches_the_reference(host: Any, sample: Sample, dtype: torch.dtype) -> None:
    grads = gradients_for(host, sample)
    assert_within_rule(SPEC, on_host(host, sample, grads), sample, dtype, grads)


def make(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Sample:
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return Sample("made", tensors, kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_order_of_threads(host: Any, dtype: torch.dtype) -> None:
    mask = torch.rand(70, 90, generator=torch.Generator().manual_seed(0)) < 0.7
    sample = make((1, 4, 70, 130), (1, 2, 90, 130), (1, 2, 90, 70), dtype=dtype, attn_mask=mask, is_causal=True)
    grads = gradients_for(host, sample)
    results = []
    for order in ORDERS.values():
        host.set_order(order)
        results.append(on_host(host, sample, grads))
    host.set_order(0)
    for name in RESULTS:
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
        assert torch.equal(getattr(results[0], name), getattr(results[2], name)), name


def test_layouts_put_heads_inside(host: Any) -> None:
    sample = make((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3))
    result = on_host(host, sample, gradients_for(host, sample))
    for name, heads in {"out": 4, "query": 4, "key": 2, "value": 2}.items():
        tensor = getattr(result, name)
        assert tensor.transpose(1, 2).is_contiguous(), name
        assert tensor.size(1) == heads
    assert result.lse.is_contiguous()


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
def test_only_the_gradients_asked_for(host: Any, wanted: tuple[bool, bool, bool]) -> None:
    sample = make((1, 2, 20, 6), (1, 2, 37, 6), (1, 2, 37, 3))
    grads = gradients_for(host, sample)
    everything = on_host(host, sample, grads)
    some = on_host(host, sample, grads, wanted)
    for name, asked in zip(("query", "key", "value"), wanted, strict=True):
        got = getattr(some, name)
        assert (got is not None) == asked
        if asked:
            assert torch.equal(got, getattr(everything, name))


def test_without_the_gradient_of_lse(host: Any) -> None:
    sample = make((1, 2, 20, 6), (1, 2, 37, 6), (1, 2, 37, 3))
    out, lse = host.attention(*sample.args)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    absent = host._attention_backward(grad_out, None, *sample.args, out, lse)
    zero = host._attention_backward(grad_out, torch.zeros_like(lse), *sample.args, out, lse)
    assert all(torch.equal(a, b) for a, b in zip(absent[:3], zero[:3], strict=True))


def test_options_without_a_kernel_are_refused(host: Any) -> None:
    sample = make((1, 2, 20, 6), (1, 2, 37, 6), (1, 2, 37, 3))
    values = torch.ones(2)
    refused = {"window_left": 3, "softcap": 1.0, "alibi_slopes": values, "sinks": values}
    for name, value in {**refused, "relative_bias": torch.ones(2, 56)}.items():
        with pytest.raises(RuntimeError, match=f"attention: {name.removesuffix('_left')}: got a value, expected none"):
            host.attention(*sample.args, **{name: value})


@pytest.mark.parametrize("large", ["batch", "length"])
def test_offsets_beyond_31_bits(host: Any, large: str) -> None:
    """Strides reach past 2**31 elements; the pages between are never touched."""
    stride = {"batch": (2**31, 16, 8, 1), "length": (8, 8, 2**30 + 8, 1)}[large]
    sizes = {"batch": (2, 1, 2, 8), "length": (1, 1, 3, 8)}[large]
    storage = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 64)), dtype=torch.bfloat16)
    wide = storage.as_strided(sizes, stride)
    wide.copy_(torch.randn(sizes, generator=torch.Generator().manual_seed(0)))
    packed = wide.contiguous()
    grads = gradients_for(host, Sample("packed", (packed, packed, packed)))
    got = on_host(host, Sample("wide", (wide, wide, wide)), grads)
    expected = on_host(host, Sample("packed", (packed, packed, packed)), grads)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in RESULTS)


def test_nan_outside_the_tensors_stays_there(host: Any) -> None:
    def surrounded(size: tuple[int, ...]) -> Tensor:
        buffer = torch.full([n + 4 for n in size], math.nan)
        view = buffer[2:-2, 2:-2, 2:-2, 2:-2]
        return view.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)))

    mask = surrounded((2, 2, 35, 67))
    operands = tuple(surrounded(size) for size in ((2, 2, 35, 20), (2, 2, 67, 20), (2, 2, 67, 70)))
    sample = Sample("surrounded", operands, {"attn_mask": mask})
    grad_out, grad_lse = surrounded((2, 2, 35, 70)), torch.randn(2, 2, 35, generator=torch.Generator().manual_seed(0))
    result = on_host(host, sample, (grad_out, grad_lse))
    assert all(getattr(result, name).isfinite().all() for name in RESULTS)


def test_the_host_reports_a_barrier_that_a_thread_misses(host: Any) -> None:
    with pytest.raises(RuntimeError, match="same barrier"):
        host.run_diverging()


def test_the_host_shows_a_race(host: Any) -> None:
    results = []
    for order in ORDERS.values():
        host.set_order(order)
        out = torch.empty(256)
        host.run_racing(out)
        results.append(out)
    host.set_order(0)
    assert results[0].isnan().any()  # ascending: everybody reads what its neighbour has yet to write
    assert not torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))
