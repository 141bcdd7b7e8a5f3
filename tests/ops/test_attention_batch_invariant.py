"""Under `ptkernels.batch_invariant` a row of attention has the same bits whatever else is in the call."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

import ptkernels as ptk
from ptkernels import _backend, _loader
from ptkernels.errors import BackendError

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HEADS, KV_HEADS = 6, 2
# Three blocks of keys, the last of them neither whole nor a multiple of any vector.
LENGTH = 601


@dataclasses.dataclass
class Prefill:
    """A causal prefill of one sequence, whose rows everything else must reproduce."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    out: Tensor
    lse: Tensor

    def check(self, result: tuple[Tensor, Tensor], rows: slice) -> None:
        out, lse = result
        assert torch.equal(out, self.out[:, :, rows])
        assert torch.equal(lse, self.lse[:, :, rows])


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (170, 0)},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi_slopes": torch.rand(HEADS, generator=torch.Generator().manual_seed(1)) / 8},
    "sinks": {"sinks": torch.randn(HEADS, generator=torch.Generator().manual_seed(2))},
}
OPTIONS["everything"] = {name: value for options in OPTIONS.values() for name, value in options.items()}

# Of query and value: multiples of vectors, and not.
DIMS = {"64": (64, 64), "80-40": (80, 40)}


def prefill(dtype: torch.dtype, options: dict[str, Any], dims: tuple[int, int] = (64, 64)) -> Prefill:
    query = torch.randn(1, HEADS, LENGTH, dims[0], dtype=dtype)
    key = torch.randn(1, KV_HEADS, LENGTH, dims[0], dtype=dtype)
    value = torch.randn(1, KV_HEADS, LENGTH, dims[1], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    attention_options = {
        name: given.to(wide) if isinstance(given, Tensor) else given for name, given in options.items()
    }
    out, lse = ptk.attention(query, key, value, is_causal=True, enable_gqa=True, return_lse=True, **attention_options)
    return Prefill(query, key, value, attention_options, out, lse)


@pytest.fixture(autouse=True)
def _batch_invariant() -> Any:
    with ptk.batch_invariant():
        yield


every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def with_cache(case: Prefill, rows: slice, *, page: int | None, leftpad: int = 0, capacity: int = 700) -> Any:
    """Rows of the prefill as queries against a cache that holds all that came before them; they are appended."""
    dtype, before = case.query.dtype, rows.start
    new_keys, new_values = case.key[:, :, rows], case.value[:, :, rows]
    given: dict[str, Any] = {"cache_seqlens": before + leftpad}
    if leftpad:
        given["cache_leftpad"] = torch.tensor([leftpad])
    caches = []
    for stored in (case.key, case.value):
        # What was never written must not be read.
        flat = torch.full((1, KV_HEADS, capacity, stored.size(3)), torch.nan, dtype=dtype)
        flat[:, :, leftpad : leftpad + before] = stored[:, :, :before]
        if page is not None:
            blocks = -(-capacity // page)
            padded = torch.nn.functional.pad(flat, (0, 0, 0, blocks * page - capacity), value=torch.nan)
            order = torch.randperm(blocks, generator=torch.Generator().manual_seed(page))
            paged = padded.view(KV_HEADS, blocks, page, -1).transpose(0, 1)
            flat = torch.empty(paged.shape, dtype=dtype)
            flat[order] = paged
            given["block_table"] = order.unsqueeze(0)
        caches.append(flat)
    options = {name: option.float() if isinstance(option, Tensor) else option for name, option in case.options.items()}
    return ptk.attention_with_kv_cache(
        case.query[:, :, rows], *caches, new_keys, new_values, **given, **options, return_lse=True
    )


@every_option
@every_dtype
def test_prefill_in_chunks(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = prefill(dtype, options)
    for begin, end in ((0, 1), (1, 8), (8, 255), (255, 257), (257, LENGTH), (LENGTH - 1, LENGTH)):
        chunk = ptk.attention(
            case.query[:, :, begin:end],
            case.key[:, :, :end],
            case.value[:, :, :end],
            causal_lower_right(end - begin, end),
            enable_gqa=True,
            return_lse=True,
            **case.options,
        )
        case.check(chunk, slice(begin, end))


@every_option
@every_dtype
@pytest.mark.parametrize("page", [None, 16, 48, 256, 300])
def test_decoding_and_chunks_with_a_cache(dtype: torch.dtype, options: dict[str, Any], page: int | None) -> None:
    case = prefill(dtype, options)
    for begin, end in ((0, 1), (255, 256), (256, 257), (LENGTH - 1, LENGTH), (590, 594), (300, LENGTH), (0, LENGTH)):
        case.check(with_cache(case, slice(begin, end), page=page), slice(begin, end))


@pytest.mark.parametrize("dims", DIMS.values(), ids=DIMS)
@every_dtype
def test_decoding_behind_left_padding(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    case = prefill(dtype, OPTIONS["everything"], dims)
    for page in (None, 32):
        for begin, end in ((599, 600), (450, 500)):
            result = with_cache(case, slice(begin, end), page=page, leftpad=37)
            case.check(result, slice(begin, end))


@every_option
@every_dtype
def test_packed_padded_and_batched(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = prefill(dtype, options)
    others = [17, 0, 400]
    lengths = [17, LENGTH, 0, 400]
    tokens = sum(others)

    def packed(own: Tensor) -> Tensor:
        other = torch.randn(tokens, own.size(1), own.size(3), dtype=dtype)
        return torch.cat([other[:17], own[0].transpose(0, 1), other[17:]])

    offsets = torch.tensor([0, *lengths]).cumsum(0)
    operands = [packed(own) for own in (case.query, case.key, case.value)]
    out, lse = ptk.attention_varlen(*operands, offsets, offsets, is_causal=True, return_lse=True, **case.options)
    own = slice(17, 17 + LENGTH)
    case.check((out[own].transpose(0, 1).unsqueeze(0), lse[:, own].unsqueeze(0)), slice(0, LENGTH))

    longest = LENGTH + 90
    batch = [torch.randn(3, own.size(1), longest, own.size(3), dtype=dtype) for own in (case.query, case.key)]
    batch.append(torch.randn(3, KV_HEADS, longest, 64, dtype=dtype))
    for padded, own_rows in zip(batch, (case.query, case.key, case.value), strict=True):
        padded[1, :, :LENGTH] = own_rows[0]
    seen = torch.arange(longest) < torch.tensor([longest, LENGTH, 5])[:, None]
    mask = seen[:, None, None]
    out, lse = ptk.attention(*batch, mask, is_causal=True, enable_gqa=True, return_lse=True, **case.options)
    case.check((out[1:2, :, :LENGTH], lse[1:2, :, :LENGTH]), slice(0, LENGTH))


@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_heads(dtype: torch.dtype, threads: int) -> None:
    case = prefill(dtype, OPTIONS["everything"])
    torch.set_num_threads(threads)
    again = prefill_again(case)
    case.check(again, slice(0, LENGTH))
    case.check(with_cache(case, slice(600, 601), page=16), slice(600, 601))
    # One query head against its key head, alone: no rows of other heads beside it.
    head = 4
    options = {
        name: given[head : head + 1] if isinstance(given, Tensor) else given for name, given in case.options.items()
    }
    kv = head // (HEADS // KV_HEADS)
    out, lse = ptk.attention(
        case.query[:, head : head + 1, 600:],
        case.key[:, kv : kv + 1],
        case.value[:, kv : kv + 1],
        causal_lower_right(1, LENGTH),
        return_lse=True,
        **options,
    )
    assert torch.equal(out, case.out[:, head : head + 1, 600:])
    assert torch.equal(lse, case.lse[:, head : head + 1, 600:])


def prefill_again(case: Prefill) -> Any:
    return ptk.attention(
        case.query, case.key, case.value, is_causal=True, enable_gqa=True, return_lse=True, **case.options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotation_in_the_call_is_that_of_the_operator(dtype: torch.dtype) -> None:
    angles = torch.rand(LENGTH, 16) * 6
    cos, sin = angles.cos(), angles.sin()
    plain = prefill(dtype, {})
    query, key = ptk.rotary_embedding(plain.query, plain.key, cos, sin)
    out, lse = ptk.attention(query, key, plain.value, is_causal=True, enable_gqa=True, return_lse=True)
    caches = [torch.zeros(1, KV_HEADS, 640, 64, dtype=dtype) for _ in range(2)]
    caches[0][:, :, :600] = key[:, :, :600]
    caches[1][:, :, :600] = plain.value[:, :, :600]
    last = slice(600, 601)
    decoded = ptk.attention_with_kv_cache(
        plain.query[:, :, last],
        *caches,
        plain.key[:, :, last],
        plain.value[:, :, last],
        cache_seqlens=600,
        rotary_cos=cos,
        rotary_sin=sin,
        return_lse=True,
    )
    assert torch.equal(decoded[0], out[:, :, last])
    assert torch.equal(decoded[1], lse[:, :, last])


@every_dtype
@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_caches_agree_with_themselves(dtype: torch.dtype, code: torch.dtype) -> None:
    capacity, scales = 640, torch.rand(2, 1, KV_HEADS, 640) / 64 + 0.01
    codes = [torch.randn(1, KV_HEADS, capacity, 64).mul(30).clamp(-127, 127).to(code) for _ in range(2)]
    query = torch.randn(1, HEADS, LENGTH, 64, dtype=dtype)

    def attend(rows: slice) -> Any:
        options = {"k_scale": scales[0], "v_scale": scales[1], "cache_seqlens": rows.stop, "return_lse": True}
        return ptk.attention_with_kv_cache(query[:, :, rows], *codes, **options)

    whole = attend(slice(0, LENGTH))
    for begin, end in ((600, 601), (255, 256), (400, 601)):
        out, lse = attend(slice(begin, end))
        assert torch.equal(out, whole[0][:, :, begin:end])
        assert torch.equal(lse, whole[1][:, :, begin:end])


@every_dtype
@pytest.mark.parametrize("block", [32, 100])
def test_masks_of_blocks_hide_as_masks_do(dtype: torch.dtype, block: int) -> None:
    case = prefill(dtype, {})
    blocks = -(-LENGTH // block)
    mask = torch.rand(blocks, blocks) < 0.4
    every = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)[:LENGTH, :LENGTH]
    kwargs = {"is_causal": True, "enable_gqa": True, "return_lse": True}
    of_blocks = ptk.attention(case.query, case.key, case.value, mask, mask_block_size=block, **kwargs)
    of_pairs = ptk.attention(case.query, case.key, case.value, every, **kwargs)
    assert torch.equal(of_blocks[0], of_pairs[0])
    assert torch.equal(of_blocks[1], of_pairs[1])


@every_option
@every_dtype
def test_results_are_those_of_attention(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = prefill(dtype, options)
    wide = [operand.double() for operand in (case.query, case.key, case.value)]
    named = {name: given.double() if isinstance(given, Tensor) else given for name, given in case.options.items()}
    oracle = ptk.reference.attention(*wide, is_causal=True, enable_gqa=True, **named)
    error = (case.out.double() - oracle).abs().max().item()
    assert error <= {torch.float64: 1e-14, torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]


@every_dtype
def test_gradients_are_those_of_attention(dtype: torch.dtype) -> None:
    operands = [torch.randn(2, heads, 70, 32, dtype=dtype, requires_grad=True) for heads in (4, 4, 4)]
    grad = torch.randn(2, 4, 70, 32, dtype=dtype)
    found = torch.autograd.grad(ptk.attention(*operands, is_causal=True), operands, grad)
    wide = [operand.detach().double().requires_grad_() for operand in operands]
    oracle = torch.autograd.grad(ptk.reference.attention(*wide, is_causal=True), wide, grad.double())
    bound = {torch.float64: 1e-13, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    for ours, exact in zip(found, oracle, strict=True):
        assert (ours.double() - exact).abs().max() <= bound


def test_same_dropout_as_ever() -> None:
    operands = [torch.randn(1, 4, 300, 32) for _ in range(3)]
    torch.manual_seed(3)
    out = ptk.attention(*operands, dropout_p=0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(out, ptk.reference.attention(*operands, dropout_p=0.3), rtol=1e-5, atol=1e-5)


def test_explain_names_kernel_and_promise() -> None:
    x = torch.randn(1, 4, 64, 32)
    offsets = torch.tensor([0, 64])
    packed = x[0].transpose(0, 1)
    for explanation in (
        ptk.explain(ptk.attention, x, x, x),
        ptk.explain(ptk.attention_varlen, packed, packed, packed, offsets, offsets),
        ptk.explain(ptk.attention_with_kv_cache, x[:, :, :1], x, x, cache_seqlens=64),
    ):
        assert _backend.BATCH_INVARIANT in explanation.reason
        if _loader.introspection() is not None:
            assert explanation.kernel.endswith(".invariant")


def test_context_ends_and_nests() -> None:
    x = torch.randn(1, 4, 64, 32)
    with ptk.batch_invariant():
        pass
    assert _backend.BATCH_INVARIANT in ptk.explain(ptk.attention, x, x, x).reason
    _backend._set_batch_invariant(False)
    try:
        assert "invariant" not in str(ptk.explain(ptk.attention, x, x, x))
    finally:
        _backend._set_batch_invariant(True)


def test_compiled_functions_follow_the_choice_when_they_run() -> None:
    query, key, value = (torch.randn(1, 4, 300, 32) for _ in range(3))
    compiled = torch.compile(ptk.attention, fullgraph=True, backend="aot_eager")
    invariant = ptk.attention(query, key, value, is_causal=True)
    assert torch.equal(compiled(query, key, value, is_causal=True), invariant)
    assert torch.equal(compiled(query[:, :, -1:], key, value), invariant[:, :, -1:])


def test_environment_variable() -> None:
    code = """
import torch, ptkernels as ptk
query, key, value = (torch.randn(1, 4, 300, 32) for _ in range(3))
whole = ptk.attention(query, key, value, is_causal=True)
assert torch.equal(ptk.attention(query[:, :, -1:], key, value), whole[:, :, -1:])
print(ptk.explain(ptk.attention, query, key, value).reason)
"""
    environment = {**os.environ, "PTKERNELS_BATCH_INVARIANT": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert _backend.BATCH_INVARIANT in result.stdout


def test_no_other_backend_offers_it() -> None:
    x = torch.randn(1, 4, 8, 32)
    with ptk.backend("reference"):
        for call in (ptk.attention, lambda *a: ptk.explain(ptk.attention, *a)):
            with pytest.raises(BackendError, match=r"attention: batch_invariant\(\).*'reference' does not offer it"):
                call(x, x, x)
        with pytest.raises(BackendError, match=r"attention_with_kv_cache: batch_invariant\(\)"):
            ptk.attention_with_kv_cache(x, x, x, cache_seqlens=8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(BackendError, match=r"batch_invariant\(\) was asked for: forward-mode"):
            ptk.attention(dual, x, x)
