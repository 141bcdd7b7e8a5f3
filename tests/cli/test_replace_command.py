"""``ptkernels replace``: the demonstration and the report on a model of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from model_zoos import zoo
from torch import nn

from ptkernels.cli import main


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(5, 2))


def text() -> str:
    return "no model"


@pytest.mark.parametrize("images", ["transformers", "torchvision"])
def test_demo(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    if images == "torchvision":
        zoo("torchvision")
    else:
        monkeypatch.setitem(sys.modules, "torchvision.models", None)  # as where it is not installed
    file = tmp_path / "demo.json"
    assert main(["replace", "--demo", "--small", "--seconds", "0.02", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert [row["model"] for row in rows] == [f"{images} ResNet-50", "transformers BERT base", "LSTM tagger"]
    for row in rows:
        assert row["model"] in printed
        assert row["replaced"] > 0
        assert row["output_difference"] < 1e-4
        assert 0 < row["closest_error"] <= row["closest_bound"]
        assert min(row[name] for name in row if name.endswith(("_before", "_after"))) > 0
        assert row["moved_after"] < row["moved_before"]
    assert rows[1]["saved_after"] < rows[1]["saved_before"]


def test_report_on_a_model_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replace", f"{__name__}:model"]) == 0
    assert "would run on conv_bn_relu" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "neither or both"),
        (["--demo", "a:b"], "neither or both"),
        (["ptkernels"], "factory: got 'ptkernels', expected MODULE:CALLABLE"),
        ([f"{__name__}:text"], "factory: got a str"),
        (["no_such_module:make"], "No module named 'no_such_module'"),
    ],
)
def test_bad_arguments(arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replace", *arguments]) == 2
    assert error in capsys.readouterr().err
