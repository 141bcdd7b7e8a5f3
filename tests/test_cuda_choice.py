"""What is decided on the host before a CUDA kernel runs: which one, over which tiles, with what memory.

And what is said of it. The kernels' results: test_cuda_host.py.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_checks import plans
from torch._subclasses.fake_tensor import FakeTensorMode

import ptkernels as ptk
from ptkernels import _backend, _cuda, _env, _triton
from ptkernels.errors import FallbackError, FallbackWarning
from ptkernels.ops.attention import library as attention_library
from ptkernels.ops.attention import routing as attention_routing

ROOT = Path(__file__).parents[1]


def test_rows_of_results_beyond_31_bits(host: Any) -> None:
    """Where results of that size would be written: they are too large to be had here."""
    strides, (batch, head, row), (heads, length) = [2**34, 2**33, 2**32, 1], (3, 2, 5), (8, 2**30)
    place = batch * strides[0] + head * strides[1] + row * strides[2]
    assert host.head_offsets(strides, batch, head, row, heads, length) == [place] * 3 + [
        (batch * heads + head) * length
    ]


@pytest.mark.parametrize(("heads", "tiles", "section"), [(1, 1, 1), (6, 5, 6), (7, 4, 3), (5, 3, 1)])
def test_a_schedule_takes_every_tile_once_and_long_ones_first(host: Any, heads: int, tiles: int, section: int) -> None:
    flat = host.tile_order(heads, tiles, section)
    order = list(zip(flat[::2], flat[1::2], strict=True))
    assert sorted(order) == [(head, tile) for head in range(heads) for tile in range(tiles)]
    for first in range(0, heads, section):
        part = [tile for head, tile in order if first <= head < first + section]
        assert part == sorted(part, reverse=True)
        assert max(index for index, (head, _) in enumerate(order) if head < first + section) < (first + section) * tiles


@pytest.mark.parametrize(
    ("heads_q", "heads_kv", "len_q", "expected"),
    [
        (8, 8, 1, (1, 128, 8)),  # no two heads share keys
        (8, 1, 1, (8, 16, 1)),
        (12, 2, 1, (2, 64, 6)),  # a group of six: two and two and two
        (64, 8, 16, (8, 16, 8)),
        (64, 8, 17, (4, 32, 16)),
        (4, 1, 130, (4, 32, 5)),
        (64, 8, 4096, (1, 128, 64 * 32)),  # nothing to gain
        (32, 1, 1, (8, 16, 4)),  # a warp's rows are of one head
    ],
)
def test_query_heads_share_a_tile_where_that_makes_fewer(
    host: Any, heads_q: int, heads_kv: int, len_q: int, expected: tuple[int, ...]
) -> None:
    assert tuple(host.query_tile(heads_q, heads_kv, len_q, 128)) == expected


@pytest.mark.parametrize(
    ("start", "panel_stride", "further"), [(0x400, 0x4000, 0), (0x28400, 0x8000, 96), (0x38000, 0, 2048)]
)
def test_matrix_descriptors_are_as_the_ptx_isa_lays_them_out(
    host: Any, start: int, panel_stride: int, further: int
) -> None:
    bits = host.operand_descriptor(start, panel_stride, further) % 2**64
    assert bits & 0x3FFF == start + further >> 4  # start address, bits 0-13
    assert bits >> 16 & 0x3FFF == panel_stride >> 4  # leading dimension's byte offset, 16-29
    assert bits >> 32 & 0x3FFF == 8 * 128 >> 4  # stride dimension's byte offset, 32-45: eight rows of 128 bytes
    assert bits >> 62 == 1  # swizzle over 128 bytes; every pattern starts at a multiple of 1024: base offset 0
    assert bits >> 14 & 3 == bits >> 30 & 3 == bits >> 46 & 0xFFFF == 0


def test_tensor_maps_are_of_the_tensor_as_it_lies(host: Any) -> None:
    sizes, strides, box = slice(0, 4), slice(4, 7), slice(7, 11)
    tensor = torch.zeros(2, 19, 8, 96, dtype=torch.bfloat16).transpose(1, 2)[..., :90]  # heads inside
    numbers, refused = host.tensor_map(tensor, 4, 32)
    assert refused == ""
    assert numbers[sizes] == [90, 19, 8, 2]  # so that what lies past a row's end or a head's last row comes as zeros
    assert numbers[strides] == [2 * stride for stride in (8 * 96, 96, 19 * 8 * 96)]
    assert numbers[box] == [64, 32, 4, 1]
    # Of a dimension of one entry the stride says nothing.
    one = torch.zeros(1, 3, 1, 8, dtype=torch.bfloat16).as_strided((1, 3, 1, 8), (5, 8, 3, 1))
    assert host.tensor_map(one, 1, 128)[0][strides] == [16, 16, 16]
    ragged = torch.zeros(400, dtype=torch.bfloat16).as_strided((2, 3, 4, 8), (108, 36, 9, 1))
    for wrong in (ragged, tensor[:, :1].expand(-1, 8, -1, -1)):
        assert "a stride that is no multiple of 16 bytes" in host.tensor_map(wrong, 1, 128)[1]
    assert "an address that is no multiple" in host.tensor_map(tensor[..., 1:], 1, 128)[1]
    assert "1 to 2^32" in host.tensor_map(tensor[:0], 1, 128)[1]
    assert "1 to 256 entries" in host.tensor_map(tensor, 1, 512)[1]


@pytest.mark.parametrize(
    ("heads", "heads_kv", "len_q"), [(8, 1, 5), (12, 2, 33), (4, 2, 130), (6, 6, 300), (16, 1, 16)]
)
@pytest.mark.parametrize(
    ("is_causal", "bottom_right", "left"), [(0, 0, -1), (1, 0, -1), (1, 1, -1), (1, 1, 70), (0, 0, 9)]
)
def test_tiles_of_packed_heads_hold_every_row_once_with_its_keys(
    host: Any, heads: int, heads_kv: int, len_q: int, is_causal: int, bottom_right: int, left: int
) -> None:
    batch, len_k = 2, 260
    query = torch.zeros(batch, heads, len_q, 64, dtype=torch.bfloat16)
    key = torch.zeros(batch, heads_kv, len_k, 64, dtype=torch.bfloat16)
    numbers = host.warp_rows(query, key, bool(is_causal), bool(bottom_right), left)
    warps = list(zip(*[iter(numbers)] * 5, strict=True))
    rows = [(b, head, row) for b, head, row0, *_ in warps for row in range(row0, row0 + 16) if row < len_q]
    assert sorted(rows) == list(itertools.product(range(batch), range(heads), range(len_q)))
    diagonal = len_k - len_q if bottom_right else 0
    for tile in range(0, len(warps), 8):
        shared = warps[tile : tile + 8]
        assert len({(b, head // (heads // heads_kv)) for b, head, *_ in shared}) == 1  # one key head's
        *_, begin, end = shared[0]
        for _, _, first, *_ in shared:
            for row in range(first, min(first + 16, len_q)):
                seen = [
                    column
                    for column in range(len_k)
                    if (not is_causal or column <= row + diagonal) and (left < 0 or column >= row + diagonal - left)
                ]
                assert not seen or begin <= seen[0] <= seen[-1] < end
        # And no tile of keys more than its rows see between them.
        last = min(max(first for _, _, first, *_ in shared) + 15, len_q - 1)
        if is_causal and begin < end:
            assert end - 128 <= last + diagonal


def test_explain_names_how_many_query_heads_share_a_tile(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for group, len_q in itertools.product((1, 2, 3, 4, 6, 8, 12, 16, 71), range(1, 400)):
        shared, *_ = host.query_tile(2 * group, 2, len_q, 128)
        assert _cuda.query_heads_per_tile(2 * group, 2, len_q) == shared
    monkeypatch.setattr(_cuda, "newest", lambda: "sm_90a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    query, key = torch.zeros(1, 8, 20, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 100, 64, dtype=torch.bfloat16)
    kernel, reason = attention_routing.cuda_kernel(query, key, key, "asked for")
    assert kernel == "cuda sm_90a"
    assert reason.endswith("; rows of 4 query heads that share a key head are packed into a tile")
    assert "packed" not in attention_routing.cuda_kernel(query[:, :2], key, key, "asked for")[1]


@pytest.mark.parametrize("name", sorted(plans()))
def test_kernels_ask_for_what_is_planned(host: Any, name: str) -> None:
    """By the plan beside the kernel; what the compiler makes of its registers, tests/test_cuda_binary.py reads."""
    numbers = host.kernel_plan(name)
    instances = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
    plan = plans()[name]
    assert {threads for threads, _, _ in instances} == {plan.threads}
    assert math.ceil(max(shared for *_, shared in instances) / 1024) == plan.shared_kib
    # From sm_80 on a block may have 99 KiB, on sm_90 227.
    assert plan.shared_kib <= (227 if "Sm90" in name else 99)
    if name in ("AttentionForwardSm80", "AttentionGradQuerySm80", "AttentionForwardSm90"):
        rows = re.findall(r"^//   (\d+(?:/\d+)?) .*? (\d+) KiB", plan.path.read_text(), re.MULTILINE)
        assert [dims for dims, _ in rows] == ["64", "96", "128", "192/128", "192", "256"]
        assert [shared / 1024 for *_, shared in instances] == [int(kib) for _, kib in rows]


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("has_slopes", [False, True])
def test_scratch_of_the_backward_is_linear_in_the_lengths(host: Any, heads: int, has_slopes: bool) -> None:
    """DeepSeek's heads of 192/128 at 16384 tokens: two or three numbers per row, whatever the keys."""
    scratch = host.backward_scratch_bytes(1, heads, 16384, has_slopes)
    assert scratch == (3 if has_slopes else 2) * 4 * heads * 16384 < 2 << 30
    assert host.backward_scratch_bytes(1, heads, 2 * 16384, has_slopes) == 2 * scratch


def test_only_cuda_functions_that_a_graph_can_capture_are_called() -> None:
    """Nothing allocates, copies or waits: memory is torch's, and numbers of the host travel as kernels' parameters."""
    sources = [path for folder in ("csrc/cuda", "csrc/ops") for path in (ROOT / folder).rglob("*.*")]
    called = {name for path in sources for name in re.findall(r"\b(cuda[A-Z]\w*)\(", path.read_text())}
    assert called == {
        "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetDevice", "cudaGetDriverEntryPointByVersion",
        "cudaLaunchKernelEx",
    }  # fmt: skip


def test_parts_of_a_cache_fill_the_gpu_and_no_more(host: Any) -> None:
    assert host.split_count(1, 132, 1 << 20) == 264
    assert host.split_count(1, 132, 1) == 1
    assert host.split_count(8, 132, 4096) == 16  # of two steps each
    assert host.split_count(300, 132, 1 << 20) == 1
    for blocks in (1, 3, 100, 264, 5000):
        assert host.split_count(blocks, 132, 1 << 16) * blocks < 264 + blocks


def test_kernels_that_have_not_passed_are_chosen_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "VERIFIED_ON", dict.fromkeys(_cuda.VERIFIED_ON))
    monkeypatch.setattr(_env, "settings", _env.Settings())
    assert _cuda.newest() is None
    assert "PTKERNELS_CUDA_ARCH" in (_cuda.unavailable() or "")
    monkeypatch.setattr(_env, "settings", _env.Settings(cuda_arch="sm_80"))
    assert (_cuda.newest(), _cuda.unavailable()) == ("sm_80", None)
    assert _env.read({"PTKERNELS_CUDA_ARCH": "sm_80"}).cuda_arch == "sm_80"
    assert _cuda.note("sm_80") == "not yet run on a GPU"
    monkeypatch.setattr(_env, "settings", _env.Settings())
    monkeypatch.setitem(_cuda.VERIFIED_ON, "cuda_cores", "an H200 at 1234567")
    assert (_cuda.newest(), _cuda.note("cuda_cores")) == ("cuda_cores", "passed on an H200 at 1234567")


def test_kernel_files_say_where_they_have_run() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*.cuh") if "static void run(const " in path.read_text()]
    names = {path.name for path in files} - {"launch.cuh"}  # which runs them all
    assert {"attention_forward_sm90.cuh", "attention_backward_sm80.cuh", "kv_cache.cuh"} <= names
    for path in files:
        if path.name in names:
            architecture = {"sm80": "sm_80", "sm90": "sm_90a"}.get(path.stem.rpartition("_")[2], "cuda_cores")
            where = _cuda.VERIFIED_ON[architecture]
            head = path.read_text().partition("#pragma once")[0].replace("\n// ", " ")
            assert ("Not yet run on a GPU." if where is None else f"Run on {where}.") in head, path


def test_a_call_that_asks_for_nothing_takes_no_kernel_that_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU and the library loaded: Triton where it can run, else the reference, announced, and refused if strict.

    With a cap, since plain calls go straight to the operator, which refuses by itself (see above).
    """
    monkeypatch.setattr(_cuda, "VERIFIED_ON", dict.fromkeys(_cuda.VERIFIED_ON))
    monkeypatch.setattr(_env, "settings", _env.Settings())
    monkeypatch.setattr(attention_library, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(_backend.state, "warned", set())
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        account = ptk.explain(ptk.attention, query, query, query, softcap=2.0)
        assert account.backend == "reference"
        assert account.reason.startswith("its CUDA kernels are not yet run on a GPU; PTKERNELS_CUDA_ARCH=sm_80 runs")
        with pytest.warns(FallbackWarning, match="runs on the reference: its CUDA kernels are not yet run on a GPU"):
            assert ptk.attention(query, query, query, softcap=2.0).shape == query.shape
        monkeypatch.setattr(_backend.state, "strict", True)
        with pytest.raises(FallbackError, match=r"not yet run on a GPU.*PTKERNELS_STRICT=1 forbids the reference"):
            ptk.attention(query, query, query, softcap=2.0)
        monkeypatch.setattr(_triton, "unavailable", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        account = ptk.explain(ptk.attention, query, query, query, softcap=2.0)
        assert (account.backend, account.kernel) == ("triton", "Triton")


def test_masks_of_blocks_are_refused_by_name_in_cuda(monkeypatch: pytest.MonkeyPatch, strict: None) -> None:
    monkeypatch.setattr(_cuda, "newest", lambda: "sm_80")
    monkeypatch.setattr(attention_library, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        blocks = {"attn_mask": torch.empty(4, 4, device="cuda", dtype=torch.bool), "mask_block_size": 16}
        account = ptk.explain(ptk.attention, query, query, query, **blocks)
        assert (account.backend, account.reason) == ("reference", "the CUDA kernels have no masks of blocks")
        with pytest.raises(FallbackError, match="the CUDA kernels have no masks of blocks"):
            ptk.attention(query, query, query, **blocks)


@pytest.mark.parametrize("newest", ["cuda_cores", "sm_80", "sm_90a"])
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_explain_names_what_the_library_chooses(
    host: Any, monkeypatch: pytest.MonkeyPatch, capability: int, newest: str
) -> None:
    monkeypatch.setattr(_cuda, "newest", lambda: newest)
    for dtype, dim in itertools.product((torch.float32, torch.bfloat16), (64, 59, 256, 257)):
        query, key = torch.zeros(2, 4, 7, dim, dtype=dtype), torch.zeros(2, 2, 9, dim, dtype=dtype)
        for value in (key, key[:1].expand(2, -1, -1, -1), key.transpose(1, 2).contiguous().transpose(1, 2)):
            chosen = host.architecture_for(query, key, value, capability, newest)
            assert _cuda.choose(query, key, value, divmod(capability, 10))[0] == chosen


@pytest.mark.parametrize(
    ("change", "capability", "architecture", "why"),
    [
        ({}, (9, 0), "sm_90a", ""),
        ({}, (10, 0), "sm_80", "not sm_90a: it is code for compute capability 9.0 alone, and the GPU has 10.0"),
        ({"key": 0}, (9, 0), "sm_80", "not sm_90a: TMA does not read key: stride 0, which is 0 or no multiple of 16"),
        ({"query": 68}, (9, 0), "sm_80", "TMA does not read query: stride 68, which"),
        ({"packed": True}, (9, 0), "sm_80", "not sm_90a: sequences are packed"),
        ({"dim": 264}, (9, 0), "cuda_cores", "not sm_90a: head dim 264 is above 256; not sm_80: head dim 264 is above"),
        ({"dtype": torch.float32}, (9, 0), "cuda_cores", "not sm_80: float32 is not multiplied on the tensor cores"),
        ({}, (7, 5), "cuda_cores", "not sm_80: the GPU has compute capability 7.5"),
    ],
)  # fmt: skip
def test_explain_says_why_no_newer_kernel(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], capability: tuple[int, int], architecture: str, why: str
) -> None:
    monkeypatch.setattr(_cuda, "newest", lambda: "sm_90a")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, dim = change.get("dtype", torch.bfloat16), change.get("dim", 64)
    operands = {name: torch.zeros(1, 2, 5, dim, dtype=dtype) for name in ("query", "key", "value")}
    for name in operands.keys() & change.keys():
        operands[name] = torch.zeros(1000, dtype=dtype).as_strided((1, 2, 5, 64), (640, 320, change[name], 1))
    if "packed" in change:
        operands = {name: tensor[0] for name, tensor in operands.items()}
    kernel, reason = attention_routing.cuda_kernel(*operands.values(), "asked for")
    assert kernel == f"cuda {architecture}"
    assert reason.startswith("asked for; not yet run on a GPU")
    assert (why in reason) if why else ("; not sm" not in reason)


def test_explain_names_no_kernel_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where TORCH_CUDA_ARCH_LIST left it out."""
    monkeypatch.setattr(_cuda, "newest", lambda: "sm_90a")
    monkeypatch.setattr(_cuda, "_built", list(_cuda._built))
    operands = [torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)] * 3
    assert _cuda.choose(*operands, (9, 0)) == ("sm_90a", "")
    _cuda.note_built("sm_90a")
    assert _cuda.choose(*operands, (9, 0)) == ("sm_90a", "")
    _cuda.note_built("sm_80")
    assert _cuda.choose(*operands, (9, 0)) == ("sm_80", "not sm_90a: libptkernels_cuda.so was built without it")
