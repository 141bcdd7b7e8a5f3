"""What replace() predicts from an example: bytes by hand, kernels as explain() names them, and no trace left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels._replace.effects import count

FLOAT = 4


def chain(channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


def test_bytes_of_a_convolution_by_hand() -> None:
    """Each operator's arguments and results once; of what lies between, the backward pass wants the convolution's."""
    model, x = chain().eval(), torch.randn(2, 3, 5, 5)
    (item,) = ptk.replace(model, "conv_bn_relu", example_inputs=x).predicted
    image, result, weight, vector = (FLOAT * n for n in (2 * 3 * 25, 2 * 4 * 25, 4 * 3, 4))
    convolution = image + weight + vector + result
    assert item.moved_before == convolution + (result + 4 * vector + result) + (result + result)
    assert item.moved_after == convolution + 4 * vector + result
    assert item.kept_before == image + result + result
    assert item.kept_after == image + result
    with torch.no_grad():
        assert count(model, x)[None].moved == item.moved_after  # which has gradients all the same


def test_kernels_are_those_that_explain_names() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.rnn = nn.GRU(8, 8, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.attention(x, x, x, need_weights=False)[0])[0])

    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 5, 8)
    report = ptk.replace(model, ("attention", "packed_rnn", "quantized_matmul"), example_inputs=x)
    heads, cell = torch.randn(2, 2, 5, 4), nn.GRU(8, 8)
    weights = [getattr(cell, f"{name}_l0").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    named = {
        "attention": ptk.explain("attention", heads, heads, heads),
        "rnn": ptk.explain("packed_rnn", x, *weights, mode="gru", layout="batch_first"),
        "head": ptk.explain("quantized_matmul", x, model.head.weight),
    }
    found = {item.path: item.kernels for item in report.predicted if item.kernels}
    assert found == {path: (f"{account.op}: {account.kernel}",) for path, account in named.items()}
    # Nothing to save in the linear layer but its weight, a quarter of the size.
    head = next(item for item in report.predicted if item.path == "head")
    assert head.moved_after < head.moved_before


def test_inner_modules_are_counted_apart_and_the_rest_elsewhere() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    x = torch.randn(2, 6, 8)
    whole = count(model, x)[None]
    report = ptk.replace(model, example_inputs=x)
    assert [item.path for item in report.predicted] == ["1", "1.self_attn", None]
    assert sum(item.moved_before for item in report.predicted) == whole.moved
    assert sum(item.kept_before for item in report.predicted) == whole.kept
    layer, attention, rest = report.predicted
    assert (layer.moved_before, layer.kept_before) == (layer.moved_after, layer.kept_after)
    assert attention.moved_after < attention.moved_before
    assert rest.moved_before == rest.moved_after > 0
    printed = str(report)
    assert "1.self_attn" in printed
    assert "(elsewhere)" in printed
    assert "total" in printed


def test_longer_sequences_save_more_than_in_proportion() -> None:
    """The matrix of weights, which the composition keeps and the kernel does not."""

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x, x, need_weights=False)[0]

    saved = []
    for length in (32, 64):
        item = ptk.replace(Self(), example_inputs=torch.randn(1, length, 8)).predicted[0]
        saved.append(item.kept_before - item.kept_after)
    assert 0 < 3 * saved[0] < saved[1]


def test_nothing_of_the_model_changes() -> None:
    """Running statistics, gradients, random numbers and hooks are as if nothing had run."""
    model, x = nn.Sequential(chain(), nn.Dropout(0.5)), torch.randn(2, 3, 5, 5)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = ptk.replace(model, "conv_bn_relu", dry_run=True, example_inputs=x)
    assert [item.path for item in report.predicted] == ["0", None]
    assert report.predicted[0].moved_after < report.predicted[0].moved_before
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(
        "forward" not in m.__dict__ and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules()
    )
    report.undo()
    assert "forward" not in model[0].__dict__


def test_dry_run_verifies_a_copy() -> None:
    model, x = chain(), torch.randn(2, 3, 5, 5)
    report = ptk.replace(model, "conv_bn_relu", dry_run=True, verify=True, example_inputs=x)
    assert len(report.verified) > 3
    assert "forward" not in model.__dict__


def test_an_example_that_fails_restores() -> None:
    model = chain()
    with pytest.raises(RuntimeError, match="channels"):
        ptk.replace(model, "conv_bn_relu", example_inputs=torch.randn(2, 5, 5, 5))
    assert "forward" not in model.__dict__
