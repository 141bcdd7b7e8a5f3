"""Convolution, batch normalisation, residual and activation in plain torch: the oracle, and what runs without a kernel.

    z = conv(pre_activation(input), weight) + bias
    u = (z - mean) / sqrt(var + eps) * bn_weight + bn_bias + residual
    out = activation(u)

``mean`` and the biased ``var`` are those of the batch when training, else the running ones; without either there is no
normalisation. Or they are those of groups of channels of every image. The convolution may be transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels.ops.conv_bn_relu.variant import OP, PLAIN, Variant, num_groups_of

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
TRANSPOSED: dict[int, Callable[..., Tensor]] = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and statistics: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


# Written out where torch's own function cannot be differentiated twice in every mode.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda u, slope: u,
    "relu": lambda u, slope: torch.relu(u),
    "leaky_relu": lambda u, slope: torch.where(u > 0, u, u * slope),
    "relu6": lambda u, slope: torch.where(u > 0, torch.where(u < 6, u, torch.full_like(u, 6.0)), torch.zeros_like(u)),
    "elu": lambda u, slope: torch.where(u > 0, u, torch.expm1(torch.where(u > 0, torch.zeros_like(u), u))),
    "silu": lambda u, slope: u * torch.sigmoid(u),
    "gelu": lambda u, slope: u * _normal_cdf(u),
    "mish": lambda u, slope: u * torch.tanh(F.softplus(u)),
    "hardswish": lambda u, slope: torch.where(u > -3, torch.where(u < 3, u * (u + 3) / 6, u), torch.zeros_like(u)),
    "sigmoid": lambda u, slope: torch.sigmoid(u),
    "tanh": lambda u, slope: torch.tanh(u),
}


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * torch.erfc(u * -math.sqrt(0.5))


def _silu_derivative(u: Tensor) -> Tensor:
    s = torch.sigmoid(u)
    return s * (1 + u * (1 - s))


def _mish_derivative(u: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(u))
    return t + u * torch.sigmoid(u) * (1 - t * t)


def _between(u: Tensor, low: float, high: float, inside: Tensor, above: float) -> Tensor:
    return torch.where(u > low, torch.where(u < high, inside, torch.full_like(u, above)), torch.zeros_like(u))


DERIVATIVES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": lambda u, slope: torch.ones_like(u),
    "relu": lambda u, slope: (u > 0).to(u.dtype),
    "leaky_relu": lambda u, slope: torch.where(u > 0, torch.ones_like(u), torch.full_like(u, slope)),
    "relu6": lambda u, slope: _between(u, 0.0, 6.0, torch.ones_like(u), 0.0),
    "elu": lambda u, slope: torch.exp(torch.where(u > 0, torch.zeros_like(u), u)),
    "silu": lambda u, slope: _silu_derivative(u),
    "gelu": lambda u, slope: _normal_cdf(u) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi),
    "mish": lambda u, slope: _mish_derivative(u),
    "hardswish": lambda u, slope: _between(u, -3.0, 3.0, u / 3 + 0.5, 1.0),
    "sigmoid": lambda u, slope: torch.sigmoid(u) * (1 - torch.sigmoid(u)),
    "tanh": lambda u, slope: 1 - torch.tanh(u).square(),
}


def per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """A vector of channels, or one per group of every image, to broadcast against ``[batch, channels, space...]``."""
    if vector.dim() == 2:
        width = like.size(1) // max(vector.size(1), 1)
        spread: Tensor = vector.to(like.dtype).unsqueeze(2).expand(-1, -1, width).flatten(1)
        return spread.view(*spread.shape, *(1,) * (like.dim() - 2))
    return vector.to(like.dtype).view(1, -1, *(1,) * (like.dim() - 2))


def batch_statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel."""
    dims = (0, *range(2, z.dim()))
    mean = z.mean(dims)
    return mean, (z - per_channel(mean, z)).square().mean(dims)


def _in_groups(z: Tensor, num_groups: int) -> Tensor:
    """``[batch, groups, values]``."""
    channels = z.size(1)
    groups = channels if num_groups == -1 else num_groups
    values: Tensor = z.unflatten(1, (groups, channels // groups if groups else 1)).flatten(2)
    return values


def sample_statistics(z: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every group of channels of every image, ``[batch, groups]``; -1: of every channel."""
    values = _in_groups(z, num_groups)
    mean = values.mean(2)
    return mean, (values - mean.unsqueeze(2)).square().mean(2)


def statistics(z: Tensor, variant: Variant) -> tuple[Tensor, Tensor]:
    """Those of the data: over the batch, or of every image."""
    return sample_statistics(z, variant.num_groups) if variant.num_groups else batch_statistics(z)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, Any, Any, int],
    variant: Variant,
    slope: float,
) -> Tensor:
    """The convolution with what is before it, of operands of one dtype; geometry: stride, padding, dilation, groups."""
    stride, padding, dilation, groups = geometry
    x = ACTIVATIONS[variant.pre_activation](x, slope)
    if variant.transposed:
        more = variant.output_padding or 0
        return TRANSPOSED[x.dim()](x, weight, bias, stride, padding, more, groups, dilation)
    return CONVOLUTIONS[x.dim()](x, weight, bias, stride, padding, dilation, groups)


def normalize(
    z: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalised and affine, in the dtype of ``z``; ``z`` itself without a mean."""
    if mean is None or var is None:
        return z
    u = (z - per_channel(mean, z)) * (per_channel(var, z) + eps).rsqrt()
    if bn_weight is not None:
        u = u * per_channel(bn_weight, z)
    return u if bn_bias is None else u + per_channel(bn_bias, z)


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    activation: str,
    negative_slope: float,
    *variant: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The result, the convolution's in the dtype of sums, and the statistics it was normalised with.

    ``variant`` are the fields of :class:`ptkernels.ops.conv_bn_relu.variant.Variant`.
    """
    dtype, variety = compute_dtype(input.dtype), Variant(*variant)
    wide_bias = None if bias is None else bias.to(dtype)
    geometry = (stride, padding, dilation, groups)
    z = convolve(input.to(dtype), weight.to(dtype), wide_bias, geometry, variety, negative_slope)
    if training or variety.num_groups:
        mean, var = statistics(z, variety)
        u = normalize(z, bn_weight, bn_bias, mean, var, eps)
        mean, var = mean.detach(), var.detach()
    else:
        mean, var = (None if t is None else t.detach() for t in (running_mean, running_var))  # type: ignore[assignment]
        u = normalize(z, bn_weight, bn_bias, mean, var, eps)
    if residual is not None:
        u = u + residual.to(dtype)
    return ACTIVATIONS[activation](u, negative_slope).to(input.dtype), z, mean, var


def update_running(running: Tensor | None, value: Tensor, momentum: float) -> None:
    """``running = (1 - momentum) * running + momentum * value``, in place."""
    if running is not None:
        with torch.no_grad():
            running.lerp_(value.to(running.dtype), momentum)


def update_statistics(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, count: int, momentum: float
) -> None:
    """Move the running statistics towards those of a batch of ``count`` values, the variance unbiased."""
    update_running(running_mean, mean, momentum)
    update_running(running_var, var * (count / (count - 1)), momentum)


def values_per_channel(z: Tensor) -> int:
    """How many numbers statistics of a channel are taken over."""
    return z.size(0) * math.prod(z.shape[2:])


def conv_bn_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
    norm: str = "batch",
    num_groups: int | None = None,
    pre_activation: str = "none",
) -> Tensor:
    """Plain torch :func:`ptkernels.conv_bn_relu`: same arguments and results, every intermediate in memory.

    Computes in float64 for float64 inputs and in float32 otherwise, and rounds the result at the end. Differentiable in
    every tensor argument but the running statistics, any number of times in forward and reverse mode.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.reference.conv_bn_relu(torch.ones(1, 1, 3), torch.ones(1, 1, 2))
        tensor([[[2., 2.]]])
    """
    variant = PLAIN._replace(num_groups=num_groups_of(OP, norm, num_groups), pre_activation=pre_activation)
    out, z, mean, var = forward(
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, training, eps, stride, padding,
        dilation, groups, activation, negative_slope, *variant,
    )  # fmt: skip
    if training and norm == "batch" and mean is not None and var is not None:
        update_statistics(running_mean, running_var, mean, var, values_per_channel(z), momentum)
    return out


def gradients(
    grad_out: Tensor, tensors: tuple[Tensor | None, ...], fixed: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Tensor | None, ...]:
    """First derivatives, written so that they can be differentiated further.

    ``tensors`` are input, weight, bias, bn_weight, bn_bias and residual, ``fixed`` the running statistics, ``options``
    the operator's others; the result has None for those of ``tensors`` that are None. With du = grad_out * act'(u) and
    g = bn_weight du: dz = g / std, less (mean(g) + xhat mean(g xhat)) / std where the statistics are those of the data,
    the means over what these were taken of.
    """
    input, weight, bias, bn_weight, bn_bias, residual = tensors
    training, eps, stride, padding, dilation, groups, activation, slope, *rest = options
    variant, geometry = Variant(*rest), (stride, padding, dilation, groups)
    measures = training or variant.num_groups != 0
    assert input is not None
    assert weight is not None
    dtype = compute_dtype(input.dtype)
    x, w = input.to(dtype), weight.to(dtype)
    z = convolve(x, w, None if bias is None else bias.to(dtype), geometry, variant, slope)
    mean, var = statistics(z, variant) if measures else fixed
    u = normalize(z, bn_weight, bn_bias, mean, var, eps)
    if residual is not None:
        u = u + residual.to(dtype)
    du = grad_out.to(dtype) * DERIVATIVES[activation](u, slope)

    dims = (0, *range(2, z.dim()))
    dz, xhat = du, z
    if mean is not None and var is not None:
        invstd = (per_channel(var, z) + eps).rsqrt()
        xhat = (z - per_channel(mean, z)) * invstd
        dz = du if bn_weight is None else du * per_channel(bn_weight, z)
        if measures:

            def mean_of(values: Tensor) -> Tensor:
                if variant.num_groups:
                    return per_channel(_in_groups(values, variant.num_groups).mean(2), z)
                return values.mean(dims, keepdim=True)

            dz = dz - mean_of(dz) - xhat * mean_of(dz * xhat)
        dz = dz * invstd
    activated = ACTIVATIONS[variant.pre_activation](x, slope)
    more = list(variant.output_padding or [0] * len(stride))
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dz, activated, w, None, stride, padding, dilation, variant.transposed, more, groups, [True, True, False]
    )
    if variant.pre_activation != "none":
        dx = dx * DERIVATIVES[variant.pre_activation](x, slope)

    def like(grad: Tensor, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else grad.to(tensor.dtype)

    return (
        dx.to(input.dtype),
        dw.to(weight.dtype),
        like(dz.sum(dims), bias),
        like((du * xhat).sum(dims), bn_weight),
        like(du.sum(dims), bn_bias),
        like(du, residual),
    )
