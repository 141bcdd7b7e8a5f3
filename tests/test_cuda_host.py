"""The CUDA kernels run on the CPU, thread by thread (cuda_host/cuda_host.h): their logic, where there is no GPU."""

from __future__ import annotations

import itertools
import math
import mmap
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import LEARNED, RESULTS, assert_within_rule, covered, plans, random_gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right

import ptkernels as ptk
from ptkernels import _backend, _cuda, _env, _triton
from ptkernels._registry import Sample
from ptkernels.errors import FallbackError, FallbackWarning
from ptkernels.ops import attention_kv_cache
from ptkernels.ops.attention import library as attention_library
from ptkernels.ops.attention import routing as attention_routing
from ptkernels.ops.attention.options import Options, resolve
from ptkernels.ops.attention.spec import SPEC
from ptkernels.ops.attention_kv_cache.spec import SPEC as CACHE_SPEC

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
SELECTION = (
    "113x203-causal", "dim-111", "dim-512", "dims-192-128", "grouped-heads", "empty-rows", "bias", "no-keys", "window",
    "slopes", "sinks", "dropout", "everything",
)  # fmt: skip


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if COMPILER is None:
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
    subprocess.run([COMPILER, *flags, *includes, *(str(ROOT / source) for source in sources), *link], check=True)
    torch.ops.load_library(library)
    return torch.ops.ptkernels_cuda_host


@pytest.fixture(autouse=True)
def _defaults(host: Any) -> Iterator[None]:
    host.set_architecture("cuda_cores")
    yield
    host.set_order(ORDERS["ascending"])


def options(sample: Sample) -> tuple[Tensor | None, Options]:
    names = ("dropout_p", "is_causal", "scale", "window", "softcap", "alibi_slopes", "sinks")
    defaults = {"dropout_p": 0.0, "is_causal": False, "softcap": 0.0}
    torch.manual_seed(0)  # of dropout
    given = [sample.kwargs.get(name, defaults.get(name)) for name in names]
    return resolve(sample.args[0].dtype, sample.kwargs.get("attn_mask"), *given)


def forward(host: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    mask, rest = options(sample)
    return host.attention(*(tensor.detach() for tensor in sample.args), mask, *rest)


def gradients_for(host: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    return random_gradients(*forward(host, sample))


def on_host(
    host: Any, sample: Sample, grads: tuple[Tensor, Tensor], wanted: tuple[bool, ...] | None = None
) -> SimpleNamespace:
    operands = [tensor.detach() for tensor in sample.args]
    mask, rest = options(sample)
    out, lse = forward(host, sample)
    if wanted is None:
        wanted = tuple(name in (sample.grad_inputs or LEARNED[:3]) for name in LEARNED)
    gradients = host._attention_backward(*grads, *operands, out, lse, mask, *rest[:2], wanted, *rest[2:])
    return SimpleNamespace(out=out, lse=lse, **dict(zip(LEARNED, gradients, strict=False)))


def contract_samples() -> Iterator[Any]:
    """Every quick sample on the CUDA cores in float32 and on tensor cores in bfloat16; a selection in other dtypes."""
    for architecture, dtype in (
        ("cuda_cores", torch.float64),
        ("cuda_cores", torch.float32),
        ("cuda_cores", torch.bfloat16),
        ("sm_80", torch.bfloat16),
        ("sm_80", torch.float16),
        ("sm_90a", torch.bfloat16),
    ):
        for sample in covered(SPEC.samples(dtype, "cpu", False, "quick")):
            every = (architecture, dtype) in (("cuda_cores", torch.float32), ("sm_80", torch.bfloat16))
            if every or sample.name in SELECTION:
                yield pytest.param(sample, dtype, architecture, id=f"{architecture}-{str(dtype)[6:]}-{sample.name}")


@pytest.mark.parametrize(("sample", "dtype", "architecture"), list(contract_samples()))
def test_matches_the_reference(host: Any, sample: Sample, dtype: torch.dtype, architecture: str) -> None:
    host.set_architecture(architecture)
    grads = gradients_for(host, sample)
    assert_within_rule(SPEC, on_host(host, sample, grads), sample, dtype, grads)


def make(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, **kwargs: Any) -> Sample:
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return Sample("made", tensors, kwargs, LEARNED[:3])


@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (96, 80), (128, 128), (192, 128), (192, 192), (256, 200)])
@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [(torch.bfloat16, "sm_80"), (torch.float16, "sm_80"), (torch.bfloat16, "sm_90a"), (torch.float16, "sm_90a")],
    ids=str,
)
def test_every_head_dim_of_the_tensor_cores(
    host: Any, dtype: torch.dtype, architecture: str, dim: int, dim_v: int
) -> None:
    sizes = ((1, 2, 150, dim), (1, 1, 199, dim), (1, 1, 199, dim_v))
    sample = make(*sizes, dtype=dtype, is_causal=True, enable_gqa=True)
    host.set_architecture(architecture)
    grads = gradients_for(host, sample)
    assert_within_rule(SPEC, on_host(host, sample, grads), sample, dtype, grads)


@pytest.mark.parametrize(
    ("dtype", "architecture"),
    [
        (torch.float64, "cuda_cores"),
        (torch.float32, "cuda_cores"),
        (torch.bfloat16, "sm_80"),
        (torch.bfloat16, "sm_90a"),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_threads(host: Any, dtype: torch.dtype, architecture: str) -> None:
    """Nor, where work is asynchronous, on when it is done."""
    keys = 250 if architecture == "sm_90a" else 90  # more tiles than slots
    mask = torch.rand(70, keys, generator=torch.Generator().manual_seed(0)) < 0.7
    sizes = ((1, 4, 70, 136), (1, 2, keys, 136), (1, 2, keys, 72))
    sample = make(*sizes, dtype=dtype, attn_mask=mask, is_causal=architecture != "sm_90a", dropout_p=0.3)
    host.set_architecture(architecture)
    grads = gradients_for(host, sample)
    results = []
    for order in ORDERS.values():
        host.set_order(order)
        results.append(on_host(host, sample, grads))
    for name in RESULTS:
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name
        assert torch.equal(getattr(results[0], name), getattr(results[2], name)), name


@pytest.mark.parametrize(("heads", "len_q"), [(2, 83), (8, 19)])  # the latter share tiles on sm_90a
@pytest.mark.parametrize("architecture", ["cuda_cores", "sm_80", "sm_90a"])
def test_dropout_has_the_masks_of_the_cpu(host: Any, architecture: str, heads: int, len_q: int) -> None:
    """With equal scores and the identity for values, out shows which weights were kept."""
    keys, seed = 64, torch.tensor([3, 4])
    query = torch.zeros(4, heads, len_q, 16, dtype=torch.bfloat16)
    key = torch.zeros(4, 2, keys, 16, dtype=torch.bfloat16)
    value = torch.eye(keys, dtype=torch.bfloat16).repeat(4, 2, 1, 1)
    rest = Options(dropout_seed=seed, dropout_p=0.4)
    host.set_architecture(architecture)
    ours, _ = host.attention(query, key, value, None, *rest)
    cpu, _ = torch.ops.ptkernels.attention(query, key, value, None, *rest)
    assert torch.equal(ours != 0, cpu != 0)
    assert 0.5 < (ours != 0).float().mean().item() < 0.7


@pytest.mark.parametrize(("architecture", "dtype"), [("cuda_cores", torch.float32), ("sm_80", torch.bfloat16)])
def test_packed_sequences_are_those_of_a_batch(host: Any, architecture: str, dtype: torch.dtype) -> None:
    host.set_architecture(architecture)
    lengths_q, lengths_k = [37, 0, 70, 5], [64, 9, 0, 131]
    starts = [torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in (lengths_q, lengths_k)]
    sample = make((1, 4, sum(lengths_q), 64), (1, 2, sum(lengths_k), 64), (1, 2, sum(lengths_k), 40), dtype=dtype)
    query, key, value = (tensor[0].transpose(0, 1).contiguous() for tensor in sample.args)
    rest = Options(is_causal=True, bottom_right=True, dropout_seed=torch.tensor([1, 2, 3, 4]), dropout_p=0.2)
    packed_rest = rest.shared
    out, lse = host.attention_varlen(query, key, value, *starts, -1, -1, *packed_rest)
    grad_out, grad_lse = random_gradients(out, lse)
    packed = host._attention_varlen_backward(
        grad_out, grad_lse, query, key, value, out, lse, *starts, -1, -1, [True] * 3 + [False] * 2, *packed_rest
    )

    def part(tensor: Tensor, bounds: Tensor, index: int) -> Tensor:
        return tensor[bounds[index] : bounds[index + 1]].transpose(0, 1).unsqueeze(0)

    for index in range(4):
        rows = slice(int(starts[0][index]), int(starts[0][index + 1]))
        operands = [part(query, starts[0], index), part(key, starts[1], index), part(value, starts[1], index)]
        alone = rest._replace(dropout_seed=torch.tensor(index + 1))
        one_out, one_lse = host.attention(*operands, None, *alone)
        assert torch.equal(part(out, starts[0], index), one_out)
        assert torch.equal(lse[:, rows], one_lse[0])
        grads = host._attention_backward(
            part(grad_out, starts[0], index), grad_lse[None, :, rows], *operands, one_out, one_lse, None, *alone[:2],
            [True] * 3, *alone[2:],
        )  # fmt: skip
        for got, want, bounds in zip(packed, grads, (starts[0], starts[1], starts[1]), strict=False):
            assert torch.equal(part(got, bounds, index), want)


def test_layouts_put_heads_inside(host: Any) -> None:
    sample = make((2, 4, 5, 6), (2, 2, 7, 6), (2, 2, 7, 3))
    result = on_host(host, sample, gradients_for(host, sample))
    for name, heads in {"out": 4, "query": 4, "key": 2, "value": 2}.items():
        tensor = getattr(result, name)
        assert tensor.transpose(1, 2).is_contiguous(), name
        assert tensor.size(1) == heads
    assert result.lse.is_contiguous()


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)))
def test_only_the_gradients_asked_for(host: Any, wanted: tuple[bool, bool, bool]) -> None:
    sample = make((1, 2, 20, 6), (1, 2, 37, 6), (1, 2, 37, 3))
    grads = gradients_for(host, sample)
    everything = on_host(host, sample, grads)
    some = on_host(host, sample, grads, (*wanted, False, False, False))
    for name, asked in zip(("query", "key", "value"), wanted, strict=True):
        got = getattr(some, name)
        assert (got is not None) == asked
        if asked:
            assert torch.equal(got, getattr(everything, name))


def test_without_the_gradient_of_lse(host: Any) -> None:
    sample = make((1, 2, 20, 6), (1, 2, 37, 6), (1, 2, 37, 3))
    out, lse = host.attention(*sample.args)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    absent = host._attention_backward(grad_out, None, *sample.args, out, lse)
    zero = host._attention_backward(grad_out, torch.zeros_like(lse), *sample.args, out, lse)
    assert all(torch.equal(a, b) for a, b in zip(absent[:3], zero[:3], strict=True))


def test_biases_by_distance_and_masks_of_blocks_are_refused(host: Any) -> None:
    sample = make((1, 2, 20, 6), (1, 2, 37, 6), (1, 2, 37, 3))
    with pytest.raises(RuntimeError, match="attention: relative_bias: got a value, expected none"):
        host.attention(*sample.args, relative_bias=torch.ones(2, 56))
    blocks = {"attn_mask": torch.ones(1, 1, dtype=torch.bool), "mask_block_size": 64}
    with pytest.raises(RuntimeError, match=r"mask_block_size: got 64, expected 1 on .*, which has no kernel"):
        host.attention(*sample.args, **blocks)


def test_nothing_runs_that_was_not_chosen(host: Any) -> None:
    host.set_architecture("none")
    with pytest.raises(RuntimeError, match="no CUDA kernel has passed on a GPU yet; PTKERNELS_CUDA_ARCH"):
        host.attention(*[torch.ones(1, 1, 3, 4)] * 3)


@pytest.mark.parametrize("architecture", ["cuda_cores", "sm_80", "sm_90a"])
@pytest.mark.parametrize("large", ["batch", "heads", "length"])
def test_offsets_beyond_31_bits(host: Any, architecture: str, large: str) -> None:
    """Strides reach past 2**31 elements; the pages between are never touched."""
    host.set_architecture(architecture)
    stride = {"batch": (2**31, 16, 8, 1), "heads": (16, 2**31, 8, 1), "length": (8, 8, 2**30 + 8, 1)}[large]
    sizes = {"batch": (2, 1, 2, 8), "heads": (1, 2, 2, 8), "length": (1, 1, 3, 8)}[large]
    storage = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 64)), dtype=torch.bfloat16)
    wide = storage.as_strided(sizes, stride)
    wide.copy_(torch.randn(sizes, generator=torch.Generator().manual_seed(0)))
    packed = wide.contiguous()
    assert host.architecture_for(wide, wide, wide, 90, architecture) == architecture
    grads = gradients_for(host, Sample("packed", (packed, packed, packed)))
    got = on_host(host, Sample("wide", (wide, wide, wide)), grads)
    expected = on_host(host, Sample("packed", (packed, packed, packed)), grads)
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in RESULTS)


def test_packed_sequences_and_caches_beyond_31_bits(host: Any) -> None:
    storage = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 2**20)), dtype=torch.bfloat16)
    rows = storage.as_strided((3, 1, 8), (2**30 + 8, 8, 1))
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))
    starts = torch.tensor([0, 2, 3])
    host.set_architecture("sm_80")
    calls = [host.attention_varlen(*[tensor] * 3, starts, starts, -1, -1)[0] for tensor in (rows, rows.contiguous())]
    assert torch.equal(*calls)
    cache = storage.as_strided((2, 1, 4, 8), (2**31, 32, 8, 1))  # and what is appended goes there
    cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(1)))
    query, filled = torch.ones(2, 1, 1, 8, dtype=torch.bfloat16), torch.tensor([2, 3])
    copies = [cache.contiguous(), cache.contiguous()]
    near, _ = host.attention_with_kv_cache_append(query, *copies, query, query, filled)
    far, _ = host.attention_with_kv_cache_append(query, cache, cache, query, query, filled)
    assert torch.equal(near, far)
    assert torch.equal(cache, copies[0])


def test_rows_of_results_beyond_31_bits(host: Any) -> None:
    """Where results of that size would be written: they are too large to be had here."""
    strides, (batch, head, row), (heads, length) = [2**34, 2**33, 2**32, 1], (3, 2, 5), (8, 2**30)
    place = batch * strides[0] + head * strides[1] + row * strides[2]
    assert host.head_offsets(strides, batch, head, row, heads, length) == [place] * 3 + [
        (batch * heads + head) * length
    ]


def test_nan_outside_the_tensors_stays_there(host: Any) -> None:
    def surrounded(size: tuple[int, ...]) -> Tensor:
        buffer = torch.full([n + 4 for n in size], math.nan)
        view = buffer[2:-2, 2:-2, 2:-2, 2:-2]
        return view.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)))

    mask = surrounded((2, 2, 35, 67))
    operands = tuple(surrounded(size) for size in ((2, 2, 35, 20), (2, 2, 67, 20), (2, 2, 67, 70)))
    sample = Sample("surrounded", operands, {"attn_mask": mask})
    grad_out, grad_lse = surrounded((2, 2, 35, 70)), torch.randn(2, 2, 35, generator=torch.Generator().manual_seed(0))
    result = on_host(host, sample, (grad_out, grad_lse))
    assert all(getattr(result, name).isfinite().all() for name in RESULTS)


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


@pytest.mark.parametrize(("heads", "heads_kv", "len_q"), [(8, 1, 5), (12, 2, 33), (4, 2, 130), (16, 1, 16)])
@pytest.mark.parametrize("options", ["everything", "window", "boolean"])
def test_heads_that_share_a_tile_keep_their_options(
    host: Any, heads: int, heads_kv: int, len_q: int, options: str
) -> None:
    host.set_architecture("sm_90a")
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(2, heads, len_q, 150, generator=generator)
    kwargs: dict[str, Any] = {
        "everything": {
            "is_causal": True, "dropout_p": 0.3, "softcap": 20.0, "attn_mask": mask.bfloat16(),
            "alibi_slopes": torch.rand(heads, generator=generator), "sinks": torch.randn(heads, generator=generator),
        },
        "window": {"attn_mask": causal_lower_right(len_q, 150), "window": (40, None)},  # whose scores stay products
        "boolean": {"attn_mask": mask > 0, "dropout_p": 0.3},
    }[options]  # fmt: skip
    sizes = ((2, heads, len_q, 64), (2, heads_kv, 150, 64), (2, heads_kv, 150, 64))
    sample = make(*sizes, dtype=torch.bfloat16, enable_gqa=True, **kwargs)
    assert host.query_tile(heads, heads_kv, len_q, 128)[0] > 1
    grads = gradients_for(host, sample)
    assert_within_rule(SPEC, on_host(host, sample, grads), sample, torch.bfloat16, grads)


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


@pytest.mark.parametrize("architecture", ["cuda_cores", "sm_80", "sm_90a"])
@pytest.mark.parametrize("len_q", [150, 300])
def test_a_call_allocates_its_results_and_the_scratch(host: Any, architecture: str, len_q: int) -> None:
    host.set_architecture(architecture)
    sizes = ((1, 2, len_q, 192), (1, 2, 170, 192), (1, 2, 170, 128))
    sample = make(*sizes, dtype=torch.bfloat16, is_causal=True)

    def allocated(call: Any) -> tuple[int, Any]:
        """Bytes beside the results, and the results."""
        with torch.profiler.profile(profile_memory=True) as profile:
            results = call()
        events = profile.profiler.kineto_results.events()  # frees have negative sizes
        everything = sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")
        return everything - sum(result.untyped_storage().nbytes() for result in results if result is not None), results

    extra, (out, lse) = allocated(lambda: forward(host, sample))
    assert extra == 0
    mask, rest = options(sample)
    grad_out, _ = random_gradients(out, lse)
    call = (grad_out, None, *sample.args, out, lse, mask, *rest[:2], [True] * 3, *rest[2:])
    extra, _ = allocated(lambda: host._attention_backward(*call))
    assert extra == host.backward_scratch_bytes(1, 2, len_q, False)


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


@pytest.mark.parametrize(("newest", "kernels"), [("sm_80", "CUDA"), (None, "Triton")])
def test_masks_of_blocks_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, strict: None, newest: str | None, kernels: str
) -> None:
    """Whichever of the two a call on a GPU would go to."""
    monkeypatch.setattr(_cuda, "newest", lambda: newest)
    monkeypatch.setattr(attention_library, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(_triton, "unavailable", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16)
        blocks = {"attn_mask": torch.empty(4, 4, device="cuda", dtype=torch.bool), "mask_block_size": 16}
        account = ptk.explain(ptk.attention, query, query, query, **blocks)
        assert (account.backend, account.reason) == ("reference", f"the {kernels} kernels have no masks of blocks")
        with pytest.raises(FallbackError, match=f"the {kernels} kernels have no masks of blocks"):
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


def test_the_host_reports_a_barrier_that_a_thread_misses(host: Any) -> None:
    with pytest.raises(RuntimeError, match="same barrier"):
        host.run_diverging()


def test_the_host_shows_a_race(host: Any) -> None:
    results = []
    for order in ORDERS.values():
        host.set_order(order)
        out = torch.empty(256)
        host.run_racing(out)
        results.append(out)
    assert results[0].isnan().any()  # ascending: everybody reads what its neighbour has yet to write
    assert not torch.equal(results[0].nan_to_num(-1), results[1].nan_to_num(-1))


def cache_samples() -> Iterator[Any]:
    for dtype in (torch.float32, torch.bfloat16):
        for sample in CACHE_SPEC.samples(dtype, "cpu", False, "quick"):
            yield pytest.param(sample, dtype, id=f"{str(dtype)[6:]}-{sample.name}")


def copied(sample: Sample) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, in the layouts that they have."""

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)

    return [copy(value) for value in sample.args], {name: copy(value) for name, value in sample.kwargs.items()}


@pytest.mark.parametrize(("sample", "dtype"), list(cache_samples()))
def test_caches_are_those_of_the_cpu(
    host: Any, monkeypatch: pytest.MonkeyPatch, sample: Sample, dtype: torch.dtype
) -> None:
    """Bit for bit what is stored; outputs to the rounding of sums in another order."""
    expected_args, expected_kwargs = copied(sample)
    expected = CACHE_SPEC.function(*expected_args, **expected_kwargs, return_lse=True)
    monkeypatch.setattr(attention_kv_cache, "attend_op", host.attention_with_kv_cache)
    monkeypatch.setattr(attention_kv_cache, "append_op", host.attention_with_kv_cache_append)
    args, kwargs = copied(sample)
    got = CACHE_SPEC.function(*args, **kwargs, return_lse=True)
    for ours, theirs in zip((*args, *kwargs.values()), (*expected_args, *expected_kwargs.values()), strict=True):
        if isinstance(ours, Tensor):
            assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=(16 if dtype.itemsize > 2 else 4) * eps)


def test_a_cache_that_is_too_short_stays_as_it_is(host: Any) -> None:
    """Lengths are not read before the kernels run: what does not fit gives NaN and is not appended."""
    query, new = torch.randn(2, 2, 1, 8), torch.randn(2, 2, 1, 8)
    k_cache, v_cache = torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8)
    out, lse = host.attention_with_kv_cache_append(query, k_cache, v_cache, new, new, torch.tensor([4, 2]))
    assert out[0].isnan().all()
    assert lse[0].isnan().all()
    assert not out[1].isnan().any()
    assert not k_cache[0].any()
    assert torch.equal(k_cache[1, :, 2], new[1, :, 0])


@pytest.mark.parametrize("wrong", [-1, 7, 2**40])
def test_pages_outside_the_cache_are_not_touched(host: Any, wrong: int) -> None:
    query, cache = torch.randn(1, 2, 1, 8), torch.randn(7, 2, 4, 8)
    table = torch.tensor([[2, wrong, wrong]])
    out, _ = host.attention_with_kv_cache(query, cache, cache, torch.tensor([4]), table)
    assert out.isfinite().all()
    out, _ = host.attention_with_kv_cache(query, cache, cache, torch.tensor([5]), table)
    assert out.isnan().all()
