"""`torch.set_float32_matmul_precision`: pieces of 16 bits where there are AMX tiles, the same bits everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels import _loader

introspection = _loader.introspection()
HAS_TILES = introspection is not None and introspection.active_isa() == "amx"
needs_tiles = pytest.mark.skipif(not HAS_TILES, reason="the kernels of this ISA level multiply float32 as float32")
# Of a product, relative to the product of the magnitudes.
ERRORS = {"high": 2.0**-15, "medium": 2.0**-7}

LENGTHS = [(33, 47), (130, 300), (700, 515)]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "negative-scale": {"scale": -0.3},
    "no-scale": {"scale": 0.0},
    "window-softcap": {"window": (70, 3), "softcap": 2.0},
    "dropout": {"dropout_p": 0.25},
}


@pytest.fixture(autouse=True)
def _highest_again() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def operands(lq: int, lk: int, d: int = 40, dv: int = 72) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, lq, d), torch.randn(2, 2, lk, d), torch.randn(2, 2, lk, dv)


def attend(precision: str, inputs: tuple[Tensor, ...], **options: Any) -> Tensor:
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(5)
    return ptk.attention(*inputs, enable_gqa=True, **options)  # type: ignore[arg-type]


@needs_tiles
@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize(("lq", "lk"), LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_error_is_that_of_the_pieces(precision: str, lq: int, lk: int, options: dict[str, Any]) -> None:
    """An error of scores by ``d`` is one of weights by a factor of up to ``exp(2 d)``; the values add their own."""
    query, key, value = inputs = operands(lq, lk)
    out = attend(precision, inputs, **options).double()
    torch.manual_seed(5)
    exact = ptk.reference.attention(*(x.double() for x in inputs), enable_gqa=True, **options)
    scale = abs(options.get("scale", query.size(-1) ** -0.5))
    sizes = query.double().abs() @ key.repeat_interleave(2, 1).double().abs().transpose(-2, -1)
    of_scores = scale * sizes.max().item() * ERRORS[precision]
    largest = value.abs().max().item() / (1 - options.get("dropout_p", 0.0))
    bound = (torch.tensor(2 * of_scores).exp().item() - 1 + 2 * ERRORS[precision]) * largest
    error = (out - exact).abs().max().item()
    assert error <= bound
    if scale:
        assert error > (attend("highest", inputs, **options) - exact).abs().max().item(), "the pieces were not used"


@needs_tiles
def test_high_is_nearer_than_medium() -> None:
    inputs = operands(300, 300)
    exact = ptk.reference.attention(*(x.double() for x in inputs), enable_gqa=True)
    high, medium = ((attend(precision, inputs) - exact).abs().max().item() for precision in ("high", "medium"))
    assert high < 2.0**-13
    assert 2.0**-13 < medium < 2.0**-5
    assert high * 64 < medium


@needs_tiles
@pytest.mark.parametrize("precision", ERRORS)
def test_any_strides_and_any_threads(precision: str) -> None:
    inputs = operands(200, 300)
    expected = attend(precision, inputs)
    strided = tuple(x.transpose(-2, -1).contiguous().transpose(-2, -1) for x in inputs)
    assert torch.equal(attend(precision, strided), expected)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(attend(precision, inputs), expected)


@needs_tiles
@pytest.mark.parametrize("precision", ERRORS)
def test_packed_and_explained(precision: str) -> None:
    x, offsets = torch.randn(90, 2, 32), torch.tensor([0, 40, 90])
    torch.set_float32_matmul_precision(precision)
    out = ptk.attention_varlen(x, x, x, offsets, offsets)
    alone = [ptk.attention(*[x[a:b].transpose(0, 1)] * 3).transpose(0, 1) for a, b in ((0, 40), (40, 90))]
    torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=4 * ERRORS[precision])
    for explanation in (
        ptk.explain(ptk.attention, *[x.transpose(0, 1)] * 3),
        ptk.explain(ptk.attention_varlen, x, x, x, offsets, offsets),
    ):
        assert explanation.kernel == {"high": "cpu.amx.tiled_bf16x3", "medium": "cpu.amx.tiled_bf16x1"}[precision]
        assert f"float32 precision {precision!r}" in explanation.reason
        assert not any("changes nothing" in hint for hint in explanation.faster)


@needs_tiles
@pytest.mark.parametrize("precision", ERRORS)
def test_infinities_and_nan(precision: str) -> None:
    query, key, value = operands(40, 60)
    value[:, :, 7, 3] = torch.inf
    query[0, 1, 5] = torch.nan
    out = attend(precision, (query, key, value))
    assert out[0, 1, 5].isnan().all()
    out[0, 1, 5] = 0
    assert out[..., [c for c in range(72) if c != 3]].isfinite().all()
    assert not out[1, ..., 3].isfinite().any()


@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("kind", ["decoding", "invariant", "gradients", "float64", "bfloat16"])
def test_everything_else_keeps_its_bits(precision: str, kind: str) -> None:
    query, key, value = operands(2 if kind == "decoding" else 64, 300)
    if kind in ("float64", "bfloat16"):
        query, key, value = (x.to(getattr(torch, kind)) for x in (query, key, value))
    leaves = [x.requires_grad_(kind == "gradients") for x in (query, key, value)]
    grad = torch.randn_like(torch.empty(2, 4, query.size(2), 72, dtype=query.dtype))

    def call() -> tuple[Tensor, ...]:
        if kind == "invariant":
            with ptk.batch_invariant():
                return (ptk.attention(query, key, value, enable_gqa=True),)
        if kind == "gradients":
            with torch.no_grad():
                torch.set_float32_matmul_precision("highest")
                saved = torch.ops.ptkernels.attention(query, key, value)
                torch.set_float32_matmul_precision(wanted)
            grads = torch.ops.ptkernels._attention_backward(grad, None, *(x.detach() for x in leaves), *saved)
            return tuple(x for x in grads if x is not None)
        return (ptk.attention(query, key, value, enable_gqa=True),)

    wanted = "highest"
    expected = call()
    wanted = precision
    torch.set_float32_matmul_precision(precision)
    assert all(map(torch.equal, call(), expected))


@pytest.mark.skipif(HAS_TILES, reason="tiles multiply pieces")
@pytest.mark.parametrize("precision", ERRORS)
def test_without_tiles_nothing_changes(precision: str) -> None:
    inputs = operands(33, 47)
    expected = attend("highest", inputs)
    assert torch.equal(attend(precision, inputs), expected)
    explanation = ptk.explain(ptk.attention, *inputs, enable_gqa=True)
    assert any(f"{precision!r} changes nothing" in hint for hint in explanation.faster)
