"""The table of operators.

Every operator describes itself once, in an :class:`OpSpec`. The contract tests, ``bench``, ``gradcheck``, ``env`` and
``explain`` are written against that description and know no operator by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ptkernels import _triton

Direction = Literal["forward", "forward+backward"]
Level = Literal["gradcheck", "quick", "full"]


@dataclass(frozen=True)
class Sample:
    """One valid call of an operator, used by the contract tests and by ``gradcheck``."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    grad_inputs: tuple[str, ...] = ()
    """Names of the differentiable arguments, as in the public function's signature."""
    batch_inputs: tuple[str, ...] | None = None
    """Those whose first dimension may have any size, as long as they agree; default: all of ``grad_inputs``."""


@dataclass(frozen=True)
class BenchCase:
    """One timed call, with the shape of a named model."""

    name: str
    model: str
    shape: dict[str, Any]
    dtype: torch.dtype
    direction: Direction
    make: Callable[[torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]
    """Draws the arguments on the generator's device; floating tensors require grad in ``forward+backward``."""
    work_flops: int
    """Floating point operations the result needs, two per multiply-add, masked-out scores not counted."""
    work_bytes: int
    """Compulsory traffic: every input read once and every output written once, per direction."""


@dataclass(frozen=True)
class Explanation:
    """Which kernel a call runs, why, and what would make it faster."""

    op: str
    kernel: str
    backend: str
    reason: str
    faster: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.kernel} ({self.backend})", f"  why: {self.reason}"]
        return "\n".join(lines + [f"  faster: {hint}" for hint in self.faster])


@dataclass(frozen=True)
class KernelInfo:
    """One row of an operator's kernel table."""

    name: str
    backend: str
    dtypes: tuple[str, ...]
    available: bool
    note: str = ""
    """Why the kernel is not available, or what it needs."""


def triton_row() -> KernelInfo:
    """The row of an operator's Triton kernels."""
    reason = _triton.unavailable()
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in _triton.DTYPES)
    return KernelInfo("Triton", "triton", dtypes, reason is None, reason or f"{_triton.NOT_YET_RUN}; from sm_80 on")


@dataclass(frozen=True)
class Tolerances:
    """The error rule: ``max|ours - ref64| <= factor * max|torch - ref64| + slack``.

    ``ref64`` is the reference in float64 and ``torch`` is PyTorch's own operator in the dtype under test. The slack is
    ``ulps * eps(dtype) * max|ref64| + internal_ulps * eps(internal dtype) * largest``, where the internal dtype is
    float32, or float64 for float64, and ``largest`` is the largest number among the gradients, or the outputs, of the
    call: the derivative of a softmax over a single key is the difference of two equal numbers of that size. The slack
    matters where PyTorch happens to be exact, as there, and in float64 itself, where the reference is no more accurate
    than what it judges.
    """

    forward: float = 2.0
    gradient: float = 2.0
    ulps: float = 2.0
    internal_ulps: float = 8.0
    internal_ulps_float64: float = 64.0

    def bound(
        self,
        *,
        peer_error: float,
        magnitude: float,
        dtype: torch.dtype,
        gradient: bool,
        largest: float | None = None,
    ) -> float:
        """The largest absolute error allowed, given PyTorch's error, ``max|ref64|`` and ``largest`` (or that again)."""
        factor = self.gradient if gradient else self.forward
        internal = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        slack = self.ulps * torch.finfo(dtype).eps * magnitude
        internal *= self.internal_ulps_float64 if dtype == torch.float64 else self.internal_ulps
        slack += internal * (magnitude if largest is None else largest)
        return factor * peer_error + slack


@dataclass(frozen=True)
class OpSpec:
    """Everything the package-wide tools need to know about one operator."""

    name: str
    function: Callable[..., Any]
    """The public function."""
    reference: Callable[..., Any]
    """The oracle: plain torch, same signature."""
    baseline: Callable[..., Any]
    """PyTorch's own operator with the same signature, whose error the error rule is measured against."""
    torch_ops: tuple[str, ...]
    """Qualified names of the registered custom operators."""
    samples: Callable[[torch.dtype, str, bool, Level], Iterator[Sample]]
    """``samples(dtype, device, requires_grad, level)``: seeded, so two calls give equal tensors."""
    torch_op_samples: Callable[[torch.dtype, str], Iterator[tuple[str, tuple[Any, ...]]]]
    """``(qualified name, args)`` pairs that call the custom operators directly."""
    bench_cases: Callable[[], list[BenchCase]]
    kernels: Callable[[], list[KernelInfo]]
    explain: Callable[..., Explanation]
    tolerances: Tolerances = field(default_factory=Tolerances)
    differentiable: bool = True
    """False for an operator of inference: calls that would need a derivative raise, and autocast leaves them alone."""
    mutates: tuple[str, ...] = ()
    """Names of the arguments that a call may write to, as in the public function's signature."""
    kept_by_autocast: tuple[str, ...] = ()
    """Names of the tensor arguments that autocast leaves in their precision."""
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Other implementations with the public signature, timed side by side with ours."""
    enlarged: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    """Changes that make the first gradcheck sample a call so many times larger. Default: the differentiable arguments
    are repeated along their first dimension."""
    host_inputs: tuple[str, ...] = ()
    """Names of the arguments whose values decide shapes: they are read on the host, wherever the others are."""
    one_call_under_vmap: tuple[str, ...] | None = None
    """Arguments that ``torch.vmap`` maps within one call of the operator; others take one each. Default: all."""


_ops: dict[str, OpSpec] = {}


def register(spec: OpSpec) -> OpSpec:
    """Add an operator to the table; a name can be taken only once."""
    if spec.name in _ops:
        raise ValueError(f"register: {spec.name} is already registered")
    _ops[spec.name] = spec
    return spec


def all_ops() -> dict[str, OpSpec]:
    """The registered operators by name, in the order of registration."""
    return dict(_ops)


def get(op: str | Callable[..., Any]) -> OpSpec:
    """The operator of that name, or the one whose public function is given."""
    for spec in _ops.values():
        if op == spec.name or op is spec.function:
            return spec
    raise ValueError(f"unknown operator {op!r}, expected one of {', '.join(_ops)}")
