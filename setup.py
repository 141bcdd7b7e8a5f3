"""Runs CMake, which holds the whole build description, as setuptools' build_ext.

PTKERNELS_CUDA=auto|0|1   build libptkernels_cuda.so: where nvcc is found (default), never, or fail without nvcc
TORCH_CUDA_ARCH_LIST      its architectures (default "8.0+PTX;9.0a")
MAX_JOBS                  compile jobs at a time (default: the number of cores)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cmake"


class CMakeBuild(build_ext):
    def run(self) -> None:
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        configure = ["-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DPTKERNELS_CUDA={os.environ.get('PTKERNELS_CUDA', 'auto')}"]
        configure += [f"-DTORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '8.0+PTX;9.0a')}"]
        self.cmake("configured", *configure)
        for part in ("cpu", "cuda"):
            self.cmake(f"built the {part} part", "--build", BUILD, "--target", part, "-j", jobs)
        self.cmake("installed", "--install", BUILD, "--prefix", prefix)

    def cmake(self, done: str, *arguments: str | Path) -> None:
        # The wheels of cmake and ninja put their programs next to python, which need not be on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        start = time.perf_counter()
        subprocess.run(["cmake", *map(str, arguments)], check=True, env={**os.environ, "PATH": path})
        print(f"ptkernels: {done} in {time.perf_counter() - start:.1f} s", flush=True)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []


class FreshBuildPy(build_py):
    def run(self) -> None:
        # Kept between builds, the directory would carry deleted modules into the wheel.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # The libraries use only the stable ABI of libtorch and none of Python's: one wheel serves every Python.
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("ptkernels._native", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": FreshBuildPy, "bdist_wheel": Wheel},
)
