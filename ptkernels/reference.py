"""The oracles: one plain PyTorch function per operator, with the operator's signature.

They are differentiable any number of times, in forward and in reverse mode, run on every device and dtype PyTorch
supports, and in float64 they are what tests and benchmarks compare with.
"""

from __future__ import annotations

from ptkernels.ops.attention.reference import attention
from ptkernels.ops.conv_bn_relu.reference import conv_bn_relu

__all__ = ["attention", "conv_bn_relu"]
