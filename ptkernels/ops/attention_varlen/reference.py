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


def _parts(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, longest: int, options: Options) -> Iterator[_Part]:
    """``longest`` is the number of queries that ``relative_bias`` is made for."""
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    seed, each = options.dropout_seed, len(rows) - 1
    if seed is not None:
        each //= max(seed.numel(), 1)
    for index in range(len(rows) - 1):
        queries, own_keys = rows[index + 1] - rows[index], keys[index + 1] - keys[index]
        first = longest - queries
        relative = _of_sequence(options.relative_bias, index, own=2)
        own = options._replace(
            alibi_slopes=_of_sequence(options.alibi_slopes, index),
            sinks=_of_sequence(options.sinks, index),
            relative_bias=None if relative is None else relative[..., first : first + max(queries + own_keys - 1, 0)],
            dropout_seed=None if seed is None else seed.reshape(-1)[index // each],
        )
        rows_of, keys_of = slice(rows[index], rows[index + 1]), slice(keys[index], keys[index + 1])
        yield _Part(rows_of, keys_of, own, index % each)


def _of_sequence(tensor: Tensor | None, index: int, own: int = 1) -> Tensor | None:
    return tensor if tensor is None or tensor.dim() == own else tensor[index]


def _dense(tensor: Tensor, part: slice) -> Tensor:
    return tensor[part].transpose(0, 1).unsqueeze(0)


def _packed(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    rows = [part.squeeze(0).transpose(0, 1) for part in parts]
    return torch.cat(rows) if rows else torch.zeros_like(like)


def attention_varlen_with(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    *,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The loop, with the options of the operator."""
    outs, lses = [], []
    for rows, keys, own, place in _parts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, options):
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
    relative_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Plain torch :func:`ptkernels.attention_varlen`: same arguments, shapes and results, one sequence at a time.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x, cu_seqlens = torch.ones(5, 1, 2), torch.tensor([0, 2, 5])
        >>> ptk.reference.attention_varlen(x, x, x, cu_seqlens, cu_seqlens, scale=0.0, return_lse=True)[1].exp()
        tensor([[2., 2., 3., 3., 3.]])
    """
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias)
    _, options = resolve(query.dtype, None, dropout_p, is_causal, scale, *beyond)
    options = options._replace(bottom_right=bottom_right)
    packing = (cu_seqlens_q, cu_seqlens_k, -1 if max_seqlen_q is None else max_seqlen_q)
    out, lse = attention_varlen_with(query, key, value, *packing, options=options)
    return (out, lse) if return_lse else out


def attention_varlen_gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    *,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """First derivatives, which can be differentiated further.

    Of query, key, value, alibi_slopes, sinks and relative_bias.
    """
    found: list[tuple[Tensor | None, ...]] = []
    for rows, keys, own, place in _parts(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, options):
        operands = (_dense(query, rows), _dense(key, keys), _dense(value, keys))
        of_lse = None if grad_lse is None else grad_lse[:, rows].unsqueeze(0)
        grads = reference.attention_gradients(
            _dense(grad_out, rows), of_lse, *operands, None, options=own, first_batch=place
        )
        of_bias = grads[6]
        if options.relative_bias is not None and of_bias is not None:
            # In its place among the distances of the longest sequences.
            before = max_seqlen_q - (rows.stop - rows.start)
            behind = options.relative_bias.size(-1) - before - of_bias.size(-1)
            of_bias = torch.nn.functional.pad(of_bias, (before, behind))
        found.append((*grads[:3], *grads[4:6], of_bias))
    if not found:
        return tuple(None if t is None else torch.zeros_like(t) for t in (query, key, value, *options.learned))
    columns: Any = list(zip(*found, strict=True))
    summed = []
    for tensor, dims, grads in zip(options.learned, (1, 1, 2), columns[3:], strict=True):
        stacked = None if tensor is None else torch.stack(grads)
        summed.append(stacked if stacked is None or tensor is None or tensor.dim() > dims else stacked.sum(0))
    packed = [_packed(grads, like) for grads, like in zip(columns[:3], (query, key, value), strict=True)]
    return (*packed, *summed)
