"""Launching the Triton kernel of convolution, batch normalisation and activation.

The device code, with its equation, layout and tiling, is in ``triton_kernels``. The normalisation comes folded into one
factor and one summand a channel, as in inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton.math import ACTIVATIONS
from ptkernels.ops.conv_bn_relu import triton_kernels as kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Launcher = Callable[[Any], Any]


class Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


def tiles(dtype: torch.dtype, channels: int, filters: int) -> list[Tile]:
    """The tile sizes worth trying for the channels of one group, best guess first; no size of the images matters."""
    n = min(_triton.power_of_2(filters), 128)
    k = min(_triton.power_of_2(channels), 64)
    if dtype == torch.float32:
        return [Tile(32, min(n, 32), min(k, 32), 4, 1)]
    if n <= 32:
        return [Tile(128, n, k, 4, 3)]
    return [Tile(128, n, k, 8, 3), Tile(64, n, k, 4, 3)]


def _identity(kernel: Any) -> Any:
    return kernel


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    wrap: Launcher = _identity,
) -> Tensor:
    """``act(scale * conv2d(input, weight) + shift + residual)``, in the memory format of ``input``.

    Args:
        input: ``[N, C, H, W]``, any strides; read fastest in channels_last, as is ``weight``.
        weight: ``[F, C / groups, R, S]``.
        scale: ``[F]``: ``bn_weight / sqrt(running_var + eps)``.
        shift: ``[F]``: ``bn_bias + (bias - running_mean) * scale``.
    """
    batch, _, height, width = input.shape
    filters, channels, taps_h, taps_w = weight.shape
    out_size = [
        (size + 2 * pad - dilate * (taps - 1) - 1) // step + 1
        for size, pad, dilate, taps, step in zip(
            (height, width), padding, dilation, (taps_h, taps_w), stride, strict=True
        )
    ]
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    out = input.new_empty((batch, filters, *out_size)).contiguous(memory_format=layout)
    if out.numel() == 0:
        return out
    per_group = filters // groups
    tile = tiles(input.dtype, channels, per_group)[0]
    pixels = batch * out_size[0] * out_size[1]
    wrap(kernels.conv)[(triton.cdiv(pixels, tile.m) * triton.cdiv(per_group, tile.n), groups)](
        input, weight, input if scale is None else scale, input if shift is None else shift,
        input if residual is None else residual, out, pixels, height, width, *out_size,
        *input.stride(), *weight.stride(), *(out if residual is None else residual).stride(), *out.stride(),
        *stride, *padding, *dilation, negative_slope,
        CHANNELS=channels, FILTERS=per_group, TAPS_H=taps_h, TAPS_W=taps_w, HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=ACTIVATIONS[activation],
        PRECISION=_triton.dot_precision(input.dtype),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
