"""Dropout: which weights it drops, how often, and that every pass drops the same."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import assert_as_reference, each_dtype, operands
from torch import Tensor

import ptkernels as ptk
from ptkernels.ops.attention.options import KEEP_ALL
from ptkernels.ops.attention.reference import dropout_keep

pytestmark = pytest.mark.usefixtures("strict")


def kept(p: float, lq: int, lk: int, *, batch: int = 1, heads: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the kernels keep after the current seed: with equal scores, and values of 1 at one key each."""
    query = torch.zeros(batch, heads, lq, 8, dtype=dtype)
    key = torch.zeros(batch, heads, lk, 8, dtype=dtype)
    state, found = torch.get_rng_state(), []
    for start in range(0, lk, 512):
        torch.set_rng_state(state)
        value = torch.eye(lk, dtype=dtype)[:, start : start + 512].expand(batch, heads, -1, -1)
        found.append(ptk.attention(query, key, value, dropout_p=p) != 0)
    return torch.cat(found, -1)


def seed() -> Tensor:
    return torch.randint(2**63 - 1, (), dtype=torch.int64)


@each_dtype
@pytest.mark.parametrize(("lq", "lk"), [(1, 5), (3, 600), (37, 70), (150, 300)])
def test_kernels_drop_what_the_reference_drops(dtype: torch.dtype, lq: int, lk: int) -> None:
    """The generator written in plain torch is the oracle of the one in the kernels."""
    torch.manual_seed(11)
    actual = kept(0.3, lq, lk, batch=2, heads=3, dtype=dtype)
    torch.manual_seed(11)
    assert torch.equal(actual, dropout_keep(seed(), round(0.7 * KEEP_ALL), (2, 3, lq, lk)))


def test_philox_gives_the_published_numbers() -> None:
    """Known answers for Philox4x32-10 that its authors distribute with Random123."""
    from ptkernels._philox import philox

    for counter, key, words in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        found = philox([torch.tensor(word) for word in counter], (torch.tensor(key[0]), torch.tensor(key[1])))
        assert [int(word) for word in found] == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_shares_are_those_of_independent_draws(p: float) -> None:
    """Overall, per row, per key, and of neighbours together, each within five standard deviations."""
    keep = kept(p, 512, 512, heads=4)[0].double()

    def within(share: Tensor, expected: float, draws: int) -> None:
        deviation = math.sqrt(expected * (1 - expected) / draws)
        assert (share - expected).abs().max() < 5 * deviation

    within(keep.mean(), 1 - p, keep.numel())
    within(keep.mean(-1), 1 - p, 512)
    within(keep.mean(-2), 1 - p, 512)
    for other in (keep.roll(1, -1), keep.roll(1, -2), keep.roll(8, -2), keep.roll(1, 0)):
        within((keep * other).mean(), (1 - p) ** 2, keep.numel())


def test_expectation_is_attention_without_dropout() -> None:
    query, key, value = operands(4, 64)
    mean = torch.stack([ptk.attention(query, key, value, dropout_p=0.25) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, ptk.attention(query, key, value), rtol=0, atol=0.06)


def test_seeds_and_calls_differ() -> None:
    query, key, value = operands(13, 17)
    torch.manual_seed(5)
    first, second = (ptk.attention(query, key, value, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(ptk.attention(query, key, value, dropout_p=0.3), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("lq", "lk"), [(1, 600), (37, 70), (130, 300)])
@each_dtype
def test_any_number_of_threads_drops_the_same(dtype: torch.dtype, lq: int, lk: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in operands(lq, lk, dtype=dtype)]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(2)
        out = ptk.attention(*inputs, dropout_p=0.4)
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("lq", "lk"), [(2, 5), (37, 70), (150, 300)])
def test_backward_drops_what_the_forward_dropped(lq: int, lk: int) -> None:
    inputs = tuple(tensor.requires_grad_() for tensor in operands(lq, lk, dtype=torch.float64))
    assert_as_reference(inputs, dropout_p=0.3)
    assert_as_reference(inputs, dropout_p=0.6, is_causal=True, window=(40, None))


def test_derivatives_of_every_order() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(3, 4, 2, dtype=torch.float64))

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(4)
        return ptk.attention(*tensors, dropout_p=0.4)

    from ptkernels import _backend

    _backend.state.strict = False  # second derivatives run on the reference
    assert torch.autograd.gradcheck(call, (query, key, value), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (query, key, value), fast_mode=True)


def test_extremes() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in operands(13, 17))
    out = ptk.attention(query, key, value, dropout_p=1.0)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), (query, key, value)))
    plain = ptk.attention(query, key, value)
    assert torch.equal(ptk.attention(query, key, value, dropout_p=0), plain)
    assert torch.equal(ptk.attention(query, key, value, dropout_p=1e-7), plain)  # below the resolution of 2^-16
    lse = ptk.attention(query, key, value, dropout_p=0.5, return_lse=True)[1]
    torch.testing.assert_close(lse, ptk.attention(query, key, value, return_lse=True)[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_it(use_reentrant: bool) -> None:
    tensors = [tensor.requires_grad_() for tensor in operands(13, 17)]

    def call(*args: Tensor) -> Tensor:
        return ptk.attention(*args, dropout_p=0.4)

    torch.manual_seed(3)
    call(*tensors).sin().sum().backward()
    expected = [tensor.grad.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(call, *tensors, use_reentrant=use_reentrant).sin().sum().backward()
    assert all(torch.equal(tensor.grad, grad) for tensor, grad in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap(randomness: str) -> None:
    stacked = torch.randn(3, 2, 2, 9, 8)
    torch.manual_seed(6)
    out = torch.vmap(lambda x: ptk.attention(x, x, x, dropout_p=0.5), randomness=randomness)(stacked)
    if randomness == "same":
        torch.manual_seed(6)
        given = seed()
        for one, x in zip(out, stacked, strict=True):
            torch.manual_seed(6)
            torch.testing.assert_close(one, ptk.attention(x, x, x, dropout_p=0.5))
        assert given.dtype == torch.int64
    else:
        same = torch.vmap(lambda x: ptk.attention(x, x, x, dropout_p=0.5), randomness=randomness)(
            stacked[:1].expand(3, -1, -1, -1, -1)
        )
        assert not torch.equal(same[0], same[1])


def test_compiled() -> None:
    torch._dynamo.reset()
    inputs = [tensor.requires_grad_() for tensor in operands(13, 17)]

    def call(*tensors: Tensor) -> Tensor:
        return ptk.attention(*tensors, dropout_p=0.4)

    found = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(8)
        out = function(*inputs)
        found.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    assert all(map(torch.equal, *found))
