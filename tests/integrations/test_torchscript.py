"""Modules traced and scripted, stored, loaded and frozen: the results of the modules, at other sizes too."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from every_module import MAKERS, example, made
from torch import Tensor, nn

import ptkernels as ptk

pytestmark = pytest.mark.filterwarnings("ignore")  # of a way that torch has left behind, and of checks of sizes
# Plain torch, with any number of states; and a forward that was traced when replace() fused it.
TRACED_ONLY = ("LayerNormLSTMCell", "LayerNormGRUCell", "PeepholeLSTMCell", "ResetBeforeGRUCell")
TRACED_ONLY += ("ZoneoutCell", "CellLayer", "replaced Sequential")


def stored(script: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def assert_same(script: Any, module: nn.Module, *calls: tuple[Any, ...]) -> None:
    """The compiled one, what is stored of it, and that frozen; gradients as well where there are any."""
    loaded = stored(script)
    assert list(loaded.state_dict()) == list(module.state_dict())
    for args in calls:
        with torch.no_grad():
            expected = module(*args)
            for other in (script, loaded, torch.jit.freeze(loaded)):
                torch.testing.assert_close(other(*args), expected)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if parameters:
        owners = dict(loaded.named_parameters())
        results = []
        for one, own in ((module, parameters), (loaded, {name: owners[name] for name in parameters})):
            out = one(*calls[0])
            out = out[0] if isinstance(out, tuple) else out
            results.append(torch.autograd.grad(out.sin().sum(), list(own.values()), allow_unused=True))
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", MAKERS)
def test_traced(name: str) -> None:
    module = made(name, training=False)
    assert_same(torch.jit.trace(module, example(name)), module, (example(name),), (example(name, 6),))


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in TRACED_ONLY])
def test_scripted(name: str) -> None:
    module = made(name, training=False)
    script = torch.jit.script(copy.deepcopy(module))  # which it changes: children become what was compiled of them
    assert_same(script, module, (example(name),), (example(name, 6),))


def padded() -> Tensor:
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    return padding


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
MHA = ptk.nn.MultiheadAttention
# What a module is made with, and calls with everything that the compiled form takes.
OPTIONS: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "attention": (
        lambda: MHA(8, 2, batch_first=True),
        [
            (x(2, 5, 8), x(2, 5, 8), x(2, 5, 8), padded(), True, CAUSAL),
            (x(2, 5, 8), x(2, 5, 8), x(2, 5, 8), None, True, x(4, 5, 5), False),
            (x(2, 5, 8), x(2, 5, 8), x(2, 5, 8), None, True, None, True, True),
            (x(5, 8), x(5, 8), x(5, 8)),
        ],
    ),
    "attention to other sizes": (
        lambda: MHA(8, 2, bias=False, kdim=6, vdim=4), [(x(5, 2, 8), x(7, 2, 6), x(7, 2, 4))],
    ),
    "convolution": (
        lambda: ptk.nn.ConvBNReLU2d(3, 3, 3, padding="same", activation="leaky_relu", negative_slope=0.2),
        [(x(2, 3, 6, 7), x(2, 3, 6, 7))],
    ),
    "convolution, even kernel": (lambda: ptk.nn.ConvBNReLU1d(3, 4, 4, padding="same", norm=False), [(x(2, 3, 6),)]),
    "convolution, reflected": (
        lambda: ptk.nn.ConvBNReLU1d(4, 4, 3, 2, 1, groups=2, padding_mode="reflect", track_running_stats=False),
        [(x(2, 4, 9),)],
    ),
    "quantized": (
        lambda: ptk.nn.QuantizedLinear.from_float(nn.Linear(8, 6, bias=False), "int8_dynamic", activation="gelu"),
        [(x(2, 3, 8), x(2, 3, 6)), (x(8),)],
    ),
    "LoRA on a linear layer": (lambda: ptk.nn.LoRALinear(nn.Linear(8, 6), 2, 4.0), [(x(2, 8),)]),
    "LSTM": (
        lambda: ptk.nn.LSTM(8, 6, 2, bidirectional=True, batch_first=True),
        [(x(2, 5, 8), (x(4, 2, 6), x(4, 2, 6))), (x(5, 8),)],
    ),
    "LSTM, projected": (lambda: ptk.nn.LSTM(8, 6, proj_size=3), [(x(5, 2, 8),)]),
    "GRU": (lambda: ptk.nn.GRU(8, 6, 2), [(x(5, 2, 8), x(2, 2, 6)), (x(5, 8), x(2, 6))]),
    "RNN": (lambda: ptk.nn.RNN(8, 6, nonlinearity="relu", bias=False), [(x(5, 2, 8), x(1, 2, 6))]),
    "LSTMCell": (lambda: ptk.nn.LSTMCell(8, 6), [(x(2, 8), (x(2, 6), x(2, 6))), (x(8),)]),
    "GRUCell": (lambda: ptk.nn.GRUCell(8, 6), [(x(2, 8), x(2, 6)), (x(8), x(6))]),
    "RNNCell": (lambda: ptk.nn.RNNCell(8, 6, nonlinearity="relu"), [(x(2, 8), x(2, 6))]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_scripted_take(name: str) -> None:
    make, calls = OPTIONS[name]
    module = make().eval()
    assert_same(torch.jit.script(copy.deepcopy(module)), module, *calls)


def test_lengths() -> None:
    module = ptk.nn.LSTM(8, 6, batch_first=True).eval()
    lengths = torch.tensor([5, 2])
    found = stored(torch.jit.script(module))(x(2, 5, 8), None, lengths)
    torch.testing.assert_close(found, module(x(2, 5, 8), lengths=lengths))


def test_what_would_be_wrong_is_refused() -> None:
    with pytest.raises(RuntimeError, match="ConvBNReLU1d: got a module in training mode"):
        torch.jit.script(nn.Sequential(ptk.nn.ConvBNReLU1d(3, 4, 3)))
    model = nn.Sequential(ptk.nn.ConvBNReLU1d(3, 4, 3)).eval()
    torch.jit.script(model)
    with pytest.raises(RuntimeError, match="evaluates only"):
        model.train()
    with pytest.raises(NotImplementedError, match="got PeepholeLSTMCell, expected no such module: trace it"):
        torch.jit.script(ptk.nn.PeepholeLSTMCell(3, 4))
    with pytest.raises(NotImplementedError, match="got add_bias_kv"):
        torch.jit.script(MHA(8, 2, add_bias_kv=True).eval())
