"""What every test starts from: memory full of NaN, one seed, and a line that says what is being tested."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ptkernels as ptk
from ptkernels import _backend, _loader
from ptkernels.errors import FallbackWarning

ROOT = Path(__file__).parents[1]
M_PERTURB, M_MMAP_MAX = -6, -4


def fill_memory_with_nan() -> bool:
    """Make malloc hand out bytes of 0xFF, a NaN in every floating dtype; returns whether it does.

    A kernel that reads what it never wrote, in an output or in its own scratch memory, then shows it. torch's
    ``fill_uninitialized_memory`` does not reach that far: the C shim allocates below it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # fresh pages would come as zeros
    # New memory is filled with the low byte of 0x100 ^ 0xFF; 0 in its place would switch the filling off.
    libc.mallopt(M_PERTURB, 0x100)
    return bool(torch.empty(1 << 20).isnan().all())


POISONED = fill_memory_with_nan()


def pytest_report_header() -> list[str]:
    introspection = _loader.introspection()
    isa = "unknown (no ptkernels._introspect)" if introspection is None else introspection.active_isa()
    if introspection is not None and introspection.emulated():
        isa += ", emulated above avx2"
    lines = [f"ptkernels {ptk.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, ISA {isa}"]
    for library in _loader.load():
        lines.append(f"{library.name}: {library.path if library.loaded else 'not loaded'} ({library.reason})")
    return [*lines, f"fresh memory: {'NaN' if POISONED else 'as malloc gives it'}"]


# Single tests of these take minutes.
LONGEST = ("test_triton.py", "test_isa.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Begun last, they would keep one worker when the others have nothing left.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fallbacks_warn_afresh() -> Iterator[None]:
    """Fallbacks warn once per process: let every test see its own, and hide them where a test does not ask."""
    _backend.state.warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@pytest.fixture
def strict() -> Iterator[None]:
    """As under ``PTKERNELS_STRICT=1``."""
    before, _backend.state.strict = _backend.state.strict, True
    yield
    _backend.state.strict = before


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The CUDA kernels, compiled for the CPU: tests/cuda_host."""
    if (compiler := shutil.which("c++") or shutil.which("g++")) is None:
        pytest.skip("needs a C++ compiler")
    torch_dir = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("cuda_host") / "libattention_host.so"
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    # Traps on an index outside a tile and on a misaligned 16-byte access, which a GPU would answer with a fault.
    flags += ["-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error"]
    # The twins of the wrappers around instructions come before the wrappers.
    includes = [f"-I{ROOT / 'tests/cuda_host'}", f"-I{ROOT}", "-isystem", str(torch_dir / "include")]
    flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
    sources = ("tests/cuda_host/attention_host.cpp", "csrc/ops/attention_kv_cache/kv_cache_glue.cpp")
    link = ["-o", str(library), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    subprocess.run([compiler, *flags, *includes, *(str(ROOT / source) for source in sources), *link], check=True)
    torch.ops.load_library(library)
    return torch.ops.ptkernels_cuda_host
