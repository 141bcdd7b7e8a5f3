"""Cells that torch lacks as modes of the operator, and zoneout: what values and derivatives of samples do not show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import ptkernels as ptk
from ptkernels.ops.packed_rnn.spec import _Case

MODES = ("peephole_lstm", "reset_before_gru", "layer_norm_lstm", "layer_norm_gru")
KINDS = ("PeepholeLSTMCell", "ResetBeforeGRUCell", "LayerNormLSTMCell", "LayerNormGRUCell")
LENGTHS = [5, 2, 0, 7]


def tensors(result: Any) -> list[Tensor]:
    return [t for part in result for t in (part if isinstance(part, tuple) else (part,))]


def results_and_gradients(layer: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    torch.manual_seed(3)  # of what zoneout draws
    results = tensors(layer(*args, **kwargs))
    return [*results, *torch.autograd.grad(results, list(layer.parameters()), [r.cos() for r in results])]


def layer_of(kind: str, zoneout: float = 0.0, size: int = 6, dtype: torch.dtype = torch.float64) -> Any:
    def cell() -> Any:
        plain = getattr(ptk.nn, kind)(size, size, dtype=dtype)
        return ptk.nn.ZoneoutCell(plain, zoneout, zoneout / 2) if zoneout else plain

    return ptk.nn.CellLayer(cell(), cell())


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_no_bit_depends_on_the_threads(mode: str, dtype: torch.dtype, zoneout: float) -> None:
    """The operator's: what torch normalises of the input before it depends on them."""
    lengths = (6, 5, 5, 4, 4, 3, 2, 1, 0)
    case = _Case("", mode, lengths, 200, 200, both=True, state=True, layout="time_first", zoneout=zoneout, train=True)
    sample = case.sample(dtype, "cpu", requires_grad=True)
    named = dict(zip(("input", "weight_ih", "weight_hh"), sample.args, strict=True)) | sample.kwargs
    found = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        results = ptk.packed_rnn(**named)
        grads = torch.autograd.grad(results, [named[n] for n in sample.grad_inputs], [r.cos() for r in results])
        found.append([*results, *grads])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_bits_of_the_whole(kind: str, batch: int) -> None:
    layer = ptk.nn.CellLayer(getattr(ptk.nn, kind)(6, 37))
    x = torch.randn(9, batch, 6)
    whole, final = layer(x)
    first, state = layer(x[:4])
    rest, again = layer(x[4:], state)
    assert torch.equal(whole, torch.cat([first, rest]))
    assert all(map(torch.equal, tensors((final,)), tensors((again,))))


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_keeps_the_same_units_in_every_layout(kind: str) -> None:
    layer = layer_of(kind, 0.4)
    data = torch.randn(sum(LENGTHS), 6, dtype=torch.float64)
    sequences = list(data.split(LENGTHS))
    padded, lengths = torch.nn.utils.rnn.pad_sequence(sequences), torch.tensor(LENGTHS)
    inside = torch.arange(max(LENGTHS)) < lengths[:, None]
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    expected = results_and_gradients(layer, data, cu_seqlens=cu_seqlens)
    found = results_and_gradients(layer, padded, lengths=lengths)
    torch.testing.assert_close(found[0].transpose(0, 1)[inside], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-12, atol=1e-12)
    with ptk.backend("reference"):
        torch.testing.assert_close(
            results_and_gradients(layer, data, cu_seqlens=cu_seqlens), expected, rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("mode", ["lstm", "gru", *MODES])
def test_derivatives_of_what_is_drawn(mode: str) -> None:
    sample = {case.name: case for case in samples()}[f"{mode.replace('_', '-')}-zoneout"]
    named = dict(zip(("input", "weight_ih", "weight_hh"), sample.args, strict=True)) | sample.kwargs
    leaves = [named[name].detach().requires_grad_() for name in sample.grad_inputs]

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        call = named | dict(zip(sample.grad_inputs, values, strict=True)) | {"train": True}
        return ptk.packed_rnn(**call)

    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def samples() -> list[Any]:
    from ptkernels._registry import all_ops

    return list(all_ops()["packed_rnn"].samples(torch.float64, "cpu", False, "gradcheck"))


def test_shares_of_zoneout() -> None:
    x, h = torch.randn(4000, 3), torch.randn(4000, 8)
    weights = [torch.randn(24, n) for n in (3, 8)]

    def step(**options: Any) -> Tensor:
        output: Tensor = ptk.packed_rnn(x[None], *weights, hx=h[None], mode="gru", layout="time_first", **options)[0][0]
        return output

    fresh = step()
    for share in (0.1, 0.75):
        kept = step(zoneout=share, train=True) == h
        assert abs(float(kept.float().mean()) - share) < 0.01
        # By unit and by sequence alike: a pattern would show in the means along an axis.
        assert (kept.float().mean(0) - share).abs().max() < 0.04
    assert torch.equal(step(zoneout=1.0, train=True), h)
    assert torch.equal(step(zoneout=0.0, train=True), fresh)
    torch.testing.assert_close(step(zoneout=0.25), fresh + 0.25 * (h - fresh))


def test_zoneout_replays_under_checkpointing_and_recompute() -> None:
    layer, x = layer_of("PeepholeLSTMCell", 0.5), torch.randn(6, 3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (
        lambda t: layer(t)[0],
        lambda t: torch.utils.checkpoint.checkpoint(lambda s: layer(s)[0], t, use_reentrant=False),
    ):
        torch.manual_seed(1)
        found.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(*found)
    weights = [torch.randn(24, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    again = []
    for recompute in (False, True):
        torch.manual_seed(2)
        output = ptk.packed_rnn(x, *weights, layout="time_first", zoneout=0.5, train=True, recompute=recompute)[0]
        again.append(torch.autograd.grad(output.square().sum(), [x, *weights]))
    assert all(map(torch.equal, *again))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_zoneout_under_vmap(randomness: str) -> None:
    layer = layer_of("ResetBeforeGRUCell", 0.5)
    x = torch.randn(1, 4, 2, 6, dtype=torch.float64).expand(3, 4, 2, 6)
    mapped = torch.vmap(lambda data: layer(data)[0], randomness=randomness)(x)
    assert torch.equal(mapped[0], mapped[1]) == (randomness == "same")


def test_rows_far_from_zero_are_normalised_exactly() -> None:
    """The mean of a product is a thousand times its deviation."""
    layer = ptk.nn.CellLayer(ptk.nn.LayerNormLSTMCell(5, 64))
    with torch.no_grad():
        layer.cell.weight_hh += 40
    x, hx = torch.randn(3, 4, 5), (torch.rand(1, 4, 64), torch.rand(1, 4, 64) + 100)
    output = layer(x, hx)[0]
    exact = layer.double()(x.double(), tuple(s.double() for s in hx))[0]
    with ptk.backend("reference"):
        own = layer.float()(x, hx)[0]
    assert (output - exact).abs().max() <= 3 * (own - exact).abs().max() + 1e-5


def test_padding_reaches_nothing() -> None:
    layer, lengths = layer_of("LayerNormGRUCell"), torch.tensor([2, 4])
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    clean = results_and_gradients(layer, x, lengths=lengths)
    x[2:, 0] = torch.nan
    assert all(map(torch.equal, clean, results_and_gradients(layer, x, lengths=lengths)))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_compile_as_one_graph(kind: str) -> None:
    layer, x = layer_of(kind, 0.2), torch.randn(5, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer.eval(), fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_run_them(kind: str, strict: None) -> None:
    layer = layer_of(kind, 0.2)
    layer(pack_sequence([torch.randn(n, 6, dtype=torch.float64) for n in (3, 1)]))
    sample = {case.name: case for case in samples()}[f"{layer.cell.mode.replace('_', '-')}-zoneout"]
    assert ptk.explain(ptk.packed_rnn, *sample.args, **sample.kwargs).backend == "cpu"


def test_bad_calls_are_named() -> None:
    x, w = torch.randn(2, 3, 4), torch.randn(16, 4)
    peephole = {"weight_peephole": torch.randn(3, 4), "mode": "peephole_lstm"}
    norm = {"norm_hidden": torch.randn(2, 12), "mode": "layer_norm_gru"}
    tanh = {"mode": "tanh", "zoneout": 0.5}

    def run(*args: Any, **kwargs: Any) -> Any:
        return ptk.packed_rnn(x, *args, layout="time_first", **kwargs)

    run(w, w, **peephole)
    for error, text, args, kwargs in (
        (TypeError, "weight_peephole: got NoneType for peephole_lstm", (w, w), {"mode": "peephole_lstm"}),
        (ValueError, "weight_peephole: got a tensor for lstm, expected None", (w, w), peephole | {"mode": "lstm"}),
        (
            ValueError,
            r"params\[2\]: got shape \[2, 4\], expected \[3, 4\]",
            (w, w),
            peephole | {"weight_peephole": w[:2]},
        ),
        (ValueError, "weight_ih: got a tensor for layer_norm_gru", (w, w), norm),
        (TypeError, "norm_hidden: got NoneType for layer_norm_gru", (None, w), {"mode": "layer_norm_gru"}),
        (ValueError, "zoneout: got 1.5, expected a probability from 0 to 1", (w, w), peephole | {"zoneout": 1.5}),
        (ValueError, r"zoneout: got \(0.5,\), expected a probability, or", (w, w), peephole | {"zoneout": (0.5,)}),
        (ValueError, r"zoneout: got .* for tanh, expected 0.0", (w, torch.randn(16, 16)), tanh),
        (ValueError, "eps: got -1.0, expected a number of 0 or more", (w, w), peephole | {"eps": -1.0}),
    ):
        with pytest.raises(error, match=f"packed_rnn: {text}"):
            run(*args, **kwargs)
    with pytest.raises(ValueError, match="input: got 4 features, expected the products of every gate: 12"):
        run(None, torch.randn(12, 4), **norm)
    other = ptk.nn.ZoneoutCell(ptk.nn.PeepholeLSTMCell(4, 4), 0.1)
    with pytest.raises(ValueError, match=r"CellLayer: reverse_cell: got the kind .*expected the cell's"):
        ptk.nn.CellLayer(ptk.nn.PeepholeLSTMCell(4, 4), other)
