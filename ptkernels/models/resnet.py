"""Residual networks (He et al., 2015): every convolution with its normalisation, residual and ReLU is one operator.

Parameters and buffers have torchvision's names, so that its checkpoints load. Convolutions and normalisations hold the
state and are not called: hooks belong on blocks and stages (``layer1`` to ``layer4``).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptkernels.nn.conv import fused


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is carried: ``relu(bn(conv(relu(bn(conv(x))))) + x)``."""

    expansion: ClassVar[int] = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.downsample = _downsample(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = fused(self.conv1, self.bn1, self.relu, x)
        return fused(self.conv2, self.bn2, self.relu, out, _carried(self.downsample, x))


class Bottleneck(nn.Module):
    """A 3x3 convolution, which has the stride, between two 1x1 ones that narrow and widen."""

    expansion: ClassVar[int] = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        wide = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        self.downsample = _downsample(in_channels, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = fused(self.conv1, self.bn1, self.relu, x)
        out = fused(self.conv2, self.bn2, self.relu, out)
        return fused(self.conv3, self.bn3, self.relu, out, _carried(self.downsample, x))


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """What the carried input goes through where it would not fit."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


def _carried(downsample: nn.Sequential | None, x: Tensor) -> Tensor:
    return x if downsample is None else fused(downsample[0], downsample[1], None, x)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, mean over space, linear layer; see :func:`resnet18` and its like.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: blocks of each of the four stages.
        num_classes: number of classes.
        width: channels of the first stage's 3x3 convolutions; every stage doubles them.

    Shape:
        ``[N, 3, H, W]``, any sides, to ``[N, num_classes]``.

    Example:
        >>> model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=5, width=8)
        >>> model(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 5])

        Another task on the same features: only the new layer is trained.

        >>> _ = model.requires_grad_(False)
        >>> model.fc = torch.nn.Linear(model.fc.in_features, 2)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['fc.weight', 'fc.bias']
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        stages = []
        for stage, count in enumerate(layers):
            blocks: list[nn.Module] = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width << stage, stride))
                channels = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(fused(self.conv1, self.bn1, self.relu, x))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        scores: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return scores


def resnet18(**options: Any) -> ResNet:
    """18 layers, 11.7 million parameters; options are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """34 layers, 21.8 million parameters; options are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """50 layers, 25.6 million parameters; options are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)
