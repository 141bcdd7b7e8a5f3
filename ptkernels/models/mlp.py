"""The smallest network of all: linear layers with ReLU in between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers, ReLU after each but the last.

    Args:
        sizes: features of the input, of every layer, of the output.

    Shape:
        ``[..., sizes[0]]`` to ``[..., sizes[-1]]``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> model = MLP()
        >>> sum(parameter.numel() for parameter in model.parameters())
        2213
        >>> x = torch.rand(1, 50)
        >>> best = model(x).argmax(1)
        >>> ptk.nn.quantize_(model, "int8_dynamic")
        ['layers.0', 'layers.2', 'layers.4']
        >>> bool(model(x).argmax(1) == best)
        True
    """

    def __init__(self, sizes: Sequence[int] = (50, 30, 20, 3)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for features, units in pairwise(sizes):
            layers += [nn.Linear(features, units), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out
