"""Real images that scikit-learn's package holds: handwritten digits, and two photographs."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def digits(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """``[count, 3, size, size]`` between -1 and 1, and their classes."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    images = torch.from_numpy(data.images[:count]).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(data.target[:count])


@functools.cache
def patches(count: int, size: int) -> Tensor:
    """``[count, 3, size, size]`` of photographs, between -1 and 1."""
    datasets = pytest.importorskip("sklearn.datasets")
    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in datasets.load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2).float() / 127.5 - 1
    cut = photos.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return cut[:: len(cut) // count][:count].contiguous()


@functools.cache
def photographs(edge: int = 224) -> Tensor:
    """A temple in China and a flower, ``[2, 3, edge, edge]``, as classifiers of ImageNet are given images."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = []
    for name in ("china.jpg", "flower.jpg"):
        pixels = torch.from_numpy(datasets.load_sample_image(name).copy()).permute(2, 0, 1)[None].float()
        side = min(pixels.shape[2:])
        top, left = (pixels.size(2) - side) // 2, (pixels.size(3) - side) // 2
        square = pixels[:, :, top : top + side, left : left + side]
        found.append(F.interpolate(square, edge, mode="bicubic", antialias=True))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return ((torch.cat(found) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
