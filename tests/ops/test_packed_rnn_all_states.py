"""States after every token of every layer: values and derivatives against torch's layers, one step at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import ptkernels as ptk

LENGTHS = torch.tensor([4, 0, 6, 1])
LAYERS = 2


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(nn, name)(3, 5, LAYERS, bidirectional=True, **options).double()
    ours = getattr(ptk.nn, name)(3, 5, LAYERS, bidirectional=True, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step_by_step(module: Any, x: Tensor) -> list[tuple[Tensor, ...]]:
    """States after every token of one sequence ``[steps, features]``: for each layer h, and c where there is one."""
    own = dict(module.named_parameters())
    found = []
    for layer in range(LAYERS):
        directions = []
        for suffix in (f"_l{layer}", f"_l{layer}_reverse"):
            options = {"proj_size": module.proj_size} if module.proj_size else {}
            single = type(module)(x.size(1), 5, **options).double()
            weights = {f"{n}_l0": own[f"{n}{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
            if module.proj_size:
                weights["weight_hr_l0"] = own[f"weight_hr{suffix}"]
            state, states = None, []
            for row in x.flip(0) if "reverse" in suffix else x:
                _, state = torch.func.functional_call(single, weights, (row[None], *([] if state is None else [state])))
                states.append([s[0] for s in (state if isinstance(state, tuple) else (state,))])
            columns = [torch.stack(column) for column in zip(*states, strict=True)]
            directions.append([c.flip(0) for c in columns] if "reverse" in suffix else columns)
        found.append(tuple(torch.cat(both, -1) for both in zip(*directions, strict=True)))
        x = found[-1][0]
    return found


def by_layer(states: Any) -> list[tuple[Any, ...]]:
    return [state if type(state) is tuple else (state,) for state in states]


def energy(tensors: list[Tensor]) -> Tensor:
    """With a gradient of its own for every element."""
    return sum((t.flatten() * torch.arange(1, t.numel() + 1) / t.numel()).sin().sum() for t in tensors)  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["packed", "padded", "batch first", "concatenated", "nested"])
@pytest.mark.parametrize(("name", "options"), [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})])
def test_every_form_of_input(name: str, options: dict[str, Any], form: str) -> None:
    theirs, ours = pair(name, **options)
    lengths = LENGTHS[LENGTHS > 0] if form == "packed" else LENGTHS
    sequences = [torch.randn(int(n), 3, dtype=torch.float64) for n in lengths]
    data = torch.cat(sequences).requires_grad_()
    each = data.split(lengths.tolist())
    running = [step_by_step(theirs, x) for x in each if len(x)]
    expected = [
        torch.cat([own[layer][i] for own in running]) for layer in range(LAYERS) for i in range(len(running[0][0]))
    ]

    padded = pad_sequence(list(each))
    inside = torch.arange(padded.size(0))[:, None] < lengths
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    if form == "packed":
        packed = pack_padded_sequence(padded, lengths, enforce_sorted=False)
        output, final, states = ours(packed, return_all_states=True)
        assert type(states[0]) is (tuple if name == "LSTM" else type(packed))
        states = [tuple(pad_packed_sequence(s)[0].transpose(0, 1)[inside.T] for s in own)
                  for own in ([s if name == "LSTM" else (s,) for s in states])]  # fmt: skip
        output = pad_packed_sequence(output)[0].transpose(0, 1)[inside.T]
    elif form == "nested":
        nested = torch.nested.nested_tensor_from_jagged(data, cu_seqlens)
        output, final, states = ours(nested, return_all_states=True)
        output, states = output.values(), [tuple(s.values() for s in own) for own in by_layer(states)]
    elif form == "concatenated":
        output, final, states = ours(data, cu_seqlens=cu_seqlens, return_all_states=True)
    else:
        batch_first = form == "batch first"
        ours.batch_first = batch_first
        x = padded.transpose(0, 1) if batch_first else padded
        output, final, states = ours(x, lengths=lengths, return_all_states=True)
        mask = inside.T if batch_first else inside
        for tensor in (t for own in by_layer(states) for t in own):
            assert not tensor[~mask].any()
        flat = (lambda t: t[mask]) if batch_first else (lambda t: t.transpose(0, 1)[mask.T])
        output, states = flat(output), [tuple(map(flat, own)) for own in by_layer(states)]
    found = [tensor for own in by_layer(states) for tensor in own]
    assert torch.equal(by_layer(states)[-1][0], output)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # With the final states, which must not be counted twice.
    leaves = [data, *ours.parameters()]
    last = list(final) if isinstance(final, tuple) else [final]
    with_final = torch.autograd.grad(energy(found) + energy(last), leaves, retain_graph=True)
    of_final = torch.autograd.grad(energy(last), leaves, retain_graph=True)
    wanted = torch.autograd.grad(energy(expected), [data, *theirs.parameters()])
    for all_of_it, part, right in zip(with_final, of_final, wanted, strict=True):
        torch.testing.assert_close(all_of_it - part, right, rtol=0, atol=1e-11)


def test_function_returns_what_the_module_does() -> None:
    for name, function in (("LSTM", ptk.lstm), ("GRU", ptk.gru), ("RNN", ptk.rnn)):
        _, module = pair(name)
        x = torch.randn(7, 3, dtype=torch.float64)
        *_, states = function(
            x, None, list(module.parameters()), num_layers=LAYERS, bidirectional=True, return_all_states=True
        )
        expected = module(x, return_all_states=True)[2]
        assert isinstance(states, tuple)
        assert len(states) == LAYERS
        for found, right in zip(by_layer(states), by_layer(expected), strict=True):
            assert all(map(torch.equal, found, right))
        for found, right in zip(by_layer(states), step_by_step(pair_of(module, name), x), strict=True):
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def pair_of(module: nn.Module, name: str) -> nn.Module:
    theirs = getattr(nn, name)(3, 5, LAYERS, bidirectional=True).double()
    theirs.load_state_dict(module.state_dict())
    return theirs


def test_states_begin_anew_at_resets() -> None:
    module = ptk.nn.LSTM(3, 5, num_layers=LAYERS).double()
    x, marks = torch.randn(7, 2, 3, dtype=torch.float64), torch.zeros(7, 2).bool()
    marks[[3, 5], 1] = True
    states = module(x, resets=marks, return_all_states=True)[2]
    for column, cuts in ((0, [7]), (1, [3, 2, 2])):
        pieces = [module(piece, return_all_states=True)[2] for piece in x[:, column].split(cuts)]
        for layer in range(LAYERS):
            for index in range(2):
                expected = torch.cat([piece[layer][index] for piece in pieces])
                torch.testing.assert_close(states[layer][index][:, column], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_are_those_that_the_next_call_takes(dtype: torch.dtype) -> None:
    module = ptk.nn.LSTM(3, 37, num_layers=LAYERS).to(dtype)
    x = torch.randn(9, 2, 3, dtype=dtype)
    with torch.no_grad():
        output, (h_n, c_n), states = module(x, return_all_states=True)
        plain, final = module(x)
        assert torch.equal(output, plain)
        assert torch.equal(h_n, final[0])
        assert torch.equal(c_n, final[1])
        for layer, (h, c) in enumerate(states):
            assert torch.equal(h[-1], h_n[layer])
            assert torch.equal(c[-1], c_n[layer])
        if dtype == torch.float32:
            middle = tuple(torch.stack([own[index][4] for own in states]) for index in range(2))
            assert torch.equal(module(x[5:], middle)[0], output[5:])
    recorded = module(x, return_all_states=True)[2]
    for found, right in zip(recorded, states, strict=True):
        assert all(map(torch.equal, found, right))


def test_nothing_depends_on_threads_or_on_recomputing() -> None:
    module = ptk.nn.LSTM(64, 128, num_layers=LAYERS)
    frugal = ptk.nn.LSTM(64, 128, num_layers=LAYERS, recompute=True)
    frugal.load_state_dict(module.state_dict())
    x = torch.randn(12, 8, 64, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads, layers in ((1, module), (2, module), (2, frugal)):
            torch.set_num_threads(threads)
            cells = [c for _, c in layers(x, return_all_states=True)[2]]
            results.append([*cells, *torch.autograd.grad(energy(cells), [x, *layers.parameters()])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_derivatives_and_transforms_through_layers() -> None:
    module = ptk.nn.LSTM(2, 3, num_layers=LAYERS).double()

    def cells(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(c for _, c in module(x, return_all_states=True)[2])

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cells, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(cells, (x,))
    batch = torch.stack([x.detach(), 3 * x.detach()])
    for found, right in zip(torch.func.vmap(cells)(batch), zip(*map(cells, batch), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(right), rtol=0, atol=1e-12)
    compiled = torch.compile(cells, fullgraph=True, backend="aot_eager")(x)
    for found, right in zip(compiled, cells(x), strict=True):
        assert torch.equal(found, right)
    exported = torch.export.export(Cells(module), (x.detach(),)).module()(x.detach())
    assert all(map(torch.equal, exported, cells(x)))
    traced = torch.jit.trace(Cells(module), (x.detach(),), check_trace=False)(batch[1])
    assert all(map(torch.equal, traced, cells(batch[1])))


class Cells(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(c for _, c in self.module(x, return_all_states=True)[2])


def test_dropout_is_between_layers_only() -> None:
    module = ptk.nn.LSTM(3, 5, num_layers=LAYERS, dropout=0.5).double()
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    dropped = module.train()(x, return_all_states=True)[2]
    whole = module.eval()(x, return_all_states=True)[2]
    assert all(map(torch.equal, dropped[0], whole[0]))
    assert not torch.equal(dropped[1][0], whole[1][0])


def test_only_an_lstm_has_cells() -> None:
    args = (torch.randn(4, 2, 3), torch.randn(15, 3), torch.randn(15, 5))
    with pytest.raises(ValueError, match="packed_rnn: return_cells: got True for gru, which has no cells"):
        ptk.packed_rnn(*args, mode="gru", layout="time_first", return_cells=True)
    arguments = (args[0], None, None, [], list(args[1:]), 2)
    with pytest.raises(RuntimeError, match="packed_rnn: all_cells: got true for 'gru', expected it for an lstm only"):
        torch.ops.ptkernels.packed_rnn(*arguments, "time_first", "gru", False, False, False, True)


def test_explain_covers_them() -> None:
    args = (torch.randn(4, 2, 3), torch.randn(20, 3), torch.randn(20, 5))
    account = ptk.explain("packed_rnn", *args, layout="time_first", return_cells=True)
    assert account.kernel.startswith("cpu.")
