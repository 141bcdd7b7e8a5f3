"""Decoding against a cache with Triton kernels: contiguous and paged, split and whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_oracle import attention
from comparing import assert_close

from ptkernels.ops.attention.triton_decode import decode

LENGTHS = [1, 67, 0, 130]


@pytest.mark.parametrize("page_size", [None, 1, 7, 64])
@pytest.mark.parametrize("splits", [1, 3, 5])
def test_matches_attention(page_size: int | None, splits: int, device: str) -> None:
    check(page_size, splits, 1, {}, device)


@pytest.mark.parametrize("options", [{"window_left": 20}, {"softcap": 2.0}, {"sinks": torch.randn(6)}], ids=str)
def test_options(options: dict[str, Any], device: str) -> None:
    check(16, 3, 3, options, device)


def check(page_size: int | None, splits: int, len_q: int, options: dict[str, Any], device: str) -> None:
    torch.manual_seed(1)
    batch, heads, kv_heads, dim, dim_v = len(LENGTHS), 6, 2, 24, 20
    room = max(LENGTHS)
    query = torch.randn(batch, heads, len_q, dim)
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
    on_device = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    out, lse = decode(
        query.to(device),
        k_cache.to(device),
        v_cache.to(device),
        torch.tensor(LENGTHS, dtype=torch.int32, device=device),
        None if table is None else table.to(device),
        splits=splits,
        **on_device,
    )
    for b, length in enumerate(LENGTHS):
        one = [t[b : b + 1, :, :limit] for t, limit in ((query, len_q), (key, length), (value, length))]
        want, peer = (
            attention(*(t.to(dtype) for t in one), is_causal=True, bottom_right=True, **options)
            for dtype in (torch.float64, torch.float32)
        )
        for name, got, index in (("out", out, 0), ("lse", lse, 1)):
            assert_close(f"{b} {name}", got[b : b + 1], peer[index], want[index], torch.float32)
