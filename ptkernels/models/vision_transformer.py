"""Images as sequences of patches: ViT, whose attention is global, and Swin, whose attention stays in windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models.blocks import FeedForward
from ptkernels.nn.attention import TransformerEncoderLayer
from ptkernels.ops.attention import attention


class ViT(nn.Module):
    """A transformer over patches and one token that gathers the class (Dosovitskiy et al., 2020).

    Args:
        image_size: sides of the image.
        patch_size: sides of a patch, a divisor of ``image_size``.
        num_classes: number of classes.
        hidden_size: features of a patch.
        num_layers: layers.
        num_heads: heads, a divisor of ``hidden_size``.
        mlp_size: features inside the feed-forward blocks. Default: ``4 * hidden_size``.
        in_channels: channels of the image.
        dropout: probability of dropping a feature.
        norm_eps: added to variances.

    Shape:
        ``[N, in_channels, image_size, image_size]`` to ``[N, num_classes]``.

    Example:
        >>> model = ViT(image_size=16, patch_size=4, num_classes=3, hidden_size=16, num_layers=1, num_heads=2)
        >>> model(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_size: int | None = None,
        in_channels: int = 3,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if image_size % patch_size != 0:
            raise ValueError(f"ViT: patch_size: got {patch_size}, expected a divisor of image_size ({image_size})")
        self.patch_size, self.num_patches = patch_size, (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.num_patches, hidden_size) * 0.02)
        self.dropout = nn.Dropout(dropout)
        sizes = (hidden_size, num_heads, 4 * hidden_size if mlp_size is None else mlp_size, dropout)
        options: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(*sizes, layer_norm_eps=norm_eps, **options) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.head = nn.Linear(hidden_size, num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Patches with their positions, ``[N, num_patches, hidden_size]``."""
        patches: Tensor = self.patch_embedding(images).flatten(2).transpose(1, 2)
        return patches + self.position_embedding[:, 1:]

    def encode(self, patches: Tensor) -> Tensor:
        """Features of the class token and of patches, any of them, ``[N, 1 + n, hidden_size]``."""
        first = (self.class_token + self.position_embedding[:, :1]).expand(len(patches), -1, -1)
        x = self.dropout(torch.cat([first, patches], 1))
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.norm(x)
        return out

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encode(self.embed(images))[:, 0])
        return scores


class WindowAttention(nn.Module):
    """Attention among the patches of each square window, with a learned bias by their offset.

    Args:
        hidden_size: features of a patch.
        num_heads: heads, a divisor of ``hidden_size``.
        window: sides of a window, in patches.

    Shape:
        ``[N, windows, window ** 2, hidden_size]`` to the same; ``hidden``, bool ``[windows, 1, window ** 2,
        window ** 2]``, is true where a patch must not see another.

    Example:
        >>> WindowAttention(8, 2, 3)(torch.randn(2, 4, 9, 8)).shape
        torch.Size([2, 4, 9, 8])
    """

    offsets: Tensor

    def __init__(self, hidden_size: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        row, column = (place[:, None] - place[None] + window - 1).unbind(-1)
        self.register_buffer("offsets", row * (2 * window - 1) + column, persistent=False)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.bias_table[self.offsets].permute(2, 0, 1)
        if hidden is not None:
            bias = bias.masked_fill(hidden, -torch.inf)
        out: Tensor = self.out(attention(query, key, value, bias).transpose(2, 3).flatten(3))
        return out


class SwinBlock(nn.Module):
    """Attention in windows, which every other block shifts by half a window, then feed-forward."""

    def __init__(self, hidden_size: int, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = WindowAttention(hidden_size, num_heads, window)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = FeedForward(hidden_size, 4 * hidden_size, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, hidden_size]`` to the same."""
        height, width, window = x.size(1), x.size(2), self.window
        # One window that covers a side sees all of it.
        shifts = [self.shift if side > window else 0 for side in (height, width)]
        out = F.pad(self.norm1(x), (0, 0, 0, -width % window, 0, -height % window))
        hidden = _across(out.size(1), out.size(2), window, shifts, x.device) if any(shifts) else None
        out = out.roll([-shift for shift in shifts], (1, 2))
        out = _unwindowed(self.attention(_windows(out, window), hidden), out.size(1), out.size(2), window)
        x = x + out.roll(shifts, (1, 2))[:, :height, :width]
        mixed: Tensor = self.mlp(self.norm2(x), x)
        return mixed


def _windows(x: Tensor, window: int) -> Tensor:
    """``[N, H, W, C]`` to ``[N, windows, window ** 2, C]``."""
    x = x.unflatten(1, (-1, window)).unflatten(3, (-1, window))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _unwindowed(x: Tensor, height: int, width: int, window: int) -> Tensor:
    x = x.unflatten(1, (height // window, width // window)).unflatten(3, (window, window))
    return x.transpose(2, 3).reshape(len(x), height, width, -1)


def _across(height: int, width: int, window: int, shifts: list[int], device: torch.device) -> Tensor:
    """Where a shifted window holds patches from opposite edges of the image: they must not see each other."""
    sides = []
    for side, shift in zip((height, width), shifts, strict=True):
        place = torch.arange(side, device=device)
        sides.append((place >= side - window).long() + (place >= side - shift).long() if shift else place * 0)
    regions = 3 * sides[0][:, None] + sides[1]
    inside = _windows(regions[None, :, :, None], window)[0, :, :, 0]
    return (inside[:, :, None] != inside[:, None, :])[:, None]


class PatchMerging(nn.Module):
    """Four neighbouring patches become one of twice the features.

    Example:
        >>> PatchMerging(4)(torch.randn(1, 5, 6, 4)).shape
        torch.Size([1, 3, 3, 8])
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * hidden_size)
        self.reduction = nn.Linear(4 * hidden_size, 2 * hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.size(2) % 2, 0, x.size(1) % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return out


class Swin(nn.Module):
    """Stages of window attention, each of half the sides and twice the features of the one before (Liu et al., 2021).

    Args:
        num_classes: number of classes.
        hidden_size: features of a patch in the first stage.
        depths: blocks of every stage.
        num_heads: heads of every stage.
        window: sides of a window, in patches.
        patch_size: sides of a patch, in pixels.
        in_channels: channels of the image.

    Shape:
        ``[N, in_channels, H, W]``, sides that are multiples of ``patch_size``, to ``[N, num_classes]``. Attention costs
        ``O(H W window ** 2)``: it is linear in the size of the image.

    Example:
        >>> model = Swin(num_classes=3, hidden_size=8, depths=(2, 2), num_heads=(2, 4), window=4, patch_size=2)
        >>> model(torch.randn(2, 3, 24, 20)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        hidden_size: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        patch_size: int = 4,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(f"Swin: num_heads: got {len(num_heads)} stages, expected {len(depths)} as in depths")
        self.patch_embedding = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)
        self.embedding_norm = nn.LayerNorm(hidden_size)
        stages: list[nn.Module] = []
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            size = hidden_size << stage
            blocks: list[nn.Module] = [] if stage == 0 else [PatchMerging(size // 2)]
            blocks += [SwinBlock(size, heads, window, window // 2 if index % 2 else 0) for index in range(depth)]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(hidden_size << (len(depths) - 1))
        self.head = nn.Linear(hidden_size << (len(depths) - 1), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding_norm(self.patch_embedding(images).permute(0, 2, 3, 1))
        scores: Tensor = self.head(self.norm(self.stages(x)).mean((1, 2)))
        return scores
