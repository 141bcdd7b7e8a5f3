"""Batch normalisation whose statistics are those of every process, between a convolution and its activation.

``torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`` makes the blocks of :mod:`ptkernels.nn` use it, as it does with
torch's own, on any device that the process group serves. The convolution runs on the kernels; the normalisation, which
has to wait for the other processes in the middle, is plain torch.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ptkernels.ops.conv_bn_relu import replays_forward
from ptkernels.ops.conv_bn_relu.reference import compute_dtype, per_channel, update_statistics, values_per_channel

__all__ = ["is_synchronized", "normalize"]


def is_synchronized(bn: nn.Module | None) -> TypeGuard[nn.SyncBatchNorm]:
    """Whether a normalisation has to ask other processes."""
    if not isinstance(bn, nn.SyncBatchNorm) or not (bn.training or bn.running_mean is None):
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(bn.process_group) > 1


def normalize(bn: nn.SyncBatchNorm, z: Tensor, momentum: float) -> Tensor:
    """``z`` normalised with the mean and biased variance over all processes; moves the running statistics.

    The variance is that of differences from the common mean: nothing is squared before it is centred. The gradients
    are those of one process that has every batch.

    Raises:
        ValueError: there is one value per channel in all processes together.
    """
    from torch.distributed.nn.functional import all_reduce

    group, dims = bn.process_group, (0, *range(2, z.dim()))
    wide = z.to(compute_dtype(z.dtype))
    counts = torch.tensor(float(values_per_channel(z)), dtype=torch.float64, device=z.device)
    dist.all_reduce(counts, group=group)
    count = int(counts)
    if count < 2:
        raise ValueError(f"SyncBatchNorm: got {count} value per channel in all processes, expected more than 1")
    mean: Tensor = all_reduce(wide.sum(dims) / count, group=group)
    centred = wide - per_channel(mean, wide)
    var: Tensor = all_reduce(centred.square().sum(dims) / count, group=group)
    if bn.track_running_stats and bn.training and bn.running_mean is not None and not replays_forward():
        update_statistics(bn.running_mean, bn.running_var, mean.detach(), var.detach(), count, momentum)
    u = centred * per_channel((var + bn.eps).rsqrt(), wide)
    if bn.affine:
        u = u * per_channel(bn.weight.to(u.dtype), u) + per_channel(bn.bias.to(u.dtype), u)
    return u
