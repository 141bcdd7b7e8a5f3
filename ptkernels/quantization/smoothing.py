"""Moving difficulty from activations to weights before both are quantized: SmoothQuant and AWQ.

    x weight^T = (x / s) (weight * s)^T        s > 0, one number for every input channel

The division goes into the module that made ``x`` (:func:`fold_scales`), so that nothing is left to compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptkernels.ops.quantized_matmul.quantize import quantize_weight


def smoothquant_scales(input_peaks: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """Channel scales by SmoothQuant (Xiao et al., 2023): ``s = max|x|^alpha / max|weight|^(1 - alpha)``.

    Args:
        input_peaks: ``[K]``, largest magnitude of every input channel over the calibration set.
        weights: the weights ``[N, K]`` of all layers that read this input.
        alpha: 0 leaves the input as it is, 1 makes all its channels equally large.

    Returns:
        Float32 ``[K]``; 1 for channels that are 0 in the input or all weights.

    Raises:
        ValueError: alpha is out of range, or shapes do not fit.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.quantization.smoothquant_scales(torch.tensor([16.0, 1.0]), [torch.ones(3, 2)])
        tensor([4., 1.])
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"smoothquant_scales: alpha: got {alpha}, expected 0 to 1")
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1:] != input_peaks.shape:
            raise ValueError(
                f"smoothquant_scales: weights: got shape {list(weight.shape)}, expected [N, {input_peaks.numel()}]"
            )
    peaks = input_peaks.float()
    tops = torch.stack([weight.detach().float().abs().amax(0) for weight in weights]).amax(0)
    scales = peaks.pow(alpha) / tops.pow(1 - alpha)
    return torch.where((peaks > 0) & (tops > 0), scales, 1.0)


def awq_scales(
    x: Tensor,
    weights: Sequence[Tensor],
    scheme: str = "int4_weight_only",
    group_size: int | None = None,
    steps: int = 20,
) -> Tensor:
    """Channel scales by AWQ (Lin et al., 2024): ``s = mean|x|^alpha``, alpha searched for the least output error.

    Args:
        x: ``[..., K]``, inputs of the calibration set; a few hundred rows do.
        weights: the weights ``[N, K]`` of all layers that read this input.
        scheme: see :func:`ptkernels.quantize_weight`; one that leaves the input as it is.
        group_size: see there.
        steps: candidates for alpha from 0 on, below 1.

    Returns:
        Float32 ``[K]``, ones where no candidate helps.

    Example:
        >>> import torch, ptkernels as ptk
        >>> scale = 1 + 50 * (torch.arange(64) % 16 == 0)                     # a few large channels
        >>> weight, x = torch.randn(32, 64), torch.randn(128, 64) * scale
        >>> s = ptk.quantization.awq_scales(x, [weight], group_size=32)
        >>> bool(s[0] > s[1])
        True
    """
    rows = x.detach().float().flatten(0, -2)
    mean = rows.abs().mean(0).clamp(min=1e-8)
    wide = [weight.detach().float() for weight in weights]
    expected = [rows @ weight.T for weight in wide]
    best, least = torch.ones_like(mean), float("inf")
    for step in range(steps):
        scales = mean.pow(step / steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight, target in zip(wide, expected, strict=True):
            rounded = quantize_weight(weight * scales, scheme, group_size).dequantize() / scales
            error += float((rows @ rounded.T - target).square().sum())
        if error < least:
            best, least = scales, error
    return best


def fold_scales(previous: nn.Module, layers: Sequence[nn.Linear], scales: Tensor) -> None:
    """Divide the output channels of ``previous`` by ``scales`` and multiply the input channels of ``layers``, in place.

    The composition computes what it did, as long as nothing but channel-wise linear work lies between and nothing else
    reads the output of ``previous``.

    Args:
        previous: a linear layer or a normalisation with a weight ``[K]`` (and a bias, if it has one).
        layers: all layers that read its output.
        scales: ``[K]``, positive.

    Raises:
        TypeError: ``previous`` has no weight to divide.
        ValueError: shapes do not fit, or a scale is not positive.

    Example:
        >>> import torch, ptkernels as ptk
        >>> norm, linear, x = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4), torch.randn(3, 8)
        >>> expected = linear(norm(x))
        >>> ptk.quantization.fold_scales(norm, [linear], torch.rand(8) + 0.5)
        >>> torch.allclose(linear(norm(x)), expected, atol=1e-5)
        True
    """
    weight = getattr(previous, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"fold_scales: previous: got {type(previous).__name__} without a weight")
    channels = weight.size(0)
    if scales.shape != (channels,) or any(layer.in_features != channels for layer in layers):
        raise ValueError(f"fold_scales: scales: got shape {list(scales.shape)}, expected [{channels}] for all layers")
    if not bool((scales > 0).all()):
        raise ValueError("fold_scales: scales: got some that are not positive")
    with torch.no_grad():
        divisor = scales.to(weight.dtype)
        weight.div_(divisor.view(-1, *(1,) * (weight.dim() - 1)))
        bias = getattr(previous, "bias", None)
        if isinstance(bias, Tensor):
            bias.div_(divisor)
        for layer in layers:
            layer.weight.mul_(scales.to(layer.weight.dtype))
