"""Drop-in modules over the operators, with constructors, parameters and state_dict of their torch.nn originals."""

from __future__ import annotations

from ptkernels.nn.conv import ConvBNReLU1d, ConvBNReLU2d, ConvBNReLU3d

__all__ = ["ConvBNReLU1d", "ConvBNReLU2d", "ConvBNReLU3d"]
