"""One benchmark case made concrete: its tensors, and callables that compute it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptkernels._registry import BenchCase, OpSpec
from ptkernels.cli.arguments import bind

BACKWARD = "forward+backward"


class UnsupportedError(Exception):
    """A contender cannot compute this case; the text says why."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensors_of(value: object) -> tuple[Tensor, ...]:
    """The tensors among an operator's results."""
    return (value,) if isinstance(value, Tensor) else tuple(item for item in value if isinstance(item, Tensor))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Contender:
    """Something that computes a problem.

    ``call`` is what is timed. ``outputs`` computes it once and returns the results, then the gradients, as torch
    tensors in the layout of the operator; it serves the check and is never timed.
    """

    name: str
    call: Callable[[], object]
    outputs: Callable[[], tuple[Tensor, ...]]
    detail: str = ""
    noise: float = 0.0
    """Share of the largest result by which one may differ that rounds its operands in another way."""


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    ``version`` raises ImportError when it is not installed, ``prepare(problem, threads)`` raises UnsupportedError.
    """

    name: str
    version: Callable[[], str]
    prepare: Callable[[Problem, int], Contender]


class Problem:
    """The arguments of one case, by position (``args``, ``kwargs``) and by name (``named``).

    ``leaves`` are the tensors that get a gradient (none for a forward case); ``cotangents`` are the gradients that
    flow in, one for each result, the same for every contender.
    """

    def __init__(self, spec: OpSpec, case: BenchCase) -> None:
        self.spec = spec
        self.case = case
        self.backward = case.direction == BACKWARD
        # Seeded by the case alone: a case sees the same numbers whichever other cases run.
        self._seed = zlib.crc32(case.name.encode())
        self.args, self.kwargs = case.make(torch.Generator().manual_seed(self._seed))
        self.named = bind(spec.reference, self.args, self.kwargs)
        self.leaf_names = tuple(
            name
            for name, value in self.named.items()
            if self.backward and isinstance(value, Tensor) and value.requires_grad
        )
        self.leaves = tuple(self.named[name] for name in self.leaf_names)
        self._cotangents: tuple[Tensor, ...] | None = None

    def cotangents(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self._cotangents is None:
            generator = torch.Generator().manual_seed(self._seed + 1)
            self._cotangents = tuple(
                # Dense in the result's own layout, as a gradient arriving from the next layer would be.
                torch.empty_like(result).copy_(torch.randn(result.shape, generator=generator))
                for result in results
            )
        return self._cotangents

    def contender(self, name: str, function: Callable[..., Any], detail: str = "") -> Contender:
        """A torch function of the operator's signature as a contender."""
        args, kwargs, leaves = self.args, self.kwargs, self.leaves
        if not self.backward:
            return Contender(
                name, lambda: function(*args, **kwargs), lambda: tensors_of(function(*args, **kwargs)), detail
            )

        def step() -> tuple[Tensor, ...]:
            results = tensors_of(function(*args, **kwargs))
            return (*results, *torch.autograd.grad(results, leaves, self.cotangents(results)))

        return Contender(name, step, step, detail)

    def require_forward(self) -> None:
        """Refuse a backward case on behalf of a contender that only does inference."""
        if self.backward:
            raise UnsupportedError("inference only, no backward")
