"""What attention promises beyond the contract of every operator."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import each_dtype, error, exact, operands, results_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ptkernels as ptk
from ptkernels.ops.attention.spec import SPEC, torch_attention

# Log-sum-exp


@each_dtype
@pytest.mark.parametrize(("lq", "lk"), [(1, 1), (65, 130), (7, 257)])
def test_lse(dtype: torch.dtype, lq: int, lk: int) -> None:
    """As accurate as float32 (float64) allows, whatever the dtype of the inputs."""
    query, key, value = operands(lq, lk, dtype=dtype)
    _, lse = ptk.attention(query, key, value, return_lse=True)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == statistics
    assert lse.shape == query.shape[:-1]
    assert lse.is_contiguous()
    expected = exact(query, key, value, return_lse=True)[1]
    assert error(lse, expected) <= 16 * torch.finfo(statistics).eps * expected.abs().max().item()


@each_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_lse_gradient(dtype: torch.dtype, causal: bool) -> None:
    """Alone, and together with the gradient of out."""
    tensors = [tensor.requires_grad_() for tensor in operands(33, 47, dtype=dtype)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    ours = ptk.attention(*tensors, is_causal=causal, return_lse=True)
    want = ptk.reference.attention(*wide, is_causal=causal, return_lse=True)
    weights = torch.randn_like(ours[1])
    for scale_out in (0.0, 1.0):
        sums = [((scale_out * out.sin().sum()) + (lse * weights).sum()) for out, lse in (ours, want)]
        actual = torch.autograd.grad(sums[0], tensors, retain_graph=True)
        expected = torch.autograd.grad(sums[1], wide, retain_graph=True)
        for grad, reference in zip(actual, expected, strict=True):
            slack = 2 * torch.finfo(dtype).eps + 16 * torch.finfo(weights.dtype).eps
            assert error(grad, reference) <= slack * max(reference.abs().max().item(), 1.0)
    only_lse = torch.autograd.grad(ours[1].sum(), tensors, retain_graph=True)
    assert not only_lse[2].any()


def test_lse_merges_partial_results() -> None:
    """Two halves of the keys, combined by their lse, are the whole: what context parallelism and decoding rest on."""
    query, key, value = operands(9, 60)
    whole, whole_lse = ptk.attention(query, key, value, return_lse=True)
    halves = zip(key.split(25, 2), value.split(25, 2), strict=True)
    parts = [ptk.attention(query, *half, return_lse=True) for half in halves]
    lse = torch.stack([part[1] for part in parts])
    weights = torch.softmax(lse, 0)[..., None]
    torch.testing.assert_close((weights * torch.stack([part[0] for part in parts])).sum(0), whole)
    torch.testing.assert_close(lse.logsumexp(0), whole_lse)


# Shapes and layouts


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        ((5, 8), (7, 8), (7, 3)),
        ((4, 5, 8), (4, 7, 8), (4, 7, 3)),
        ((4, 5, 8), (1, 7, 8), (1, 7, 3)),
        ((4, 5, 8), (7, 8), (7, 3)),
        ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 3)),
        ((2, 1, 5, 8), (2, 4, 7, 8), (1, 4, 7, 3)),
        ((2, 4, 5, 8), (4, 7, 8), (7, 3)),
        ((1, 4, 5, 8), (3, 4, 7, 8), (3, 1, 7, 3)),
        ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 3)),
        ((2, 3, 4, 5, 8), (3, 4, 7, 8), (2, 1, 4, 7, 3)),
        ((2, 1, 4, 5, 8), (3, 1, 7, 8), (7, 3)),
        ((2, 0, 4, 5, 8), (2, 1, 4, 7, 8), (2, 1, 4, 7, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_any_rank_as_torch_takes_it(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], masked: bool
) -> None:
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (query, key, value)]
    mask = None
    if masked:
        lead = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])
        mask = torch.rand((*lead, 5, 7)) < 0.7
        mask[..., 0] = True
    actual, lse = ptk.attention(*tensors, mask, return_lse=True)
    expected = F.scaled_dot_product_attention(*tensors, mask)
    assert lse.shape == expected.shape[:-1]
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, want in zip(
        torch.autograd.grad(actual, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 2), (6, 3), (6, 6)])
def test_grouped_heads_are_repeated_heads(rank: int, heads: int, kv_heads: int) -> None:
    lead = (2, 3)[: rank - 3]
    query = torch.randn(*lead, heads, 9, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(*lead, kv_heads, 11, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    actual = ptk.attention(query, key, value, is_causal=True, enable_gqa=True)
    repeated = [tensor.repeat_interleave(heads // kv_heads, -3) for tensor in (key, value)]
    expected = ptk.attention(query, *repeated, is_causal=True)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    for ours, want in zip(
        torch.autograd.grad(actual, (query, key, value), grad),
        torch.autograd.grad(expected, (query, key, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, want)


@each_dtype
def test_heads_merge_without_a_copy(dtype: torch.dtype) -> None:
    """For the output, and for each gradient on its way back into a projection."""
    tensors = [tensor.requires_grad_() for tensor in operands(5, 7, heads=3, dtype=dtype)]
    out = ptk.attention(*tensors)
    for tensor in (out, *torch.autograd.grad(out.sum(), tensors)):
        merged = tensor.transpose(1, 2).flatten(2)
        assert merged.is_contiguous()
        assert merged.data_ptr() == tensor.data_ptr()


def test_one_leading_dimension_gives_a_contiguous_output() -> None:
    assert ptk.attention(*(torch.randn(3, 5, 8) for _ in range(3))).is_contiguous()
    assert ptk.attention(*(torch.randn(5, 8) for _ in range(3))).is_contiguous()


def test_expanded_inputs_are_not_copied() -> None:
    """The gradient of an expanded tensor still sums over what it was expanded to."""
    base = torch.randn(1, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    query = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    grads = [
        torch.autograd.grad(function(query, base.expand(2, 3, 9, 8), base.expand(2, 3, 9, 8)).sin().sum(), base)[0]
        for function in (ptk.attention, ptk.reference.attention)
    ]
    torch.testing.assert_close(*grads)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Within the error rule of float32 for whatever sizes, heads, masks and layouts come together."""
    draw = data.draw
    batch, kv_heads, groups = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lq, lk = draw(st.integers(0, 90)), draw(st.integers(0, 90))
    d, dv = draw(st.integers(1, 72)), draw(st.integers(1, 72))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def tensor(heads: int, length: int, dim: int) -> Tensor:
        order = draw(st.permutations(range(4)))
        shape = (batch, heads, length, dim)
        dense = torch.randn([shape[axis] for axis in order], generator=generator)
        return dense.permute([order.index(axis) for axis in range(4)]).requires_grad_()

    tensors = [tensor(kv_heads * groups, lq, d), tensor(kv_heads, lk, d), tensor(kv_heads, lk, dv)]
    options: dict[str, Any] = {"is_causal": draw(st.booleans()), "enable_gqa": True}
    kind = draw(st.sampled_from(["none", "bool", "float"]))
    if kind != "none":
        full = (batch, kv_heads * groups, lq, lk)
        shape = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, 3)) :]
        mask = torch.randn(shape, generator=generator)
        options["attn_mask"] = mask < 0.8 if kind == "bool" else mask
    grad = torch.randn(batch, kv_heads * groups, lq, dv, generator=generator)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        cast = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        out = function(*cast, **options)
        return [out, *torch.autograd.grad(out, cast, grad.to(dtype))]

    expected = run(ptk.reference.attention, torch.float64)
    peer, ours = run(torch_attention, torch.float32), run(ptk.attention, torch.float32)
    sizes = [reference.abs().max().item() if reference.numel() else 0.0 for reference in expected]
    for index, (actual, other, reference) in enumerate(zip(ours, peer, expected, strict=True)):
        bound = SPEC.tolerances.bound(
            peer_error=error(other, reference),
            magnitude=sizes[index],
            largest=max(sizes[1:]) if index else sizes[0],
            dtype=torch.float32,
            gradient=index > 0,
        )
        assert error(actual, reference) <= bound


# Numbers


@each_dtype
def test_scale_zero_is_the_mean(dtype: torch.dtype) -> None:
    query, key, value = operands(5, 64, dtype=dtype)
    out, lse = ptk.attention(query, key, value, scale=0.0, return_lse=True)
    mean = value.double().mean(2, keepdim=True).expand(out.shape)
    torch.testing.assert_close(out.double(), mean, rtol=0, atol=1e-2 if dtype.itemsize == 2 else 1e-6)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(64)))


@each_dtype
def test_huge_scores_do_not_overflow(dtype: torch.dtype) -> None:
    query, key, value = operands(5, 64, dtype=dtype)
    out, lse = ptk.attention(query * 50, key * 50, value, return_lse=True)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert out.abs().max() <= value.abs().max()


@each_dtype
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    query, key, value = operands(37, 70, dtype=dtype)
    expected = ptk.attention(query, key, value)
    query[0, 1, 5, 3] = math.nan
    out, lse = ptk.attention(query, key, value, return_lse=True)
    assert out[0, 1, 5].isnan().all()
    assert lse[0, 1, 5].isnan()
    out[0, 1, 5] = expected[0, 1, 5]
    assert torch.equal(out, expected)


@each_dtype
def test_nan_in_a_key_or_value_reaches_every_row(dtype: torch.dtype) -> None:
    query, key, value = operands(37, 70, dtype=dtype)
    for spoiled in (key, value):
        clean = spoiled[1, 0, 66, 2].clone()
        spoiled[1, 0, 66, 2] = math.nan
        out = ptk.attention(query, key, value)
        assert out[1, 0, :, 2].isnan().all()
        assert out[0].isfinite().all()
        spoiled[1, 0, 66, 2] = clean


def test_infinite_scores_are_those_of_torch() -> None:
    query, key, value = operands(3, 6)
    query[0, 0, 0, 0] = math.inf
    torch.testing.assert_close(
        ptk.attention(query, key, value), ptk.reference.attention(query, key, value), equal_nan=True
    )


def test_precision_of_16_bit_gradients() -> None:
    """Accumulated in float32: many small contributions are not lost."""
    query = torch.zeros(1, 1, 4096, 16, dtype=torch.bfloat16)
    key, value = (torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    out = ptk.attention(query, key, value)
    (grad,) = torch.autograd.grad(out, value, torch.ones_like(out))
    torch.testing.assert_close(grad, torch.full_like(grad, 1024.0))


# What runs on the reference


def test_double_backward_with_lse_and_mask() -> None:
    tensors = [tensor.requires_grad_() for tensor in operands(3, 4, 2, dtype=torch.float64)]
    mask = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = ptk.attention(*args, mask, return_lse=True)
        return out, lse.masked_fill(~mask.any(-1), 0.0)

    assert torch.autograd.gradcheck(call, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, check_fwd_over_rev=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *args: call(*args)[1], tensors, fast_mode=True)


@pytest.mark.parametrize("frozen", [("query",), ("key", "value"), ("value",)], ids=str)
def test_double_backward_with_frozen_operands(frozen: tuple[str, ...]) -> None:
    names = ("query", "key", "value")
    tensors = dict(zip(names, operands(3, 4, 2, dtype=torch.float64), strict=True))
    needed = [tensors[name].requires_grad_() for name in names if name not in frozen]

    def call(*args: Tensor) -> Tensor:
        given = iter(args)
        return ptk.attention(*(tensors[name] if name in frozen else next(given) for name in names))

    assert torch.autograd.gradgradcheck(call, needed, fast_mode=True)


def test_forward_mode_outside_functorch() -> None:
    query, key, value = operands(3, 4, dtype=torch.float64)
    tangent = torch.randn_like(key)
    expected = torch.func.jvp(lambda k: ptk.reference.attention(query, k, value), (key,), (tangent,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(key, tangent)
        for function in (ptk.attention, lambda *args: torch.ops.ptkernels.attention(*args)[0]):
            actual = torch.autograd.forward_ad.unpack_dual(function(query, dual, value)).tangent
            torch.testing.assert_close(actual, expected)
        assert ptk.explain("attention", query, dual, value).backend == "reference"
        # An active level alone changes nothing.
        assert ptk.explain("attention", query, key, value).backend == "cpu"
        assert torch.autograd.forward_ad.unpack_dual(ptk.attention(query, key, value)).tangent is None


def test_second_derivatives_by_vectorised_jacobians() -> None:
    """Through the older vmap behind torch.autograd.functional."""
    query, key, value = operands(2, 3, 2, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return ptk.attention(x, key, value).sin().sum()

    def reference(x: Tensor) -> Tensor:
        return ptk.reference.attention(x, key, value).sin().sum()

    for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian):
        torch.testing.assert_close(derivative(ours, query, vectorize=True), derivative(reference, query))


def test_reference_agrees_with_torch() -> None:
    """The oracle against an implementation that is not ours."""
    query, key, value = operands(33, 47, dtype=torch.float64)
    bias = torch.randn(33, 47, dtype=torch.float64)
    for options in ({}, {"is_causal": True}, {"attn_mask": bias}, {"attn_mask": bias > 0}, {"scale": 0.3}):
        torch.testing.assert_close(
            ptk.reference.attention(query, key, value, **options),
            F.scaled_dot_product_attention(query, key, value, **options),
        )


# What explain says


def test_explain_names_reasons_and_remedies() -> None:
    query, key, value = operands(33, 47)
    account = ptk.explain(ptk.attention, query, key, value)
    assert (account.op, account.backend, account.faster) == ("attention", "cpu", account.faster)
    for option in ({"dropout_p": 0.1}, {"window": (3, 0)}, {"attn_mask": torch.zeros(33, 47, requires_grad=True)}):
        assert ptk.explain("attention", query, key, value, **option).backend == "cpu"
    account = ptk.explain("attention", query.mT.contiguous().mT, key, value)
    assert any("query" in hint and "stride 33" in hint for hint in account.faster)
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            ptk.explain("attention", query, key, value).kernel
            == ptk.explain("attention", query.bfloat16(), key.bfloat16(), value.bfloat16()).kernel
        )
    on_meta = ptk.explain("attention", *(tensor.to("meta") for tensor in (query, key, value)))
    assert on_meta.kernel == "shape propagation"


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(dtype: str, causal: bool) -> None:
    """Peak resident memory of a process, where the scores alone would be 1 GiB in float32."""
    code = f"""
import resource, torch, ptkernels as ptk
torch.set_num_threads(2)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def step(length, grad):
    tensors = [torch.randn(1, 1, length, 64, dtype=torch.{dtype}, requires_grad=grad) for _ in range(3)]
    out = ptk.attention(*tensors, is_causal={causal})
    if grad:
        out.backward(torch.ones_like(out))
step(256, True)
start = peak()
step(16384, False)
forward = peak()
step(16384, True)
print(forward - start, peak() - start)
"""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    forward, backward = map(int, result.stdout.split())
    # Operands, results and gradients are 4 MiB each at most, and packed copies of them as much again.
    assert forward <= 64, f"{forward} MiB in forward"
    assert backward <= 128, f"{backward} MiB in forward and backward"


@each_dtype
@pytest.mark.parametrize(("lq", "lk", "heads_kv"), [(1, 700, 2), (3, 130, 2), (1, 1, 4), (7, 257, 4), (16, 300, 4)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (5, 0)}, {"mask": True}], ids=str)
def test_gradients_of_few_queries(dtype: torch.dtype, lq: int, lk: int, heads_kv: int, options: dict[str, Any]) -> None:
    """Keys and values read where they are, in chunks; what no row sees has gradient 0, whatever it holds."""
    options = dict(options)
    if options.pop("mask", False):
        options["attn_mask"] = torch.rand(lq, lk) < 0.6
    query = torch.randn(2, 4, lq, 40).to(dtype).requires_grad_()
    key, value = (torch.randn(2, heads_kv, lk, d).to(dtype).requires_grad_() for d in (40, 24))
    inputs = (query, key, value)
    ours = results_and_gradients(ptk.attention, inputs, enable_gqa=True, **options)
    leaves = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    wide = results_and_gradients(ptk.reference.attention, leaves, enable_gqa=True, **options)
    for actual, expected in zip(ours, wide, strict=True):
        assert error(actual, expected) <= 8 * torch.finfo(dtype).eps * max(expected.abs().max().item(), 1.0)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = results_and_gradients(ptk.attention, inputs, enable_gqa=True, **options)
        assert all(map(torch.equal, again, ours))


def test_gradients_of_few_queries_leave_hidden_keys_alone() -> None:
    query, key, value = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (2, 600, 600))
    with torch.no_grad():
        key[:, :, 2:] = math.nan
        value[:, :, 2:] = math.nan
    grads = torch.autograd.grad(ptk.attention(query, key, value, is_causal=True).sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[:, :, 2:] == 0).all() for grad in grads[1:])
