"""MultiheadAttention and the layers of a transformer are torch.nn's, over the fused operator."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

import ptkernels as ptk
from ptkernels.errors import FallbackError

BATCH, LENGTH, KEYS = 2, 3, 5


def pair(**options: Any) -> tuple[nn.MultiheadAttention, ptk.nn.MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    ours = ptk.nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(length: int, dim: int, batched: bool, batch_first: bool) -> Tensor:
    shape = (BATCH, length, dim) if batch_first else (length, BATCH, dim)
    return torch.randn(shape if batched else (length, dim), dtype=torch.float64)


def mask(kind: str | None, *shape: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "float":
        return torch.randn(shape, dtype=torch.float64)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False  # a row without keys is NaN in torch
    return hidden


@pytest.mark.parametrize(
    "extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 10}, {"bias": False}]
)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_results_are_torchs(extra: dict[str, Any], batch_first: bool, batched: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, **extra)
    query = tokens(LENGTH, 8, batched, batch_first)
    key, value = (tokens(KEYS, extra.get(name, 8), batched, batch_first) for name in ("kdim", "vdim"))
    heads = 2 * (BATCH if batched else 1)
    for weights, padding, attn, per_head in itertools.product(
        (False, True), (None, "bool", "float"), (None, "bool", "float"), (False, True)
    ):
        options = {
            "need_weights": weights,
            "average_attn_weights": per_head,
            "key_padding_mask": mask(padding, *((BATCH, KEYS) if batched else (KEYS,))),
            "attn_mask": mask(attn, *((heads, LENGTH, KEYS) if per_head else (LENGTH, KEYS))),
        }
        expected, expected_weights = theirs(query, key, value, **options)
        out, out_weights = ours(query, key, value, **options)
        torch.testing.assert_close(out, expected)
        assert (out_weights is None) == (expected_weights is None)
        if weights:
            torch.testing.assert_close(out_weights, expected_weights)


def test_gradients_are_torchs() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((theirs, ours), inputs, strict=True):
        out, weights = module(leaf, leaf, leaf)
        (out.sin().sum() + weights.cos().sum()).backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, expected), parameter in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_a_row_without_keys_is_zero_before_the_projection() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    out, weights = ours(x, x, x, key_padding_mask=torch.ones(BATCH, LENGTH, dtype=torch.bool))
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))
    assert torch.equal(weights, torch.zeros_like(weights))


def test_causal_hint_needs_no_mask() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    expected = theirs(x, x, x, attn_mask=causal)
    for out, wanted in zip(ours(x, x, x, is_causal=True), expected, strict=True):
        torch.testing.assert_close(out, wanted)


def test_attn_mask_of_another_shape_is_named() -> None:
    _, ours = pair()
    x = torch.randn(LENGTH, BATCH, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"attn_mask: got shape \(3, 3, 3\), expected .* = 4"):
        ours(x, x, x, attn_mask=torch.zeros(3, LENGTH, LENGTH, dtype=torch.float64))


def test_nested_input_takes_torchs_own_path() -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(n, 8, dtype=torch.float64) for n in (2, 3)])
    with torch.no_grad():
        expected, _ = theirs.eval()(x, x, x, need_weights=False)
        out, _ = ours.eval()(x, x, x, need_weights=False)
    torch.testing.assert_close(out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


def test_torchs_composition_is_announced(strict: None) -> None:
    _, ours = pair(batch_first=True, dropout=0.1)
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    with pytest.raises(FallbackError, match="weights after dropout"):
        ours(x, x, x)
    ours(x, x, x, need_weights=False)
    ours.eval()(x, x, x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first: bool, training: bool) -> None:
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    theirs = nn.TransformerEncoderLayer(8, 2, 16, **options).train(training)
    ours = ptk.nn.TransformerEncoderLayer(8, 2, 16, **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[0, -1] = True
    expected, out = (layer(x, src_key_padding_mask=padding) for layer in (theirs, ours))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_layer(norm_first: bool, training: bool) -> None:
    """Keys and values of the memory come from one product."""
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "dtype": torch.float64}
    theirs = nn.TransformerDecoderLayer(8, 2, 16, **options).train(training)
    ours = ptk.nn.TransformerDecoderLayer(8, 2, 16, **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, -1] = True
    masks = {
        "tgt_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "memory_mask": mask("bool", LENGTH, KEYS),
        "memory_key_padding_mask": padding,
    }
    leaves = [torch.randn(BATCH, KEYS, 8, dtype=torch.float64).requires_grad_() for _ in range(2)]
    leaves[1].data.copy_(leaves[0].data)
    results = [layer(x, memory, **masks) for layer, memory in zip((theirs, ours), leaves, strict=True)]
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(ours(x, leaves[1], **{**masks, "tgt_mask": None}, tgt_is_causal=True), results[0])
    for result in results:
        result.sin().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    for (name, expected), parameter in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, msg=name)


def test_prefix_tuning() -> None:
    """Keys and values that are learned stand before a frozen layer's own; every query sees all of them."""
    prefix, length = 3, 5
    leaves = [torch.randn(1, 2, prefix, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    query, *own = torch.randn(3, 2, 2, length, 4, dtype=torch.float64)
    seen = torch.ones(length, prefix + length, dtype=torch.bool).tril(prefix)
    masks = (causal_lower_right(length, prefix + length), seen)
    gradients = []
    for function, mask in zip((ptk.attention, F.scaled_dot_product_attention), masks, strict=True):
        key, value = (torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in zip(leaves, own, strict=True))
        gradients.append(torch.autograd.grad(function(query, key, value, mask).sin().sum(), leaves))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_modules_copy_pickle_and_compile() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, 8, dtype=torch.float64)
    expected, _ = ours(x, x, x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.compile(ours, fullgraph=True)):
        torch.testing.assert_close(other(x, x, x)[0], expected)
