"""Every operator at every ISA level: the machine's own, each in its own process, and emulated those that it lacks.

The level is chosen once per process, so each run of the operators' tests here is a pytest of its own; the level of this
process is the one that all other files test.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ptkernels import _env, _loader

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"
EMULATED = ROOT / "build" / "emulated" / "libptkernels.so"
SUITES = ["tests/contract/test_values.py", "tests/contract/test_derivatives.py", "tests/test_gemm.py"]
SUITES += ["tests/ops/test_attention_batch_invariant.py", "tests/ops/test_attention_float32_precision.py"]
# What depends on the kernels, without the samples marked slow; the rest of the contract is the same at every level.
SUBSET = "test_gemm or values or same_bits or left_alone or gradcheck or (batch_invariant and everything)"
SUBSET += " or float32_precision"

introspection = _loader.introspection()
DETECTED = "baseline" if introspection is None else introspection.detected_isa()
PREFERRED = "baseline" if introspection is None else introspection.preferred_isa()
NATIVE = _env.ISA_LEVELS[: _env.ISA_LEVELS.index(DETECTED) + 1]
LACKING = [name for name in _env.ISA_LEVELS if name not in NATIVE]

each_native_level = pytest.mark.parametrize(
    "level", [pytest.param(name, marks=pytest.mark.amx if name == "amx" else []) for name in NATIVE]
)


def run_suites(level: str, **environment: str) -> None:
    options = ["-p", "no:cacheprovider", "-o", "faulthandler_timeout=300"]
    options += ["-o", "faulthandler_exit_on_timeout=true"]
    command = [sys.executable, "-m", "pytest", *options, "-m", "not slow", "-k", SUBSET, *SUITES]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PTKERNELS_", "PYTEST_"))}
    result = subprocess.run(
        command, cwd=ROOT, env={**clean, "PTKERNELS_MAX_ISA": level, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
    if introspection is not None:
        assert re.search(rf"ISA {level}\b", result.stdout), "the tests ran at another level"


@each_native_level
def test_operators_at_level(level: str) -> None:
    if introspection is not None and level == introspection.active_isa():
        pytest.skip("the level of this process, which runs these suites itself")
    run_suites(level)


@pytest.mark.skipif(not EMULATED.exists(), reason="needs `make build-emulated`")
@pytest.mark.skipif(DETECTED == "baseline", reason="emulation runs on AVX2")
@pytest.mark.parametrize("level", LACKING)
def test_operators_at_emulated_level(level: str) -> None:
    run_suites(level, PTKERNELS_LIBRARY=str(EMULATED))


def import_with(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_unknown_level_is_refused() -> None:
    result = import_with("import ptkernels", PTKERNELS_MAX_ISA="avx1024")
    assert "ValueError: PTKERNELS_MAX_ISA: got 'avx1024', expected one of baseline, avx2, avx512" in result.stderr


def test_level_cannot_change_after_a_kernel_ran() -> None:
    code = """
import torch, ptkernels
x = torch.ones(1, 1, 1, 8)
ptkernels.attention(x, x, x)
torch.ops.ptkernels._set_max_isa("baseline")
"""
    result = import_with(code, PTKERNELS_MAX_ISA=DETECTED)
    if DETECTED == "baseline":
        assert result.returncode == 0
    else:
        assert f"RuntimeError: max ISA: got 'baseline' after kernels were chosen for {DETECTED}" in result.stderr


@pytest.mark.skipif(introspection is None, reason="needs ptkernels._introspect")
def test_level_above_the_machine_means_its_fastest() -> None:
    code = "from ptkernels import _loader; print(_loader.introspection().active_isa())"
    result = import_with(code, PTKERNELS_MAX_ISA="amx", PTKERNELS_LIBRARY="")
    assert result.stdout.strip() == PREFERRED


# --- without torch and Python


@pytest.fixture(scope="module")
def selftest() -> Path:
    if not (BUILD / "build.ninja").exists() or shutil.which("ninja", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs the build tree")
    ninja = Path(sys.executable).with_name("ninja")
    subprocess.run([ninja, "-C", BUILD, "ptkernels_selftest"], check=True, capture_output=True)
    return BUILD / "ptkernels_selftest"


def assert_passes(output: str, level: str) -> None:
    assert f"running {level};" in output
    assert output.strip().endswith("passed")


@each_native_level
def test_kernels_alone(selftest: Path, level: str) -> None:
    result = subprocess.run([selftest, level], capture_output=True, text=True)
    assert_passes(result.stdout, level)


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64")
@pytest.mark.parametrize(("cpu", "level"), [("Haswell", "avx2"), ("Nehalem", "baseline"), ("qemu64", "baseline")])
def test_older_cpu_meets_no_illegal_instruction(selftest: Path, cpu: str, level: str) -> None:
    """qemu raises SIGILL on what the CPU that it plays does not have."""
    result = subprocess.run(["qemu-x86_64", "-cpu", cpu, selftest], capture_output=True, text=True)
    assert_passes(result.stdout, level)
