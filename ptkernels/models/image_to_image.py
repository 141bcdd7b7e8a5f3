"""Images to images: style transfer, segmentation, super-resolution.

Convolutions, transposed ones too, and what follows them are one operator.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.nn.conv import ConvBNReLU2d, ConvTransposeBNReLU2d

# Without parameters, as style transfer normalises.
_INSTANCE: dict[str, Any] = {"norm": "instance", "affine": False}


class _StyleResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBNReLU2d(channels, channels, 3, padding=1, **_INSTANCE)
        self.second = ConvBNReLU2d(channels, channels, 3, padding=1, activation="none", **_INSTANCE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x), x)
        return out


class StyleTransferNet(nn.Module):
    """One pass that repaints an image (Johnson et al., 2016, https://arxiv.org/abs/1603.08155).

    Args:
        width: channels at full size; at a quarter there are four times as many.
        num_residual: residual blocks.

    Shape:
        ``[N, 3, H, W]``, sides that are multiples of 4, to the same, between -1 and 1.

    Example:
        >>> StyleTransferNet(width=4, num_residual=1)(torch.randn(1, 3, 16, 24)).shape
        torch.Size([1, 3, 16, 24])
    """

    def __init__(self, width: int = 32, num_residual: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            ConvBNReLU2d(3, width, 9, 1, 4, **_INSTANCE),
            ConvBNReLU2d(width, 2 * width, 3, 2, 1, **_INSTANCE),
            ConvBNReLU2d(2 * width, 4 * width, 3, 2, 1, **_INSTANCE),
        )
        self.residual = nn.Sequential(*(_StyleResidual(4 * width) for _ in range(num_residual)))
        ups = (
            ConvTransposeBNReLU2d(channels, channels // 2, 3, 2, 1, 1, **_INSTANCE)
            for channels in (4 * width, 2 * width)
        )
        self.decoder = nn.Sequential(
            *ups, ConvBNReLU2d(width, 3, 9, padding=4, bias=True, norm=False, activation="tanh")
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.residual(self.encoder(x)))
        return out


def gram_matrix(features: Tensor) -> Tensor:
    """Correlations of channels, ``[N, C, C]``, of features ``[N, C, H, W]`` in any layout, divided by ``C H W``.

    Example:
        >>> gram_matrix(torch.ones(1, 2, 3, 4))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / features[0].numel()


def _twice(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBNReLU2d(in_channels, out_channels, 3, padding=1), ConvBNReLU2d(out_channels, out_channels, 3, padding=1)
    )


class UNet(nn.Module):
    """Scores of every pixel (Ronneberger et al., 2015, https://arxiv.org/abs/1505.04597), with padded convolutions.

    Args:
        in_channels: channels of the image.
        num_classes: scores of a pixel.
        width: channels at full size; each halving of the sides doubles them.
        depth: how often the sides are halved.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, num_classes, H, W]``.

    Raises:
        ValueError: a side is not a multiple of ``2 ** depth``.

    Example:
        >>> UNet(3, 2, width=4, depth=2)(torch.randn(1, 3, 16, 24)).shape
        torch.Size([1, 2, 16, 24])
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 2, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        pairs = list(itertools.pairwise(widths))
        self.first = _twice(in_channels, width)
        self.down = nn.ModuleList(_twice(above, below) for above, below in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(below, above, 2, 2) for above, below in reversed(pairs))
        self.merge = nn.ModuleList(_twice(below, above) for above, below in reversed(pairs))
        self.last = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        multiple = 1 << len(self.down)
        if x.dim() != 4 or any(side % multiple for side in x.shape[2:]):
            raise ValueError(
                f"UNet: x: got shape {list(x.shape)}, expected [N, C, H, W], sides multiples of {multiple}"
            )
        skips = [self.first(x)]
        for down in self.down:
            skips.append(down(F.max_pool2d(skips[-1], 2)))
        out = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            out = merge(torch.cat([skips.pop(), up(out)], 1))
        scores: Tensor = self.last(out)
        return scores


class EDSRBlock(nn.Module):
    """A residual block without normalisation, ``x + scale * conv(relu(conv(x)))`` (Lim et al., 2017).

    Args:
        channels: of the image.
        scale: factor of what is added; below 1 it steadies wide networks.

    Example:
        >>> EDSRBlock(8)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def __init__(self, channels: int, scale: float = 1.0) -> None:
        super().__init__()
        self.first = ConvBNReLU2d(channels, channels, 3, padding=1, bias=True, norm=False)
        self.second = ConvBNReLU2d(channels, channels, 3, padding=1, bias=True, norm=False, activation="none")
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(x)
        out: Tensor = self.second(inner, x) if self.scale == 1.0 else x + self.scale * self.second(inner)
        return out


class EDSR(nn.Module):
    """Images enlarged by a power of two (Lim et al., 2017, https://arxiv.org/abs/1707.02921).

    Args:
        upscale: 2 or a power of it.
        channels: of the blocks.
        num_blocks: how many.
        scale: of :class:`EDSRBlock`.

    Shape:
        ``[N, 3, H, W]`` to ``[N, 3, upscale * H, upscale * W]``.

    Raises:
        ValueError: ``upscale`` is no power of two.

    Example:
        >>> EDSR(upscale=4, channels=8, num_blocks=2)(torch.rand(1, 3, 6, 7)).shape
        torch.Size([1, 3, 24, 28])
    """

    def __init__(self, upscale: int = 2, channels: int = 64, num_blocks: int = 16, scale: float = 1.0) -> None:
        super().__init__()
        doublings = upscale.bit_length() - 1
        if upscale < 2 or upscale != 1 << doublings:
            raise ValueError(f"EDSR: upscale: got {upscale}, expected a power of two")
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(EDSRBlock(channels, scale) for _ in range(num_blocks)))
        self.body_end = ConvBNReLU2d(channels, channels, 3, padding=1, bias=True, norm=False, activation="none")
        ups: list[nn.Module] = []
        for _ in range(doublings):
            ups += [nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*ups, nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        head = self.head(x)
        out: Tensor = self.tail(self.body_end(self.body(head), head))
        return out
