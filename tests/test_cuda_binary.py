"""libptkernels_cuda.so as built: which GPUs it holds code for, and what the compiler made of the kernels.

Read from the ELF images inside the library, with neither a GPU nor the CUDA toolkit's disassemblers.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kernel_checks import plans

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "ptkernels" / "lib" / "libptkernels_cuda.so"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="libptkernels_cuda.so was not built")

REGISTERS = 65536  # per multiprocessor
PTX, MACHINE_CODE = 1, 2


@dataclass
class Kernel:
    registers: int = 0
    stack: int = 0
    shared: int = 0


def images(data: bytes) -> Iterator[tuple[str, bytes]]:
    """(architecture, ELF image) of every piece of machine code in a file that nvcc linked."""
    for kind, arch, image in entries(data):
        if kind == MACHINE_CODE:
            assert image.startswith(b"\x7fELF"), "compressed machine code: this test reads it plain"
            yield f"sm_{arch}", image


def entries(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """(kind, architecture as a number and a letter, contents) of everything that nvcc put into a file for GPUs."""
    magic = struct.pack("<I", 0xBA55ED50)
    start = data.find(magic)
    while start >= 0:
        _, header_size, size = struct.unpack_from("<HHQ", data, start + 4)
        entry, end = start + header_size, start + header_size + size
        while header_size == 16 and entry < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            arch, flags = struct.unpack_from("<I8xI", data, entry + 28)
            contents = data[entry + entry_header : entry + entry_header + entry_size]
            yield kind, f"{arch}{'a' if flags >> 20 & 1 else ''}", contents
            entry += entry_header + entry_size
        start = data.find(magic, start + 4)


def kernels(image: bytes) -> dict[str, Kernel]:
    """Resources of each kernel in an ELF image of machine code, by its mangled name."""

    def text(offset: int) -> str:
        return image[offset : image.index(b"\0", offset)].decode()

    (table,) = struct.unpack_from("<Q", image, 40)
    count, names_index = struct.unpack_from("<HH", image, 60)
    rows = [struct.unpack_from("<II16xQQI", image, table + 64 * index) for index in range(count)]
    names = rows[names_index][2]
    sections = {text(names + row[0]): row for row in rows}
    found = {name[6:]: Kernel() for name in sections if name.startswith(".text.")}
    for name, kernel in found.items():
        if f".nv.shared.{name}" in sections:
            kernel.shared = sections[f".nv.shared.{name}"][3]
    _, _, symbols, _, strings = sections[".symtab"]
    # Attributes: format, kind, size of what follows; those of format 4 and 8 bytes are (symbol, value).
    _, _, position, size, _ = sections[".nv.info"]
    end = position + size
    while position < end:
        form, attribute, length = struct.unpack_from("<BBH", image, position)
        position += 4
        if form != 4:
            continue
        if length == 8 and attribute in (0x2F, 0x11):
            symbol, value = struct.unpack_from("<II", image, position)
            (offset,) = struct.unpack_from("<I", image, symbols + 24 * symbol)
            kernel = found.get(text(rows[strings][2] + offset))
            if kernel is not None:
                setattr(kernel, {0x2F: "registers", 0x11: "stack"}[attribute], value)
        position += length
    return found


def symbol_index(image: bytes, name: str) -> int:
    """Of a kernel, in the symbol table of an ELF image."""
    (table,) = struct.unpack_from("<Q", image, 40)
    (count,) = struct.unpack_from("<H", image, 60)
    rows = [struct.unpack_from("<II16xQQI", image, table + 64 * index) for index in range(count)]
    symbols = next(row for row in rows if row[1] == 2)
    strings = rows[symbols[4]][2]
    for index in range(symbols[3] // 24):
        (offset,) = struct.unpack_from("<I", image, symbols[2] + 24 * index)
        kind = image[symbols[2] + 24 * index + 4] & 15
        start = strings + offset
        if kind == 2 and image[start : image.index(b"\0", start)].decode() == name:
            return index
    raise KeyError(name)


@functools.cache
def built() -> dict[str, dict[str, Kernel]]:
    found: dict[str, dict[str, Kernel]] = {}
    for arch, image in images(LIBRARY.read_bytes()):
        found.setdefault(arch, {}).update(kernels(image))
    return found


@pytest.mark.skipif(NVCC is None or os.environ.get("PTKERNELS_CUDA") == "0", reason="needs nvcc")
def test_library_is_built_where_nvcc_is() -> None:
    assert LIBRARY.is_file()


@needs_library
def test_holds_code_for_the_architectures_asked_for() -> None:
    asked = re.findall(r"(\d+)\.(\d+a?)(\+PTX)?", os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a"))
    assert set(built()) == {f"sm_{major}{minor}" for major, minor, _ in asked}
    # A GPU newer than all of them runs what the driver makes of PTX.
    found = {arch for kind, arch, _ in entries(LIBRARY.read_bytes()) if kind == PTX}
    assert found == {f"{major}{minor}" for major, minor, ptx in asked if ptx}


@needs_library
def test_holds_every_kernel_for_every_architecture() -> None:
    on_cores = 2 * 4 + 2  # wide dtypes with four head dims each, narrow ones with the largest
    on_tensor_cores = 2 * 6
    expected = {
        "AttentionForward": on_cores,
        "AttentionGradQuery": on_cores,
        "AttentionGradKeyValue": on_cores,
        "AttentionDelta": 4,
        "AttentionWeightScale": 4,
        "AttentionHeadSums": 4,
        "AttentionForwardSm80": on_tensor_cores,
        "AttentionForwardSm90": 2 * 6,  # empty but on sm_90a
        "AttentionGradQuerySm80": on_tensor_cores,
        "AttentionGradKeyValueSm80": on_tensor_cores + 2 * 4,  # in two parts from a head dim of 128 on
        "AttentionGradMask": 4 + 2 * 3,
    }
    for arch, found in built().items():
        assert {name: sum(f"{len(name)}{name}I" in mangled for mangled in found) for name in expected} == expected, arch


@needs_library
def test_no_kernel_spills_registers() -> None:
    """No thread has a stack, where spilled registers and arrays indexed at run time would lie."""
    with_stack = [
        (arch, name, kernel.stack)
        for arch, found in built().items()
        for name, kernel in found.items()
        if kernel.stack > 0
    ]
    assert not with_stack


def is_instance(mangled: str, name: str) -> bool:
    """Whether a kernel is an instance of the one that a plan names."""
    whole, _, part = name.rstrip(">").partition("<")
    arguments = f"INS0_{len(part)}{part}I" if part else "[IE]"
    return re.search(rf"kernel_entryINS0_{len(whole)}{whole}{arguments}", mangled) is not None


@needs_library
def test_every_kernel_keeps_to_the_plan_beside_it() -> None:
    """Registers; shared memory, which is asked for at launch, is compared by tests/test_cuda_choice.py."""
    instances = 0
    for arch, found in built().items():
        for mangled, kernel in found.items():
            (plan,) = [plan for name, plan in plans().items() if is_instance(mangled, name)]
            assert 0 < kernel.registers <= plan.registers, (arch, mangled)
            assert plan.registers * plan.threads <= REGISTERS
            assert kernel.shared <= 1024, (arch, mangled)  # all but what the driver keeps is asked for at launch
            if "Sm90" in mangled and arch == "sm_90a":
                # What its warpgroups give and take has to be there: two of the three wait for it.
                assert kernel.registers * 3 == 24 + 2 * 240, mangled
            instances += 1
    assert instances >= 132 * len(built())


INSTRUCTIONS = {
    # kernel: its instructions, as nvdisasm spells them: products, copies to shared memory, reads of operands
    ("sm_80", "AttentionForwardSm80"): ("HMMA.16816.F32", "LDGSTS.E", "LDSM.16"),
    ("sm_80", "AttentionGradKeyValueSm80"): ("HMMA.16816.F32", "LDGSTS.E", "LDSM.16.MT88"),
    # wgmma, TMA, registers given and taken, barriers of copies
    ("sm_90a", "AttentionForwardSm90"): ("HGMMA.64x", "UTMALDG.4D", "USETMAXREG", "SYNCS"),
}


def disassembled(path: Path, image: bytes, name: str) -> str:
    """The instructions of one kernel of an image."""
    found = importlib.util.find_spec("triton")
    disassembler = Path(found.origin).parent / "backends/nvidia/bin/nvdisasm" if found and found.origin else None
    if disassembler is None or not disassembler.is_file():
        pytest.skip("needs Triton's package, which holds nvdisasm")
    cubin = path / "image.cubin"
    cubin.write_bytes(image)
    command = [disassembler, "-c", "-fun", f"0x{symbol_index(image, name):x}", cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def images_with(arch: str, kernel: str) -> Iterator[tuple[bytes, list[str]]]:
    """Images for an architecture that hold a kernel, and the names of its instances there."""
    for built_for, image in images(LIBRARY.read_bytes()):
        names = [name for name in kernels(image) if f"{len(kernel)}{kernel}I" in name]
        if built_for == arch and names:
            yield image, names


@needs_library
@pytest.mark.parametrize(("arch", "kernel"), list(INSTRUCTIONS), ids="-".join)
def test_runs_on_the_units_that_it_says(tmp_path: Path, arch: str, kernel: str) -> None:
    seen = 0
    for image, names in images_with(arch, kernel):
        code = disassembled(tmp_path, image, names[0])  # one of the image: all of them would take a while
        assert not [text for text in INSTRUCTIONS[arch, kernel] if text not in code], names[0]
        assert "STL" not in code
        assert "LDL" not in code
        seen += 1
    assert seen == 2  # bfloat16 and float16


def reachable(code: str, start: str) -> list[str]:
    """The instructions that may run after the first one that holds `start`, as nvdisasm writes them."""
    lines, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+|\$\S+):$", line.strip()):
            labels[label[1]] = len(lines)
        elif "/*" in line and ";" in line:
            lines.append(line.partition("*/")[2].partition(";")[0].strip())
    waiting, seen = [next(index for index, line in enumerate(lines) if start in line)], set()
    while waiting:
        index = waiting.pop()
        if index in seen or index == len(lines):
            continue
        seen.add(index)
        predicate, operation = re.match(r"(@!?U?P\S+ )?(\S+)", lines[index]).groups()  # type: ignore[union-attr]
        kind = operation.partition(".")[0]
        assert kind not in ("BRX", "JMX", "JMP", "BREAK"), lines[index]
        if kind in ("BRA", "CALL", "BSSY"):
            (target,) = re.findall(r"`\((\S+)\)", lines[index])
            waiting.append(labels[target])
        # BSYNC goes on where its BSSY says; a call comes back.
        if predicate or kind not in ("BRA", "EXIT", "RET", "BSYNC"):
            waiting.append(index + 1)
    return [lines[index] for index in sorted(seen)]


def highest_register(lines: list[str]) -> int:
    return max(int(number) for line in lines for number in re.findall(r"\bR(\d+)\b", line))


def counts_of_products(code: str) -> tuple[int, ...]:
    """Of asynchronous products: all, those that end a group, fences before some, and waits for some."""
    lines = [line for line in code.splitlines() if "HGMMA" in line]
    return (
        len(lines),
        sum("gsb0" in line for line in lines),
        code.count("WARPGROUP.ARRIVE"),
        code.count("DEPBAR.LE gsb0"),
    )


def softmax_meets_products(code: str) -> bool:
    """Whether exponentials lie between the issue of a product of weights in registers and the wait for it."""
    issued = re.search(r"HGMMA\.\S+ R\d+, R\d+, gdesc\S+ R\d+, gsb0", code)
    waits = re.compile(r"DEPBAR\.LE gsb0, 0x(\d)").finditer(code, issued.end()) if issued else iter(())
    scores, outputs = next(waits), next(waits)
    return (scores[1], outputs[1]) == ("1", "0") and "MUFU.EX2" in code[scores.end() : outputs.start()]


@needs_library
def test_products_of_hopper_run_asynchronously(tmp_path: Path) -> None:
    """As the source has it: three fences, four groups, four waits; a tile's softmax beside the product of the last one.
    The producer gets by with the registers that it keeps, and copies; the consumers take turns, and do not copy.

    Where the compiler cannot keep a product's registers apart from other code it adds fences and waits, says so in a
    remark (C7510 and its neighbours), and the build goes on.
    """
    seen = 0
    for image, names in images_with("sm_90a", "AttentionForwardSm90"):
        for name in names:
            code = disassembled(tmp_path, image, name)
            products, *groups = counts_of_products(code)
            assert groups == [4, 3, 4], name
            assert products > 4, name
            assert softmax_meets_products(code), name
            producer, consumers = reachable(code, "USETMAXREG.DEALLOC"), reachable(code, "USETMAXREG.TRY_ALLOC")
            assert highest_register(producer) < 24, name
            assert 24 <= highest_register(consumers) < 240, name
            for lines, copies, multiplies in ((producer, True, False), (consumers, False, True)):
                text = "\n".join(lines)
                assert ("UTMALDG" in text) == copies, name
                assert ("HGMMA" in text) == ("BAR.SYNC" in text) == ("BAR.ARV" in text) == multiplies, name
            seen += 1
    assert seen == 12


@needs_library
def test_loads_and_registers_for_the_cuda_key(tmp_path: Path) -> None:
    """Under a torch without CUDA, with a libtorch_cuda.so that has the symbols and none of the function."""
    compiler = shutil.which("c++")
    if compiler is None or torch.version.cuda is not None:
        pytest.skip("needs a C++ compiler and a torch without CUDA")
    missing = ("aoti_torch_get_current_cuda_stream", "torch_c10_cuda_check_msg", "torch_c10_cuda_free_error_msg")
    source = tmp_path / "stand_in.cpp"
    source.write_text("".join(f'extern "C" int {name}() {{ return 1; }}\n' for name in missing))
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", tmp_path / "libtorch_cuda.so"], check=True)
    code = f"""
import ctypes, torch, ptkernels
ctypes.CDLL({str(tmp_path / "libtorch_cuda.so")!r}, ctypes.RTLD_GLOBAL)
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = [f"ptkernels::{{name}}" for name in (
    "attention", "_attention_backward", "attention_varlen", "_attention_varlen_backward",
)]
before = [has(op, "CUDA") for op in ops]
torch.ops.load_library({str(LIBRARY)!r})
print(before, [has(op, "CUDA") for op in ops])
print([torch.ops.ptkernels._set_cuda_architecture(name) for name in ("sm_80", "sm_90a", "")])
"""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    # Of packed sequences, the Triton kernels had been registered; the library takes their place.
    newest = "sm_90a" if "sm_90a" in built() else "sm_80"
    assert ran.stdout.splitlines() == [f"{[False, False, True, True]} {[True] * 4}", str(["sm_80", newest, "none"])]


def compiled(path: Path, source: str, *what: str) -> tuple[bytes, str]:
    """What nvcc makes of CUDA code for sm_90a that may include the project's headers, an object file or `what` option
    asks for, and what it says of it.
    """
    (path / "code.cu").write_text(source)
    flags = ["-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT}", "-isystem", Path(torch.__file__).parent / "include"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    flags += ["-gencode=arch=compute_90a,code=sm_90a", *(what or ("-c",)), path / "code.cu", "-o", path / "code"]
    made = subprocess.run([str(NVCC), *map(str, flags)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return (path / "code").read_bytes(), made.stdout + made.stderr


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("header", sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cuh")))
def test_every_wrapper_stands_alone(tmp_path: Path, header: str) -> None:
    compiled(tmp_path, f'#include "csrc/cuda/{header}"\n', "--ptx")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_blocks_make_clusters(tmp_path: Path) -> None:
    """A tile for two blocks by one copy, each of which then reads the other's."""
    code, _ = compiled(
        tmp_path,
        """
        #include "csrc/cuda/cluster.cuh"
        #include "csrc/cuda/launch.cuh"
        using namespace ptk::cuda;
        struct SwapTiles {
          static constexpr int kThreads = 128, kBlocksPerMultiprocessor = 1, kClusterBlocks = 2;
          struct Params { TensorMap map; uint16_t* out; };
          struct alignas(1024) Shared { uint16_t tile[64 * 64]; Barrier full, empty; };
          static int64_t blocks(const Params&) { return 2; }
          __device__ static void run(const Params& params, Shared& shared) {
            if (threadIdx.x == 0) {
              shared.full.init(1);
              shared.empty.init(2);
              publish_barriers();
            }
            sync_cluster();
            if (threadIdx.x == 0) {
              shared.full.arrive_expecting(sizeof(shared.tile));
              if (cluster_rank() == 0) {
                copy_tile_to_blocks(shared.tile, params.map, shared.full, 0, 0, 0, 0, 3);
              }
            }
            shared.full.wait(0);
            params.out[blockIdx.x * 128 + threadIdx.x] = *in_block(shared.tile + threadIdx.x, 1 - cluster_rank());
            if (threadIdx.x == 0) {
              arrive_in_block(shared.empty, 0);
            }
            sync_cluster();
          }
        };
        template void StreamLauncher::run<SwapTiles>(const SwapTiles::Params&) const;
        """,
    )
    ((arch, image),) = images(code)
    ((name, kernel),) = kernels(image).items()
    assert (arch, kernel.stack) == ("sm_90a", 0)
    instructions = disassembled(tmp_path, image, name)
    wanted = ("UCGABAR_ARV", "UCGABAR_WAIT", "UTMALDG.4D.MULTICAST", "SYNCS.ARRIVE.TRANS64.RED")
    assert not [text for text in wanted if text not in instructions]
    assert b"cudaLaunchKernelExC" in code


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_kernel_with_local_memory_is_seen(tmp_path: Path) -> None:
    """The reader of the images, on a kernel that indexes a local array at run time."""
    code, _ = compiled(
        tmp_path,
        """
        __global__ void local(float* p, int n) {
          __shared__ float s[100];
          float a[32];
          for (int i = 0; i < 32; ++i) a[i] = p[i];
          s[threadIdx.x] = a[n];
          __syncthreads();
          for (int i = 0; i < 32; ++i) p[i] = a[(i * n) % 32] + s[i];
        }
        """,
    )
    ((arch, image),) = images(code)
    ((name, kernel),) = kernels(image).items()
    assert (arch, "local" in name) == ("sm_90a", True)
    assert kernel.stack == 128
    assert kernel.shared >= 400
    assert kernel.registers > 0


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_a_kernel_with_serialised_products_is_seen(tmp_path: Path) -> None:
    """The reader of the code, on a kernel that touches a result while its products are under way."""
    code, said = compiled(
        tmp_path,
        """
        #include "csrc/cuda/wgmma.cuh"
        using namespace ptk::cuda;
        __global__ void serial(float* out, uint64_t a, uint64_t b, int n) {
          float d[8][4] = {};
          for (int i = 0; i < n; ++i) {
            fence_products();
            multiply_rows_async<torch::headeronly::Half, 64, 0>(d, a + i, b, 1);
            commit_products();
            d[0][0] *= 2;
            multiply_rows_async<torch::headeronly::Half, 64, 0>(d, a, b, 1);
          }
          wait_products<0>();
          for (int i = 0; i < 8; ++i) for (int j = 0; j < 4; ++j) out[threadIdx.x * 32 + i * 4 + j] = d[i][j];
        }
        """,
    )
    assert "wgmma.mma_async instructions are serialized" in said
    ((_, image),) = images(code)
    (name,) = kernels(image)
    products, groups, fences, waits = counts_of_products(disassembled(tmp_path, image, name))
    assert groups == products
    assert fences > 1
    assert waits > 1
