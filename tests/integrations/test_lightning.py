"""Lightning's Trainer trains our modules as a loop by hand does."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from every_module import SelfAttention
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ptkernels as ptk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")


class Network(nn.Module):
    """Layers of every operator, one of torch's for replace() to change."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ptk.nn.ConvBNReLU1d(5, 5, 3, padding=1)
        self.attention = SelfAttention()
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.head = ptk.nn.LoRALinear(ptk.nn.QuantizedLinear.from_float(nn.Linear(6, 3), "int8_weight_only"), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.attention(self.stem(x)))[0][:, -1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 0.02)


class Task(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self.model(x), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self.model)


@pytest.mark.filterwarnings("ignore")
def test_training_and_checkpoints(tmp_path: Path) -> None:
    """Accumulated and clipped gradients; a checkpoint, and training that goes on from it."""
    torch.manual_seed(0)
    model = Network()
    ptk.replace(model)
    plain = copy.deepcopy(model).train()
    data = TensorDataset(torch.randn(8, 5, 8), torch.arange(8) % 3)
    loader = DataLoader(data, batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "default_root_dir": tmp_path, **quiet}
    first = lightning.Trainer(max_epochs=1, enable_checkpointing=False, **options)
    first.fit(Task(model), loader)
    first.save_checkpoint(tmp_path / "one.ckpt")
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    second = lightning.Trainer(max_epochs=2, enable_checkpointing=False, **options)
    second.fit(Task(again), loader, ckpt_path=tmp_path / "one.ckpt")

    optimizer = optimizer_of(plain)
    for step in range(2 * len(loader)):
        x, labels = data[2 * (step % len(loader)) : 2 * (step % len(loader)) + 2]
        (nn.functional.cross_entropy(plain(x), labels) / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    for (name, expected), found in zip(plain.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_trains() -> None:
    torch.manual_seed(0)
    task = Task(Network())
    seen: list[torch.dtype] = []
    task.model.lstm.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    ptk.replace(task.model)
    before = copy.deepcopy(task.model.state_dict())
    loader = DataLoader(TensorDataset(torch.randn(4, 5, 8), torch.arange(4) % 3), batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    lightning.Trainer(max_steps=2, precision="bf16-mixed", enable_checkpointing=False, **quiet).fit(task, loader)
    assert set(seen) == {torch.bfloat16}
    trained = dict(task.model.named_parameters())
    moved = {name for name, parameter in trained.items() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in trained.items() if parameter.requires_grad}
