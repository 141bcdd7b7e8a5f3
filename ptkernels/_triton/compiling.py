"""Compiling kernels for GPUs that are not there, and reading what came out.

A launch is recorded instead of run, its arguments specialised as Triton's own launcher would, and compiled for an
architecture. What the binary shows is kept on disk under a key made of the kernel's source, its arguments and Triton's
version, so that a second check of the same kernels costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptkernels import _triton

_POINTERS = {
    "float64": "*fp64",
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "float8_e4m3fn": "*fp8e4nv",
    "int64": "*i64",
    "int32": "*i32",
    "int8": "*i8",
    "uint8": "*u8",
    "bool": "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides what is compiled."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]

    def key(self, arch: int) -> str:
        parts = (self.kernel.cache_key, self.signature, self.constants, self.divisible, self.options)
        return hashlib.sha256(repr((*parts, arch, triton.__version__)).encode()).hexdigest()

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__}({self.constants}, {self.options})"


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel needs and uses."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...] = field(default=())
    """Which of the matrix instructions ``mma``, ``wgmma`` and ``tcgen05`` it has."""


class Recorder:
    """Stands in for ``wrap_triton``: what is launched through it is kept, and nothing runs.

    >>> recorder = Recorder()
    >>> recorder.launches
    []
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any) -> Any:
        return _Recorded(kernel, self.launches)


class _Recorded:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Any:
        return self.record

    def record(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
        names = list(self.kernel.arg_names)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        signature, constants, divisible = {}, {}, []
        for parameter in self.kernel.params:
            name, value = parameter.name, given[parameter.name]
            specialised = type(value) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialised and value == 1):
                signature[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, Tensor):
                signature[name] = _POINTERS[str(value.dtype).removeprefix("torch.")]
                divisible.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if specialised and value % 16 == 0:
                    divisible.append(name)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        self.launches.append(Launch(self.kernel, signature, constants, tuple(divisible), options))


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of local memory that it spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: got {usage.stdout!r}, expected the resources of a kernel")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def compile_for(launch: Launch, arch: int) -> Binary:
    """Compile one launch; raises what Triton raises where the kernel cannot be compiled."""
    index = {name: position for position, name in enumerate(launch.kernel.arg_names)}
    attributes = {(index[name],): [["tt.divisibility", 16]] for name in launch.divisible}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(compiled.asm["cubin"])
    patterns = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
    found = tuple(name for name, pattern in patterns.items() if re.search(pattern, ptx))
    return Binary(registers, spilled, compiled.metadata.shared, found)


def check(launches: Iterable[Launch], arch: int, cache: Path) -> list[tuple[Launch, Binary]]:
    """Compile launches for an architecture, reading from ``cache`` what was compiled before."""
    cache.mkdir(parents=True, exist_ok=True)

    results = []
    for key, launch in {launch.key(arch): launch for launch in launches}.items():
        path = cache / f"{key}.json"
        if path.exists():
            known = json.loads(path.read_text())
            binary = Binary(**{**known, "instructions": tuple(known["instructions"])})
        else:
            binary = compile_for(launch, arch)
            path.write_text(json.dumps(asdict(binary)))
        results.append((launch, binary))
    return results


def problems(binary: Binary, arch: int, *, sixteen_bit_dots: bool) -> list[str]:
    """What is wrong with a binary: memory that the GPU does not have, spills, products off the tensor cores."""
    found = []
    if binary.shared_bytes > _triton.shared_memory(arch):
        found.append(f"{binary.shared_bytes} bytes of shared memory, the GPU has {_triton.shared_memory(arch)}")
    if binary.spilled_bytes > 0:
        found.append(f"{binary.spilled_bytes} bytes of a thread's registers are in local memory")
    expected = {80: "mma", 90: "wgmma", 100: "tcgen05"}.get(arch, "mma")
    if sixteen_bit_dots and expected not in binary.instructions:
        found.append(f"no {expected}: {binary.instructions or 'no matrix instruction at all'}")
    return found
