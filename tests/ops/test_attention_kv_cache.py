"""What only attention with a cache promises: what is stored, what is read, and that steps add up to the whole."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ptkernels as ptk
from ptkernels.ops.attention_kv_cache.reference import quantize

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
NAN = math.nan

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_page = pytest.mark.parametrize("page", [1, 4, 128])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    views = [tensor.contiguous().view(torch.uint8) for tensor in (actual, expected)]
    return actual.dtype == expected.dtype and torch.equal(*views)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def shuffled_table(batch: int, capacity: int, page: int) -> Tensor:
    """A block table over ``batch * ceil(capacity / page)`` pages in no order; page 0 stays unused."""
    count = -(-capacity // page)
    return 1 + torch.randperm(batch * count).view(batch, count).int()


def to_pages(cache: Tensor, table: Tensor, page: int, fill: float = NAN) -> Tensor:
    """A contiguous cache, or its scales, as the pages of a table, with ``fill`` where there is no slot."""
    count = table.size(1)
    rest = cache.shape[3:]
    padded = cache.new_full((*cache.shape[:2], count * page, *rest), 0 if cache.dtype in QUANTIZED else fill)
    padded[:, :, : cache.size(2)] = cache
    blocks = padded.new_full((1 + table.numel(), cache.size(1), page, *rest), 0 if cache.dtype in QUANTIZED else fill)
    blocks[table.long()] = padded.unflatten(2, (count, page)).transpose(1, 2)
    return blocks


def from_pages(blocks: Tensor, table: Tensor, capacity: int) -> Tensor:
    return blocks[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :capacity]


def angles(positions: int, pairs: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    turns = torch.arange(positions)[:, None] / 100 ** (torch.arange(pairs) / max(pairs, 1))
    return turns.cos().to(dtype), turns.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As complex numbers: another formula than the reference's."""
    pairs = cos.size(-1)
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    split = turned.unflatten(-1, (pairs, 2)) if interleaved else turned.unflatten(-1, (2, pairs)).mT
    turns = torch.complex(cos.to(x.dtype), sin.to(x.dtype))
    result = torch.view_as_real(torch.view_as_complex(split.contiguous()) * turns)
    return torch.cat(((result if interleaved else result.mT).flatten(-2), rest), -1)


# --- what is stored


@each_dtype
@pytest.mark.parametrize("page", [None, 1, 4, 128])
@pytest.mark.parametrize("length", [1, 5])
def test_appending_is_an_assignment(dtype: torch.dtype, page: int | None, length: int) -> None:
    batch, heads, dim, capacity = 3, 2, 24, 260
    filled = [0, 129, capacity - length]
    news = [draw(batch, heads, length, size, dtype=dtype) for size in (dim, dim + 3)]
    caches = [draw(batch, heads, capacity, size, dtype=dtype) for size in (dim, dim + 3)]
    expected = [cache.clone() for cache in caches]
    for (after, new), (b, start) in itertools.product(zip(expected, news, strict=True), enumerate(filled)):
        after[b, :, start : start + length] = new[b]
    table = None
    if page is not None:
        table = shuffled_table(batch, capacity, page)
        caches = [to_pages(cache, table, page) for cache in caches]
    query = draw(batch, heads, 1, dim, dtype=dtype)
    ptk.attention_with_kv_cache(query, *caches, *news, cache_seqlens=torch.tensor(filled), block_table=table)
    for cache, after in zip(caches, expected, strict=True):
        if table is not None:
            assert cache[0].isnan().all(), "the page of no sequence"
            cache = from_pages(cache, table, capacity)
        assert same_bits(cache, after)


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [6, 32])
def test_rotated_keys_have_the_bits_of_the_composition(dtype: torch.dtype, interleaved: bool, turned: int) -> None:
    k, v, query = (draw(2, 3, 4, 32, dtype=dtype) for _ in range(3))
    caches = [torch.zeros(2, 3, 20, 32, dtype=dtype) for _ in range(4)]
    cos, sin = angles(20, turned // 2, dtype)
    options: Any = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    options["cache_seqlens"] = torch.tensor([16, 3])
    out = ptk.attention_with_kv_cache(query, *caches[:2], k, v, **options)
    expected = ptk.reference.attention_with_kv_cache(query, *caches[2:], k, v, **options)
    assert same_bits(caches[0], caches[2])
    assert same_bits(caches[1], caches[3])
    close(out, expected, dtype)


@each_dtype
@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_codes_are_the_nearest(dtype: torch.dtype, quantized: torch.dtype, per_head: bool) -> None:
    heads, length, dim, capacity = 3, 40, 33, 50
    k, v = (draw(1, heads, length, dim, dtype=dtype) * torch.logspace(-3, 2, length)[:, None].to(dtype) for _ in "kv")
    k[0, 0, 3] = 0.0
    k[0, 1, 5] = 6e4  # beyond what a scale per head covers
    shape = (heads,) if per_head else (1, heads, capacity)
    scales = [torch.full(shape, 0.05 if per_head else NAN) for _ in "kv"]
    caches = [torch.zeros(1, heads, capacity, dim, dtype=quantized) for _ in "kv"]
    query = draw(1, heads, 1, dim, dtype=dtype)
    ptk.attention_with_kv_cache(query, *caches, k, v, cache_seqlens=7, k_scale=scales[0], v_scale=scales[1])
    for new, cache, scale in zip((k, v), caches, scales, strict=True):
        codes, chosen = quantize(new[0], quantized, scale if per_head else None)
        assert same_bits(cache[0, :, 7:47], codes)
        assert (cache[0, :, :7].float() == 0).all()
        if not per_head:
            assert same_bits(scale[0, :, 7:47], chosen)
            assert scale[0, :, :7].isnan().all()
            restored = cache[0, :, 7:47].double() * scale[0, :, 7:47, None].double()
            step = scale[0, :, 7:47, None] * (0.5 if quantized == torch.int8 else 16)
            assert ((restored - new[0].double()).abs() <= step * 1.001).all()


def test_nan_among_new_keys_is_not_lost() -> None:
    for quantized in QUANTIZED:
        k = draw(1, 1, 2, 8)
        k[..., 1, 3] = NAN
        caches = [torch.zeros(1, 1, 4, 8, dtype=quantized) for _ in "kv"]
        scales = [torch.ones(1, 1, 4) for _ in "kv"]
        out = ptk.attention_with_kv_cache(
            draw(1, 1, 1, 8), *caches, k, k, cache_seqlens=0, k_scale=scales[0], v_scale=scales[1]
        )
        assert scales[0][0, 0, 1].isnan()
        assert out.isnan().all()


def test_appending_counts_as_a_change() -> None:
    caches = [torch.zeros(1, 1, 4, 8) for _ in "kv"]
    new = draw(1, 1, 1, 8)
    ptk.attention_with_kv_cache(new, *caches, cache_seqlens=2)
    assert [cache._version for cache in caches] == [0, 0]
    ptk.attention_with_kv_cache(new, *caches, new, new, cache_seqlens=2)
    assert all(cache._version > 0 for cache in caches)


# --- what is read


@each_dtype
@each_page
@pytest.mark.parametrize("length", [1, 30])
def test_pages_change_no_bit(dtype: torch.dtype, page: int, length: int) -> None:
    capacity = 700
    caches = [draw(2, 2, capacity, 32, dtype=dtype) for _ in "kv"]
    query = draw(2, 8, length, 32, dtype=dtype)
    filled = torch.tensor([capacity, 333])
    table = shuffled_table(2, capacity, page)
    expected = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=filled, return_lse=True)
    pages = [to_pages(cache, table, page) for cache in caches]
    # The entries of pages that hold no slot are never read.
    table[1, -(-333 // page) :] = -7
    for given in (table, table.long(), table.repeat_interleave(2, 1)[:, ::2]):
        actual = ptk.attention_with_kv_cache(query, *pages, cache_seqlens=filled, block_table=given, return_lse=True)
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
def test_pages_of_codes_change_no_bit(quantized: torch.dtype, length: int) -> None:
    values = [draw(2, 2, 90, 32) for _ in "kv"]
    scales = [value.abs().amax(-1) / 100 for value in values]
    codes = [(value / scale[..., None]).to(quantized) for value, scale in zip(values, scales, strict=True)]
    query = draw(2, 4, length, 32)
    filled, table = torch.tensor([90, 33]), shuffled_table(2, 90, 8)

    def call(codes: list[Tensor], scales: list[Tensor], **options: Any) -> Tensor:
        return ptk.attention_with_kv_cache(
            query, *codes, cache_seqlens=filled, k_scale=scales[0], v_scale=scales[1], **options
        )

    expected = call(codes, scales)
    as_bytes = [to_pages(code.view(torch.int8), table, 8).view(quantized) for code in codes]
    actual = call(as_bytes, [to_pages(scale, table, 8) for scale in scales], block_table=table)
    assert torch.equal(actual, expected)
    exact = [code.float() * scale[..., None] for code, scale in zip(codes, scales, strict=True)]
    close(actual, ptk.attention_with_kv_cache(query, *exact, cache_seqlens=filled), torch.float32)


@each_dtype
@pytest.mark.parametrize("length", [1, 3, 40])
def test_what_no_query_sees_is_not_read(dtype: torch.dtype, length: int) -> None:
    capacity, page = 600, 16
    filled, pad = torch.tensor([570, 90]), torch.tensor([515, 3])
    window = (25, -1)
    clean = [draw(2, 2, capacity, 24, dtype=dtype) for _ in "kv"]
    dirty = [cache.clone() for cache in clean]
    for cache, b in itertools.product(dirty, range(2)):
        first = max(int(pad[b]), int(filled[b]) - length - window[0])
        cache[b, :, :first] = NAN
        cache[b, :, int(filled[b]) :] = NAN
    query = draw(2, 4, length, 24, dtype=dtype)
    options: Any = {"cache_seqlens": filled, "cache_leftpad": pad, "window": window}
    expected = ptk.attention_with_kv_cache(query, *clean, **options)
    assert expected.isfinite().all()
    assert torch.equal(ptk.attention_with_kv_cache(query, *dirty, **options), expected)
    table = shuffled_table(2, capacity, page)
    pages = [to_pages(cache, table, page) for cache in dirty]
    assert torch.equal(ptk.attention_with_kv_cache(query, *pages, block_table=table, **options), expected)


@pytest.mark.parametrize("length", [1, 20])
def test_layouts_change_no_bit(length: int) -> None:
    query = draw(2, 4, length, 32)
    caches = [draw(2, 2, 50, 32) for _ in "kv"]
    new = draw(2, 2, length, 32)
    filled = torch.tensor([30, 7])
    expected = ptk.attention_with_kv_cache(query, *(cache.clone() for cache in caches), new, new, cache_seqlens=filled)
    inside = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    strided = query.transpose(1, 3).contiguous().transpose(1, 3)
    turned = new.mT.contiguous().mT
    actual = ptk.attention_with_kv_cache(strided, *inside, turned, turned, cache_seqlens=filled.int())
    assert torch.equal(actual, expected)
    together = torch.stack([cache.clone() for cache in caches], 2)  # keys and values of a head in one tensor
    packed = ptk.attention_with_kv_cache(query, *together.unbind(2), new, new, cache_seqlens=filled)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("length", [1, 20])
def test_rows_chosen_by_index(length: int) -> None:
    caches = [draw(5, 2, 40, 16) for _ in "kv"]
    query, new, index = draw(3, 4, length, 16), draw(3, 2, length, 16), torch.tensor([4, 0, 2])
    chosen = [cache[index].clone() for cache in caches]
    filled = torch.tensor([20, 0, 3])
    expected = ptk.attention_with_kv_cache(query, *chosen, new, new, cache_seqlens=filled)
    for dtype in (torch.int32, torch.int64):
        mine = [cache.clone() for cache in caches]
        actual = ptk.attention_with_kv_cache(
            query, *mine, new, new, cache_seqlens=filled, cache_batch_idx=index.to(dtype)
        )
        assert torch.equal(actual, expected)
        for cache, before, after in zip(mine, caches, chosen, strict=True):
            assert torch.equal(cache[index], after)
            assert torch.equal(cache[[1, 3]], before[[1, 3]])
    shared = ptk.attention_with_kv_cache(
        query, *caches, cache_seqlens=filled + 1, cache_batch_idx=torch.tensor([3, 3, 3])
    )
    assert torch.equal(
        shared, ptk.attention_with_kv_cache(query, *(c[[3, 3, 3]] for c in caches), cache_seqlens=filled + 1)
    )


@each_dtype
def test_left_padding_is_a_shorter_sequence(dtype: torch.dtype) -> None:
    caches = [draw(2, 2, 80, 16, dtype=dtype) for _ in "kv"]
    query = draw(2, 4, 6, 16, dtype=dtype)
    filled, pad = torch.tensor([70, 40]), torch.tensor([13, 40])
    actual, lse = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=filled, cache_leftpad=pad, return_lse=True)
    for b in range(2):
        own = [cache[b : b + 1, :, int(pad[b]) :] for cache in caches]
        length = int(filled[b] - pad[b])
        expected = ptk.attention_with_kv_cache(query[b : b + 1], *own, cache_seqlens=length, return_lse=True)
        close(actual[b : b + 1], expected[0], dtype)
        close(lse[b : b + 1], expected[1], dtype)


@each_dtype
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (5, 1), (3, 3), (32, 1)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_shared_heads_are_repeated_heads(dtype: torch.dtype, heads: int, kv_heads: int, length: int) -> None:
    caches = [draw(2, kv_heads, 60, 20, dtype=dtype) for _ in "kv"]
    query = draw(2, heads, length, 20, dtype=dtype)
    filled = torch.tensor([60, 31])
    actual = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=filled)
    repeated = [cache.repeat_interleave(heads // kv_heads, 1) for cache in caches]
    close(actual, ptk.attention_with_kv_cache(query, *repeated, cache_seqlens=filled), dtype)


@each_dtype
@pytest.mark.parametrize("length", [1, 30])
def test_against_attention_with_a_mask(dtype: torch.dtype, length: int) -> None:
    """The same visibility and biases, written out as a mask for the other operator."""
    heads, used = 4, 530
    key, value = (draw(1, 2, used, 16, dtype=dtype) for _ in "kv")
    query, slopes = draw(1, heads, length, 16, dtype=dtype), torch.rand(heads)
    distance = torch.arange(used - length, used)[:, None] - torch.arange(used)
    for causal, window in itertools.product((False, True), (None, (70, 3), (-1, 2), (520, -1))):
        left, right = window or (-1, -1)
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= (distance >= 0) | (not causal)
        seen &= (distance <= left) | (left < 0)
        seen &= (-distance <= right) | (right < 0)
        bias = (-slopes[:, None, None].double() * distance.abs()).masked_fill(~seen, -math.inf)
        bias = bias.to(torch.promote_types(dtype, torch.float32))
        expected = ptk.attention(query, key, value, bias, enable_gqa=True, return_lse=True)
        actual = ptk.attention_with_kv_cache(
            query, key, value, cache_seqlens=used, is_causal=causal, window=window, alibi_slopes=slopes, return_lse=True
        )
        close(actual[0], expected[0], dtype)
        close(actual[1], expected[1], dtype)


def test_nothing_to_attend_to() -> None:
    for length in (1, 20):
        caches = [torch.full((2, 2, 8, 16), NAN) for _ in "kv"]
        query, sinks = draw(2, 4, length, 16), draw(4)
        out, lse = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=0, return_lse=True)
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        out, lse = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=0, sinks=sinks, return_lse=True)
        assert (out == 0).all()
        torch.testing.assert_close(lse, sinks[:, None].expand(2, 4, length))
        empty = [cache[:, :, :0] for cache in caches]
        assert (ptk.attention_with_kv_cache(query, *empty, cache_seqlens=0) == 0).all()


# --- steps and wholes


@each_dtype
@pytest.mark.parametrize("chunks", [[1] * 23, [5, 1, 17], [20, 3], [23]])
def test_steps_add_up_to_causal_attention(dtype: torch.dtype, chunks: list[int]) -> None:
    total, dim = sum(chunks), 32
    query = draw(2, 6, total, dim, dtype=dtype)
    key, value = (draw(2, 2, total, dim, dtype=dtype) for _ in "kv")
    caches = [torch.full((2, 2, total + 3, dim), NAN, dtype=dtype) for _ in "kv"]
    steps, start = [], 0
    for length in chunks:
        part = slice(start, start + length)
        steps.append(
            ptk.attention_with_kv_cache(
                query[:, :, part], *caches, key[:, :, part], value[:, :, part], cache_seqlens=start
            )
        )
        start += length
    exact = ptk.reference.attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    peer = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    bound = 2 * (peer.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (torch.cat(steps, 2).double() - exact).abs().max() <= bound


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [8, 16])
def test_rotated_steps_add_up_to_rotated_attention(interleaved: bool, turned: int) -> None:
    dtype, total = torch.float64, 14
    query, key, value = (draw(1, heads, total, 16, dtype=dtype) for heads in (4, 2, 2))
    cos, sin = angles(20, turned // 2, dtype)
    caches = [torch.zeros(1, 2, 20, 16, dtype=dtype) for _ in "kv"]
    steps = [
        ptk.attention_with_kv_cache(
            *(query[:, :, part], *caches, key[:, :, part], value[:, :, part]),
            cache_seqlens=part.start,
            rotary_cos=cos,
            rotary_sin=sin,
            rotary_interleaved=interleaved,
        )
        for part in (slice(0, 9), slice(9, 10), slice(10, 14))
    ]
    turn = (cos[:total], sin[:total], interleaved)
    expected = ptk.attention(rotated(query, *turn), rotated(key, *turn), value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(torch.cat(steps, 2), expected, rtol=1e-12, atol=1e-12)


def test_without_direction_all_queries_take_the_first_angle() -> None:
    query, key, value = (draw(1, 2, 3, 16, dtype=torch.float64) for _ in range(3))
    cos, sin = angles(20, 8, torch.float64)
    caches = [torch.zeros(1, 2, 20, 16, dtype=torch.float64) for _ in "kv"]
    actual = ptk.attention_with_kv_cache(
        query, *caches, key, value, cache_seqlens=0, rotary_cos=cos, rotary_sin=sin, is_causal=False
    )
    expected = ptk.attention(rotated(query, cos[:1], sin[:1], False), rotated(key, cos[:3], sin[:3], False), value)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_threads_change_no_bit() -> None:
    """Neither of the direct nor of the tiled kernel, with sequences of very unequal lengths."""
    for dtype, length in itertools.product((torch.float32, torch.bfloat16), (1, 50)):
        caches = [draw(3, 2, 2100, 40, dtype=dtype) for _ in "kv"]
        query = draw(3, 4, length, 40, dtype=dtype)
        new = draw(3, 2, length, 40, dtype=dtype)
        filled = torch.tensor([2000, 0, 700])
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mine = [cache.clone() for cache in caches]
            results.append(
                (*ptk.attention_with_kv_cache(query, *mine, new, new, cache_seqlens=filled, return_lse=True), *mine)
            )
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("quantized", QUANTIZED, ids=str)
def test_quantised_caches_lose_little(quantized: torch.dtype) -> None:
    query, key, value = draw(1, 8, 1, 64), draw(1, 2, 500, 64), draw(1, 2, 500, 64)
    caches = [torch.zeros(1, 2, 512, 64, dtype=quantized) for _ in "kv"]
    scales = [torch.zeros(1, 2, 512) for _ in "kv"]
    out = ptk.attention_with_kv_cache(query, *caches, key, value, cache_seqlens=0, k_scale=scales[0], v_scale=scales[1])
    exact = ptk.attention(query, key, value, enable_gqa=True)
    error = (out - exact).norm() / exact.norm()
    assert error < (0.02 if quantized == torch.int8 else 0.08)


# --- torch's subsystems


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_decoding_changes_the_cache(backend: str) -> None:
    def step(query: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
        out = ptk.attention_with_kv_cache(query * 2, k_cache, v_cache, k + 1, v, cache_seqlens=filled)
        return out + ptk.attention_with_kv_cache(query, k_cache, v_cache, cache_seqlens=filled + 1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    caches = [draw(2, 2, 30, 16) for _ in "kv"]
    mine = [cache.clone() for cache in caches]
    for filled in (3, 4, 5):
        lengths = torch.tensor([filled, 2 * filled])
        query, k, v = draw(2, 4, 1, 16), draw(2, 2, 1, 16), draw(2, 2, 1, 16)
        expected = step(query, *caches, k, v, lengths)
        torch.testing.assert_close(compiled(query, *mine, k, v, lengths), expected)
        assert all(map(torch.equal, mine, caches))


def test_derivatives_are_refused() -> None:
    caches = [draw(1, 1, 4, 8) for _ in "kv"]
    query = draw(1, 1, 1, 8).requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"^attention_with_kv_cache: query: got a tensor that requires grad.*no_grad"
    ):
        ptk.attention_with_kv_cache(query, *caches, cache_seqlens=2)
    new = draw(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match=r"^attention_with_kv_cache: k: got a tensor that requires grad"):
        ptk.attention_with_kv_cache(new, *caches, query, new, cache_seqlens=2)
    with pytest.raises(RuntimeError, match=r"^attention_with_kv_cache: query: got a tensor with a tangent"):
        torch.func.jvp(lambda x: ptk.attention_with_kv_cache(x, *caches, cache_seqlens=2), (new,), (new,))
    expected = ptk.attention_with_kv_cache(query.detach(), *caches, cache_seqlens=2)
    with torch.no_grad():
        assert torch.equal(ptk.attention_with_kv_cache(query, *caches, cache_seqlens=2), expected)
    with torch.inference_mode():
        own = [cache.clone() for cache in caches]
        ptk.attention_with_kv_cache(query, *own, new, new, cache_seqlens=2)


def test_autocast_leaves_the_call_alone() -> None:
    caches = [draw(1, 1, 4, 8) for _ in "kv"]
    query = draw(1, 1, 1, 8)
    expected = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ptk.attention_with_kv_cache(query, *caches, cache_seqlens=2), expected)


def test_reference_on_request_and_explain() -> None:
    caches = [draw(1, 2, 40, 8) for _ in "kv"]
    for length, kernel in ((1, "direct"), (30, "tiled")):
        query = draw(1, 4, length, 8)
        ours = ptk.attention_with_kv_cache(query, *caches, cache_seqlens=31)
        account = ptk.explain("attention_with_kv_cache", query, *caches, cache_seqlens=31)
        assert account.backend == "cpu"
        assert account.kernel.endswith(kernel) or "not built" in account.kernel
        with ptk.backend("reference"):
            close(ptk.attention_with_kv_cache(query, *caches, cache_seqlens=31), ours, torch.float32)
            assert ptk.explain(ptk.attention_with_kv_cache, query, *caches, cache_seqlens=31).backend == "reference"
