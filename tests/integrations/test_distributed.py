"""Several gloo processes under torchrun give what one process gives: DDP, FSDP2, layers split among processes."""

from __future__ import annotations

import copy
import json
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torch.distributed", reason="this torch has no distributed package")

import torch.distributed as dist
from jobs_data_parallel import SPLITS, net, quantized_layers, split, state, trained
from several_processes import ROOT, torchrun
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels.integrations import tensor_parallel

Outcome = Callable[[str, int], list[Any]]


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(
            found[name], wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_example_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes against one, which is this."""
    options = ["--steps", "6", "--batch", "8", "--json"]
    torchrun(2, "examples/train_ddp.py", *options, str(tmp_path / "2.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["train_ddp.py", *options, str(tmp_path / "1.json")])
    runpy.run_path(str(ROOT / "examples" / "train_ddp.py"), run_name="__main__")
    one, two = (torch.tensor(json.loads((tmp_path / f"{world}.json").read_text())) for world in (1, 2))
    assert one[-1] < one[0]
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


TRAININGS = [("DDP", 2), ("DDP", 4), ("FSDP2", 2), ("FSDP2", 4), ("FSDP2 and tensor parallel", 4)]


@pytest.mark.parametrize(("job", "world"), TRAININGS, ids=str)
def test_training_is_that_of_one_process(outcome: Outcome, job: str, world: int) -> None:
    """Parameters, and running statistics over all parts of the batch, after two steps."""
    model = net()
    trained(model)
    for found in outcome(job, world):
        assert_all_close(found, state(model))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", SPLITS)
def test_split_models(outcome: Outcome, model: str, world: int) -> None:
    """Outputs and gradients."""
    expected = split(model)
    for found in outcome(model, world):
        if model == "quantized layers, by group":
            del found["1.bias"]  # of which every process has its part
        assert_all_close(found, {name: tensor for name, tensor in expected.items() if name in found})


def test_layers_that_cannot_be_split_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 3)
    _, first, _, second = quantized_layers()
    column, row = tensor_parallel.ColumnParallelQuantizedLinear, tensor_parallel.RowParallelQuantizedLinear
    with pytest.raises(ValueError, match="out_features: got 64, expected a multiple of 3 "):
        column(first)
    with pytest.raises(ValueError, match="in_features: got 128, expected a multiple of 48"):
        row(second)
    with pytest.raises(ValueError, match="RowParallelQuantizedLinear: layer: got activation 'gelu'"):
        row(first)
    dynamic = copy.deepcopy(first)
    dynamic.activation = None
    with pytest.raises(ValueError, match="got scheme int8_dynamic, expected one that takes the input as it is"):
        row(dynamic)


class Mesh:
    """As far as it is looked at before anything is sent."""

    def size(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("style", "module", "error"),
    [
        ("QuantizedColwiseParallel", nn.Linear(3, 3), "got Linear, expected ptkernels.nn.QuantizedLinear"),
        ("QuantizedRowwiseParallel", nn.Linear(3, 3), "got Linear, expected ptkernels.nn.QuantizedLinear"),
        ("QuantizedColwiseParallel", quantized_layers()[1], "out_features: got 64, expected a multiple of 3 "),
        ("QuantizedRowwiseParallel", quantized_layers()[3], "in_features: got 128, expected a multiple of 48 "),
        ("HeadwiseParallel", nn.MultiheadAttention(8, 4), "got MultiheadAttention, expected ptkernels.nn"),
        ("HeadwiseParallel", ptk.nn.MultiheadAttention(8, 4), "num_heads: got 4, expected a multiple of 3 "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_styles_refuse_what_they_cannot_split(style: str, module: nn.Module, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{style}: .*{error}"):
        getattr(tensor_parallel, style)()._apply(module, Mesh())
