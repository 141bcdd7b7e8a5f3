"""Cells that torch lacks, and the layer that runs any cell, against equations, loops and torch where it has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import ptkernels as ptk

LENGTHS = [4, 6, 0, 1, 3]
KINDS = ("LayerNormLSTMCell", "LayerNormGRUCell", "PeepholeLSTMCell", "ResetBeforeGRUCell")


def states(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def cell_of(kind: str, zoneout: float = 0.0) -> Any:
    cell = getattr(ptk.nn, kind)(3, 4, dtype=torch.float64)
    return ptk.nn.ZoneoutCell(cell, zoneout) if zoneout else cell


def test_layer_norm_lstm_is_its_equations() -> None:
    cell = cell_of("LayerNormLSTMCell")
    x, h, c = (torch.randn(2, n, dtype=torch.float64) for n in (3, 4, 4))

    def norm(value: Tensor) -> Tensor:
        return (value - value.mean(-1, keepdim=True)) / (value.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    i, f, g, o = (norm(x @ cell.weight_ih.T) + norm(h @ cell.weight_hh.T) + cell.bias).chunk(4, 1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    expected = (o.sigmoid() * norm(new_c).tanh(), new_c)
    for found, right in zip(cell(x, (h, c)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_layer_norm_gru_is_its_equations() -> None:
    cell = cell_of("LayerNormGRUCell")
    x, h = (torch.randn(2, n, dtype=torch.float64) for n in (3, 4))
    (rz, n), (hrz, hn) = ((x @ cell.weight_ih.T).split([8, 4], 1), (h @ cell.weight_hh.T).split([8, 4], 1))
    r, z = (F.layer_norm(rz, (8,)) + F.layer_norm(hrz, (8,)) + cell.bias[:8]).sigmoid().chunk(2, 1)
    n = (F.layer_norm(n, (4,)) + cell.bias[8:] + r * F.layer_norm(hn, (4,))).tanh()
    torch.testing.assert_close(cell(x, h), (1 - z) * n + z * h, rtol=1e-12, atol=1e-12)


def test_peepholes_of_zero_leave_torchs_lstm() -> None:
    cell, theirs = cell_of("PeepholeLSTMCell"), nn.LSTMCell(3, 4).double()
    nn.init.zeros_(cell.weight_peephole)
    nn.init.zeros_(theirs.bias_hh)
    for own, other in (
        (cell.weight_ih, theirs.weight_ih),
        (cell.weight_hh, theirs.weight_hh),
        (cell.bias, theirs.bias_ih),
    ):
        other.data.copy_(own.data)
    x = torch.randn(2, 3, dtype=torch.float64)
    for found, right in zip(cell(x), theirs(x), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    h, c = torch.randn(2, 2, 4, dtype=torch.float64)
    nn.init.normal_(cell.weight_peephole)
    i, f, g, o = (x @ cell.weight_ih.T + cell.bias + h @ cell.weight_hh.T).chunk(4, 1)
    p = cell.weight_peephole
    new_c = (f + p[1] * c).sigmoid() * c + (i + p[0] * c).sigmoid() * g.tanh()
    found = cell(x, (h, c))
    torch.testing.assert_close(found[1], new_c, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], (o + p[2] * new_c).sigmoid() * new_c.tanh(), rtol=1e-12, atol=1e-12)


def test_reset_before_differs_from_torchs_gru_in_its_candidate_only() -> None:
    cell = cell_of("ResetBeforeGRUCell")
    x, h = (torch.randn(2, n, dtype=torch.float64) for n in (3, 4))
    (r, z, n), (ur, uz, un) = (x @ cell.weight_ih.T + cell.bias).chunk(3, 1), cell.weight_hh.chunk(3)
    z = (z + h @ uz.T).sigmoid()
    n = (n + ((r + h @ ur.T).sigmoid() * h) @ un.T).tanh()
    torch.testing.assert_close(cell(x, h), (1 - z) * n + z * h, rtol=1e-12, atol=1e-12)


def test_zoneout_keeps_units_or_means() -> None:
    cell = ptk.nn.ZoneoutCell(cell_of("PeepholeLSTMCell"), 0.3, 0.6)
    x, h, c = torch.randn(5000, 3).double(), torch.randn(5000, 4).double(), torch.randn(5000, 4).double()
    new = cell.cell(x, (h, c))
    for found, old, fresh, p in zip(cell(x, (h, c)), (h, c), new, (0.3, 0.6), strict=True):
        kept = found == old
        assert torch.equal(found[~kept], fresh[~kept])
        assert abs(float(kept.double().mean()) - p) < 0.02
    torch.manual_seed(1)
    first = cell(x, (h, c))
    torch.manual_seed(1)
    assert all(map(torch.equal, first, cell(x, (h, c))))
    for found, old, fresh, p in zip(cell.eval()(x, (h, c)), (h, c), new, (0.3, 0.6), strict=True):
        torch.testing.assert_close(found, p * old + (1 - p) * fresh, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zoneout", [0.0, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_a_loop_over_sequences(kind: str, zoneout: float) -> None:
    layer = ptk.nn.CellLayer(cell_of(kind, zoneout), cell_of(kind, zoneout)).eval()
    count = layer.cell.num_states
    lengths, batch = torch.tensor(LENGTHS), len(LENGTHS)
    data = torch.randn(sum(LENGTHS), 3, dtype=torch.float64, requires_grad=True)
    hx = tuple(torch.randn(2, batch, 4, dtype=torch.float64, requires_grad=True) for _ in range(count))
    outputs, finals = [], []
    for b, sequence in enumerate(data.split(LENGTHS)):
        both = []
        for d, cell in enumerate((layer.cell, layer.reverse_cell)):
            state, seen = tuple(s[d, b : b + 1] for s in hx), []
            for row in sequence.flip(0) if d else sequence:
                state = states(cell(row[None], state if count > 1 else state[0]))
                seen.append(state[0])
            both.append((torch.cat(seen[:: -1 if d else 1]) if seen else sequence.new_zeros(0, 4), state))
        outputs.append(torch.cat([both[0][0], both[1][0]], 1))
        finals.append([torch.stack([both[0][1][i], both[1][1][i]]) for i in range(count)])
    expected = [torch.cat(outputs), *(torch.cat(own, 1) for own in zip(*finals, strict=True))]
    wanted = torch.autograd.grad(expected, [data, *hx, *layer.parameters()], [e.cos() for e in expected])
    state: Any = hx if count > 1 else hx[0]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    padded = nn.utils.rnn.pad_sequence(list(data.split(LENGTHS)))
    inside = torch.arange(max(LENGTHS)) < lengths[:, None]
    calls = {
        "concatenated": layer(data, state, cu_seqlens=cu_seqlens),
        "nested": layer(torch.nested.nested_tensor_from_jagged(data, cu_seqlens), state),
        "padded": layer(padded, state, lengths=lengths),
    }
    for form, (output, final) in calls.items():
        flat = output.values() if form == "nested" else output.transpose(0, 1)[inside] if form == "padded" else output
        results = [flat, *states(final)]
        grads = torch.autograd.grad(results, [data, *hx, *layer.parameters()], [r.cos() for r in results])
        for found, right in zip([*results, *grads], [*expected, *wanted], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10, msg=form)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind: str) -> None:
    layer = ptk.nn.CellLayer(cell_of(kind))
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (3, 1)])
    names = [name for name, _ in layer.named_parameters()]

    def run(data: Tensor, *params: Tensor) -> Tensor:
        output, _ = torch.func.functional_call(
            layer, dict(zip(names, params, strict=True)), (packed._replace(data=data),)
        )
        return output.data

    leaves = [t.detach().clone().requires_grad_() for t in (packed.data, *layer.parameters())]
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves, check_undefined_grad=False)


def test_bad_calls_are_named() -> None:
    layer = ptk.nn.CellLayer(cell_of("LayerNormLSTMCell"))
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="CellLayer: input: got 2 features, expected 3"):
        layer(x[..., :2])
    with pytest.raises(ValueError, match=r"CellLayer: hx: got shapes .*, expected 2 times \[1, 2, 4\]"):
        layer(x, torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="CellLayer: reverse_cell: got other states"):
        ptk.nn.CellLayer(cell_of("LayerNormLSTMCell"), cell_of("LayerNormGRUCell"))
    with pytest.raises(ValueError, match="ZoneoutCell: probability: got 2, expected"):
        ptk.nn.ZoneoutCell(cell_of("LayerNormGRUCell"), 2)
