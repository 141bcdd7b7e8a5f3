"""Generative adversarial networks: WGAN-GP, whose critic is differentiated twice, and Pix2Pix with its PatchGAN."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ptkernels.nn.conv import ConvBNReLU2d, ConvTransposeBNReLU2d


def _leaky(in_channels: int, out_channels: int, stride: int = 2, norm: bool = True) -> ConvBNReLU2d:
    """A 4x4 convolution and LeakyReLU 0.2, as GANs have them; a bias where nothing normalises."""
    options = {"activation": "leaky_relu", "negative_slope": 0.2}
    return ConvBNReLU2d(in_channels, out_channels, 4, stride, 1, bias=not norm, norm=norm, **options)  # type: ignore[arg-type]


def _image(in_channels: int, out_channels: int) -> ConvTransposeBNReLU2d:
    """The last doubling of a generator: a bias, and a tanh in place of a normalisation."""
    return ConvTransposeBNReLU2d(in_channels, out_channels, 4, 2, 1, bias=True, norm=False, activation="tanh")


class Critic(nn.Module):
    """Scores of images, unbounded and without normalisation over the batch, as a gradient penalty needs.

    Args:
        in_channels: channels of the image.
        width: channels after the first convolution; each halving of the sides doubles them.
        size: sides of the image, a power of two from 8 on.

    Shape:
        ``[N, in_channels, size, size]`` to ``[N]``.

    Example:
        >>> Critic(1, 4, 16)(torch.randn(3, 1, 16, 16)).shape
        torch.Size([3])
    """

    def __init__(self, in_channels: int = 3, width: int = 64, size: int = 32) -> None:
        super().__init__()
        blocks: list[nn.Module] = [_leaky(in_channels, width, norm=False)]
        while size > 8:
            blocks.append(_leaky(width, 2 * width, norm=False))
            size, width = size // 2, 2 * width
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Conv2d(width, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.blocks(x))
        return scores.flatten()


class ImageGenerator(nn.Module):
    """Images of noise: transposed convolutions that double the sides, batch normalisation and ReLU.

    Args:
        noise: features of the noise.
        out_channels: channels of the image.
        width: channels before the last doubling.
        size: sides of the image, a power of two from 8 on.

    Shape:
        ``[N, noise]`` to ``[N, out_channels, size, size]``, between -1 and 1.

    Example:
        >>> ImageGenerator(5, 1, 4, 16)(torch.randn(3, 5)).shape
        torch.Size([3, 1, 16, 16])
    """

    def __init__(self, noise: int = 100, out_channels: int = 3, width: int = 64, size: int = 32) -> None:
        super().__init__()
        channels = width * (size // 8)
        blocks: list[nn.Module] = [ConvTransposeBNReLU2d(noise, channels, 4)]
        while channels > width:
            blocks.append(ConvTransposeBNReLU2d(channels, channels // 2, 4, 2, 1))
            channels //= 2
        self.blocks = nn.Sequential(*blocks, _image(width, out_channels))

    def forward(self, noise: Tensor) -> Tensor:
        images: Tensor = self.blocks(noise[:, :, None, None])
        return images


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Mean squared distance from 1 of the critic's gradient norms, between pairs (Gulrajani et al., 2017).

    Its gradient is a second derivative of the critic. Convolutions have no kernels for one and run on their reference,
    with a warning (:class:`ptkernels.errors.FallbackWarning`).

    Args:
        critic: images ``[N, ...]`` to scores ``[N]``.
        real: ``[N, ...]``.
        fake: like ``real``.
        generator: source of the random points between them.

    Returns:
        One number; multiply by about 10 and add to ``fake_scores.mean() - real_scores.mean()``.

    Example:
        >>> penalty = gradient_penalty(lambda x: 2 * x.flatten(1).sum(1), torch.zeros(3, 4), torch.ones(3, 4))
        >>> float(penalty)  # gradients of 2 in 4 places have norm 4
        9.0
    """
    weight = torch.rand(len(real), *[1] * (real.dim() - 1), generator=generator, device=real.device, dtype=real.dtype)
    between = torch.lerp(fake.detach(), real.detach(), weight).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    distances: Tensor = gradient.flatten(1).norm(dim=1) - 1
    return distances.square().mean()


class PatchGAN(nn.Module):
    """Scores of overlapping patches of a pair of images (Isola et al., 2016, https://arxiv.org/abs/1611.07004).

    Args:
        in_channels: channels of both images together.
        width: channels after the first convolution.
        num_layers: halvings of the sides; 3 is the 70x70 PatchGAN.

    Shape:
        Two images that together are ``[N, in_channels, H, W]`` to ``[N, 1, H', W']``.

    Example:
        >>> PatchGAN(6, width=4)(torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 1, 6, 6])
    """

    def __init__(self, in_channels: int = 6, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(1 << level, 8) for level in range(num_layers + 1)]
        blocks = [_leaky(in_channels, width, norm=False)]
        for level, pair in enumerate(itertools.pairwise(widths)):
            blocks.append(_leaky(*pair, stride=2 if level + 1 < num_layers else 1))
        self.blocks = nn.Sequential(*blocks)
        self.score = nn.Conv2d(widths[-1], 1, 4, 1, 1)

    def forward(self, source: Tensor, image: Tensor) -> Tensor:
        scores: Tensor = self.score(self.blocks(torch.cat([source, image], 1)))
        return scores


class Pix2PixGenerator(nn.Module):
    """A U-Net of 4x4 convolutions of stride 2: every one is undone by a transposed one that also reads its input.

    Args:
        in_channels: channels of the source.
        out_channels: channels of the result.
        width: channels after the first convolution.
        depth: halvings of the sides.
        dropout: probability of dropping a channel of the innermost results, the only randomness of the model.

    Shape:
        ``[N, in_channels, H, W]``, sides that are multiples of ``2 ** depth``, to ``[N, out_channels, H, W]``, between
        -1 and 1.

    Example:
        >>> Pix2PixGenerator(3, 1, width=4, depth=3)(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 1, 32, 32])
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 3, width: int = 64, depth: int = 8, dropout: float = 0.5
    ) -> None:
        super().__init__()
        widths = [width * min(1 << level, 8) for level in range(depth)]
        # Neither the first nor the innermost is normalised: an image of one pixel has no variance.
        self.down = nn.ModuleList(
            _leaky(before, after, norm=0 < level < depth - 1)
            for level, (before, after) in enumerate(zip([in_channels, *widths], widths, strict=False))
        )
        self.up = nn.ModuleList()
        for level in range(depth - 1, 0, -1):
            inner = widths[level] if level == depth - 1 else 2 * widths[level]
            # Before or behind a ReLU a dropped channel is the same.
            dropped = nn.Dropout2d(dropout if level > depth - 4 else 0.0)
            self.up.append(nn.Sequential(ConvTransposeBNReLU2d(inner, widths[level - 1], 4, 2, 1), dropped))
        self.last = _image(2 * width if depth > 1 else width, out_channels)

    def forward(self, source: Tensor) -> Tensor:
        skips = [source]
        for down in self.down:
            skips.append(down(skips[-1]))
        out = skips.pop()
        for up in self.up:
            out = torch.cat([up(out), skips.pop()], 1)
        images: Tensor = self.last(out)
        return images
