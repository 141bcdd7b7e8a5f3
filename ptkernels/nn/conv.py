"""Convolution, batch normalisation and activation as one module, with the parameters of the three it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ptkernels.nn import synchronized, torchscript
from ptkernels.ops.conv_bn_relu import conv_bn_relu, reference
from ptkernels.ops.conv_transpose_bn_relu import conv_transpose_bn_relu

__all__ = [
    "ConvBNReLU1d",
    "ConvBNReLU2d",
    "ConvBNReLU3d",
    "ConvTransposeBNReLU1d",
    "ConvTransposeBNReLU2d",
    "ConvTransposeBNReLU3d",
    "ReLUConvBN1d",
    "ReLUConvBN2d",
    "ReLUConvBN3d",
]

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


class _Block(nn.Module):
    """What all modules share.

    The children ``conv``, ``bn`` and ``act`` are torch's own modules: they hold the parameters, the buffers and the
    options, read at every call, under the names ``conv.*`` and ``bn.*``.
    """

    _bn: ClassVar[type[nn.Module]]
    _instance: ClassVar[type[nn.Module]]

    def _set(
        self,
        conv: nn.Module,
        norm: bool | str,
        num_groups: int | None,
        statistics: tuple[float, float | None, bool, bool],
        activation: str,
        pre_activation: str,
        negative_slope: float,
        recompute: bool,
        where: dict[str, Any],
    ) -> None:
        kind = type(self).__name__
        for name, value in (("activation", activation), ("pre_activation", pre_activation)):
            if value not in ACTIVATIONS:
                raise ValueError(f"{kind}: {name}: got {value!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.conv: Any = conv
        self.bn: Any = self._normalisation(norm, num_groups, statistics, where)
        self.act: Any = nn.LeakyReLU(negative_slope) if activation == "leaky_relu" else ACTIVATIONS[activation]()
        self.activation = activation
        self.pre_activation = pre_activation
        self.negative_slope = negative_slope
        self.recompute = recompute

    def _normalisation(
        self,
        norm: bool | str,
        num_groups: int | None,
        statistics: tuple[float, float | None, bool, bool],
        where: dict[str, Any],
    ) -> nn.Module:
        eps, momentum, affine, tracks = statistics
        channels = self.conv.out_channels
        if norm == "group":
            if num_groups is None:
                raise ValueError(f"{type(self).__name__}: num_groups: got None, expected an int with norm='group'")
            return nn.GroupNorm(num_groups, channels, eps, affine, **where)
        if num_groups is not None:
            raise ValueError(f"{type(self).__name__}: num_groups: got {num_groups}, expected None with norm={norm!r}")
        if norm == "instance":
            return self._instance(channels, eps, affine=affine, **where)
        if norm in (True, "batch"):
            return self._bn(channels, eps, momentum, affine, tracks, **where)
        if norm is False:
            return nn.Identity()
        raise ValueError(
            f"{type(self).__name__}: norm: got {norm!r}, expected True or 'batch', 'instance', 'group' or False"
        )

    def load_unfused(self, modules: nn.Sequential) -> None:
        """Take over the parameters and buffers of ``nn.Sequential(conv, bn, ...)``, strictly.

        The state of the first convolution goes to ``conv.*``, that of the module behind it, where this module
        normalises, to ``bn.*``.

        Raises:
            RuntimeError: a key is missing or left over, or a shape differs, as in ``load_state_dict``.
        """
        state = modules.state_dict()
        names = ["conv"] if isinstance(self.bn, nn.Identity) else ["conv", "bn"]
        positions = list(modules._modules)
        convolutions = (isinstance(module, nn.modules.conv._ConvNd) for module in modules)
        first = next((index for index, found in enumerate(convolutions) if found), 0)
        renamed = {}
        for key, value in state.items():
            position, _, rest = key.partition(".")
            index = positions.index(position) - first
            renamed[f"{names[index]}.{rest}" if 0 <= index < len(names) else key] = value
        self.load_state_dict(renamed, strict=True)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"recompute": self.recompute}
        if self.pre_activation != "none":
            options["pre_activation"] = self.pre_activation
            options["negative_slope"] = self.negative_slope
        return options

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.ConvBNReLU(self)


class _ConvBNReLU(_Block):
    """What the modules of one, two and three dimensions share."""

    _conv: ClassVar[type[nn.Module]]

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
        norm: bool | str = True,
        num_groups: int | None = None,
        pre_activation: str = "none",
        negative_slope: float = 0.01,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = self._conv(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, **where
        )
        statistics = (eps, momentum, affine, track_running_stats)
        self._set(conv, norm, num_groups, statistics, activation, pre_activation, negative_slope, recompute, where)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``act(bn(conv(x)) + residual)``."""
        return fused(self.conv, self.bn, self.act, x, residual, **self._options())


class _ConvTransposeBNReLU(_Block):
    """The same of transposed convolutions."""

    _conv: ClassVar[type[nn.Module]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = False,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        *,
        norm: bool | str = True,
        num_groups: int | None = None,
        pre_activation: str = "none",
        negative_slope: float = 0.01,
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        conv = self._conv(
            *(in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation),
            padding_mode,
            **where,
        )
        statistics = (eps, momentum, affine, track_running_stats)
        self._set(conv, norm, num_groups, statistics, activation, pre_activation, negative_slope, recompute, where)

    def forward(self, x: Tensor, residual: Tensor | None = None, output_size: list[int] | None = None) -> Tensor:
        """``act(bn(conv_transpose(x)) + residual)``; ``output_size`` as of torch's transposed convolutions."""
        options = self._options()
        if output_size is not None:
            conv = self.conv
            sizes = (output_size, conv.stride, conv.padding, conv.kernel_size, len(conv.kernel_size), conv.dilation)
            options["output_padding"] = conv._output_padding(x, *sizes)
        return fused(self.conv, self.bn, self.act, x, residual, **options)


class _ReLUConvBN(_ConvBNReLU):
    """The same with the activation in front."""

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
        activation: str = "none",
        *,
        pre_activation: str = "relu",
        **options: Any,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(eps, momentum, affine, track_running_stats, activation),
            pre_activation=pre_activation,
            **options,
        )


def fused(
    conv: Any,
    bn: nn.Module | None,
    act: nn.Module | str | None,
    x: Tensor,
    residual: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` with the parameters, buffers and options of torch's modules, as they are now.

    The convolution may be transposed, and the normalisation one over the batch, of groups or of instances.
    """
    if conv._forward_pre_hooks:
        x = _pre_hooks(conv, x)
    padding = conv.padding
    function: Callable[..., Tensor] = conv_bn_relu
    if isinstance(conv, nn.modules.conv._ConvTransposeNd):
        function = conv_transpose_bn_relu
        options.setdefault("output_padding", conv.output_padding)
    elif conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    options.update(stride=conv.stride, padding=padding, dilation=conv.dilation, groups=conv.groups)
    activation = act if isinstance(act, str) else _activation_name(act)
    if activation == "leaky_relu" and not isinstance(act, str):
        options["negative_slope"] = getattr(act, "negative_slope", 0.01)
    if isinstance(bn, (nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)):
        options.update(_of_images(bn), eps=bn.eps, residual=residual, activation=activation)
        return function(x, conv.weight, conv.bias, bn.weight, bn.bias, **options)
    if not isinstance(bn, nn.modules.batchnorm._BatchNorm):
        return function(x, conv.weight, conv.bias, residual=residual, activation=activation, **options)
    training = bn.training or bn.running_mean is None
    momentum = synchronized.momentum_of(bn)
    if synchronized.is_synchronized(bn):
        z = function(x, conv.weight, conv.bias, activation="none", **options)
        u = synchronized.normalize(bn, z, momentum)
        u = u if residual is None else u + residual
        return reference.ACTIVATIONS[activation](u, options.get("negative_slope", 0.01)).to(z.dtype)
    running = (bn.running_mean, bn.running_var) if not bn.training or bn.track_running_stats else (None, None)
    return function(
        x, conv.weight, conv.bias, bn.weight, bn.bias, *running,
        residual=residual, training=training, momentum=momentum, eps=bn.eps, activation=activation, **options,
    )  # fmt: skip


def _of_images(bn: Any) -> dict[str, Any]:
    """The options of a normalisation with statistics of every image."""
    if isinstance(bn, nn.GroupNorm):
        return {"norm": "group", "num_groups": bn.num_groups}
    if bn.track_running_stats:
        kind = type(bn).__name__
        raise ValueError(f"{kind}: track_running_stats: got True, expected False before a fused activation")
    return {"norm": "instance"}


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
        norm: True or ``"batch"``, ``"group"`` (``bn`` is then a ``GroupNorm``) or ``"instance"`` (an ``InstanceNorm``
            without running statistics). False leaves the normalisation out; ``bn`` is then an identity.
        num_groups: of ``norm="group"``.
        pre_activation: of the input, before the convolution.
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
    _conv, _bn, _instance = nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d


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
    _conv, _bn, _instance = nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d


class ConvBNReLU3d(_ConvBNReLU):
    __doc__ = (
        """``act(bn(conv(x)) + residual)`` over ``[N, C, D, H, W]``, for Conv3d, BatchNorm3d and an activation."""
        + _ARGUMENTS
    )
    _conv, _bn, _instance = nn.Conv3d, nn.BatchNorm3d, nn.InstanceNorm3d


_TRANSPOSED_ARGUMENTS = _ARGUMENTS.replace(
    "padding, dilation, groups, bias, padding_mode: of the\n            convolution",
    "padding, output_padding, groups, bias, dilation,\n            padding_mode: of the convolution",
)


class ConvTransposeBNReLU1d(_ConvTransposeBNReLU):
    __doc__ = (
        """``act(bn(conv(x)) + residual)`` over ``[N, C, L]``, for ConvTranspose1d, BatchNorm1d and an activation."""
        + _TRANSPOSED_ARGUMENTS
    )
    _conv, _bn, _instance = nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d


class ConvTransposeBNReLU2d(_ConvTransposeBNReLU):
    __doc__ = (
        """``act(bn(conv(x)) + residual)`` over ``[N, C, H, W]``, for ConvTranspose2d, BatchNorm2d and an activation."""
        + _TRANSPOSED_ARGUMENTS
        + """
    Example:
        >>> import torch, ptkernels.nn
        >>> block = ptkernels.nn.ConvTransposeBNReLU2d(8, 3, 4, stride=2, padding=1)
        >>> block(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 3, 10, 10])
        >>> block(torch.randn(2, 8, 5, 5), output_size=[11, 11]).shape
        torch.Size([2, 3, 11, 11])
"""
    )
    _conv, _bn, _instance = nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d


class ConvTransposeBNReLU3d(_ConvTransposeBNReLU):
    __doc__ = (
        """The same over ``[N, C, D, H, W]``, for ConvTranspose3d, BatchNorm3d and an activation."""
        + _TRANSPOSED_ARGUMENTS
    )
    _conv, _bn, _instance = nn.ConvTranspose3d, nn.BatchNorm3d, nn.InstanceNorm3d


_REVERSED_ARGUMENTS = _ARGUMENTS.replace(
    """activation: ``"relu"`` or another one that :func:`ptkernels.conv_bn_relu` knows; ``"none"`` for none.""",
    """activation: after the normalisation, none by default.""",
).replace("pre_activation: of the input, before the convolution.", """pre_activation: ``"relu"``, or another one.""")


class ReLUConvBN1d(_ReLUConvBN):
    __doc__ = """``bn(conv(relu(x))) + residual`` over ``[N, C, L]``.""" + _REVERSED_ARGUMENTS
    _conv, _bn, _instance = nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d


class ReLUConvBN2d(_ReLUConvBN):
    __doc__ = (
        """``bn(conv(relu(x))) + residual`` over ``[N, C, H, W]``, the order of differentiable architecture search."""
        + _REVERSED_ARGUMENTS
        + """
    Example:
        >>> import torch, ptkernels.nn
        >>> block = ptkernels.nn.ReLUConvBN2d(8, 4, 1, affine=False)
        >>> block(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
"""
    )
    _conv, _bn, _instance = nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d


class ReLUConvBN3d(_ReLUConvBN):
    __doc__ = """``bn(conv(relu(x))) + residual`` over ``[N, C, D, H, W]``.""" + _REVERSED_ARGUMENTS
    _conv, _bn, _instance = nn.Conv3d, nn.BatchNorm3d, nn.InstanceNorm3d
