"""What the shared libraries ask of the system they are loaded into, and what each ISA level's objects hold.

Read from symbol tables and disassembly, so that it holds for every machine and not only for this one.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cmake"
EMULATED = ROOT / "build" / "emulated"
CPU_LIBRARY = ROOT / "ptkernels" / "lib" / "libptkernels.so"
CUDA_LIBRARY = ROOT / "ptkernels" / "lib" / "libptkernels_cuda.so"
TORCH_TARGET = "0x020a000000000000"
LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("objdump") is None, reason="reads ELF files with binutils"
)
needs_objects = pytest.mark.skipif(
    platform.machine() != "x86_64" or not (BUILD / "CMakeFiles").is_dir(), reason="needs the build tree of an x86 build"
)


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def libraries() -> list[Path]:
    return [path for path in (CPU_LIBRARY, CUDA_LIBRARY) if path.exists()]


@functools.cache
def undefined_symbols(library: Path) -> list[tuple[str, str]]:
    """(name, version) of the symbols that must be found at load time; version is empty for libtorch's."""
    symbols = []
    for line in run("nm", "-D", "--undefined-only", library).splitlines():
        kind, name = line.split()[-2:]
        if kind == "U":
            base, _, version = name.replace("@@", "@").partition("@")
            symbols.append((base, version))
    return symbols


@functools.cache
def stable_shim() -> frozenset[str]:
    """Functions that the installed torch declares as its C shim when it is asked for no more than torch 2.10's."""
    include = Path(torch.__file__).parent / "include"
    source = "\n".join(
        f"#include <torch/csrc/{header}>"
        for header in (
            "inductor/aoti_torch/c/shim.h",
            "stable/c/shim.h",
            "inductor/aoti_torch/generated/c_shim_aten.h",
        )
    )
    options = ["-std=c++20", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{include}"]
    preprocess = ["c++", "-E", "-P", *options, "-x", "c++", "-"]
    text = subprocess.run(preprocess, input=source, check=True, capture_output=True, text=True).stdout
    exported = re.findall(r'__attribute__\(\(__visibility__\("default"\)\)\)\s*([^;{]*?)\(', text)
    return frozenset(re.split(r"[\s*]+", declaration.strip())[-1] for declaration in exported)


def test_shim_list_knows_its_versions() -> None:
    shim = stable_shim()
    assert {"torch_parallel_for", "torch_library_impl", "aoti_torch_get_data_ptr"} <= shim
    # Declared since torch 2.11 and 2.13.
    assert not {"torch_from_blob", "torch_new_stable_ivalue"} & shim


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_only_stable_torch_symbols(library: Path) -> None:
    wanted = {name for name, version in undefined_symbols(library) if not version}
    assert "torch_library_impl" in wanted
    assert not wanted - stable_shim()


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_no_python(library: Path) -> None:
    assert not [name for name, _ in undefined_symbols(library) if re.match(r"_?Py", name)]
    assert "python" not in run("readelf", "-d", library)


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_needs_no_search_path(library: Path) -> None:
    dynamic = run("readelf", "-d", library)
    assert not re.search(r"R(UN)?PATH", dynamic)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    foreign = {name for name in needed if not re.match(r"lib(stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so\.|ld-linux", name)}
    assert foreign <= {"libtorch_cpu.so", "libtorch_cuda.so"}


# manylinux_2_28. The static CUDA runtime uses the threads of whatever glibc the build machine has, which moved into
# libc.so.6 at 2.34: only its floor is higher, and only when built on such a machine.
FLOORS = {
    CPU_LIBRARY.name: {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)},
    CUDA_LIBRARY.name: {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8,)},
}


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_system_floor(library: Path) -> None:
    too_new = []
    for name, version in undefined_symbols(library):
        if version:
            family, _, number = version.partition("_")
            if tuple(map(int, number.split("."))) > FLOORS[library.name][family]:
                too_new.append(f"{name}@{version}")
    assert not too_new, "newer than the floor; build on an older system, or define it in csrc/core/manylinux.cpp"


def objects(level: str, build: Path = BUILD) -> list[Path]:
    found = sorted((build / "CMakeFiles" / "ptk_kernels.dir" / "kernels" / level).glob("*.o"))
    assert found, f"no objects of level {level}"
    return found


def plain_objects() -> list[Path]:
    found = sorted((BUILD / "CMakeFiles" / "ptkernels.dir").rglob("*.o"))
    assert found
    return found


def weak_symbols(path: Path) -> set[str]:
    """What the linker takes from whichever object comes first, since it is to be the same in all of them."""
    lines = run("nm", "-C", "--defined-only", path).splitlines()
    return {line.split(maxsplit=2)[2] for line in lines if re.match(r"[0-9a-f]+ [WVu] ", line)}


@needs_objects
@pytest.mark.parametrize("build", [path for path in (BUILD, EMULATED) if path.is_dir()], ids=lambda path: path.name)
@pytest.mark.parametrize("level", LEVELS)
def test_no_operator_takes_another_ones_kernel(level: str, build: Path) -> None:
    """Two classes of one name in one level's namespace would silently run the one that was linked first."""
    sources = [path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".inl")]
    holders = Counter(symbol for path in objects(level, build) for symbol in weak_symbols(path))
    shared = {symbol for symbol, count in holders.items() if count > 1}
    names = {name for symbol in shared for name in re.findall(rf"ptk::{level}::(\w+)", symbol)}
    declared_twice = [
        name for name in names if sum(bool(re.search(rf"\b(class|struct) {name} .*{{", text)) for text in sources) > 1
    ]
    assert not declared_twice


def vector_encodings(path: Path) -> set[str]:
    """Which of the VEX and EVEX instruction encodings an object's code uses.

    In 64-bit mode an instruction that starts (after segment and address-size prefixes) with C4 or C5 is VEX, with 62
    EVEX: this needs no list of mnemonics and misses none.
    """
    kinds = {0xC4: "VEX", 0xC5: "VEX", 0x62: "EVEX"}
    prefixes = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x67}
    found = set()
    for match in re.finditer(r"^ +[0-9a-f]+:\t((?:[0-9a-f]{2} )+)", run("objdump", "-dw", path), re.MULTILINE):
        code = [int(byte, 16) for byte in match[1].split()]
        opcode = next((byte for byte in code if byte not in prefixes), 0)
        if opcode in kinds:
            found.add(kinds[opcode])
    return found


@needs_objects
@pytest.mark.parametrize("part", ["baseline", "glue"])
def test_baseline_code_runs_on_any_x86(part: str) -> None:
    for path in objects("baseline") if part == "baseline" else plain_objects():
        assert not vector_encodings(path), path.name


@needs_objects
def test_avx2_code_has_no_avx512() -> None:
    for path in objects("avx2"):
        assert vector_encodings(path) == {"VEX"}, path.name


@needs_objects
@pytest.mark.parametrize(
    ("level", "instructions"),
    [
        ("avx2", [r"vfmadd\w+ps .*%ymm"]),
        ("avx512", [r"vfmadd\w+ps .*%zmm"]),
        ("avx512_vnni", [r"vpdpbusd .*%zmm"]),
        ("avx512_bf16", [r"vdpbf16ps .*%zmm"]),
        ("amx", [r"tdpbf16ps", r"tdpbssd"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_level_uses_what_it_is_named_for(level: str, instructions: list[str]) -> None:
    code = "\n".join(run("objdump", "-d", "--no-show-raw-insn", path) for path in objects(level))
    for instruction in instructions:
        assert re.search(instruction, code), f"{level}: no {instruction}"


@needs_objects
@pytest.mark.parametrize("level", LEVELS[1:])
def test_weak_symbols_stay_in_their_level(level: str) -> None:
    """The linker keeps one copy of a weak symbol: a std:: template compiled for AVX-512 could become everybody's."""
    for path in objects(level):
        strays = []
        for line in run("nm", "-C", "--defined-only", path).splitlines():
            _, kind, name = line.split(maxsplit=2)
            # DW.ref.* are pointers, not code.
            if kind in "WVu" and f"ptk::{level}::" not in name and not name.startswith("DW.ref."):
                strays.append(name)
        assert not strays, path.name
