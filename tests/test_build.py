"""The build: incremental, and complete in the wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (ROOT / "build" / "cmake" / "build.ninja").exists(), reason="needs the build tree of a source checkout"
)


def build_in_place() -> str:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-10000:]
    return result.stdout


def test_second_build_does_nothing() -> None:
    build_in_place()
    again = build_in_place()
    assert again.count("ninja: no work to do.") == 2, again
    assert "Installing" not in again


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout[-10000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "ptkernels/lib/libptkernels.so" in names
    assert ("ptkernels/lib/libptkernels_cuda.so" in names) == (ROOT / "ptkernels/lib/libptkernels_cuda.so").exists()
    assert "ptkernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "bench/", "build/"))]

    code = """
import torch, ptkernels
x = torch.ones(1, 2, 3, 8)
assert torch.equal(ptkernels.attention(x, x, x), x)
print(ptkernels.__file__)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PTKERNELS_LIBRARY": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert Path(result.stdout.strip()).is_relative_to(tmp_path)
