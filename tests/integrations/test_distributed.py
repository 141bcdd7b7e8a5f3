"""Several gloo processes give what one process gives: DDP under torchrun, FSDP2, tensor-parallel quantized layers."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import ptkernels as ptk
from ptkernels.nn import QuantizedLinear

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")

ROOT = Path(__file__).resolve().parents[2]


def test_example_under_torchrun(tmp_path: Path) -> None:
    losses = {}
    for world in (1, 2):
        file = tmp_path / f"{world}.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        done = subprocess.run(
            [*command, "examples/train_ddp.py", "--steps", "6", "--batch", "8", "--json", str(file)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        losses[world] = torch.tensor(json.loads(file.read_text()))
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = ptk.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.lstm = ptk.nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.encoder(x))[0])


def layers() -> tuple[QuantizedLinear, QuantizedLinear]:
    torch.manual_seed(0)
    first, second = nn.Linear(24, 64), nn.Linear(64, 10)
    return (
        QuantizedLinear.from_float(first, "int8_dynamic", activation="gelu"),
        QuantizedLinear.from_float(second, "int4_weight_only", 16, symmetric=False),
    )


def example(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def fsdp(rank: int, world: int) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Net()
    for part in (model.encoder, model.lstm, model):
        fully_shard(part)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(example(4, 5, 8).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def quantized(rank: int, world: int) -> list[Tensor]:
    from ptkernels.integrations.tensor_parallel import ColumnParallelQuantizedLinear, RowParallelQuantizedLinear

    first, second = layers()
    x = example(5, 24).requires_grad_()
    out = RowParallelQuantizedLinear(second)(ColumnParallelQuantizedLinear(first)(x))
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), x)]


def process(rank: int, world: int, port: int, job: Callable[[int, int], list[Tensor]], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    results[rank] = job(rank, world)
    dist.destroy_process_group()


def together(job: Callable[[int, int], list[Tensor]], world: int) -> list[list[Tensor]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(process, (world, port, job, shared), nprocs=world)
        return [shared[rank] for rank in range(world)]


def test_fully_sharded_data_parallel() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(example(4, 5, 8)).square().mean().backward()
        optimizer.step()
    for found in together(fsdp, 2):
        for actual, expected in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(actual, expected.detach(), rtol=1e-4, atol=1e-6)


def test_column_and_row_parallel_quantized_layers() -> None:
    first, second = layers()
    x = example(5, 24).requires_grad_()
    out = second(first(x))
    expected = [out.detach(), *torch.autograd.grad(out.sin().sum(), x)]
    for found in together(quantized, 2):
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_split_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptkernels.integrations.tensor_parallel import ColumnParallelQuantizedLinear, RowParallelQuantizedLinear

    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 3)
    first, second = layers()
    with pytest.raises(ValueError, match="out_features: got 64, expected a multiple of 3 "):
        ColumnParallelQuantizedLinear(first)
    with pytest.raises(ValueError, match="in_features: got 64, expected a multiple of 48"):
        RowParallelQuantizedLinear(second)
    with pytest.raises(ValueError, match="RowParallelQuantizedLinear: layer: got activation 'gelu'"):
        RowParallelQuantizedLinear(first)
    dynamic = copy.deepcopy(first)
    dynamic.activation = None
    with pytest.raises(ValueError, match="got scheme int8_dynamic, expected one that takes the input as it is"):
        RowParallelQuantizedLinear(dynamic)
