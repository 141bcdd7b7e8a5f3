"""Convolution, batch normalisation and activation as one module, with the parameters of the three it replaces."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ptkernels.nn import synchronized, torchscript
from ptkernels.ops.conv_bn_relu import conv_bn_relu, reference

__all__ = ["ConvBNReLU1d", "ConvBNReLU2d", "ConvBNReLU3d"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
_NAMES: dict[type[Any], str] = {kind: name for name, kind in ACTIVATIONS.items()}


class _ConvBNReLU(nn.Module):
    """What the modules of one, two and three dimensions share.

    The children ``conv``, ``bn`` and ``act`` are torch's own modules: they hold the parameters, the buffers and the
    options, read at every call, under the names ``conv.*`` and ``bn.*``.
    """

    _conv: ClassVar[type[nn.Module]]
    _bn: ClassVar[type[nn.Module]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        *,
        norm: bool = True,
        negative_slope: float = 0.01,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise ValueError(f"{type(self).__name__}: activation: got {activation!r}, expected one of {expected}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv: Any = self._conv(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **where
        )
        self.bn: Any = (
            self._bn(out_channels, eps, momentum, affine, track_running_stats, **where) if norm else nn.Identity()
        )
        self.act: Any = nn.LeakyReLU(negative_slope) if activation == "leaky_relu" else ACTIVATIONS[activation]()
        self.activation = activation
        self.recompute = recompute

    def load_unfused(self, modules: nn.Sequential) -> None:
        """Take over the parameters and buffers of ``nn.Sequential(conv, bn, ...)``, strictly.

        The first module's state goes to ``conv.*``, the second's, where this module normalises, to ``bn.*``.

        Raises:
            RuntimeError: a key is missing or left over, or a shape differs, as in ``load_state_dict``.
        """
        state = modules.state_dict()
        names = ["conv", "bn"] if isinstance(self.bn, nn.modules.batchnorm._BatchNorm) else ["conv"]
        renamed = {}
        for key, value in state.items():
            position, _, rest = key.partition(".")
            index = list(modules._modules).index(position)
            renamed[f"{names[index]}.{rest}" if index < len(names) else key] = value
        self.load_state_dict(renamed, strict=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``."""
        return fused(self.conv, self.bn, self.act, x, residual, recompute=self.recompute)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.ConvBNReLU(self)


def fused(
    conv: Any,
    bn: nn.Module | None,
    act: nn.Module | str | None,
    x: Tensor,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with the parameters, buffers and options of torch's modules, as they are now."""
    if conv._forward_pre_hooks:
        x = _pre_hooks(conv, x)
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    options.update(stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups)
    activation = act if isinstance(act, str) else _activation_name(act)
    if activation == "leaky_relu" and not isinstance(act, str):
        options["negative_slope"] = getattr(act, "negative_slope", 0.01)
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        return conv_bn_relu(x, conv.weight, conv.bias, residual=residual, activation=activation, **options)
    training = bn.training or bn.running_mean is None
    momentum = synchronized.momentum_of(bn)
    if synchronized.is_synchronized(bn):
        z = conv_bn_relu(x, conv.weight, conv.bias, activation="none", **options)
        u = synchronized.normalize(bn, z, momentum)
        u = u if residual is None else u + residual
        return reference.ACTIVATIONS[activation](u, options.get("negative_slope", 0.01)).to(z.dtype)
    running = (bn.running_mean, bn.running_var) if not bn.training or bn.track_running_stats else (None, None)
    return conv_bn_relu(
        x, conv.weight, conv.bias, bn.weight, bn.bias, *running,
        residual=residual, training=training, momentum=momentum, eps=bn.eps, activation=activation, **options,
    )  # fmt: skip


def _activation_name(act: nn.Module | None) -> str:
    name = _NAMES.get(type(act))
    return name or next((name for name, kind in ACTIVATIONS.items() if isinstance(act, kind)), "none")


def _pre_hooks(conv: Any, x: Tensor) -> Tensor:
    """What is to happen before the convolution is called: pruning and spectral norm then compute its weight."""
    for key, hook in conv._forward_pre_hooks.items():
        if key in conv._forward_pre_hooks_with_kwargs:
            changed = hook(conv, (x,), {})
            x = x if changed is None else changed[0][0]
        else:
            changed = hook(conv, (x,))
            x = x if changed is None else changed[0] if isinstance(changed, tuple) else changed
    return x


_ARGUMENTS = """

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: of the
            convolution, as in ``torch.nn``, but ``bias`` defaults to False: what follows has one.
        eps, momentum, affine, track_running_stats: of the normalisation, as in ``torch.nn``.
        activation: ``"relu"`` or another one that :func:`ptkernels.conv_bn_relu` knows; ``"none"`` for none.
        norm: False leaves the normalisation out; ``bn`` is then an identity.
        negative_slope: of ``"leaky_relu"``.
        recompute: keep only the input for the backward pass, which computes the convolution again.

    :meth:`SyncBatchNorm.convert_sync_batchnorm`, or torch's, gives the statistics of every process.

    Of hooks on children, only forward pre-hooks of ``conv`` fire (pruning, spectral norm): the children hold state and
    are not called.
"""


class ConvBNReLU1d(_ConvBNReLU):
    __doc__ = (
        """``act(bn(conv(x)) + residual)`` over ``[N, C, L]``, a drop-in for Conv1d, BatchNorm1d and an activation."""
        + _ARGUMENTS
    )
    _conv, _bn = nn.Conv1d, nn.BatchNorm1d


class ConvBNReLU2d(_ConvBNReLU):
    __doc__ = (
        """``act(bn(conv(x)) + residual)`` over ``[N, C, H, W]``, for Conv2d, BatchNorm2d and an activation."""
        + _ARGUMENTS
        + """
    Example:
        >>> import torch, ptkernels.nn
        >>> block = ptkernels.nn.ConvBNReLU2d(3, 8, 3, padding=1)
        >>> block.load_unfused(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8)))
        >>> block(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
        >>> sorted(block.state_dict())[:3]
        ['bn.bias', 'bn.num_batches_tracked', 'bn.running_mean']
"""
    )
    _conv, _bn = nn.Conv2d, nn.BatchNorm2d


class ConvBNReLU3d(_ConvBNReLU):
    __doc__ = (
        """``act(bn(conv(x)) + residual)`` over ``[N, C, D, H, W]``, for Conv3d, BatchNorm3d and an activation."""
        + _ARGUMENTS
    )
    _conv, _bn = nn.Conv3d, nn.BatchNorm3d
