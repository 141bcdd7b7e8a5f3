"""Transposed convolution, normalisation, residual and activation in plain torch: the oracle."""

from __future__ import annotations

from torch import Tensor

from ptkernels.ops.conv_bn_relu.reference import forward, update_statistics, values_per_channel
from ptkernels.ops.conv_bn_relu.variant import TRANSPOSED_OP, Variant, num_groups_of


def conv_transpose_bn_relu(
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
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    activation: str = "relu",
    negative_slope: float = 0.01,
    recompute: bool = False,
    norm: str = "batch",
    num_groups: int | None = None,
    pre_activation: str = "none",
) -> Tensor:
    """Plain torch :func:`ptkernels.conv_transpose_bn_relu`: same arguments and results.

    Computes in float64 for float64 inputs and in float32 otherwise, and rounds the result at the end. Differentiable in
    every tensor argument but the running statistics, any number of times in forward and reverse mode.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.reference.conv_transpose_bn_relu(torch.ones(1, 1, 2), torch.ones(1, 1, 2), stride=2)
        tensor([[[1., 1., 1., 1.]]])
    """
    space = input.dim() - 2
    more = (output_padding,) * space if isinstance(output_padding, int) else output_padding
    variant = Variant(True, more, num_groups_of(TRANSPOSED_OP, norm, num_groups), pre_activation)
    out, z, mean, var = forward(
        input, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, training, eps, stride, padding,
        dilation, groups, activation, negative_slope, *variant,
    )  # fmt: skip
    if training and norm == "batch" and mean is not None and var is not None:
        update_statistics(running_mean, running_var, mean, var, values_per_channel(z), momentum)
    return out
