"""Attention over sequences that are split among the processes of a group: ring attention, load-balanced when causal.

    equation   the keys of process j give  out_j, lse_j  on their own;  with  lse = log sum_j exp(lse_j)
                   out = sum_j exp(lse_j - lse) out_j
               and  d out_j = exp(lse_j - lse) d out:  all that the backward of piece j needs beside out and lse_j

    layout     process r of W holds, where causal, slices r and 2 W - 1 - r of 2 W of the sequence, so that every
               process has the same work in every step: all of its keys and half of its queries, or the other way round

    steps      W, each with the next keys and values on their way while the present ones are attended to; in the
               backward their gradients travel with them and arrive home after W steps

Source: Liu et al., *Ring Attention with Blockwise Transformers*, 2023; the balanced split is that of Llama 3's training
(Meta, 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptkernels.ops.attention.library import attention_op, backward_op

__all__ = ["gather_sequence", "ring_attention", "shard_sequence"]


def shard_sequence(tensor: Tensor, dim: int = -2, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The part of a whole sequence that this process holds: slices ``r`` and ``2 W - 1 - r`` of ``2 W``.

    Args:
        tensor: the same on every process.
        dim: the sequence's dimension, a multiple of ``2 W`` long.
        group: the processes. Default: all.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if tensor.size(dim) % (2 * world):
        raise ValueError(f"shard_sequence: tensor: got length {tensor.size(dim)}, expected a multiple of {2 * world}")
    slices = tensor.chunk(2 * world, dim)
    return torch.cat([slices[rank], slices[2 * world - 1 - rank]], dim)


def gather_sequence(tensor: Tensor, dim: int = -2, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The whole sequence, from the parts that :func:`shard_sequence` made. Not differentiable."""
    world = dist.get_world_size(group)
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world)]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    halves = [part.chunk(2, dim) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`ptkernels.attention` of a sequence whose parts are on different processes; differentiable once.

    Args:
        query: ``[batch, heads, length, dim]``, this process's part of the sequence (:func:`shard_sequence`), of the
            same shape on every process.
        key: ``[batch, kv_heads, length, dim]``, ``kv_heads`` dividing ``heads``.
        value: ``[batch, kv_heads, length, dim_v]``.
        is_causal: attend to earlier tokens of the whole sequence only.
        scale: factor of the scores. Default: ``1 / sqrt(dim)``.
        group: the processes. Default: all.

    Returns:
        ``[batch, heads, length, dim_v]``, this process's part of the result. Results of the pieces are summed in
        float32, in float64 for float64; each is rounded to the dtype of ``query`` before.

    Raises:
        ValueError: the length is odd and ``is_causal``; for bad tensors, what attention itself raises.

    Every process sends and receives ``W - 1`` times its keys and values, and keeps no more than two copies of them.
    """
    if is_causal and query.size(-2) % 2:
        raise ValueError(
            f"ring_attention: query: got length {query.size(-2)}, expected an even one (see shard_sequence)"
        )
    out: Tensor = _Ring.apply(query, key, value, is_causal, scale, group)  # type: ignore[no-untyped-call]
    return out


class _Traveller:
    """Tensors that go round the ring, each step from this process to the next."""

    def __init__(self, tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None) -> None:
        self.tensors = tuple(tensor.contiguous() for tensor in tensors)
        self.group = group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        self.to, self.source = (
            (rank + step) % world if group is None else dist.get_global_rank(group, (rank + step) % world)
            for step in (1, -1)
        )
        self._arriving: tuple[Tensor, ...] = ()
        self._requests: list[Any] = []

    def depart(self) -> None:
        self._arriving = tuple(torch.empty_like(tensor) for tensor in self.tensors)
        exchanges = [dist.P2POp(dist.isend, tensor, self.to, self.group) for tensor in self.tensors]
        exchanges += [dist.P2POp(dist.irecv, tensor, self.source, self.group) for tensor in self._arriving]
        self._requests = dist.batch_isend_irecv(exchanges)

    def arrive(self) -> None:
        for request in self._requests:
            request.wait()
        self.tensors = self._arriving


def _meeting(step: int, rank: int, is_causal: bool, length: int) -> tuple[slice, slice, bool]:
    """Which of our queries meet which keys in a step, and whether causally."""
    whole, half = slice(0, length), length // 2
    if not is_causal or step == 0:
        return whole, whole, is_causal
    # Keys of an earlier process: the first of its slices precedes both of ours, the second neither. Of a later one:
    # both of its slices precede our second, neither our first.
    return (whole, slice(0, half), False) if step <= rank else (slice(half, length), whole, False)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        scale: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        rank, world, length = dist.get_rank(group), dist.get_world_size(group), query.size(-2)
        travelling = _Traveller((key, value), group)
        total, total_lse, partial_lse = None, None, []
        for step in range(world):
            if step + 1 < world:
                travelling.depart()
            rows, columns, causal = _meeting(step, rank, is_causal, length)
            k, v = (tensor[:, :, columns] for tensor in travelling.tensors)
            out, lse = attention_op(query[:, :, rows], k, v, None, causal, scale)
            partial_lse.append(lse)
            if total is None or total_lse is None:
                total, total_lse = out.to(lse.dtype), lse.clone()
            else:
                merged = torch.logaddexp(total_lse[:, :, rows], lse)
                total[:, :, rows] *= _factor(total_lse[:, :, rows], merged)
                total[:, :, rows] += _factor(lse, merged) * out
                total_lse[:, :, rows] = merged
            if step + 1 < world:
                travelling.arrive()
        assert total is not None
        result: Tensor = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, total_lse, *partial_lse)
        ctx.options = (is_causal, scale, group)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *partial_lse = ctx.saved_tensors
        is_causal, scale, group = ctx.options
        rank, world, length = dist.get_rank(group), dist.get_world_size(group), query.size(-2)
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        travelling = _Traveller((key, value), group)
        sums = _Traveller(tuple(torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (key, value)), group)
        for step in range(world):
            if step + 1 < world:
                travelling.depart()
            rows, columns, causal = _meeting(step, rank, is_causal, length)
            k, v = (tensor[:, :, columns] for tensor in travelling.tensors)
            weighted = (grad_out[:, :, rows] * _factor(partial_lse[step], lse[:, :, rows])).to(query.dtype)
            args = (weighted, None, query[:, :, rows], k, v, out[:, :, rows], partial_lse[step], None, causal, scale)
            grad_q, *grad_kv = backward_op(*args, (True, True, True))[:3]
            grad_query[:, :, rows] += grad_q
            for total, grad in zip(sums.tensors, grad_kv, strict=True):
                total[:, :, columns] += grad
            # After the last step the sums belong to the next process's keys: one exchange more brings them home.
            if world > 1:
                sums.depart()
                sums.arrive()
            if step + 1 < world:
                travelling.arrive()
        grads = (grad_query.to(query.dtype), *(total.to(query.dtype) for total in sums.tensors))
        return (*grads, None, None, None)


def _factor(lse: Tensor, merged: Tensor) -> Tensor:
    """``exp(lse - merged)`` for every row, 0 where there were no keys at all."""
    return (lse - merged).exp().nan_to_num(0.0).unsqueeze(-1)
