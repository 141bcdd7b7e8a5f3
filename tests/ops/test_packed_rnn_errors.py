"""Every bad call of the recurrent layers names the operator and the argument, before any data is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import ptkernels as ptk
from ptkernels.errors import BackendError

T, B, F, H = 4, 3, 5, 6


def params(features: int = F, hidden: int = H, gates: int = 4, count: int = 4, **options: Any) -> list[Tensor]:
    found = [torch.randn(gates * hidden, features, **options), torch.randn(gates * hidden, hidden, **options)]
    return [*found, *(torch.randn(gates * hidden, **options) for _ in range(count - 2))]


def good() -> dict[str, Any]:
    """A valid call of lstm, to be spoiled in one place."""
    return {"input": torch.randn(T, B, F), "hx": None, "params": params()}


def states(*h: int, c: tuple[int, ...] = (1, B, H), **options: Any) -> dict[str, Any]:
    return {"hx": (torch.randn(h or (1, B, H), **options), torch.randn(c, **options))}


def replaced(index: int, tensor: Any) -> dict[str, Any]:
    found: list[Any] = list(params())
    found[index] = tensor
    return {"params": found}


def packed(data: Tensor, batch_sizes: list[int], order: list[int] | None = None) -> dict[str, Any]:
    """A PackedSequence that its own constructor would not have made."""
    sorted_indices = None if order is None else torch.tensor(order)
    value = PackedSequence.__new__(PackedSequence, data, torch.tensor(batch_sizes), sorted_indices, sorted_indices)
    return {"input": value}


@dataclass(frozen=True)
class Bad:
    name: str
    changes: Callable[[], dict[str, Any]]
    error: type[Exception]
    message: str
    op: str = "lstm"
    options: dict[str, Any] = field(default_factory=dict)


def cu(*values: int) -> dict[str, Any]:
    return {"input": torch.randn(7, F), "cu_seqlens": torch.tensor(values)}


def lengths(*values: int, **options: Any) -> dict[str, Any]:
    return {"lengths": torch.tensor(values, **options)}


BAD = [
    Bad("input None", lambda: {"input": None}, TypeError, "lstm: input: got .*NoneType, expected torch.Tensor"),
    Bad("input list", lambda: {"input": [[1.0]]}, TypeError, "input: got builtins.list"),
    Bad(
        "input int", lambda: {"input": torch.ones(T, B, F).int()}, TypeError, "input: got dtype int32, expected one of"
    ),
    Bad(
        "input sparse", lambda: {"input": torch.randn(T, B, F).to_sparse()}, TypeError, "input: got a nested, sparse or"
    ),
    Bad(
        "input strided nested",
        lambda: {"input": torch.nested.nested_tensor([torch.randn(2, F)])},
        ValueError,
        "input: got another nested tensor, expected a jagged one",
    ),
    Bad(
        "input 1-D",
        lambda: {"input": torch.randn(F)},
        ValueError,
        r"input: got shape \[5\], expected 2 .unbatched. or 3",
    ),
    Bad("input 4-D", lambda: {"input": torch.randn(1, T, B, F)}, ValueError, "expected 2 .unbatched. or 3 dimensions"),
    Bad(
        "no features", lambda: {"input": torch.randn(T, B, 0)}, ValueError, "input: got 0 features, expected at least 1"
    ),
    Bad(
        "features",
        lambda: {"input": torch.randn(T, B, F + 1)},
        ValueError,
        r"params\[0\]: got shape \[24, 5\], expected",
    ),
    # parameters
    Bad("params tensor", lambda: {"params": torch.randn(3)}, TypeError, "params: got Tensor, expected a sequence"),
    Bad("too few params", lambda: {"params": params()[:3]}, ValueError, "params: got 3 tensors, expected 4 for each"),
    Bad("no params", lambda: {"params": []}, ValueError, "params: got 0 tensors"),
    Bad(
        "params layers", lambda: {"num_layers": 2}, ValueError, "params: got 4 tensors, expected 4 for each of 2 layers"
    ),
    Bad("params directions", lambda: {"bidirectional": True}, ValueError, "each of 1 layers x 2 directions"),
    Bad("param None", lambda: replaced(1, None), TypeError, r"params\[1\]: got builtins.NoneType"),
    Bad(
        "param double",
        lambda: replaced(0, params()[0].double()),
        TypeError,
        r"params\[0\]: got dtype float64, expected float32",
    ),
    Bad(
        "param meta",
        lambda: replaced(2, params()[2].to("meta")),
        ValueError,
        r"params\[2\]: got device meta, expected cpu",
    ),
    Bad(
        "weight_ih rows",
        lambda: replaced(0, torch.randn(23, F)),
        ValueError,
        r"params\[0\]: got shape \[23, 5\], expected",
    ),
    Bad(
        "weight_hh shape",
        lambda: replaced(1, torch.randn(24, 7)),
        ValueError,
        r"params\[1\]: got shape \[24, 7\], expected \[24, 6\]",
    ),
    Bad(
        "bias shape",
        lambda: replaced(3, torch.randn(25)),
        ValueError,
        r"params\[3\]: got shape \[25\], expected \[24\]",
    ),
    Bad("no units", lambda: replaced(0, torch.randn(0, F)), ValueError, r"params\[0\]: got shape \[0, 5\]"),
    Bad(
        "projection shape",
        lambda: {"params": [*params(), torch.randn(2, 7)]},
        ValueError,
        r"params\[1\]: got shape \[24, 6\], expected \[24, 2\]",
    ),
    Bad(
        "gru with projection", lambda: {"params": params(gates=3, count=5)}, ValueError, "gru: params: got 5", op="gru"
    ),
    Bad(
        "gru rows",
        lambda: {"params": params(gates=4, hidden=1)},
        ValueError,
        r"gru: params\[0\]: got shape \[4, 5\]",
        op="gru",
    ),
    # states
    Bad("hx tensor", lambda: {"hx": torch.randn(1, B, H)}, TypeError, "hx: got Tensor, expected a pair of tensors"),
    Bad("hx three", lambda: {"hx": (1, 2, 3)}, TypeError, "hx: got tuple, expected a pair"),
    Bad("hx number", lambda: {"hx": (1.0, 2.0)}, TypeError, "hx: got builtins.float, expected torch.Tensor"),
    Bad("hx batch", lambda: states(1, B + 1, H), ValueError, r"hx: got shape \[1, 4, 6\], expected \[1, 3, 6\]"),
    Bad("hx units", lambda: states(1, B, H + 1), ValueError, r"hx: got shape \[1, 3, 7\], expected \[1, 3, 6\]"),
    Bad("hx rank", lambda: states(B, H), ValueError, r"hx: got shape \[3, 6\], expected 3 dimensions"),
    Bad("hx layers", lambda: states(2, B, H), ValueError, "hx: got 2 states, expected 1"),
    Bad("cx units", lambda: states(c=(1, B, 2)), ValueError, r"cx: got shape \[1, 3, 2\], expected \[1, 3, 6\]"),
    Bad(
        "hx double",
        lambda: states(dtype=torch.float64),
        TypeError,
        "hx: got dtype float64, expected float32 like input",
    ),
    Bad("hx meta", lambda: states(device="meta"), ValueError, "hx: got device meta, expected cpu like input"),
    Bad(
        "unbatched with batched hx",
        lambda: {"input": torch.randn(T, F), **states()},
        ValueError,
        r"hx: got shape \[1, 3, 6\], expected 2 dimensions",
    ),
    # lengths
    Bad("lengths list", lambda: {"lengths": [1, 2, 3]}, TypeError, "lengths: got list, expected torch.Tensor"),
    Bad(
        "lengths float",
        lambda: lengths(1, 2, 3, dtype=torch.float32),
        TypeError,
        "lengths: got dtype float32, expected int64",
    ),
    Bad(
        "lengths 2-D",
        lambda: {"lengths": torch.ones(B, 1).long()},
        ValueError,
        r"lengths: got shape \[3, 1\], expected one",
    ),
    Bad("lengths count", lambda: lengths(1, 2), ValueError, "lengths: got 2 entries, expected 3"),
    Bad("lengths negative", lambda: lengths(1, -1, 2), ValueError, "lengths: got -1, expected 0 to 4"),
    Bad("lengths too long", lambda: lengths(1, 5, 2), ValueError, "lengths: got 5, expected 0 to 4"),
    Bad("lengths huge", lambda: lengths(1, 2**62, 2), ValueError, "lengths: got 4611686018427387904"),
    Bad(
        "lengths of one",
        lambda: {"input": torch.randn(T, F), **lengths(4)},
        ValueError,
        "lengths: got a tensor with unbatched",
    ),
    # concatenated
    Bad(
        "cu_seqlens padded",
        lambda: {"cu_seqlens": torch.tensor([0, 4])},
        ValueError,
        "input: got shape .*expected .tokens, features",
    ),
    Bad(
        "cu_seqlens first",
        lambda: cu(1, 3, 7),
        ValueError,
        r"cu_seqlens: got \[1, 3, 7\], expected ascending from 0 to 7",
    ),
    Bad("cu_seqlens last", lambda: cu(0, 3, 8), ValueError, "cu_seqlens: got .*expected ascending from 0 to 7"),
    Bad("cu_seqlens falls", lambda: cu(0, 5, 3, 7), ValueError, "cu_seqlens: got .*expected ascending"),
    Bad("cu_seqlens empty", lambda: cu(), (TypeError, ValueError), "cu_seqlens: got"),  # type: ignore[arg-type]
    Bad(
        "cu_seqlens and lengths",
        lambda: {**cu(0, 7), **lengths(7)},
        ValueError,
        "lengths: got a tensor with concatenated",
    ),
    # packed
    Bad(
        "batch_sizes grow", lambda: packed(torch.randn(5, F), [2, 3]), ValueError, "batch_sizes: got .*that never grow"
    ),
    Bad(
        "batch_sizes zero",
        lambda: packed(torch.randn(2, F), [2, 0]),
        ValueError,
        "batch_sizes: got .*expected positive",
    ),
    Bad(
        "batch_sizes sum",
        lambda: packed(torch.randn(6, F), [3, 2]),
        ValueError,
        "batch_sizes: got a sum of 5, expected the 6 rows",
    ),
    Bad(
        "packed rank",
        lambda: packed(torch.randn(5, F, 1), [3, 2]),
        ValueError,
        r"input: got shape \[5, 5, 1\], expected 2",
    ),
    Bad(
        "sorted_indices twice",
        lambda: packed(torch.randn(5, F), [3, 2], [0, 0, 1]),
        ValueError,
        "sorted_indices: got .*permutation",
    ),
    Bad(
        "sorted_indices range",
        lambda: packed(torch.randn(5, F), [3, 2], [0, 3, 1]),
        ValueError,
        "sorted_indices: got .*permutation",
    ),
    Bad(
        "packed and lengths",
        lambda: {**packed(torch.randn(5, F), [3, 2]), **lengths(2, 2, 1)},
        ValueError,
        "lengths: got a tensor",
    ),
    # numbers and names
    Bad("dropout range", lambda: {"dropout": 1.5}, ValueError, "dropout: got 1.5, expected a probability"),
    Bad("dropout text", lambda: {"dropout": "half"}, ValueError, "dropout: got 'half', expected a probability"),
    Bad("no layers", lambda: {"num_layers": 0}, ValueError, "num_layers: got 0, expected a positive integer"),
    Bad(
        "nonlinearity",
        lambda: {"params": params(gates=1), "nonlinearity": "gelu"},
        ValueError,
        "rnn: nonlinearity: got 'gelu', expected tanh or relu",
        op="rnn",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_call(bad: Bad) -> None:
    function = getattr(ptk, bad.op)
    arguments = good()
    if bad.op != "lstm":
        arguments["params"] = params(gates=3 if bad.op == "gru" else 1)
    with pytest.raises(bad.error, match=bad.message):
        function(**{**arguments, **bad.changes()})


LAYER = [
    ("mode", lambda: {"mode": "mgu"}, "mode: got 'mgu'"),
    ("layout", lambda: {"layout": "ragged"}, "layout: got 'ragged'"),
    ("one bias", lambda: {"bias_ih": torch.randn(4 * H)}, "bias_hh: got one bias without the other"),
    ("cells alone", lambda: {"cx": torch.randn(1, 2, H)}, "cx: got cells without hx"),
    (
        "cells of a gru",
        lambda: {"mode": "gru", "hx": torch.randn(1, 2, H), "cx": torch.randn(1, 2, H)},
        "cx: got cells for",
    ),
    ("directions", lambda: {"weight_ih": torch.randn(3, 4 * H, F)}, "weight_ih: got 3 directions, expected 2"),
    ("batch_size", lambda: {"batch_size": 5}, "batch_sizes: got .*expected 5"),
]


@pytest.mark.parametrize(("name", "changes", "message"), LAYER, ids=[name for name, _, _ in LAYER])
def test_bad_layer(name: str, changes: Callable[[], dict[str, Any]], message: str) -> None:
    arguments = {
        "input": torch.randn(3, F),
        "weight_ih": torch.randn(4 * H, F),
        "weight_hh": torch.randn(4 * H, H),
        "sizes": torch.tensor([2, 1]),
    }
    with pytest.raises(ValueError, match=f"packed_rnn: {message}"):
        ptk.packed_rnn(**{**arguments, **changes()})
    with pytest.raises(ValueError, match=f"packed_rnn: {message}"):
        ptk.explain(ptk.packed_rnn, **{**arguments, **changes()}) if name != "batch_size" else ptk.packed_rnn(
            **{**arguments, **changes()}
        )


Op = dict[str, Any]


def op_arguments() -> Op:
    return {
        "input": torch.randn(5, F),
        "sizes": torch.tensor([3, 2]),
        "sorted_indices": None,
        "state": [torch.randn(1, B, H), torch.randn(1, B, H)],
        "params": params(),
        "batch_size": B,
        "layout": "packed",
        "mode": "lstm",
    }


OP_BAD: list[tuple[str, Callable[[], Op], str]] = [
    ("input", lambda: {"input": torch.ones(5, F).int()}, "input: got another dtype"),
    ("rank", lambda: {"input": torch.randn(5, 1, F)}, "input: got 3 dimensions, expected 2"),
    ("no sizes", lambda: {"sizes": None}, "sizes: got None"),
    ("sizes dtype", lambda: {"sizes": torch.tensor([3, 2]).int()}, "sizes: got a tensor that is not a vector of int64"),
    ("sizes grow", lambda: {"sizes": torch.tensor([3, 4])}, "sizes: got 4 sequences at step 1 after 3"),
    ("sizes first", lambda: {"sizes": torch.tensor([2, 3])}, "sizes: got 2 sequences at the first step"),
    ("sizes sum", lambda: {"sizes": torch.tensor([3, 1])}, "sizes: got a sum of 4"),
    ("order", lambda: {"sorted_indices": torch.tensor([0, 2, 3])}, "sorted_indices: got 3 out of range"),
    ("state count", lambda: {"state": [torch.randn(1, B, H)]}, "state: got 1 tensors, expected none or 2"),
    ("state shape", lambda: {"state": [torch.randn(1, 2, H)] * 2}, "state: got shape .1, 2, 6., expected .1, 3, 6."),
    ("state dtype", lambda: {"state": [torch.randn(1, B, H).double()] * 2}, "state: got another dtype"),
    ("params count", lambda: {"params": params()[:1]}, "params: got 1 tensors"),
    ("params shape", lambda: {"params": params(hidden=H + 1)}, "state: got shape"),
    ("layout", lambda: {"layout": "nested"}, "layout: got 'nested'"),
    ("mode", lambda: {"mode": "LSTM"}, "mode: got 'LSTM'"),
    ("batch", lambda: {"batch_size": -1}, "batch_size: got -1"),
    (
        "lengths",
        lambda: {"layout": "varlen", "sizes": torch.tensor([0, 4, 3, 5])},
        "sizes: got cu_seqlens that decrease",
    ),
]


@pytest.mark.parametrize(("name", "changes", "message"), OP_BAD, ids=[name for name, _, _ in OP_BAD])
def test_the_operator_checks_for_itself(name: str, changes: Callable[[], Op], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"packed_rnn: {message}"):
        torch.ops.ptkernels.packed_rnn(**{**op_arguments(), **changes()})


def test_the_backward_checks_what_it_is_given() -> None:
    arguments = op_arguments()
    output, h_n, _, gates, cells = torch.ops.ptkernels.packed_rnn(**arguments, bidirectional=False, save=True)
    valid = {
        "grad_output": torch.randn_like(output),
        "grad_h_n": torch.randn_like(h_n),
        "grad_c_n": None,
        **arguments,
        "output": output,
        "gates": gates,
        "cells": cells,
        "bidirectional": False,
        "output_mask": [True] * 7,
    }
    backward = torch.ops.ptkernels._packed_rnn_backward
    assert len(backward(**valid)) == 7
    for changes, message in (
        ({"grad_output": output[:3]}, "grad_output: got shape"),
        ({"grad_h_n": h_n.double()}, "grad_h_n: got another dtype"),
        ({"gates": gates[:, :2]}, "gates: got shape"),
        ({"cells": cells.double()}, "cells: got another dtype"),
        ({"output": output[:, :2]}, "output: got shape"),
        ({"output_mask": [True]}, "output_mask: got 1 entries"),
    ):
        with pytest.raises(RuntimeError, match=f"packed_rnn: {message}"):
            backward(**{**valid, **changes})


def test_modules_name_the_argument() -> None:
    with pytest.raises(ValueError, match="lstm: input: got 4 features, expected 5"):
        ptk.nn.LSTM(F, H)(torch.randn(T, B, 4))
    with pytest.raises(ValueError, match="GRUCell: input: got"):
        ptk.nn.GRUCell(F, H)(torch.randn(T, B, F))
    with pytest.raises(ValueError, match="LSTMCell: hx: got another number of dimensions"):
        ptk.nn.LSTMCell(F, H)(torch.randn(B, F), (torch.randn(H), torch.randn(H)))
    with pytest.raises(ValueError, match="RNN: nonlinearity"):
        ptk.nn.RNN(F, H, nonlinearity="gelu")


def test_a_backend_that_cannot_run_is_an_error() -> None:
    module = nn.LSTM(F, H).to("meta")
    with (
        ptk.backend("cpu"),
        pytest.raises(BackendError, match="lstm: backend 'cpu' was asked for, got tensors on meta"),
    ):
        ptk.lstm(torch.randn(T, B, F, device="meta"), None, list(module.parameters()))
