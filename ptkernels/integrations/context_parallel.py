"""Attention over sequences that are split among the processes of a group: ring attention, load-balanced when causal.

    equation   the keys of process j give  out_j, lse_j  on their own;  with  lse = log sum_j exp(lse_j)
                   out = sum_j exp(lse_j - lse) out_j
               and  d out_j = exp(lse_j - lse) d out:  all that the backward of piece j needs beside out and lse_j

    layout     process r of W holds slices r and 2 W - 1 - r of 2 W of every sequence, so that, where it is causal,
               every process has the same work in every step: all of its queries and half of its keys, or the other way
               round

    steps      W, each with the next keys and values on their way while the present ones are attended to; in the
               backward their gradients travel with them and arrive home after W steps

Sequences of one length are ``[batch, heads, length, dim]`` (:func:`ring_attention`); those of different lengths lie
packed one after another, ``[tokens, heads, dim]`` with ``cu_seqlens`` (:func:`ring_attention_varlen`).

Source: Liu et al., *Ring Attention with Blockwise Transformers*, 2023; the balanced split is that of Llama 3's training
(Meta, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ptkernels.ops.attention.library import attention_op, backward_op
from ptkernels.ops.attention_varlen.library import varlen_backward_op, varlen_op

__all__ = [
    "gather_packed",
    "gather_sequence",
    "ring_attention",
    "ring_attention_varlen",
    "shard_cu_seqlens",
    "shard_packed",
    "shard_sequence",
]


def shard_sequence(tensor: Tensor, dim: int = -2, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The part of a whole sequence that this process holds: slices ``r`` and ``2 W - 1 - r`` of ``2 W``.

    Args:
        tensor: the same on every process; positions and labels are split as tokens are.
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


def shard_packed(tensor: Tensor, cu_seqlens: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The parts of whole packed sequences that this process holds: its two slices of each, one after the other.

    Args:
        tensor: ``[tokens, ...]``, the same on every process; positions and labels are split as tokens are.
        cu_seqlens: ``[sequences + 1]``, integers: 0, then where each sequence ends. Lengths may be any.
        group: the processes. Default: all.
    """
    _check_tokens("shard_packed", "tensor", tensor, int(cu_seqlens[-1]))
    rows = _Packing(cu_seqlens, dist.get_world_size(group)).rows(dist.get_rank(group))
    return tensor.index_select(0, rows.to(tensor.device))


def shard_cu_seqlens(cu_seqlens: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """``cu_seqlens`` of the parts that :func:`shard_packed` gives this process."""
    packing = _Packing(cu_seqlens, dist.get_world_size(group))
    own: Tensor = packing.whole(dist.get_rank(group)).cu_seqlens
    return own


def gather_packed(tensor: Tensor, cu_seqlens: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """The whole packed sequences, from the parts that :func:`shard_packed` made. Not differentiable."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    packing = _Packing(cu_seqlens, world)
    _check_tokens("gather_packed", "tensor", tensor, packing.tokens[rank])
    longest = max(packing.tokens)
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.size(0)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=group)
    whole = tensor.new_empty(sum(packing.tokens), *tensor.shape[1:])
    for process, part in enumerate(parts):
        whole[packing.rows(process).to(tensor.device)] = part[: packing.tokens[process]]
    return whole


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
        ValueError: the lengths are odd or unequal and ``is_causal``; for bad tensors, what attention itself raises.

    Every process sends and receives ``W - 1`` times its keys and values, and keeps no more than two copies of them.
    """
    if is_causal and query.size(-2) % 2:
        raise ValueError(
            f"ring_attention: query: got length {query.size(-2)}, expected an even one (see shard_sequence)"
        )
    if is_causal and key.size(-2) != query.size(-2):
        raise ValueError(f"ring_attention: key: got length {key.size(-2)}, expected {query.size(-2)} like query")
    out: Tensor = _Ring.apply(query, key, value, is_causal, scale, group, _Padded(query.size(-2)))  # type: ignore[no-untyped-call]
    return out


def ring_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`ptkernels.attention_varlen` of packed sequences, a part of each on every process; differentiable once.

    Args:
        query: ``[tokens, heads, dim]``, this process's parts of the sequences (:func:`shard_packed`).
        key: ``[tokens, kv_heads, dim]``, ``kv_heads`` dividing ``heads``.
        value: ``[tokens, kv_heads, dim_v]``.
        cu_seqlens: ``[sequences + 1]``, integers: 0, then where each *whole* sequence ends. Lengths may be any, 0 and
            less than the number of processes as well.
        is_causal: attend to earlier tokens of a sequence only.
        scale: factor of the scores. Default: ``1 / sqrt(dim)``.
        group: the processes. Default: all.

    Returns:
        ``[tokens, heads, dim_v]``, this process's part of the result, summed as in :func:`ring_attention`.

    Raises:
        ValueError: this process does not have the tokens that ``cu_seqlens`` gives it; for bad tensors, what attention
            itself raises.
    """
    packing = _Packing(cu_seqlens.to(query.device), dist.get_world_size(group))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tokens("ring_attention_varlen", name, tensor, packing.tokens[dist.get_rank(group)])
    out: Tensor = _Ring.apply(query, key, value, is_causal, scale, group, packing)  # type: ignore[no-untyped-call]
    return out


def _check_tokens(op: str, name: str, tensor: Tensor, tokens: int) -> None:
    if tensor.size(0) != tokens:
        raise ValueError(f"{op}: {name}: got {tensor.size(0)} tokens, expected {tokens} (see shard_packed)")


@dataclass(frozen=True)
class _Rows:
    """Some of the tokens of a process: where they are, and where the sequences among them end."""

    place: Any
    """Index of the operands and results, and of lse."""
    cu_seqlens: Any = None


class _Padded:
    """Sequences of one length, as many tokens on every process."""

    tokens: None = None

    def __init__(self, length: int) -> None:
        self.half = length // 2

    def whole(self, process: int) -> _Rows:
        return _Rows(slice(None))

    def first(self, process: int) -> _Rows:
        return _Rows((slice(None), slice(None), slice(0, self.half)))

    def second(self, process: int) -> _Rows:
        return _Rows((slice(None), slice(None), slice(self.half, None)))

    def attend(self, rows: _Rows, columns: _Rows, operands: Any, *options: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = attention_op(*operands, None, *options)
        return result

    def differentiate(self, rows: _Rows, columns: _Rows, grad: Tensor, operands: Any, saved: Any, *options: Any) -> Any:
        return backward_op(grad, None, *operands, *saved, None, *options, (True, True, True))[:3]


class _Packing:
    """Packed sequences, of each of which a process has two slices."""

    def __init__(self, cu_seqlens: Tensor, world: int) -> None:
        self.world, self.device = world, cu_seqlens.device
        ends = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(ends)]
        if not ends or ends[0] != 0 or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens: got {ends}, expected 0, then where each sequence ends")
        # Of every slice of every sequence, where it starts.
        self.edges = [
            [begin + i * n // (2 * world) for i in range(2 * world + 1)]
            for begin, n in zip(ends, lengths, strict=False)
        ]
        self.tokens = [sum(a + b for a, b in self._halves(process)) for process in range(world)]

    def _halves(self, process: int) -> list[tuple[int, int]]:
        """Lengths of both slices of every sequence."""
        last = 2 * self.world - 1 - process
        return [(e[process + 1] - e[process], e[last + 1] - e[last]) for e in self.edges]

    def rows(self, process: int) -> Tensor:
        """Of the whole packed sequences, those that a process has."""
        found = [range(e[i], e[i + 1]) for e in self.edges for i in (process, 2 * self.world - 1 - process)]
        return torch.tensor([row for rows in found for row in rows], dtype=torch.int64)

    def _select(self, process: int, take: tuple[bool, bool]) -> _Rows:
        place: list[int] = []
        ends, start = [0], 0
        for halves in self._halves(process):
            for length, wanted in zip(halves, take, strict=True):
                place += range(start, start + length) if wanted else ()
                start += length
            ends.append(len(place))
        cu_seqlens = torch.tensor(ends, device=self.device)
        return _Rows(
            slice(None) if all(take) else torch.tensor(place, dtype=torch.int64, device=self.device), cu_seqlens
        )

    def whole(self, process: int) -> _Rows:
        return self._select(process, (True, True))

    def first(self, process: int) -> _Rows:
        return self._select(process, (True, False))

    def second(self, process: int) -> _Rows:
        return self._select(process, (False, True))

    def attend(self, rows: _Rows, columns: _Rows, operands: Any, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = varlen_op(*operands, rows.cu_seqlens, columns.cu_seqlens, -1, -1, *options)
        return out, lse.t()  # a row of tokens in front, as in all else

    def differentiate(self, rows: _Rows, columns: _Rows, grad: Tensor, operands: Any, saved: Any, *options: Any) -> Any:
        out, lse = saved
        places = (rows.cu_seqlens, columns.cu_seqlens, -1, -1)
        wanted = (True, True, True, False, False, False)
        return varlen_backward_op(grad, None, *operands, out, lse.t(), *places, wanted, *options)[:3]


class _Traveller:
    """Tensors that go round the ring, each step from this process to the next."""

    def __init__(
        self, tensors: tuple[Tensor, ...], group: dist.ProcessGroup | None, tokens: list[int] | None = None
    ) -> None:
        self.tensors = tuple(tensor.contiguous() for tensor in tensors)
        self.group, self.tokens = group, tokens
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.owner = self.rank
        self.to, self.source = (
            (self.rank + step) % self.world
            if group is None
            else dist.get_global_rank(group, (self.rank + step) % self.world)
            for step in (1, -1)
        )
        self._arriving: tuple[Tensor, ...] = ()
        self._requests: list[Any] = []

    def depart(self) -> None:
        self.owner = (self.owner - 1) % self.world
        self._arriving = tuple(
            tensor.new_empty(tensor.shape if self.tokens is None else (self.tokens[self.owner], *tensor.shape[1:]))
            for tensor in self.tensors
        )
        exchanges = [dist.P2POp(dist.isend, tensor, self.to, self.group) for tensor in self.tensors]
        exchanges += [dist.P2POp(dist.irecv, tensor, self.source, self.group) for tensor in self._arriving]
        self._requests = dist.batch_isend_irecv(exchanges)

    def arrive(self) -> None:
        for request in self._requests:
            request.wait()
        self.tensors = self._arriving


def _meeting(layout: Any, step: int, rank: int, world: int, is_causal: bool) -> tuple[_Rows, _Rows, bool]:
    """Which of our queries meet which keys in a step, and whether causally."""
    owner = (rank - step) % world
    if not is_causal or step == 0:
        return layout.whole(rank), layout.whole(owner), is_causal
    # Keys of an earlier process: the first of its slices precedes both of ours, the second neither. Of a later one:
    # both of its slices precede our second, neither our first.
    if owner < rank:
        return layout.whole(rank), layout.first(owner), False
    return layout.second(rank), layout.whole(owner), False


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
        layout: Any,
    ) -> Tensor:
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        travelling = _Traveller((key, value), group, layout.tokens)
        total, total_lse, partial_lse = None, None, []
        for step in range(world):
            keys, values = travelling.tensors
            if step + 1 < world:
                travelling.depart()
            rows, columns, causal = _meeting(layout, step, rank, world, is_causal)
            operands = (query[rows.place], keys[columns.place], values[columns.place])
            out, lse = layout.attend(rows, columns, operands, causal, scale)
            partial_lse.append(lse)
            if total is None or total_lse is None:
                total, total_lse = out.to(lse.dtype), lse.clone()
            else:
                before = total_lse[rows.place]
                merged = torch.logaddexp(before, lse)
                total[rows.place] = total[rows.place] * _factor(before, merged) + _factor(lse, merged) * out
                total_lse[rows.place] = merged
            if step + 1 < world:
                travelling.arrive()
        assert total is not None
        result: Tensor = total.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, total_lse, *partial_lse)
        ctx.options = (is_causal, scale, group, layout)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        query, key, value, out, lse, *partial_lse = ctx.saved_tensors
        is_causal, scale, group, layout = ctx.options
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        travelling = _Traveller((key, value), group, layout.tokens)
        zeros = tuple(torch.zeros_like(tensor, dtype=lse.dtype) for tensor in (key, value))
        sums = _Traveller(zeros, group, layout.tokens)
        for step in range(world):
            keys, values = travelling.tensors
            if step + 1 < world:
                travelling.depart()
            rows, columns, causal = _meeting(layout, step, rank, world, is_causal)
            own_lse = partial_lse[step]
            weighted = (grad_out[rows.place] * _factor(own_lse, lse[rows.place])).to(query.dtype)
            operands = (query[rows.place], keys[columns.place], values[columns.place])
            saved = (out[rows.place], own_lse)
            grad_q, *grad_kv = layout.differentiate(rows, columns, weighted, operands, saved, causal, scale)
            grad_query[rows.place] += grad_q
            for total, grad in zip(sums.tensors, grad_kv, strict=True):
                total[columns.place] += grad
            # After the last step the sums belong to the next process's keys: one exchange more brings them home.
            if world > 1:
                sums.depart()
                sums.arrive()
            if step + 1 < world:
                travelling.arrive()
        grads = (grad_query.to(query.dtype), *(total.to(query.dtype) for total in sums.tensors))
        return (*grads, None, None, None, None)


def _factor(lse: Tensor, merged: Tensor) -> Tensor:
    """``exp(lse - merged)`` for every row, 0 where there were no keys at all."""
    return (lse - merged).exp().nan_to_num(0.0).unsqueeze(-1)
