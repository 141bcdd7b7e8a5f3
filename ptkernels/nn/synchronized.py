"""Batch normalisation whose statistics are those of every process, between a convolution and its activation.

:class:`SyncBatchNorm` and ``torch.nn.SyncBatchNorm`` are for the blocks of :mod:`ptkernels.nn` the same, on any device
that the process group serves. The convolution runs on the kernels; the normalisation, which has to wait for the other
processes in the middle, is plain torch.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist

from ptkernels.nn import torchscript
from ptkernels.ops.conv_bn_relu import replays_forward
from ptkernels.ops.conv_bn_relu.reference import compute_dtype, per_channel, update_statistics, values_per_channel

__all__ = ["SyncBatchNorm", "is_synchronized", "momentum_of", "normalize"]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``torch.nn.SyncBatchNorm`` for any device and backend: torch's own, and DDP with it, refuse the CPU.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as in :class:`torch.nn.BatchNorm2d`, whose
            ``state_dict`` loads strictly, both ways.
        process_group: the processes whose batches make up the statistics. Default: all.
        device, dtype: of parameters and buffers.

    Shape:
        ``[N, C, ...]`` to the same; ``N`` may differ from process to process.

    Raises:
        ValueError: there is one value per channel in all processes together.

    Without a process group it is batch normalisation.

    Example:
        >>> import torch, ptkernels as ptk
        >>> model = torch.nn.Sequential(ptk.nn.ConvBNReLU2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = ptk.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        >>> type(model[0].bn) is type(model[1]) is ptk.nn.SyncBatchNorm
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: input: got {input.dim()} dimensions, expected at least 2")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = momentum_of(self)
        if is_synchronized(self):
            return normalize(self, input, momentum).to(input.dtype)
        training = self.training or self.running_mean is None
        mean, var = self.running_mean, self.running_var
        if training and not self.track_running_stats:
            mean = var = None
        if training and mean is not None and var is not None and replays_forward():
            mean, var = mean.clone(), var.clone()
        return F.batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """A model with this class in place of every batch normalisation, which keeps its parameters and buffers.

        Returns:
            The module itself, changed in place, unless it is a batch normalisation.
        """
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = (module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            made = cls(*kind, process_group, device="meta")
            made._parameters, made._buffers = module._parameters, module._buffers
            return made.train(module.training)
        for name, child in list(module.named_children()):
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.BatchNorm(self)


def is_synchronized(bn: nn.Module | None) -> TypeGuard[SyncBatchNorm]:
    """Whether a normalisation has to ask other processes."""
    if not isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm)) or not (bn.training or bn.running_mean is None):
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(bn.process_group) > 1


def momentum_of(bn: nn.modules.batchnorm._BatchNorm) -> float:
    """Weight of this batch in the running statistics; counts it."""
    momentum = 0.0 if bn.momentum is None else bn.momentum
    tracked = bn.training and bn.track_running_stats
    if tracked and bn.num_batches_tracked is not None and not replays_forward():
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            momentum = 1.0 / float(bn.num_batches_tracked)
    return momentum


class _SumOverProcesses(torch.autograd.Function):
    """A sum that every process uses: its gradient is the sum of what each makes of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]


def normalize(bn: SyncBatchNorm, z: Tensor, momentum: float) -> Tensor:
    """``z`` normalised with the mean and biased variance over all processes; moves the running statistics.

    The variance is that of differences from the common mean: nothing is squared before it is centred. The gradients
    are those of one process that has every batch.

    Raises:
        ValueError: there is one value per channel in all processes together.
    """
    group, dims = bn.process_group, (0, *range(2, z.dim()))
    wide = z.to(compute_dtype(z.dtype))
    counts = torch.tensor(float(values_per_channel(z)), dtype=torch.float64, device=z.device)
    dist.all_reduce(counts, group=group)
    count = int(counts)
    if count < 2:
        raise ValueError(f"SyncBatchNorm: got {count} value per channel in all processes, expected more than 1")
    mean: Tensor = _SumOverProcesses.apply(wide.sum(dims) / count, group)  # type: ignore[no-untyped-call]
    centred = wide - per_channel(mean, wide)
    var: Tensor = _SumOverProcesses.apply(centred.square().sum(dims) / count, group)  # type: ignore[no-untyped-call]
    if bn.track_running_stats and bn.training and bn.running_mean is not None and not replays_forward():
        update_statistics(bn.running_mean, bn.running_var, mean.detach(), var.detach(), count, momentum)
    u = centred * per_channel((var + bn.eps).rsqrt(), wide)
    if bn.affine:
        u = u * per_channel(bn.weight.to(u.dtype), u) + per_channel(bn.bias.to(u.dtype), u)
    return u
