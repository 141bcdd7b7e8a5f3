"""The CUDA kernels run on the CPU, thread by thread (cuda_host/cuda_host.h): their logic, where there is no GPU."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import LEARNED, RESULTS, assert_within_rule, covered, random_gradients
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from ptkernels._registry import Sample
from ptkernels.ops import attention_kv_cache
from ptkernels.ops.attention.options import Options, resolve
from ptkernels.ops.attention.spec import SPEC
from ptkernels.ops.attention_kv_cache.spec import SPEC as CACHE_SPEC

ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}
SELECTION = (
    "113x203-causal", "dim-111", "dim-512", "dims-192-128", "grouped-heads", "empty-rows", "bias", "no-keys", "window",
    "slopes", "sinks", "dropout", "everything",
)  # fmt: skip


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
    packed_rest = rest.packed
    out, lse = host.attention_varlen(query, key, value, *starts, -1, -1, *packed_rest)
    grad_out, grad_lse = random_gradients(out, lse)
    packed = host._attention_varlen_backward(
        grad_out, grad_lse, query, key, value, out, lse, *starts, -1, -1, [True] * 3 + [False] * 3, *packed_rest
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
    rows, starts = torch.randn(7, 2, 64), torch.tensor([0, 7])
    with pytest.raises(RuntimeError, match="attention: relative_bias: got a value, expected none"):
        host.attention_varlen(*[rows] * 3, starts, starts, 7, 7, relative_bias=torch.ones(2, 13))
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
