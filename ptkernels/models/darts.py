"""A cell of differentiable architecture search (Liu et al., 2018, https://arxiv.org/abs/1806.09055).

Operations are ReLU, then convolution, then normalisation: one operator, unless one ReLU feeds two convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.nn.conv import ConvBNReLU2d, ReLUConvBN2d


def _pointwise(in_channels: int, out_channels: int) -> ReLUConvBN2d:
    return ReLUConvBN2d(in_channels, out_channels, 1, affine=False)


class FactorizedReduce(nn.Module):
    """Half the sides: two 1x1 convolutions of stride 2, one of them shifted by a pixel, normalised together.

    Example:
        >>> FactorizedReduce(4, 8)(torch.randn(2, 4, 6, 6)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels // 2, 1, 2, bias=False)
        self.second = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        # Odd sides: the shifted image is padded, so that both halves have the same size.
        shifted = F.pad(x, (0, x.size(3) % 2, 0, x.size(2) % 2))[:, :, 1:, 1:]
        out: Tensor = self.bn(torch.cat([self.first(x), self.second(shifted)], 1))
        return out


class SeparableConv(nn.Module):
    """ReLU, then ``repeats`` times a depthwise convolution, a 1x1 one, normalisation, with ReLU in between.

    Example:
        >>> SeparableConv(4, 3, stride=2, repeats=2)(torch.randn(2, 4, 6, 6)).shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int, dilation: int = 1, repeats: int = 1, affine: bool = False
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        layers: list[nn.Module] = []
        for index in range(repeats):
            layers.append(
                ConvBNReLU2d(
                    *(channels, channels, kernel_size, stride if index == 0 else 1, padding, dilation, channels),
                    norm=False,
                    activation="none",
                    pre_activation="relu" if index == 0 else "none",
                )
            )
            activation = "relu" if index + 1 < repeats else "none"
            layers.append(ConvBNReLU2d(channels, channels, 1, affine=affine, activation=activation))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class _Zero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def _pooling(kind: type[nn.Module], channels: int, stride: int, **options: bool) -> nn.Module:
    return nn.Sequential(kind(3, stride, 1, **options), nn.BatchNorm2d(channels, affine=False))


OPERATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda channels, stride: _Zero(stride),
    "max_pool_3x3": lambda channels, stride: _pooling(nn.MaxPool2d, channels, stride),
    "avg_pool_3x3": lambda channels, stride: _pooling(nn.AvgPool2d, channels, stride, count_include_pad=False),
    "skip_connect": lambda channels, stride: nn.Identity() if stride == 1 else FactorizedReduce(channels, channels),
    "sep_conv_3x3": lambda channels, stride: SeparableConv(channels, 3, stride, repeats=2),
    "sep_conv_5x5": lambda channels, stride: SeparableConv(channels, 5, stride, repeats=2),
    "dil_conv_3x3": lambda channels, stride: SeparableConv(channels, 3, stride, dilation=2),
    "dil_conv_5x5": lambda channels, stride: SeparableConv(channels, 5, stride, dilation=2),
}


class DARTSCell(nn.Module):
    """Nodes that each sum, over all before them, a weighted mixture of :data:`OPERATIONS`; all of them are the result.

    Args:
        before_previous, previous: channels of the two inputs.
        channels: of every node.
        nodes: how many, all of which are concatenated.
        reduction: halve the sides.
        reduction_before: the cell before halved them: the older input is halved too.

    Shape:
        Two images and weights ``[edges, len(OPERATIONS)]``, each row a softmax, to ``[N, nodes * channels, H, W]``.
        There are ``sum(2 + i for i in range(nodes))`` edges.

    Example:
        >>> cell = DARTSCell(6, 6, 4, nodes=2, reduction=True)
        >>> weights = torch.zeros(cell.num_edges, len(OPERATIONS)).softmax(-1)
        >>> x = torch.randn(2, 6, 8, 8)
        >>> cell(x, x, weights).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        before_previous: int,
        previous: int,
        channels: int,
        nodes: int = 4,
        reduction: bool = False,
        reduction_before: bool = False,
    ) -> None:
        super().__init__()
        older = FactorizedReduce if reduction_before else _pointwise
        self.older, self.newer = older(before_previous, channels), _pointwise(previous, channels)
        self.nodes, self.num_edges = nodes, sum(2 + node for node in range(nodes))
        self.edges = nn.ModuleList()
        for node in range(nodes):
            for source in range(2 + node):
                stride = 2 if reduction and source < 2 else 1
                self.edges.append(nn.ModuleList(make(channels, stride) for make in OPERATIONS.values()))

    def forward(self, before_previous: Tensor, previous: Tensor, weights: Tensor) -> Tensor:
        if weights.shape != (self.num_edges, len(OPERATIONS)):
            expected = [self.num_edges, len(OPERATIONS)]
            raise ValueError(f"DARTSCell: weights: got shape {list(weights.shape)}, expected {expected}")
        states = [self.older(before_previous), self.newer(previous)]
        edge = 0
        for _ in range(self.nodes):
            terms = []
            for state in states:
                operations: Any = self.edges[edge]
                terms += [weight * run(state) for weight, run in zip(weights[edge], operations, strict=True)]
                edge += 1
            states.append(torch.stack(terms).sum(0))
        return torch.cat(states[2:], 1)
