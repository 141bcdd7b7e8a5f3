"""CUDA kernels: comparing those of attention with the float64 reference, where tests/contract does not reach, and the
plans that are written beside all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkernels._registry import OpSpec, Sample

RESULTS = ("out", "lse", "query", "key", "value")
# In the order of the operator's output_mask.
LEARNED = ("query", "key", "value", "attn_mask", "alibi_slopes", "sinks")


def covered(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Attention's samples for the CUDA kernels, which have neither masks of blocks nor biases by distance: where there
    are other options beside such a bias, with those alone.
    """
    for sample in samples:
        kwargs = {name: value for name, value in sample.kwargs.items() if name != "relative_bias"}
        if "mask_block_size" not in kwargs and (len(kwargs) == len(sample.kwargs) or "softcap" in kwargs):
            grad_inputs = tuple(name for name in sample.grad_inputs if name != "relative_bias")
            yield replace(sample, kwargs=kwargs, grad_inputs=grad_inputs)


def random_gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for the two results, the same for the same shapes."""
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in (out, lse)
    )
    # torch.logsumexp differentiates to exp(score - lse), which for the lse of a row blocked with finfo.min is 1.
    return grad_out, grad_lse.masked_fill(lse.abs() > 1e30, 0.0)


def differentiate(call: Any, sample: Sample, dtype: torch.dtype, grads: tuple[Tensor, Tensor]) -> SimpleNamespace:
    """out, lse and the gradients of a function with the public signature, its operands taken in `dtype`."""
    named = {**dict(zip(LEARNED, sample.args, strict=False)), **sample.kwargs}
    for name in sample.grad_inputs:
        held = dtype if name in LEARNED[:3] else torch.promote_types(named[name].dtype, dtype)
        named[name] = named[name].detach().to(held).requires_grad_()
    torch.manual_seed(0)  # of dropout
    out, lse = call(**named, return_lse=True)
    wanted = [grad.to(t.dtype) for grad, t in zip(grads, (out, lse), strict=True)]
    found = torch.autograd.grad((out, lse), [named[name] for name in sample.grad_inputs], wanted)
    return SimpleNamespace(out=out.detach(), lse=lse.detach(), **dict(zip(sample.grad_inputs, found, strict=True)))


def magnitude(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_within_rule(
    spec: OpSpec, ours: SimpleNamespace, sample: Sample, dtype: torch.dtype, grads: tuple[Tensor, Tensor]
) -> None:
    """The rule of the spec; infinities, which lse has where a row is blocked, must be in the same places."""
    expected = differentiate(spec.reference, sample, torch.float64, grads)
    peer = differentiate(spec.baseline, sample, dtype, grads)
    outputs, gradients = RESULTS[:2], sample.grad_inputs
    for name in (*outputs, *gradients):
        got, want = getattr(ours, name).double(), getattr(expected, name)
        assert got.shape == want.shape, name
        assert torch.equal(got.isinf(), want.isinf()), name
        finite = want.isfinite()
        bound = spec.tolerances.bound(
            peer_error=magnitude((getattr(peer, name).double() - want)[finite]),
            magnitude=magnitude(want),
            largest=max(magnitude(getattr(expected, other)) for other in (outputs if name in outputs else gradients)),
            dtype=torch.promote_types(dtype, torch.float32) if name == "lse" else dtype,
            gradient=name in gradients,
        )
        difference = (got - want)[finite].abs()
        error = difference.max().item() if difference.numel() else 0.0
        assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"


class Plan(NamedTuple):
    """What a kernel takes at most, as written at the head of its file."""

    path: Path
    threads: int
    registers: int
    shared_kib: int


def plans() -> dict[str, Plan]:
    """Of every CUDA kernel, by its name; ``A<B>`` where ``A`` is a kernel with a part ``B`` to choose."""
    found = {}
    for path in (Path(__file__).parents[1] / "csrc").rglob("*.cuh"):
        head = path.read_text().partition("#pragma once")[0]
        for name, *numbers in re.findall(r"^//   ([A-Z]\S*) +(\d+) +(\d+) +(\d+) KiB$", head, re.MULTILINE):
            assert name not in found, name
            found[name] = Plan(path, *map(int, numbers))
    return found
