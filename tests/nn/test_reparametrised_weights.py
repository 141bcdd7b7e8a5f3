"""Weights that are computed: pruning, weight norm and spectral norm, as hooks and as parametrizations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batch, network, torch_side
from torch import nn
from torch.nn.utils import parametrizations, prune

# Where each family has a weight; quantized codes are no parameter.
PLACES = {
    "attention": ("layer.self_attn", "in_proj_weight"),
    "convolution": ("layer.conv", "weight"),
    "recurrent": ("layer", "weight_hh_l0"),
    "gated": ("layer", "weight_hh"),
}


pytestmark = pytest.mark.parametrize("family", PLACES)


def reparametrised(family: str, how: Callable[[nn.Module, str], Any]) -> nn.Module:
    model = network(family)
    path, name = PLACES[family]
    torch.manual_seed(3)
    how(model.get_submodule(path), name)
    return model


REPARAMETRISATIONS = {
    "pruning": lambda module, name: prune.random_unstructured(module, name, 0.5),
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, old": nn.utils.weight_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of")
@pytest.mark.parametrize("kind", REPARAMETRISATIONS)
def test_reparametrised_weights_are_read_at_every_call(family: str, kind: str) -> None:
    """Two steps of training: the second call must see what the first step made of the weight."""
    model = reparametrised(family, REPARAMETRISATIONS[kind])
    path, name = PLACES[family]
    plain = network(family)
    x, labels = batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        state = {key: value.clone() for key, value in model.state_dict().items() if key in plain.state_dict()}
        out = model(x)
        plain.load_state_dict(state, strict=False)
        with torch.no_grad():  # torch computes some of them when a module is called
            getattr(plain.get_submodule(path), name).copy_(getattr(model.get_submodule(path), name))
        with torch_side(plain) as theirs:
            torch.testing.assert_close(out, theirs(x))
        optimizer.zero_grad()
        F.cross_entropy(out, labels).backward()
        optimizer.step()
    weight = getattr(model.get_submodule(path), name)
    if kind == "pruning":
        assert int((weight == 0).sum()) >= weight.numel() // 2


@pytest.mark.parametrize("spectral_norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_spectral_norm_moves_at_every_training_call(
    family: str, spectral_norm: Callable[[nn.Module, str], Any]
) -> None:
    model = reparametrised(family, spectral_norm)
    path, name = PLACES[family]
    x, _ = batch()
    for _ in range(30):
        out = model(x)
    out.sum().backward()
    with torch.no_grad():
        weight = getattr(model.eval().get_submodule(path), name).flatten(1)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(weight, 2), torch.ones((), dtype=torch.float64), rtol=0.02, atol=0
    )
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
