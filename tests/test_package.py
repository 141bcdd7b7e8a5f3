"""The package as a whole: importing it, its environment, its failures to load, and the processes it lives in."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ptkernels as ptk
from ptkernels import _backend, _env
from ptkernels._registry import all_ops, register
from ptkernels.errors import FallbackWarning

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_import_is_light() -> None:
    """No device is initialised, and nothing is imported that torch had not imported already."""
    code = """
import sys, torch
before = set(sys.modules)
import ptkernels
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not torch.cuda.is_initialized()
heavy = {"numpy", "sympy", "triton", "transformers", "matplotlib", "pandas", "rich", "onnxruntime", "openvino"}
assert not roots & heavy, roots & heavy
assert not {"torch._dynamo", "torch._inductor"} & (set(sys.modules) - before)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_public_names() -> None:
    assert set(ptk.__all__) <= set(dir(ptk))
    assert (Path(ptk.__file__).parent / "py.typed").is_file()
    assert ptk.__version__


def test_registry_takes_a_name_once() -> None:
    spec = next(iter(all_ops().values()))
    with pytest.raises(ValueError, match=f"register: {spec.name} is already registered"):
        register(spec)


@pytest.mark.parametrize("content", [None, b"not a library" * 1000], ids=["missing", "garbage"])
def test_library_that_does_not_load(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "libptkernels.so"
    if content is not None:
        path.write_bytes(content)
    result = python("import ptkernels", PTKERNELS_LIBRARY=str(path))
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ptkernels: ")
    assert str(path) in last
    assert torch.__version__ in last
    assert ("does not exist" if content is None else "invalid ELF header") in last


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PTKERNELS_BACKEND", "gpu"),
        ("PTKERNELS_STRICT", "yes"),
        ("PTKERNELS_MAX_ISA", "sse9"),
        ("PTKERNELS_CUDA_ARCH", "sm_75"),
    ],
)
def test_environment_is_checked(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got '{value}', expected one of"):
        _env.read({name: value})


CALL = "import torch, ptkernels as ptk; x = torch.randn(1, 2, 3, 4)\n"


def test_backend_from_the_environment() -> None:
    result = python(
        CALL + "ptk.attention(x, x, x); print(ptk.explain('attention', x, x, x))", PTKERNELS_BACKEND="reference"
    )
    assert "plain torch composition (reference)" in result.stdout, result.stderr
    assert result.stderr == ""  # what was asked for needs no warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_unavailable_backend_from_the_environment() -> None:
    """The package can be imported, to find out; calls raise."""
    result = python("import ptkernels; print('imported')\n" + CALL + "ptk.attention(x, x, x)", PTKERNELS_BACKEND="cuda")
    assert "imported" in result.stdout
    assert "BackendError: attention: backend 'cuda' was asked for and cannot run here" in result.stderr


def test_fallback_warns_once_and_raises_where_strict() -> None:
    call = CALL + "for _ in range(3): torch.func.jvp(lambda t: ptk.attention(t, x, x), (x,), (x,))"
    result = python(call)
    assert result.stderr.count("FallbackWarning: attention: runs on the reference: forward-mode") == 1
    result = python(call, PTKERNELS_STRICT="1")
    assert "FallbackError: attention: no kernel for this call: forward-mode" in result.stderr


def test_backend_nests_and_is_restored() -> None:
    assert _backend.state.backend is None
    with ptk.backend("reference") as outer:
        with ptk.backend("cpu"):
            assert _backend.state.backend == "cpu"
        assert _backend.state.backend == "reference"
        with outer:
            assert _backend.state.backend == "reference"
        with pytest.raises(KeyError), ptk.backend("cpu"):
            raise KeyError
        assert _backend.state.backend == "reference"
    assert _backend.state.backend is None

    @ptk.backend("reference")
    def decorated() -> str | None:
        return _backend.state.backend

    assert decorated() == "reference"
    assert _backend.state.backend is None


def test_backend_inside_a_compiled_function() -> None:
    """The choice is part of what the compiled code is specialised on."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ptk.attention(x, x, x), backend="eager", fullgraph=True)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    kernel = compiled(x)
    with ptk.backend("reference"):
        reference = compiled(x)
    assert kernel.stride() != reference.stride()
    torch.testing.assert_close(kernel, reference)
    assert compiled(x).stride() == kernel.stride()


def test_device_without_kernel_runs_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for mps and the like: the dispatcher refuses, as it does there, and no kernel is listed."""
    from ptkernels.ops import attention as package
    from ptkernels.ops.attention import library

    def refuse(*_: object) -> None:
        raise NotImplementedError("Could not run 'ptkernels::attention' with arguments from this backend")

    monkeypatch.setattr(package, "_op", refuse)
    monkeypatch.setattr(library, "DEVICES", ())
    x = torch.randn(1, 2, 3, 4)
    with pytest.warns(FallbackWarning, match="runs on the reference: no kernel for cpu tensors"):
        out = ptk.attention(x, x, x)
    torch.testing.assert_close(out, ptk.reference.attention(x, x, x))
    assert ptk.explain("attention", x, x, x).reason == "no kernel for cpu tensors"


def test_threads_share_the_operators() -> None:
    """Calls from several Python threads at once, each with parallel regions of its own, give the bits of one alone."""
    inputs = [torch.randn(2, 3, 65, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(4)]

    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = ptk.attention(x, x, x, is_causal=True)
        return out.detach(), torch.autograd.grad(out.sin().sum(), x)[0]

    alone = [work(x) for x in inputs]
    failures: list[str] = []

    def run(index: int) -> None:
        for _ in range(20):
            if not all(map(torch.equal, work(inputs[index]), alone[index])):
                failures.append(f"thread {index}")

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


FORK = """
import os, torch, ptkernels as ptk
torch.set_num_threads(2)
x = torch.randn(2, 4, 300, 32)
{before}
child = os.fork()
if child == 0:
    {first}
    ptk.attention(x, x, x)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
ptk.attention(x, x, x)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("before", "first"),
    [("pass", "pass"), ("ptk.attention(x, x, x)", "torch.set_num_threads(1)")],
    ids=["unused", "as DataLoader workers start"],
)
def test_fork(before: str, first: str) -> None:
    """torch's OpenMP pool does not survive a fork: its own operators hang too where neither precaution was taken."""
    result = python(FORK.format(before=before, first=first))
    assert result.returncode == 0, result.stderr
