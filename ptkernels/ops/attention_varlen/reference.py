"""Attention over packed sequences in plain torch: a loop of :func:`ptkernels.reference.attention`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels.ops.attention import reference
from ptkernels.ops.attention.options import Options, resolve


class _Part(NamedTuple):
    """One sequence: its rows and keys, its own options, and its place in the batch of its dropout seed."""

    rows: slice
    keys: slice
    options: Options
    place: int


def _parts(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, options: Options) -> Iterator[_Part]:
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    seed, each = options.dropout_seed, len(rows) - 1
    if seed is not None:
        each //= max(seed.numel(), 1)
    for index in range(len(rows) - 1):
        own = options._replace(
            alibi_slopes=_of_sequence(options.alibi_slopes, index),
            sinks=_of_sequence(options.sinks, index),
            dropout_seed=None if seed is None else seed.reshape(-1)[index // each],
        )
        rows_of, keys_of = slice(rows[index], rows[index + 1]), slice(keys[index], keys[index + 1])
        yield _Part(rows_of, keys_of, own, index % each)


def _of_sequence(tensor: Tensor | None, index: int) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == 1 else tensor[index]


def _dense(tensor: Tensor, part: slice) -> Tensor:
    return tensor[part].transpose(0, 1).unsqueeze(0)


def _packed(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    rows = [part.squeeze(0).transpose(0, 1) for part in parts]
    return torch.cat(rows) if rows else torch.zeros_like(like)


def attention_varlen_with(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, options: Options
) -> tuple[Tensor, Tensor]:
    """The loop, with the options of the operator."""
    outs, lses = [], []
    for rows, keys, own, place in _parts(cu_seqlens_q, cu_seqlens_k, options):
        operands = (_dense(query, rows), _dense(key, keys), _dense(value, keys))
        out, lse = reference.attention_with(*operands, None, own, first_batch=place)
        outs.append(out)
        lses.append(lse.squeeze(0))
    empty = query.new_zeros(0, query.size(1), value.size(2))
    return _packed(outs, empty), torch.cat(lses, 1) if lses else empty.sum(-1).t()


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch :func:`ptkernels.attention_varlen`: same arguments, shapes and results, one sequence at a time.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x, cu_seqlens = torch.ones(5, 1, 2), torch.tensor([0, 2, 5])
        >>> ptk.reference.attention_varlen(x, x, x, cu_seqlens, cu_seqlens, scale=0.0, return_lse=True)[1].exp()
        tensor([[2., 2., 3., 3., 3.]])
    """
    _, options = resolve(query.dtype, None, dropout_p, is_causal, scale, window, softcap, alibi_slopes, sinks)
    options = options._replace(bottom_right=bottom_right)
    out, lse = attention_varlen_with(query, key, value, cu_seqlens_q, cu_seqlens_k, options=options)
    return (out, lse) if return_lse else out


def attention_varlen_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """First derivatives, which can be differentiated further: of query, key, value, alibi_slopes and sinks."""
    found: list[tuple[Tensor | None, ...]] = []
    for rows, keys, own, place in _parts(cu_seqlens_q, cu_seqlens_k, options):
        operands = (_dense(query, rows), _dense(key, keys), _dense(value, keys))
        of_lse = None if grad_lse is None else grad_lse[:, rows].unsqueeze(0)
        grads = reference.attention_gradients(
            _dense(grad_out, rows), of_lse, *operands, None, options=own, first_batch=place
        )
        found.append((*grads[:3], *grads[4:6]))
    if not found:
        return tuple(None if t is None else torch.zeros_like(t) for t in (query, key, value, *options.tensors))
    columns: Any = list(zip(*found, strict=True))
    summed = []
    for tensor, grads in zip(options.tensors, columns[3:], strict=True):
        stacked = None if tensor is None else torch.stack(grads)
        summed.append(stacked if stacked is None or tensor is None or tensor.dim() == 2 else stacked.sum(0))
    packed = [_packed(grads, like) for grads, like in zip(columns[:3], (query, key, value), strict=True)]
    return (*packed, *summed)
