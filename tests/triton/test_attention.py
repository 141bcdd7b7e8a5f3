"""Forward and backward of attention's Triton kernels, dense and packed, with every option."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from attention_oracle import differentiate, kept
from comparing import assert_close, magnitude
from torch import Tensor

from ptkernels.ops.attention import triton as kernels

FLOAT32_TINY = torch.finfo(torch.float32).min


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers between NaN, with no two strides as a kernel would like them."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.size(-1) + 1), math.nan, dtype=tensor.dtype)
    view = wide.transpose(1, 2).contiguous().transpose(1, 2)[..., 1::2]
    view.copy_(tensor)
    return view


def bias(shape: tuple[int, ...]) -> Tensor:
    return draw("bias", shape)


def padding(batch: int, keys: int) -> Tensor:
    return torch.arange(keys) < torch.tensor([keys // 2] * (batch - 1) + [0])[:, None, None, None]


def blocked(rows: int, keys: int, value: float) -> Tensor:
    """A bias of `value` wherever a draw says so, and in all of row 0."""
    refused = draw("refused", (rows, keys)) > 0
    refused[0] = True
    return torch.zeros(rows, keys, dtype=torch.float64).masked_fill(refused, value)


BLOCKS = draw("blocks", (2, 1, 7, 14)) > 0
BLOCKS[1, :, 3] = False

# name: (batch, query heads, key heads, queries, keys, dim, dim_v), options
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one": ((1, 1, 1, 1, 1, 1, 1), {}),
    "tails": ((2, 2, 2, 37, 71, 20, 20), {}),
    "whole-blocks": ((1, 1, 1, 64, 128, 64, 64), {}),
    "dims-33-5": ((1, 2, 1, 19, 23, 33, 5), {"scale": -0.3}),
    "dims-192-128": ((1, 1, 1, 17, 35, 192, 128), {"is_causal": True}),
    "dims-512": ((1, 1, 1, 5, 17, 512, 300), {}),
    "causal": ((1, 2, 2, 67, 67, 16, 16), {"is_causal": True}),
    "causal-more-queries": ((1, 1, 1, 70, 13, 16, 16), {"is_causal": True}),
    "causal-more-keys": ((1, 1, 1, 13, 70, 16, 16), {"is_causal": True}),
    "bottom-right": ((1, 1, 1, 13, 70, 16, 16), {"is_causal": True, "bottom_right": True}),
    "bottom-right-empty-rows": ((1, 1, 1, 70, 13, 16, 16), {"is_causal": True, "bottom_right": True}),
    "window": ((1, 1, 1, 101, 97, 16, 16), {"window_left": 7, "window_right": 3}),
    "window-left": ((1, 2, 1, 70, 130, 16, 16), {"window_left": 40, "is_causal": True, "bottom_right": True}),
    "window-right": ((1, 1, 1, 70, 41, 16, 16), {"window_right": 5}),
    "window-own-key": ((1, 1, 1, 35, 35, 16, 16), {"window_left": 0, "window_right": 0}),
    "grouped": ((2, 6, 2, 21, 34, 16, 16), {"is_causal": True}),
    "scale-zero": ((1, 1, 1, 9, 11, 16, 16), {"scale": 0.0}),
    "padding": ((3, 2, 2, 21, 34, 16, 16), {"attn_mask": padding(3, 34)}),
    "bool-rows": ((2, 2, 2, 35, 34, 16, 16), {"attn_mask": draw("rows", (35, 34)) > 0.5, "is_causal": True}),
    "mask-of-blocks": ((2, 2, 1, 35, 67, 16, 16), {"attn_mask": BLOCKS, "mask_block_size": 5, "is_causal": True}),
    "mask-of-one-block": ((1, 1, 1, 5, 7, 16, 16), {"attn_mask": BLOCKS[:1, :, :1, :1], "mask_block_size": 1000}),
    "bias": ((2, 2, 2, 35, 67, 16, 16), {"attn_mask": bias((2, 2, 35, 67))}),
    "bias-of-heads": ((3, 2, 1, 35, 40, 16, 16), {"attn_mask": bias((2, 35, 40)), "is_causal": True}),
    "bias-of-batch": ((2, 3, 3, 35, 40, 16, 16), {"attn_mask": bias((2, 1, 35, 40)), "window_left": 9}),
    "bias-of-keys": ((2, 2, 2, 69, 67, 16, 16), {"attn_mask": bias((67,))}),
    "bias-of-rows": ((1, 2, 2, 69, 67, 16, 16), {"attn_mask": bias((2, 69, 1))}),
    "bias-of-all": ((1, 2, 2, 69, 67, 16, 16), {"attn_mask": bias((1, 1))}),
    "bias-minus-inf": ((1, 2, 2, 21, 34, 16, 16), {"attn_mask": blocked(21, 34, -math.inf)}),
    "bias-float32-min": ((1, 2, 2, 21, 34, 16, 16), {"attn_mask": blocked(21, 34, FLOAT32_TINY)}),
    "softcap": ((1, 2, 1, 35, 41, 16, 16), {"softcap": 1.5, "is_causal": True}),
    "alibi": ((2, 3, 3, 35, 67, 16, 16), {"alibi_slopes": draw("slopes", (3,)).abs(), "bottom_right": True}),
    "alibi-of-batch": ((2, 2, 1, 35, 20, 16, 16), {"alibi_slopes": draw("slopes", (2, 2)), "is_causal": True}),
    "sinks": ((2, 3, 3, 35, 20, 16, 16), {"sinks": draw("sinks", (3,)), "is_causal": True}),
    "sinks-empty-rows": ((2, 2, 2, 35, 20, 16, 16), {"sinks": draw("sinks", (2,)), "attn_mask": padding(2, 20)}),
    "dropout": ((2, 2, 1, 35, 67, 16, 16), {"dropout_p": 0.3, "dropout_seed": torch.tensor(2**62 + 12345)}),
    "bias-far-from-0": (
        (1, 2, 2, 21, 34, 16, 16),
        {"attn_mask": bias((21, 34)) + 90, "sinks": torch.tensor([91.0, 94.0])},
    ),
    "everything": (
        (2, 4, 2, 45, 70, 24, 40),
        {
            "attn_mask": bias((1, 4, 45, 70)),
            "softcap": 3.0,
            "alibi_slopes": draw("slopes", (4,)).abs() * 0.1,
            "sinks": draw("sinks", (4,)),
            "dropout_p": 0.2,
            "dropout_seed": torch.tensor(-7),
            "window_left": 31,
            "window_right": 4,
            "bottom_right": True,
        },
    ),
}
TENSORS = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")


def rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor


def problem(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    (batch, heads, heads_kv, queries, keys, dim, dim_v), options = CASES[name]
    tensors: dict[str, Tensor | None] = {
        "query": draw(name + "q", (batch, heads, queries, dim)).to(dtype),
        "key": draw(name + "k", (batch, heads_kv, keys, dim)).to(dtype),
        "value": draw(name + "v", (batch, heads_kv, keys, dim_v)).to(dtype),
    }
    for other in TENSORS[3:]:
        wide = torch.promote_types(dtype, torch.float32) if other != "attn_mask" or "float32" in name else dtype
        tensors[other] = rounded(options.get(other), wide)
    return tensors, {key: value for key, value in options.items() if key not in TENSORS}


def run(tensors: dict[str, Tensor | None], options: dict[str, Any], grads: tuple[Tensor, Tensor], device: str) -> Any:
    """All results of the kernels, everything they write into poisoned beforehand."""
    query, key, value, mask, slopes, sinks = (
        None if t is None else t.to(device) for t in (tensors[name] for name in TENSORS)
    )
    call = kernels.Call(**options, alibi_slopes=slopes, sinks=sinks)
    out, lse = kernels.forward(query, key, value, mask, call)
    grad_out = grads[0].to(query.dtype).to(device)
    found = kernels.backward(grad_out, grads[1].to(lse), query, key, value, out, lse, mask, call)
    return {"out": out, "lse": lse, **found._asdict()}


def check(name: str, dtype: torch.dtype, device: str, layout: Any = lambda tensor: tensor) -> None:
    tensors, options = problem(name, dtype)
    query, value = tensors["query"], tensors["value"]
    grads = draw("do", (*query.shape[:3], value.size(-1))).to(dtype), draw("dlse", query.shape[:3]).float()
    expected = differentiate(tensors, options, grads, torch.float64)
    # torch's logsumexp differentiates to exp(score - lse), which is 1 for the lse of a row blocked by a huge number.
    grads = grads[0], grads[1].masked_fill(expected["lse"].abs() > 1e30, 0.0)
    expected = differentiate(tensors, options, grads, torch.float64)
    peer = differentiate(tensors, options, grads, dtype)
    for operand in ("query", "key", "value"):
        tensors[operand] = layout(tensors[operand])
    ours = run(tensors, options, grads, device)
    gradients = [key for key in expected if key not in ("out", "lse")]
    largest = max(magnitude(expected[key]) for key in gradients)
    for key, want in expected.items():
        kind = torch.promote_types(dtype, torch.float32) if key in ("lse", "alibi_slopes", "sinks") else dtype
        slack = largest if key in gradients else 0.0
        # A sum of thousands of terms that cancel, where one rounding more or less decides: three times, not twice.
        factor = 3.0 if key in ("alibi_slopes", "sinks") else 2.0
        assert_close(f"{name}: {key}", ours[key], peer[key], want, kind, slack, factor)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, device: str) -> None:
    check(name, torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["tails", "bias", "window-left", "everything"])
def test_16_bit(name: str, dtype: torch.dtype, device: str) -> None:
    check(name, dtype, device)


@pytest.mark.parametrize("name", ["dims-33-5", "bias-of-rows", "bias-far-from-0", "softcap", "alibi"])
def test_float64(name: str, device: str) -> None:
    check(name, torch.float64, device)


@pytest.mark.parametrize("name", ["tails", "grouped", "dims-33-5"])
def test_any_strides(name: str, device: str) -> None:
    check(name, torch.float32, device, strided)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_zero_sizes(shape: tuple[int, ...], device: str) -> None:
    batch, heads, queries, keys = shape
    query, key = torch.randn(batch, heads, queries, 8), torch.randn(batch, heads, keys, 8)
    grads = torch.randn(batch, heads, queries, 8), torch.randn(batch, heads, queries)
    ours = run(dict.fromkeys(TENSORS) | {"query": query, "key": key, "value": key}, {}, grads, device)
    assert (ours["lse"] == -math.inf).all()
    assert not any(ours[name].any() for name in ("out", "query", "key", "value"))


def test_only_what_is_needed(device: str) -> None:
    query, key, value = (torch.randn(1, 2, 20, 16, device=device) for _ in range(3))
    mask = torch.randn(20, 20, device=device)
    call = kernels.Call()
    out, lse = kernels.forward(query, key, value, mask, call)
    for index in range(4):
        needed = [position == index for position in range(6)]
        grads = kernels.backward(out, None, query, key, value, out, lse, mask, call, needed)
        assert [grad is not None for grad in grads] == needed


def test_dropout_keeps_the_share_it_should() -> None:
    share = kept(99, round(0.7 * 65536), 4, 4, 64, 64).double().mean().item()
    assert abs(share - 0.7) < 5 * math.sqrt(0.7 * 0.3 / (4 * 4 * 64 * 64))


LENGTHS = {"unequal": ([5, 0, 33, 1], [7, 3, 40, 0]), "one": ([17], [17])}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"is_causal": True, "bottom_right": True}, {"window_left": 3, "softcap": 2.0}],
    ids=["plain", "causal", "bottom-right", "window"],
)
def test_varlen(lengths: str, options: dict[str, Any], device: str) -> None:
    lens_q, lens_k = LENGTHS[lengths]
    tokens_q, tokens_k = sum(lens_q), sum(lens_k)
    query, key = draw("q", (tokens_q, 4, 20)).float(), draw("k", (tokens_k, 2, 20)).float()
    value, sinks = draw("v", (tokens_k, 2, 12)).float(), draw("sinks", (4,)).float()
    grads = draw("do", (tokens_q, 4, 12)).float(), draw("dlse", (4, tokens_q)).float()
    starts = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
    call = kernels.Call(
        **options,
        sinks=sinks.to(device),
        cu_seqlens_q=starts[0].to(device),
        cu_seqlens_k=starts[1].to(device),
        max_seqlen_q=max(lens_q),
        max_seqlen_k=max(lens_k),
    )
    operands = [t.to(device) for t in (query, key, value)]
    out, lse = kernels.varlen_forward(*operands, call)
    found = kernels.varlen_backward(grads[0].to(device), grads[1].to(device), *operands, out, lse, call)

    grad_sinks = torch.zeros(4, dtype=torch.float64)
    for index in range(len(lens_q)):
        rows = slice(*starts[0][index : index + 2].tolist())
        keys = slice(*starts[1][index : index + 2].tolist())
        one = {
            "query": query[rows].transpose(0, 1)[None],
            "key": key[keys].transpose(0, 1)[None],
            "value": value[keys].transpose(0, 1)[None],
            "sinks": sinks,
        }
        of_one = grads[0][rows].transpose(0, 1)[None], grads[1][None, :, rows]
        want, peer = (differentiate(one, options, of_one, dtype) for dtype in (torch.float64, torch.float32))
        grad_sinks += want["sinks"]
        got = {"out": out[rows], "query": found.query[rows], "key": found.key[keys], "value": found.value[keys]}
        largest = max(magnitude(t) for t in want.values())
        for name, tensor in got.items():
            shaped = tensor.transpose(0, 1)[None]
            assert_close(f"{index} {name}", shaped, peer[name], want[name], torch.float32, largest)
        assert_close(f"{index} lse", lse[None, :, rows], peer["lse"], want["lse"], torch.float32)
    assert_close("sinks", found.sinks, grad_sinks.float(), grad_sinks, torch.float32, magnitude(grads[0]) * tokens_q)
