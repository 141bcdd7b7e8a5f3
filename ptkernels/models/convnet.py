"""A small convolutional network for 32x32 images, of blocks of fused convolution, normalisation and ReLU."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from ptkernels.nn.conv import ConvBNReLU2d


class ConvNet(nn.Module):
    """Three blocks of two 3x3 convolutions, pooling and dropout; then the mean over space and two linear layers.

    Args:
        num_classes: number of classes.
        dropout: probability of dropping a feature before the last layer; blocks drop whole channels with 0.25.

    Shape:
        ``[N, 3, H, W]``, sides of at least 8 (CIFAR-10: 32), to ``[N, num_classes]``.

    Example:
        >>> import torch
        >>> model = ConvNet()
        >>> sum(parameter.numel() for parameter in model.parameters())
        323498
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        widths = (3, 32, 64, 128)
        self.blocks = nn.Sequential(*(_block(*pair) for pair in itertools.pairwise(widths)))
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1], 256), nn.ReLU(), nn.Dropout(dropout), nn.Linear(256, num_classes)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.blocks(x).mean((2, 3)))
        return scores


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBNReLU2d(in_channels, out_channels, 3, padding=1, bias=True),
        ConvBNReLU2d(out_channels, out_channels, 3, padding=1, bias=True),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.25),
    )
