"""examples/aot_inductor: a model compiled ahead of time gives, without Python, what it gives in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptkernels import _loader

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(*command: str | Path, **options: object) -> str:
    environment = {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **{"env": environment, **options})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at the program with ldd")
def test_without_python(tmp_path: Path) -> None:
    for tool in ("cmake", "c++", "make"):
        if shutil.which(tool, path=PATH) is None:
            pytest.skip(f"there is no {tool}")
    (library,) = (found.path for found in _loader.load() if found.name == "libptkernels.so")
    example, build = ROOT / "examples" / "aot_inductor", tmp_path / "build"
    run(sys.executable, example / "export.py", tmp_path)
    paths = (f"-DPTKERNELS_LIBRARY={library}", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    run("cmake", "-S", example, "-B", build, *paths)
    run("cmake", "--build", build)
    linked = run("ldd", build / "run")
    assert "libpython" not in linked
    assert "libtorch_python" not in linked
    run(build / "run", "model.pt2", "inputs.pt", "outputs.pt", cwd=tmp_path, env={})
    (found,), (expected,) = torch.load(tmp_path / "outputs.pt"), torch.load(tmp_path / "expected.pt")
    torch.testing.assert_close(found, expected)
