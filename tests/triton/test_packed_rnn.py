"""The recurrent layers' Triton kernels, launched once for all steps and once per step; the samples take either."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import op_checks as contract
import pytest
import torch
from comparing import DEVICE

import ptkernels as ptk
from ptkernels import _registry
from ptkernels.ops.packed_rnn import spec
from ptkernels.ops.packed_rnn import triton as launch

SPEC = _registry.get("packed_rnn")
SAMPLES = {
    sample.name: sample
    for level in ("gradcheck", "quick")
    for sample in SPEC.samples(torch.float32, DEVICE, False, level)
    # Projections, and cells whose step is more than a product, are launched step by step alone.
    if not {"weight_hr", "return_cells", "zoneout"} & set(sample.kwargs) and sample.args[0].numel() < 500
    if sample.kwargs["mode"] in ("lstm", "gru", "tanh", "relu")
}
# Torch has no projected cell to take c from after every token: the rule's peer is the reference in the same dtype.
OF_CELLS = replace(SPEC, baseline=SPEC.reference)
PLANS = {
    "whole": lambda *args: [launch.Tile(16, 32, 32, 4, 1)],
    "steps": lambda *args: [],
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", SAMPLES)
def test_values_and_gradients(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "persistent_tiles", PLANS[plan])
    sample = SAMPLES[name]
    with ptk.backend("triton"):
        assert SPEC.explain(*sample.args, **sample.kwargs).backend == "triton"
        ours = contract.value_and_gradients(SPEC.function, SPEC, sample)
    contract.assert_results_within_rule(SPEC, sample, torch.float32, ours)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("projection", [0, 2])
def test_offsets_of_64_bits(plan: str, projection: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direction of 2**31 gates would not fit here; the kernels for it do."""
    monkeypatch.setattr(launch, "persistent_tiles", PLANS[plan])
    monkeypatch.setattr(launch, "LARGEST_OFFSET", 0)
    sample = spec._Case("wide", "lstm", (3, 1), hidden=3, both=True, projection=projection).sample(
        torch.float32, DEVICE, False
    )
    with ptk.backend("triton"):
        ours = contract.value_and_gradients(SPEC.function, SPEC, sample)
    contract.assert_results_within_rule(SPEC, sample, torch.float32, ours)


@pytest.mark.parametrize(
    ("wanted", "cells"),
    [(None, True), (("weight_hr",), False), (("weight_hh", "bias_ih"), False)],
    ids=str,
)
def test_projection_of_padded_sequences(wanted: tuple[str, ...] | None, cells: bool) -> None:
    """More sequences, units and outputs than a tile has; all gradients, or some; of cells of every token as well."""
    rows = (3, 0, 2, *[1] * 14)
    case = spec._Case("padded", "lstm", rows, 3, 19, True, projection=17, layout="batch_first", cells=cells)
    sample = case.sample(torch.float32, DEVICE, False)
    sample = replace(sample, grad_inputs=wanted or sample.grad_inputs)
    with ptk.backend("triton"):
        ours = contract.value_and_gradients(SPEC.function, SPEC, sample)
    contract.assert_results_within_rule(OF_CELLS if cells else SPEC, sample, torch.float32, ours)


ROWS = (2, 0, 3, *[1] * 14)
CELLS = {
    # More sequences than one program has, so that several add to the gradients of vectors.
    "layer_norm_lstm": spec._Case("blocks", "layer_norm_lstm", ROWS, hidden=65, both=True, layout="batch_first"),
    "layer_norm_gru": spec._Case("blocks", "layer_norm_gru", ROWS, hidden=65, layout="varlen"),
    # What is drawn follows sequences, which are not in the order of their lengths.
    "lstm": spec._Case("drawn", "lstm", ROWS, layout="varlen", zoneout=(0.3, 0.5), train=True, both=True),
    "gru": spec._Case("drawn", "gru", ROWS, layout="time_first", zoneout=0.3, train=True, both=True),
}


@pytest.mark.parametrize("mode", CELLS)
def test_cells_of_many_sequences(mode: str) -> None:
    sample = CELLS[mode].sample(torch.float32, DEVICE, False)
    with ptk.backend("triton"):
        ours = contract.value_and_gradients(SPEC.function, SPEC, sample)
    contract.assert_results_within_rule(SPEC, sample, torch.float32, ours)


@pytest.mark.parametrize("layout", ["packed", "varlen"])
def test_cells_of_every_token_beside_a_projection(layout: str) -> None:
    """From given states; with gradients of all results, and of the cells alone."""
    case = spec._Case("cells", lengths=(4, 3, 3, 1), hidden=7, projection=3, state=True, layout=layout, cells=True)
    sample = case.sample(torch.float32, DEVICE, False)
    with ptk.backend("triton"):
        ours = contract.value_and_gradients(SPEC.function, SPEC, sample)
        of_cells = value_and_gradient_of(SPEC.function, sample, 3)
    contract.assert_results_within_rule(OF_CELLS, sample, torch.float32, ours)
    expected = value_and_gradient_of(SPEC.reference, sample, 3)
    torch.testing.assert_close(of_cells, expected)


def value_and_gradient_of(function: Any, sample: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of a call's results, and the gradient of U through it alone."""
    leaf = sample.args[2].detach().requires_grad_()
    result = function(*sample.args[:2], leaf, **sample.kwargs)[index]
    return result, torch.autograd.grad(result.square().sum(), leaf)[0]


@pytest.mark.parametrize(("mode", "projection"), [("lstm", 0), ("lstm", 4), ("gru", 0)])
def test_layers_and_directions_of_a_stack(mode: str, projection: int, device: str) -> None:
    torch.manual_seed(0)
    kind, options = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[mode], {"num_layers": 2, "bidirectional": True}
    module = kind(5, 6, **options, **({"proj_size": projection} if projection else {}))
    data, lengths = torch.randn(4, 3, 5), torch.tensor([4, 1, 2])
    packed = torch.nn.utils.rnn.pack_padded_sequence(data, lengths, enforce_sorted=False)
    want = module(packed)[0].data
    on_device = packed.to(device)
    params = [param.to(device) for param in module.parameters()]
    with ptk.backend("triton"):
        got = getattr(ptk, mode)(on_device, None, params, num_layers=2, bidirectional=True)[0].data
    torch.testing.assert_close(got.cpu(), want)
    # Without the backend asked for, the operator is what it was.
    compiled = getattr(ptk, mode)(packed, None, list(module.parameters()), num_layers=2, bidirectional=True)[0].data
    torch.testing.assert_close(compiled, want)
