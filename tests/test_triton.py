"""Triton kernels on machines without a GPU: run in the interpreter, compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_launches
from torch import Tensor

import ptkernels as ptk
from ptkernels import _env, _triton
from ptkernels._triton import tuning
from ptkernels.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "triton-check"
ARCHS = (80, 90, 100)

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


@pytest.mark.skipif(_triton.interpreted(), reason="the interpreter multiplies anything")
def test_float64_of_codes_needs_a_newer_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "version", lambda: (3, 8, 1))
    assert "before Triton 3.9" in str(_triton.uncovered_codes(torch.float64))
    assert _triton.uncovered_codes(torch.float32) is None
    monkeypatch.setattr(_triton, "version", lambda: (3, 9, 0))
    assert _triton.uncovered_codes(torch.float64) is None


def test_importing_ptkernels_does_not_import_triton() -> None:
    program = "import sys, ptkernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_tuned_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB")
    monkeypatch.setattr(_env, "cache_folder", lambda: tmp_path)
    tuning._table.cache_clear()
    key = (torch.bfloat16, 64)
    assert tuning.pick("conv", key, "abc", device) == "a"
    with tuning.recording({"conv|torch.bfloat16|64": 1}) as asked:
        assert tuning.pick("conv", key, "abc", device) == "b"
        assert asked["conv|torch.bfloat16|64"] == 3
    path = tuning.store(device, {"conv|torch.bfloat16|64": 2, "other|1": 9})
    assert path == tmp_path / "tiles" / "nvidia-h100-80gb.json"
    assert tuning.pick("conv", key, "abc", device) == "c"
    assert tuning.pick("other", (1,), "ab", device) == "a"  # a table of other candidates
    assert tuning.pick("conv", (torch.float16, 64), "abc", device) == "a"
    tuning._table.cache_clear()


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", triton_launches.CASES)
def test_kernels_compile(name: str, arch: int) -> None:
    from ptkernels._triton.compiling import check, problems

    if name in triton_launches.FLOAT64_OF_CODES and (reason := _triton.uncovered_codes(torch.float64)):
        pytest.skip(reason)
    for launch, binary in check(triton_launches.CASES[name](arch), arch, CACHE):
        dots = triton_launches.uses_matrix_instructions(launch)
        assert not problems(binary, arch, sixteen_bit_dots=dots), launch.name


def traced_call(name: str) -> tuple[Any, list[Tensor]]:
    """A call of an operator on a GPU, as a function of its tensors there."""

    def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    ops, window = torch.ops.ptkernels, ([1, 1], [1, 1], [1, 1], 1)
    rows = on_gpu(2, dtype=torch.int32)
    if name == "conv":
        training = (*(None,) * 6, True, 1e-5, *window)
        return lambda x, w: ops.conv_bn_relu(x, w, *training), [on_gpu(2, 32, 9, 9), on_gpu(16, 32, 3, 3)]
    if name == "linear":
        weight = [on_gpu(32, 16, dtype=torch.uint8), on_gpu(32, 1, dtype=torch.float32)]
        return lambda x, *w: ops.quantized_linear(x, *w, code_format="fp4"), [on_gpu(5, 32), *weight]
    if name == "experts":
        weight = [on_gpu(3 * 32, 16, dtype=torch.uint8), on_gpu(3 * 32, 1, dtype=torch.float32)]
        counts = torch.tensor([2, 0, 3])
        return lambda x, *w: ops.quantized_linear(x, *w, code_format="fp4", counts=counts), [on_gpu(5, 32), *weight]
    if name == "lstm":
        call = lambda x, *w: ops.packed_rnn(x, None, None, [], list(w), 3, "time_first", "lstm")  # noqa: E731
        return call, [on_gpu(7, 3, 8), on_gpu(64, 8), on_gpu(64, 16)]
    if name == "rotary":
        heads = [on_gpu(2, heads, 5, 16) for heads in (4, 2)]
        return lambda q, k, w, *angles: ops.rotary_embedding(q, k, *angles, None, w, None, True), [
            *heads, on_gpu(16), *(on_gpu(9, 6) for _ in range(2))
        ]  # fmt: skip
    if name == "varlen":
        return lambda q, k, v, cu: ops.attention_varlen(q, k, v, cu, cu, 9, 9), [
            *(on_gpu(9, 4, 16) for _ in "qkv"),
            rows,
        ]
    if name == "cache-float8":

        def append(
            query: Tensor, k_cache: Tensor, v_cache: Tensor, new: Tensor, scale: Tensor, angles: Tensor, rows: Tensor
        ) -> Any:
            place, rotary = (rows, None, None, None), (angles, angles, False)
            options = (None, True, -1, -1, 0.0, None, None, scale, scale)
            return ops.attention_with_kv_cache_append(query, k_cache, v_cache, new, new, *place, *rotary, *options)

        caches = [on_gpu(2, 4, 64, 64, dtype=torch.float8_e4m3fn) for _ in range(2)]
        tables = [on_gpu(4, dtype=torch.float32), on_gpu(64, 8), rows]
        return append, [on_gpu(2, 4, 1, 64), *caches, on_gpu(2, 4, 1, 64), *tables]
    cache = on_gpu(2, 4, 64, 64)
    return ops.attention_with_kv_cache, [on_gpu(2, 4, 1, 64), cache, cache, rows]


TRACED = ("conv", "linear", "experts", "lstm", "rotary", "varlen", "cache", "cache-float8")


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="tracing sees kernels, not what interprets them")
@pytest.mark.parametrize("name", TRACED)
def test_tracing_sees_the_kernels_of_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of an operator, AOT Autograd, which comes before Inductor, is shown the launches of its kernels."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    monkeypatch.setattr(_triton, "unavailable", lambda: None)
    with FakeTensorMode(), torch.no_grad():
        call, tensors = traced_call(name)
        graph = make_fx(dispatch_functionalize(call))(*tensors)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert any("triton_kernel_wrapper" in target for target in targets)
    assert not any("ptkernels" in target for target in targets)


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
