"""The error rule, with an oracle that can be evaluated in any dtype as its own peer."""

from __future__ import annotations

import torch
from torch import Tensor

from ptkernels import _triton
from ptkernels._registry import Tolerances

DEVICE = "cuda" if torch.cuda.is_available() and not _triton.interpreted() else "cpu"


def magnitude(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_close(
    name: str,
    got: Tensor | None,
    peer: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    largest: float = 0.0,
    factor: float = 2.0,
) -> None:
    """`max|got - expected| <= factor * max|peer - expected| + slack`, infinities in the same places."""
    assert got is not None, name
    got, peer, expected = (t.detach().double().cpu() for t in (got, peer, expected))
    assert got.shape == expected.shape, name
    assert not got.isnan().any(), f"{name}: NaN"
    assert torch.equal(got.isinf(), expected.isinf()), name
    finite = expected.isfinite()
    bound = Tolerances(forward=factor).bound(
        peer_error=magnitude((peer - expected)[finite]),
        magnitude=magnitude(expected),
        largest=max(largest, magnitude(expected)),
        dtype=dtype,
        gradient=False,
    )
    error = magnitude((got - expected)[finite])
    assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"
