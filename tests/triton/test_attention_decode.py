"""Attention to a cache with Triton kernels, split and whole; the operator's samples run the rest."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from attention_oracle import attention
from comparing import assert_close
from torch import Tensor

import ptkernels as ptk
from ptkernels import _triton
from ptkernels._triton.math import e4m3_codes, e4m3_values
from ptkernels.ops.attention.triton_decode import Cache, decode

LENGTHS = [1, 67, 0, 130]


@pytest.mark.parametrize("page_size", [None, 7, 64])
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_matches_attention(page_size: int | None, splits: int, device: str) -> None:
    torch.manual_seed(1)
    batch, heads, kv_heads, dim, dim_v = len(LENGTHS), 6, 2, 24, 20
    room = max(LENGTHS)
    query = torch.randn(batch, heads, 1, dim)
    key, value = torch.randn(batch, kv_heads, room, dim), torch.randn(batch, kv_heads, room, dim_v)
    table = None
    k_cache, v_cache = key.clone(), value.clone()
    for b, length in enumerate(LENGTHS):
        k_cache[b, :, length:], v_cache[b, :, length:] = math.nan, math.nan
    if page_size is not None:
        per = math.ceil(room / page_size)
        order = torch.randperm(batch * per)
        table = order.view(batch, per).int()
        padded = [
            torch.nn.functional.pad(t, (0, 0, 0, per * page_size - room), value=math.nan) for t in (k_cache, v_cache)
        ]
        pages = [t.unflatten(2, (per, page_size)).transpose(1, 2).flatten(0, 1) for t in padded]
        k_cache, v_cache = (torch.empty_like(t).index_copy_(0, order, t) for t in pages)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    on_device = Cache(k_cache.to(device), v_cache.to(device), lengths, None if table is None else table.to(device))
    out, lse = decode(query.to(device), on_device, window_right=0, splits=splits)
    for b, length in enumerate(LENGTHS):
        one = [t[b : b + 1, :, :limit] for t, limit in ((query, 1), (key, length), (value, length))]
        want, peer = (
            attention(*(t.to(dtype) for t in one), is_causal=True, bottom_right=True)
            for dtype in (torch.float64, torch.float32)
        )
        for name, got, index in (("out", out, 0), ("lse", lse, 1)):
            assert_close(f"{b} {name}", got[b : b + 1], peer[index], want[index], torch.float32)


def test_what_is_out_of_range_is_cut_off(device: str) -> None:
    query, cache = torch.randn(2, 2, 1, 16, device=device), torch.randn(3, 2, 8, 16, device=device)
    table = torch.tensor([[0, 99], [-5, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([1000, 16], dtype=torch.int32, device=device)
    out, _ = decode(query, Cache(cache, cache, lengths, table))
    assert out.isfinite().all()


@triton.jit
def encode(X, CODES, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(CODES + at, e4m3_codes(tl.load(X + at)))


@triton.jit
def read_codes(CODES, OUT, NATIVE: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(OUT + at, e4m3_values(tl.load(CODES + at), NATIVE))


def test_float8_codes_are_those_of_torch(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()].unique()
    middles = (finite[1:] + finite[:-1]) / 2  # ties, and both sides of them
    near = torch.cat([middles, torch.nextafter(middles, finite[1:]), torch.nextafter(middles, finite[:-1])])
    x = torch.cat([near, finite, -finite, torch.tensor([math.nan, 1e-30, -0.0])])
    x = torch.cat([x, x.new_zeros(2048 - x.numel())]).to(device)
    ours = torch.empty(2048, dtype=torch.uint8, device=device)
    encode[(1,)](x, ours, BLOCK=2048)
    assert torch.equal(ours.cpu(), x.cpu().to(torch.float8_e4m3fn).view(torch.uint8))
    kinds = [False] if device == "cuda" and torch.cuda.get_device_capability() < (8, 9) else [False, True]
    for native in kinds:
        read = torch.empty(256, device=device)
        read_codes[(1,)](codes.to(device), read, native)
        # The interpreter's own conversion knows no NaN.
        same = numbers.isfinite() if native and _triton.interpreted() else codes >= 0
        assert torch.equal(read.cpu()[same].nan_to_num(1e9), numbers[same].nan_to_num(1e9))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("scale_dim", [1, 3])
def test_float8_cache_with_rotary(scale_dim: int, arch: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of reading codes give the same bits, and what is appended has the reference's."""
    if device == "cuda" and _triton.arch_of(torch.empty(0, device=device)) < arch:
        pytest.skip("the GPU has no float8")
    monkeypatch.setattr(_triton, "arch_of", lambda tensor: arch)

    def call(where: str, function: object) -> list[Tensor]:
        torch.manual_seed(3)
        shape = (2, 2, 16, 32)
        scale = torch.rand(2) if scale_dim == 1 else torch.rand(shape[:3])
        caches = [torch.randn(shape).to(torch.float8_e4m3fn).to(where) for _ in range(2)]
        scales = [(scale / 100 + 1e-3).to(where) for _ in range(2)]
        query, k, v = (torch.randn(2, heads, 3, 32).to(where) for heads in (4, 2, 2))
        k[0, 0, 1, 5] = 1e4
        rotary = [torch.rand(16, 12).to(where) for _ in range(2)]
        seqlens = torch.tensor([4, 11], device=where)
        out = function(
            query, *caches, k, v, cache_seqlens=seqlens, rotary_cos=rotary[0], rotary_sin=rotary[1],
            k_scale=scales[0], v_scale=scales[1],
        )  # fmt: skip
        return [out.cpu(), *(t.cpu().view(torch.uint8) for t in caches), *(t.cpu() for t in scales)]

    with ptk.backend("triton"):
        ours = call(device, ptk.attention_with_kv_cache)
    expected = call("cpu", ptk.reference.attention_with_kv_cache)
    torch.testing.assert_close(ours[0], expected[0])
    for got, want in zip(ours[1:], expected[1:], strict=True):
        assert torch.equal(got, want)
