"""Ring attention on several gloo processes gives what one process gives, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ptkernels as ptk

pytest.importorskip("torch.distributed", reason="this torch has no distributed package")

from jobs_context_parallel import CU_SEQLENS, DTYPES, differentiated, operands

from ptkernels.integrations.context_parallel import (
    gather_packed,
    gather_sequence,
    ring_attention,
    ring_attention_varlen,
    shard_cu_seqlens,
    shard_packed,
    shard_sequence,
)

Outcome = Callable[[str, int], Any]


def whole(dtype: torch.dtype, is_causal: bool, packed: bool, exact: bool, keys: int = 24) -> list[torch.Tensor]:
    tensors = [tensor.double() if exact else tensor for tensor in operands(dtype, packed, keys)]
    source = ptk.reference if exact else ptk
    function = partial(source.attention, is_causal=is_causal, enable_gqa=True)
    if packed:
        ends = {"cu_seqlens_q": CU_SEQLENS, "cu_seqlens_k": CU_SEQLENS}
        function = partial(source.attention_varlen, **ends, is_causal=is_causal)
    return differentiated(function, tensors)


def assert_as_one_process(found: Any, dtype: torch.dtype, is_causal: bool, packed: bool, keys: int = 24) -> None:
    exact, alone = (whole(dtype, is_causal, packed, choice, keys) for choice in (True, False))
    largest = max(float(expected.abs().max()) for expected in exact)
    for ring, one, expected in zip(found, alone, exact, strict=True):
        # Weights are exponentials of differences of log-sum-exps of about 100: so many roundings.
        slack = 256 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest
        # Results of the pieces are rounded to the operands' dtype.
        slack += 2 * torch.finfo(dtype).eps * float(expected.abs().max())
        error, error_alone = (float((tensor.double() - expected).abs().max()) for tensor in (ring, one))
        assert error <= 2 * error_alone + slack


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_ring_is_one_process(outcome: Outcome, packed: bool, dtype: torch.dtype, is_causal: bool, world: int) -> None:
    name = f"ring{' of packed sequences' if packed else ''}, {dtype}, {'causal' if is_causal else 'all'}"
    for found in outcome(name, world):
        assert_as_one_process(found, dtype, is_causal, packed)


@pytest.mark.parametrize("world", [2, 4])
def test_keys_of_another_length(outcome: Outcome, world: int) -> None:
    assert_as_one_process(outcome("ring, more keys", world)[0], torch.float64, False, packed=False, keys=40)


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)


@pytest.mark.usefixtures("one_of_two")
def test_split() -> None:
    with pytest.raises(ValueError, match="shard_sequence: tensor: got length 6, expected a multiple of 4"):
        shard_sequence(torch.zeros(6, 2))
    assert shard_sequence(torch.arange(8)[:, None], dim=0).flatten().tolist() == [0, 1, 6, 7]
    cu_seqlens = torch.tensor([0, 8, 8, 11])
    assert shard_packed(torch.arange(11), cu_seqlens).tolist() == [0, 1, 6, 7, 10]
    assert shard_cu_seqlens(cu_seqlens).tolist() == [0, 4, 4, 5]


@pytest.mark.usefixtures("one_of_two")
def test_wrong_parts_are_refused() -> None:
    x = torch.zeros(5, 1, 4)
    cu_seqlens = torch.tensor([0, 8, 11])
    with pytest.raises(ValueError, match="shard_packed: tensor: got 5 tokens, expected 11"):
        shard_packed(x, cu_seqlens)
    with pytest.raises(ValueError, match="gather_packed: tensor: got 4 tokens, expected 5"):
        gather_packed(x[:4], cu_seqlens)
    with pytest.raises(ValueError, match="ring_attention_varlen: key: got 4 tokens, expected 5"):
        ring_attention_varlen(x, x[:4], x, cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens: got \[1, 5\], expected 0, then"):
        shard_packed(x, torch.tensor([1, 5]))


def test_causal_needs_two_slices() -> None:
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="ring_attention: query: got length 3, expected an even one"):
        ring_attention(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="ring_attention: key: got length 3, expected 2 like query"):
        ring_attention(x[:, :, :2], x, x, is_causal=True)


def test_a_group_of_one() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        tensors = operands(torch.float64, packed=False)
        found = differentiated(partial(ring_attention, is_causal=True), [shard_sequence(t) for t in tensors])
        assert_as_one_process([gather_sequence(t) for t in found], torch.float64, True, packed=False)
    finally:
        dist.destroy_process_group()
