"""Rotary embedding: what rotations and norms are, the cache's own rotation, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ptkernels as ptk

pytestmark = pytest.mark.usefixtures("strict")


def tables(rows: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(rows, dtype=torch.float64), 100.0 ** (-torch.arange(half) / max(half, 1)))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def operands(length: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 4, length, d).to(dtype), torch.randn(2, 2, length, d).to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved: bool) -> None:
    query, key = (torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 9, 8) for _ in range(2))
    query, key = ptk.rotary_embedding(query, key, *tables(9, 4, torch.float64), interleaved=interleaved)
    scores = (query @ key.mT)[0, 0]
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_interleaved_is_a_permutation() -> None:
    query, key = operands(7, 16)
    cos, sin = tables(7, 8)
    order = torch.arange(16).view(8, 2).t().flatten()
    plain = ptk.rotary_embedding(query[..., order], key[..., order], cos, sin)
    pairs = ptk.rotary_embedding(query, key, cos, sin, interleaved=True)
    for a, b in zip(plain, pairs, strict=True):
        torch.testing.assert_close(a, b[..., order])


def test_the_rest_of_a_row_stays() -> None:
    query, key = operands(7, 20)
    turned = ptk.rotary_embedding(query, key, *tables(7, 6))
    assert torch.equal(turned[0][..., 12:], query[..., 12:])
    assert torch.equal(turned[1][:, :, 0], key[:, :, 0])  # no angle at position 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_as_the_cache_rotates(interleaved: bool) -> None:
    """Bits aside, what ``attention_with_kv_cache`` does to what is appended."""
    query, key = operands(5, 16)
    cos, sin = tables(12, 8)
    value = torch.randn(2, 2, 5, 16)
    k_cache, v_cache = torch.zeros(2, 2, 12, 16), torch.zeros(2, 2, 12, 16)
    seqlens = torch.tensor([3, 6], dtype=torch.int32)
    ptk.attention_with_kv_cache(
        query, k_cache, v_cache, key, value, cache_seqlens=seqlens, rotary_cos=cos, rotary_sin=sin,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    positions = seqlens.long()[:, None] + torch.arange(5)
    _, rotated = ptk.rotary_embedding(query, key, cos, sin, positions=positions, interleaved=interleaved)
    for batch, first in enumerate(seqlens.tolist()):
        torch.testing.assert_close(k_cache[batch, :, first : first + 5], rotated[batch])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    query, key = operands(7, 48, dtype)
    weight = torch.rand(48).to(dtype)
    cos, sin = torch.ones(7, 24), torch.zeros(7, 24)
    normalized, plain = ptk.rotary_embedding(query, key, cos, sin, query_norm_weight=weight, norm_eps=1e-5)
    expected = torch.nn.functional.rms_norm(query.double(), (48,), weight.double(), 1e-5)
    torch.testing.assert_close(normalized, expected.to(dtype))
    assert torch.equal(plain, key)


def test_as_qwen3_in_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    query, key = operands(9, 16)
    norm = modeling.Qwen3RMSNorm(16, eps=1e-5)
    torch.nn.init.uniform_(norm.weight)
    cos, sin = tables(9, 8)
    full = [torch.cat([table, table], -1)[None] for table in (cos, sin)]
    expected = modeling.apply_rotary_pos_emb(norm(query), norm(key), *full)
    weights = {"query_norm_weight": norm.weight, "key_norm_weight": norm.weight}
    actual = ptk.rotary_embedding(query, key, cos, sin, norm_eps=1e-5, **weights)
    torch.testing.assert_close(actual, expected)


def test_rotation_saves_nothing_but_tables() -> None:
    query, key = (tensor.requires_grad_() for tensor in operands(9, 16))
    cos, sin = tables(9, 8)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ptk.rotary_embedding(query, key, cos, sin)
    assert {tensor.data_ptr() for tensor in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_gradient_of_one_result() -> None:
    query, key = (tensor.double().requires_grad_() for tensor in operands(3, 4))
    rotated = ptk.rotary_embedding(query, key, *tables(3, 2, torch.float64))
    grads = torch.autograd.grad(rotated[0].sin().sum(), (query, key))
    assert grads[0].abs().max() > 0
    assert (grads[1] == 0).all()


def test_nothing_is_read_beyond_positions() -> None:
    query, key = operands(3, 8)
    cos, sin = tables(3, 4)
    for position in (-1, 3, 2**40):
        with pytest.raises(RuntimeError, match=rf"rotary_embedding: positions: got {position}, expected 0 to 2"):
            ptk.rotary_embedding(query, key, cos, sin, positions=torch.tensor([0, position, 1]))


def good() -> dict[str, Any]:
    query, key = operands(3, 8)
    cos, sin = tables(5, 4)
    return {"query": query, "key": key, "cos": cos, "sin": sin}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": None}, TypeError, "query: got .*NoneType, expected torch.Tensor"),
    ({"query": torch.ones(2, 4, 3, 8).int()}, TypeError, "query: got dtype int32, expected one of float64"),
    ({"query": torch.ones(4, 3, 8)}, ValueError, "query: got 3 dimensions, expected 4"),
    ({"query": torch.ones(2, 4, 3, 8).to_sparse()}, TypeError, "query: got a nested or sparse tensor"),
    ({"key": torch.ones(2, 2, 3, 8).double()}, TypeError, "key: got dtype float64, expected float32"),
    ({"key": torch.ones(2, 2, 3, 8, device="meta")}, ValueError, "key: got device meta, expected cpu like query"),
    ({"key": torch.ones(2, 2, 4, 8)}, ValueError, r"key: got shape \[2, 2, 4, 8\], expected \[2, heads, 3, 8\]"),
    ({"cos": torch.ones(2, 4), "sin": torch.ones(2, 4)}, ValueError, "cos: got 2 positions, expected at least 3"),
    ({"cos": torch.ones(5, 5)}, ValueError, r"cos: got shape \[5, 5\], expected \[positions, up to 4\]"),
    ({"cos": torch.ones(5, 4).long()}, TypeError, "cos: got dtype int64"),
    ({"cos": torch.ones(5, 4, requires_grad=True)}, ValueError, r"cos: got a tensor that requires grad, expected cos"),
    ({"sin": torch.ones(5, 3)}, ValueError, r"sin: got shape \[5, 3\], expected \[5, 4\] like cos"),
    ({"sin": torch.ones(5, 4).half()}, TypeError, "sin: got dtype float16, expected float32"),
    ({"positions": torch.zeros(3)}, TypeError, "positions: got dtype float32, expected int64"),
    ({"positions": torch.zeros(4).long()}, ValueError, r"positions: got shape \[4\], expected \[3\] or \[2, 3\]"),
    ({"query_norm_weight": torch.ones(7)}, ValueError, r"query_norm_weight: got shape \[7\], expected \[8\]"),
    ({"key_norm_weight": torch.ones(8).half()}, TypeError, "key_norm_weight: got dtype float16, expected float32"),
    ({"interleaved": 1}, TypeError, "interleaved: got int, expected bool"),
    ({"norm_eps": "small"}, TypeError, "norm_eps: got str, expected float"),
    ({"norm_eps": -1.0}, ValueError, "norm_eps: got -1.0, expected a finite number"),
    ({"norm_eps": math.inf}, ValueError, "norm_eps: got inf"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    for call in (ptk.rotary_embedding, lambda **arguments: ptk.explain(ptk.rotary_embedding, **arguments)):
        with pytest.raises(error, match=f"rotary_embedding: {message}"):
            call(**(good() | changes))
