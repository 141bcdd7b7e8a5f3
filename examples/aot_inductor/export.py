"""Compile a model of our modules ahead of time, for a process without Python.

    python examples/aot_inductor/export.py FOLDER

writes model.pt2 (the compiled model with its weights), inputs.pt, and expected.pt, what the model gives for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import ptkernels as ptk


class Classifier(nn.Module):
    """Sound into scores, by a layer of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ptk.nn.ConvBNReLU1d(8, 16, 3, padding=1)
        self.encoder = ptk.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.gru = ptk.nn.GRU(16, 16, batch_first=True)
        self.head = ptk.nn.QuantizedLinear.from_float(nn.Linear(16, 4), "int8_weight_only")

    def forward(self, sound: Tensor) -> Tensor:
        states, _ = self.gru(self.encoder(self.stem(sound).transpose(1, 2)))
        scores: Tensor = self.head(states.mean(1))
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    model = Classifier().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 8, 12),), dynamic_shapes=({0: batch},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    sound = torch.randn(5, 8, 12)  # another batch than the example's
    with torch.no_grad():
        torch.save([sound], folder / "inputs.pt")
        torch.save([model(sound)], folder / "expected.pt")


if __name__ == "__main__":
    main()
