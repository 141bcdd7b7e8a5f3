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
