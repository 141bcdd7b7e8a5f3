"""The check every contender passes before it is timed: its error against the reference in float64.

The rule is that of the tests (:class:`ptkernels._registry.Tolerances`): a stated multiple of the error that PyTorch's
own operator makes on the same numbers in the case's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .problem import Problem, tensors_of

PEER_SLACK = 8.0
"""Peers are held to this multiple of our own bound: the check must catch one that computes something else, and must not
drop one (which would flatter us) for rounding in another order."""


@dataclass(frozen=True)
class Part:
    """An independent piece of a problem: its arguments by name, and how to cut the same piece out of the outputs.

    ``cut(index, tensor)`` takes output ``index`` of the whole problem (results first, then gradients).
    """

    named: dict[str, Any]
    cut: Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Verdict:
    """``error`` and ``bound`` of the output that is closest to (or furthest beyond) its bound."""

    passed: bool
    error: float
    bound: float
    text: str


def whole(problem: Problem) -> list[Part]:
    """The problem as a single part."""
    return [Part(problem.named, lambda index, tensor: tensor)]


class Oracle:
    """The float64 results of a problem, or of the parts of it that are checked, and what error each output may have."""

    def __init__(self, problem: Problem, parts: Sequence[Part], results: tuple[Tensor, ...]) -> None:
        spec = problem.spec
        self._parts = parts
        self._leaf_names = problem.leaf_names
        self._names = [f"output {i}" if len(results) > 1 else "output" for i in range(len(results))]
        self._names += [f"gradient of {name}" for name in problem.leaf_names]
        cotangents = problem.cotangents(results) if problem.backward else ()
        self._expected: list[tuple[Tensor, ...]] = []
        errors, magnitudes = [0.0] * len(self._names), [0.0] * len(self._names)
        for part in parts:
            flowing = tuple(part.cut(i, cotangent) for i, cotangent in enumerate(cotangents))
            expected = self._compute(spec.reference, part, flowing, torch.float64)
            baseline = self._compute(spec.baseline, part, flowing, None)
            self._expected.append(expected)
            for i, (ours, theirs) in enumerate(zip(expected, baseline, strict=True)):
                errors[i] = max(errors[i], _distance(theirs, ours))
                magnitudes[i] = max(magnitudes[i], _magnitude(ours))
        self._magnitudes = magnitudes
        self._bounds = [
            spec.tolerances.bound(
                peer_error=error, magnitude=magnitude, dtype=problem.case.dtype, gradient=i >= len(results)
            )
            for i, (error, magnitude) in enumerate(zip(errors, magnitudes, strict=True))
        ]

    def _compute(
        self, function: Callable[..., Any], part: Part, cotangents: tuple[Tensor, ...], dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        def convert(value: Any, gradient: bool) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach()
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            return value.requires_grad_(gradient)

        named = {name: convert(value, name in self._leaf_names) for name, value in part.named.items()}
        with torch.set_grad_enabled(bool(cotangents)):
            results = tensors_of(function(**named))
        if not cotangents:
            return results
        flowing = [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)]
        gradients = torch.autograd.grad(results, [named[name] for name in self._leaf_names], flowing)
        return (*(result.detach() for result in results), *gradients)

    def check(self, outputs: tuple[Tensor, ...], slack: float = 1.0, noise: float = 0.0) -> Verdict:
        """Judge results (then gradients) of the whole problem; ``noise`` is a share of the largest one."""
        if len(outputs) != len(self._names):
            return Verdict(False, float("nan"), 0.0, f"got {len(outputs)} outputs, expected {len(self._names)}")
        verdicts = []
        for index, (name, output) in enumerate(zip(self._names, outputs, strict=True)):
            bound = self._bounds[index]
            pieces = [
                (part.cut(index, output.detach()), expected[index])
                for part, expected in zip(self._parts, self._expected, strict=True)
            ]
            wrong = next((piece.shape for piece, expected in pieces if piece.shape != expected.shape), None)
            if wrong is not None:
                return Verdict(False, float("nan"), bound, f"{name}: got shape {list(wrong)} for a checked part")
            error = max(_distance(piece, expected) for piece, expected in pieces)
            allowed = slack * bound + noise * self._magnitudes[index]
            verdicts.append(
                Verdict(error <= allowed, error, allowed, f"{name}: error {error:.3g}, bound {allowed:.3g}")
            )
        return max(verdicts, key=lambda verdict: verdict.error / verdict.bound if verdict.bound else verdict.error)


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where one is not finite and the other differs from it."""
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.to(torch.float64), expected.to(torch.float64)
    difference = torch.where(actual == expected, 0.0, (actual - expected).abs())
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _magnitude(expected: Tensor) -> float:
    return float(expected.abs().nan_to_num(nan=0.0, posinf=0.0).max()) if expected.numel() else 0.0
