"""Every CUDA kernel once, on small awkward shapes: what gpu_check.sh puts under compute-sanitizer."""

from __future__ import annotations

import torch

import ptkernels as ptk

# (heads, kv heads, Lq, Lk, D, Dv): tails in every direction, one per head-dim bucket of the kernels.
SHAPES = [(4, 2, 65, 70, 33, 64), (2, 2, 33, 129, 128, 65), (2, 1, 70, 17, 200, 131), (1, 1, 20, 37, 300, 512)]

for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for heads, kv_heads, len_q, len_k, dim, dim_v in SHAPES:
        sizes = ((heads, len_q, dim), (kv_heads, len_k, dim), (kv_heads, len_k, dim_v))
        query, key, value = (torch.randn(1, *size, device="cuda", dtype=dtype, requires_grad=True) for size in sizes)
        blocked = torch.zeros(len_q, len_k, device="cuda").index_fill(0, torch.tensor([3], device="cuda"), -1e9)
        for mask in (None, torch.rand(len_q, len_k, device="cuda") < 0.5, blocked):
            out, lse = ptk.attention(query, key, value, mask, is_causal=True, enable_gqa=True, return_lse=True)
            gradients = torch.autograd.grad(
                (out, lse), (query, key, value), (torch.ones_like(out), torch.ones_like(lse))
            )
            assert all(gradient.isfinite().all() for gradient in gradients)
# The options of the kernels on the tensor cores, whose copies and barriers are what a sanitizer should see.
for dim, dim_v in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)):
    query, key, value = (
        torch.randn(1, 2, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for length, width in ((200, dim), (330, dim), (330, dim_v))
    )
    mask, slopes, sinks = (torch.randn(size, device="cuda", requires_grad=True) for size in ((200, 330), 2, 2))
    options = {"softcap": 5.0, "alibi_slopes": slopes, "sinks": sinks, "dropout_p": 0.1, "window": (150, 20)}
    out = ptk.attention(query, key, value, mask, **options)
    torch.autograd.grad(out.sum(), (query, key, value, mask, slopes, sinks))
# Heads that share a tile, packed sequences of which one is empty, and a step of decoding with pages.
for dtype in (torch.float32, torch.bfloat16):
    query, key, value = (
        torch.randn(2, heads, length, 64, device="cuda", dtype=dtype, requires_grad=True)
        for heads, length in ((8, 19), (2, 150), (2, 150))
    )
    out = ptk.attention(query, key, value, is_causal=True, enable_gqa=True, dropout_p=0.1)
    torch.autograd.grad(out.sum(), (query, key, value))
    packed = [torch.randn(107, heads, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    starts = torch.tensor([0, 37, 37, 107], dtype=torch.int32, device="cuda")
    out = ptk.attention_varlen(*packed, starts, starts, 70, 70, is_causal=True)
    torch.autograd.grad(out.sum(), packed)
    step, new = (torch.randn(2, heads, 1, 64, device="cuda", dtype=dtype) for heads in (8, 2))
    pages = torch.randn(2, 9, 2, 16, 64, device="cuda", dtype=dtype)
    table = torch.arange(8, dtype=torch.int32, device="cuda").view(2, 4)
    filled = torch.tensor([33, 7], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        ptk.attention_with_kv_cache(step, *pages, new, new, cache_seqlens=filled, block_table=table)
torch.cuda.synchronize()
