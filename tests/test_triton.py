"""Triton kernels on machines without a GPU: run in the interpreter, compiled for GPUs that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_launches

import ptkernels as ptk
from ptkernels import _triton
from ptkernels.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "triton-check"
ARCHS = (80, 90, 100)
# A thread's registers hold what every option of attention needs at once, all of them together, but for so many bytes.
SPILL_OF_ALL_OPTIONS = 256
# Products in IEEE float32 are made of registers alone; a few bytes of a frame are not worth a smaller tile.
SPILL_OF_FLOAT32 = 32

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


@installed
@pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", triton_launches.CASES)
def test_kernels_compile(name: str, arch: int) -> None:
    from ptkernels._triton.compiling import check, problems

    allowed = SPILL_OF_ALL_OPTIONS if name.endswith("-all") else SPILL_OF_FLOAT32 if "float32" in name else 0
    for launch, binary in check(triton_launches.CASES[name](arch), arch, CACHE):
        dots = triton_launches.uses_matrix_instructions(launch)
        assert not problems(binary, arch, sixteen_bit_dots=dots, spill_allowed=allowed), launch.name


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
