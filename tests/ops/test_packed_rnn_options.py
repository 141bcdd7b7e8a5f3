"""What recurrent layers do beyond torch's: resets, recomputed gates, dropped recurrent weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import ptkernels as ptk

LENGTHS = torch.tensor([4, 6, 1, 0, 6, 3])
CELLS = ("LSTM", "GRU", "RNN")


def states(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def draw_states(name: str, rows: int, batch: int, hidden: int) -> tuple[Tensor, ...]:
    count = 2 if name == "LSTM" else 1
    return tuple(torch.randn(rows, batch, hidden, dtype=torch.float64, requires_grad=True) for _ in range(count))


# --- resets


def piecewise(module: nn.Module, x: Tensor, marks: Tensor, hx: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """torch's one-layer module on one sequence ``[steps, features]``, stretch by stretch."""
    both = module.bidirectional
    cuts = [0, *(t for t in range(1, len(x)) if marks[t]), len(x)]
    outputs, finals = [], []
    for begin, end in itertools.pairwise(cuts):
        state = [torch.zeros_like(s) for s in hx]
        if begin == 0 and not marks[0]:
            state = [torch.cat([s[:1], z[1:]]) for s, z in zip(hx, state, strict=True)]
        if end == len(x) and both:
            state = [torch.cat([z[:1], s[1:]]) for s, z in zip(hx, state, strict=True)]
        output, final = module(x[begin:end, None], tuple(state) if len(state) > 1 else state[0])
        outputs.append(output[:, 0])
        finals.append(states(final))
    ends = [torch.cat([finals[-1][i][:1], finals[0][i][1:]]) for i in range(len(hx))]
    return torch.cat(outputs), ends


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_resets_are_sequences_of_their_own(name: str, both: bool) -> None:
    theirs = getattr(nn, name)(3, 5, bidirectional=both).double()
    ours = getattr(ptk.nn, name)(3, 5, bidirectional=both).double()
    ours.load_state_dict(theirs.state_dict())
    batch, steps = len(LENGTHS), int(LENGTHS.max())
    x = torch.randn(batch, steps, 3, dtype=torch.float64, requires_grad=True)
    marks = torch.rand(batch, steps, generator=torch.Generator().manual_seed(2)) < 0.4
    marks[0, 0], marks[1, 0] = True, False
    hx = draw_states(name, 2 if both else 1, batch, 5)
    outputs, finals = [], []
    for b, length in enumerate(LENGTHS):
        own = tuple(s[:, b : b + 1] for s in hx)
        output, final = piecewise(theirs, x[b, :length], marks[b], own) if length else (x[b, :0, :1], list(own))
        outputs.append(output.flatten())
        finals.append(final)
    expected = [torch.cat(outputs), *(torch.cat(own, 1) for own in zip(*finals, strict=True))]
    wanted = torch.autograd.grad(expected, [x, *hx, *theirs.parameters()], [e.cos() for e in expected])

    inside = torch.arange(steps) < LENGTHS[:, None]
    full = LENGTHS > 0
    data, flat_marks = x[inside], marks[inside]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)])
    packed = pack_padded_sequence(x[full], LENGTHS[full], True, enforce_sorted=False)
    packed_marks = pack_padded_sequence(marks[full][..., None], LENGTHS[full], True, enforce_sorted=False).data[:, 0]
    state: Any = hx if name == "LSTM" else hx[0]
    some: Any = tuple(s[:, full] for s in hx) if name == "LSTM" else hx[0][:, full]
    calls = {
        "concatenated": ours(data, state, cu_seqlens=cu_seqlens, resets=flat_marks),
        "padded": ours(x.transpose(0, 1), state, lengths=LENGTHS, resets=marks.T),
        "packed": ours(packed, some, resets=packed_marks),
    }
    for form, (output, final) in calls.items():
        if form == "padded":
            output = output.transpose(0, 1)[inside]
        elif form == "packed":
            output = pad_packed_sequence(output, True, total_length=steps)[0][inside[full]]
            final = [s.new_zeros(s.size(0), batch, 5).index_copy(1, full.nonzero()[:, 0], s) for s in states(final)]
            final = tuple(torch.where(full[:, None], s, h) for s, h in zip(final, hx, strict=True))
        results = [output.flatten(), *states(final)]
        for found, right in zip(results, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11, msg=form)
        grads = torch.autograd.grad(results, [x, *hx, *ours.parameters()], [r.cos() for r in results])
        for found, right in zip(grads, wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10, msg=form)


def test_resets_through_layers_and_one_sequence() -> None:
    module = ptk.nn.GRU(3, 4, num_layers=2)
    x, marks = torch.randn(7, 3), torch.tensor([0, 0, 1, 0, 0, 1, 0]).bool()
    output, final = module(x, resets=marks)
    expected = [module(piece) for piece in x.split([2, 3, 2])]
    # The pieces run as one batch, whose sums have another order than those of a sequence alone.
    torch.testing.assert_close(output, torch.cat([out for out, _ in expected]), rtol=0, atol=1e-6)
    torch.testing.assert_close(final, expected[-1][1], rtol=0, atol=1e-6)
    assert torch.equal(module(x, resets=torch.zeros(7).bool())[0], module(x)[0])


@pytest.mark.parametrize(
    ("resets", "error", "message"),
    [
        ([True], TypeError, "gru: resets: got list, expected torch.Tensor"),
        (torch.zeros(5, 2), TypeError, "gru: resets: got dtype float32, expected bool"),
        (
            torch.zeros(2, 5).bool(),
            ValueError,
            r"gru: resets: got shape \[2, 5\], expected \[5, 2\], one for each token",
        ),
    ],
)
def test_bad_resets(resets: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ptk.nn.GRU(3, 4)(torch.randn(5, 2, 3), resets=resets)


# --- recomputed gates


def saved_bytes(module: nn.Module, x: Tensor) -> tuple[int, list[Tensor]]:
    """Memory that a forward keeps for its backward besides input and parameters, and the gradients."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, final = module(x)
    grads = torch.autograd.grad([output, *states(final)], [x, *module.parameters()], [output, *states(final)])
    return sum(kept.values()), list(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "share"), [("LSTM", 0.4), ("GRU", 0.4), ("RNN", 1.0)])
def test_recomputing_gives_the_same_bits_with_less_memory(name: str, share: float, dtype: torch.dtype) -> None:
    kwargs: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    plain = getattr(ptk.nn, name)(12, 32, **kwargs).to(dtype)
    frugal = getattr(ptk.nn, name)(12, 32, **kwargs, recompute=True).to(dtype)
    frugal.load_state_dict(plain.state_dict())
    assert "recompute=True" in str(frugal)
    x = torch.randn(20, 3, 12, dtype=dtype, requires_grad=True)
    before, expected = saved_bytes(plain, x)
    after, found = saved_bytes(frugal, x)
    assert after <= share * before
    assert all(map(torch.equal, found, expected))


def test_recomputed_gates_under_transforms() -> None:
    module = ptk.nn.LSTM(3, 4, recompute=True).double()
    params = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def energy(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, (x,))[0].square().sum()

    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x[:2].detach().requires_grad_(),))
    each = torch.func.vmap(torch.func.grad(energy), (None, 0))(params, torch.stack([x.detach(), 2 * x.detach()]))
    alone = torch.func.grad(energy)(params, 2 * x.detach())
    for name, grad in each.items():
        torch.testing.assert_close(grad[1], alone[name], rtol=1e-12, atol=1e-12)


# --- dropped recurrent weights


def test_weight_dropout() -> None:
    module = ptk.nn.LSTM(3, 4, num_layers=2, weight_dropout=0.5).double()
    plain = ptk.nn.LSTM(3, 4, num_layers=2).double()
    assert "weight_dropout=0.5" in str(module)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    torch.manual_seed(3)
    dropped = {name: torch.dropout(p, 0.5, True) if "weight_hh" in name else p for name, p in module.named_parameters()}
    assert all(0 < int((dropped[f"weight_hh_l{i}"] == 0).sum()) < 64 for i in range(2))
    plain.load_state_dict(dropped)
    torch.manual_seed(3)
    output = module(x)[0]
    assert torch.equal(output, plain(x)[0])
    (grad,) = torch.autograd.grad(output.sum(), module.weight_hh_l0)
    assert torch.equal(grad == 0, dropped["weight_hh_l0"] == 0)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module.eval()(x)[0], plain(x)[0])
    with pytest.raises(ValueError, match=r"LSTM: weight_dropout: got 1\.5, expected a probability from 0 to 1"):
        ptk.nn.LSTM(3, 4, weight_dropout=1.5)
