"""Attention to a cache with Triton kernels, split and whole; the operator's samples run the rest."""

from __future__ import annotations

import math

import pytest
import torch
from attention_oracle import attention
from comparing import assert_close

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
