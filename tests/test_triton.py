"""Triton kernels on machines without a GPU: run in the interpreter, compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels import _triton
from ptkernels.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "triton-check"
ARCHS = (80, 90, 100)
# A thread's registers hold what every option of attention needs at once, all of them together, but for so many bytes.
SPILL_OF_ALL_OPTIONS = 256

installed = pytest.mark.skipif(_triton._package_unavailable() is not None, reason=str(_triton._package_unavailable()))
pytestmark = pytest.mark.triton


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="this process is interpreted itself")
@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "tests" / "triton").glob("test_*.py")))
def test_in_the_interpreter(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/triton/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available() or _triton.interpreted(), reason="Triton can run here")
def test_the_backend_says_why_it_cannot_run() -> None:
    with pytest.raises(BackendError, match=r"CUDA device|not installed|too old"):
        ptk.backend("triton")
    row = next(kernel for kernel in ptk._registry.get("attention").kernels() if kernel.backend == "triton")
    assert not row.available
    assert row.note


@pytest.mark.parametrize(
    ("found", "reason"), [(None, "not installed"), ((3, 5, 1), "3.5.1 is too old, expected 3.6"), ((3, 6, 0), None)]
)
def test_versions(found: tuple[int, ...] | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "version", lambda: found)
    got = _triton._package_unavailable.__wrapped__()
    assert (got is None) if reason is None else reason in got


def test_importing_ptkernels_does_not_import_triton() -> None:
    program = "import sys, ptkernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def attention_launches(arch: int, dim: int, dim_v: int, dtype: torch.dtype, options: str) -> Iterator[Any]:
    """What forward and backward launch, once for every tile size in the table."""
    from ptkernels._triton.compiling import Recorder
    from ptkernels.ops.attention import triton as attention

    query = meta(2, 1024, 16, dim, dtype=dtype).transpose(1, 2)
    key = meta(2, 1024, 4, dim, dtype=dtype).transpose(1, 2)
    value = meta(2, 1024, 4, dim_v, dtype=dtype).transpose(1, 2)
    mask, call = None, attention.Call(is_causal=True)
    if options == "all":
        mask = meta(1, 16, 1024, 1024, dtype=dtype)
        call = attention.Call(
            is_causal=True,
            softcap=30.0,
            alibi_slopes=meta(16, dtype=torch.float32),
            sinks=meta(16, dtype=torch.float32),
            dropout_seed=meta(dtype=torch.int64),
            dropout_p=0.1,
            window_left=100,
            bottom_right=True,
        )
    table = attention.tiles
    most = max(len(table(kernel, dtype, dim, dim_v, arch)) for kernel in ("forward", "dq", "dkdv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton, "arch_of", lambda tensor: arch)
        for index in range(most):
            patch.setattr(attention, "tiles", lambda *args, index=index: table(*args)[index:] or table(*args))
            recorder = Recorder()
            out, lse = attention.forward(query, key, value, mask, call, recorder)
            attention.backward(out, None, query, key, value, out, lse, mask, call, wrap=recorder)
            yield from recorder.launches


def uses_tensor_cores(launch: Any) -> bool:
    """Whether a 16-bit kernel's products are as large as those of a warp group, which wgmma and tcgen05 need."""
    if "BLOCK_N" not in launch.constants:
        return False
    rows = launch.constants["BLOCK_N" if launch.name.startswith("backward_dkdv") else "BLOCK_M"]
    return bool(rows >= 64)


ATTENTION = [
    pytest.param(dim, dim_v, dtype, options, id=f"{dim}-{dim_v}-{str(dtype)[6:]}-{options}")
    for dim, dim_v, dtype, options in [
        (64, 64, torch.bfloat16, "plain"),
        (64, 64, torch.bfloat16, "all"),
        (128, 128, torch.bfloat16, "plain"),
        (128, 128, torch.float16, "all"),
        (192, 128, torch.bfloat16, "plain"),
        (80, 80, torch.float32, "plain"),
    ]
]


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dim", "dim_v", "dtype", "options"), ATTENTION)
def test_attention_compiles(arch: int, dim: int, dim_v: int, dtype: torch.dtype, options: str) -> None:
    from ptkernels._triton.compiling import check, problems

    allowed = SPILL_OF_ALL_OPTIONS if options == "all" else 0
    for launch, binary in check(attention_launches(arch, dim, dim_v, dtype, options), arch, CACHE):
        dots = dtype != torch.float32 and uses_tensor_cores(launch)
        assert not problems(binary, arch, sixteen_bit_dots=dots, spill_allowed=allowed), launch.name


def linear_launches(rows: int, code: str, quantize_input: bool, arch: int) -> list[Any]:
    from ptkernels._triton.compiling import Recorder
    from ptkernels.ops.quantized_matmul import triton as quantized

    n, k, group = 4096, 4096, -1 if quantize_input else 128
    codes = meta(n, k // 2, dtype=torch.uint8) if code == "u4" else meta(n, k, dtype=torch.int8)
    weight = quantized.Weight(codes, meta(n, 1 if group == -1 else k // group, dtype=torch.float32), k, code, group)
    recorder = Recorder()
    quantized.linear(meta(rows, k), weight, meta(n), activation="silu", quantize_input=quantize_input, wrap=recorder)
    if not quantize_input and rows > 16:
        quantized.linear_dx(meta(rows, n), weight, recorder)
    return recorder.launches


def conv_launches(filters: int, arch: int) -> list[Any]:
    from ptkernels._triton.compiling import Recorder
    from ptkernels.ops.conv_bn_relu import triton as conv

    recorder = Recorder()
    x, weight = (meta(*size).to(memory_format=torch.channels_last) for size in ((8, 64, 56, 56), (filters, 64, 3, 3)))
    scale = meta(filters, dtype=torch.float32)
    residual = meta(8, filters, 56, 56).to(memory_format=torch.channels_last)
    conv.conv_bn_act(x, weight, scale, scale, residual=residual, padding=(1, 1), wrap=recorder)
    return recorder.launches


def decode_launches(dim: int, arch: int) -> list[Any]:
    from ptkernels._triton.compiling import Recorder
    from ptkernels.ops.attention.triton_decode import decode

    recorder = Recorder()
    cache, ints = meta(1024, 64, 8, dim).transpose(1, 2), meta(8, 128, dtype=torch.int32)
    decode(meta(8, 32, 1, dim), cache, cache, ints[:, 0], ints, wrap=recorder)
    return recorder.launches


def wide_enough(launch: Any) -> bool:
    return launch.name.startswith(("linear", "conv")) and launch.constants["BLOCK_M"] >= 64


OTHERS = {
    "int8-dynamic": lambda arch: linear_launches(4096, "s8", True, arch),
    "int4": lambda arch: linear_launches(4096, "u4", False, arch),
    "int4-few-rows": lambda arch: linear_launches(8, "u4", False, arch),
    "int8-groups": lambda arch: linear_launches(64, "s8", False, arch),
    "conv": lambda arch: conv_launches(64, arch),
    "conv-wide": lambda arch: conv_launches(256, arch),
    "decode": lambda arch: decode_launches(128, arch),
}


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_kernels_compile(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptkernels._triton.compiling import check, problems

    monkeypatch.setattr(_triton, "arch_of", lambda tensor: arch)
    for launch, binary in check(OTHERS[name](arch), arch, CACHE):
        # Products of 8 bits have instructions of their own, which not every generation's warp groups have.
        sixteen_bit_dots = wide_enough(launch) and "INTEGER" not in str(launch.constants).replace(
            "'INTEGER': False", ""
        )
        assert not problems(binary, arch, sixteen_bit_dots=sixteen_bit_dots), launch.name


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="tracing sees kernels, not what interprets them")
def test_tracing_sees_the_kernels() -> None:
    """AOT Autograd, which comes before Inductor, is shown the launch and not an opaque operator."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    from ptkernels.ops.attention import triton_ops

    with FakeTensorMode():
        query = torch.empty(2, 4, 64, 64, device="cuda", dtype=torch.bfloat16)
        graph = make_fx(dispatch_functionalize(lambda q: triton_ops.attention_op(q, q, q, None, True)))(query)
    assert any("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes)
