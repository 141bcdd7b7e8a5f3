"""EfficientNet-Lite0: inverted residuals of depthwise convolutions, every convolution fused with what follows it."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from ptkernels.nn import ConvBNReLU2d

__all__ = ["EfficientNetLite0"]

# Expansion of the channels, kernel, stride of the first block, channels, blocks.
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_EPS, _MOMENTUM = 1e-3, 0.01


class _Layer(ConvBNReLU2d):
    """A convolution whose zeros at the borders are what TensorFlow's "SAME" adds: the odd one behind the input."""

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: str = "relu6"
    ) -> None:
        super().__init__(
            in_channels, channels, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups,
            eps=_EPS, momentum=_MOMENTUM, activation=activation,
        )  # fmt: skip

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            missing = [max(0, (-(-size // stride) - 1) * stride + kernel - size) for size in (x.size(3), x.size(2))]
            x = F.pad(x, [part for zeros in missing for part in (zeros // 2, zeros - zeros // 2)])
        return super().forward(x, residual)


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes allow."""

    def __init__(self, in_channels: int, channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = in_channels * expansion
        self.expand = _Layer(in_channels, wide, 1) if expansion > 1 else None
        self.depthwise = _Layer(wide, wide, kernel, stride, groups=wide)
        self.project = _Layer(wide, channels, 1, activation="none")
        self.adds = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        out: Tensor = self.project(self.depthwise(y), x if self.adds else None)
        return out


class EfficientNetLite0(nn.Module):
    """Image classifier of 4.7 million parameters.

    Args:
        classes: of the classifier.

    Shape:
        ``[N, 3, H, W]``, 224 pixels wide and high as it was trained, to ``[N, classes]``.

    Example:
        >>> import torch
        >>> from ptkernels.models.efficientnet import EfficientNetLite0
        >>> EfficientNetLite0(classes=10).eval()(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _Layer(3, 32, 3, stride=2)
        blocks, before = [], 32
        for expansion, kernel, stride, channels, count in _STAGES:
            for index in range(count):
                blocks.append(_Block(before, channels, expansion, kernel, stride if index == 0 else 1))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _Layer(before, 1280, 1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        features = self.head(self.blocks(self.stem(x))).mean((2, 3))
        scores: Tensor = self.classifier(self.dropout(features))
        return scores

    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Take over, strictly, the state of the published PyTorch port, whose names are ``_blocks.0._bn1.weight``.

        Raises:
            RuntimeError: a key is missing or left over, or a shape differs, as in ``load_state_dict``.
        """
        self.load_state_dict({_renamed(key): value for key, value in state.items()}, strict=True)


_IN_BLOCKS = {
    "_expand_conv": "expand.conv", "_bn0": "expand.bn", "_depthwise_conv": "depthwise.conv", "_bn1": "depthwise.bn",
    "_project_conv": "project.conv", "_bn2": "project.bn",
}  # fmt: skip
_OUTSIDE = {"_conv_stem": "stem.conv", "_bn0": "stem.bn", "_conv_head": "head.conv", "_bn1": "head.bn"}


def _renamed(key: str) -> str:
    first, _, rest = key.partition(".")
    if first == "_blocks":
        number, module, name = rest.split(".")
        return f"blocks.{number}.{_IN_BLOCKS.get(module, module)}.{name}"
    return f"{_OUTSIDE.get(first, 'classifier' if first == '_fc' else first)}.{rest}"
