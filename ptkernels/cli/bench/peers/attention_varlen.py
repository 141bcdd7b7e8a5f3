"""Peers of packed attention: PyTorch's fused attention on padded copies, and one call of it per sequence."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ptkernels.cli.bench.gate import Part, whole
from ptkernels.cli.bench.problem import Peer, Problem

from . import torch_peer


def padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What models do without packing: sequences padded to the longest, padding masked, results packed again."""
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()

    def pad(tensor: Tensor, ends: Sequence[int], longest: int) -> Tensor:
        pieces = [tensor[begin:end] for begin, end in itertools.pairwise(ends)]
        grown = [F.pad(piece, (0, 0, 0, 0, 0, longest - piece.size(0))) for piece in pieces]
        return torch.stack(grown).transpose(1, 2)

    q, k, v = pad(query, rows, max_seqlen_q), pad(key, keys, max_seqlen_k), pad(value, keys, max_seqlen_k)
    mask: Tensor | None = None
    if not is_causal or rows != keys:
        lengths = cu_seqlens_k.diff()[:, None, None, None]
        mask = torch.arange(max_seqlen_k) < lengths
    if is_causal and mask is not None:
        mask = mask & torch.ones(max_seqlen_q, max_seqlen_k, dtype=torch.bool).tril()
    # Causal rows of a sequence see none of the padding behind it.
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal and mask is None, scale=scale)
    out = out.transpose(1, 2)
    return torch.cat([out[i, : end - begin] for i, (begin, end) in enumerate(itertools.pairwise(rows))])


def one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """A loop over sequences: no padding, a call for each."""
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs = []
    for i in range(len(rows) - 1):
        cuts = (slice(rows[i], rows[i + 1]), slice(keys[i], keys[i + 1]), slice(keys[i], keys[i + 1]))
        q, k, v = (t[cut].transpose(0, 1)[None] for t, cut in zip((query, key, value), cuts, strict=True))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def peers() -> list[Peer]:
    return [torch_peer("torch-padded", padded), torch_peer("torch-loop", one_by_one)]


def parts(problem: Problem, flops: float) -> list[Part]:
    """All of it: sequences are short."""
    return whole(problem)
