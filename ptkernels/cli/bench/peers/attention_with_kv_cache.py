"""The cache operator's peers: PyTorch's fused attention on the filled part of the cache, and the composition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ptkernels.cli.bench.gate import Part, whole
from ptkernels.cli.bench.problem import Contender, Peer, Problem, UnsupportedError
from ptkernels.ops.attention_kv_cache.spec import composition

from . import EAGER, SDPA, torch_peer


def peers() -> list[Peer]:
    return [Peer(SDPA, lambda: torch.__version__, _sdpa), torch_peer(EAGER, composition)]


def parts(problem: Problem, flops: float) -> list[Part]:
    """All of it: decoding is little arithmetic."""
    return whole(problem)


def _sdpa(problem: Problem, threads: int) -> Contender:
    """A slice of the cache copies nothing; pages and codes would have to be gathered first."""
    named = problem.named
    if named["block_table"] is not None or named["k_scale"] is not None:
        raise UnsupportedError("torch has no fused attention on pages or on quantised caches")
    lengths = named["cache_seqlens"].unique().tolist()
    if named["k"] is not None or len(lengths) != 1:
        raise UnsupportedError("only for sequences of one length, with nothing to append")
    query: Tensor = named["query"]
    key, value = (named[name][:, :, : lengths[0]] for name in ("k_cache", "v_cache"))
    grouped = query.size(1) != key.size(1)

    def call() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

    return Contender(SDPA, call, lambda: (call(),))
