"""Where a recurrent layer runs, and why: the decision itself, and the account of it that ``explain`` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend, _loader, _triton
from ptkernels._autograd import has_tangent
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.packed_rnn import library
from ptkernels.ops.packed_rnn.checks import DTYPES, OP, check_layer
from ptkernels.ops.packed_rnn.reference import PLAIN, Options

_COMPOSITION = "plain torch composition"
_REQUESTED = "backend 'reference' was asked for"


def fallback_reason(input: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    if _backend.runs_on_triton(input.device.type, library.DEVICES):
        return _triton.uncovered(input) or _tangent(input, state, params)
    # On the meta device a call is shape propagation, which the operators have for every device.
    if input.device.type not in (*library.DEVICES, "meta"):
        return _backend.no_kernel(input.device.type)
    return _tangent(input, state, params)


def _tangent(input: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> str | None:
    return "forward-mode differentiation has no kernel" if has_tangent(input, *state, *params) else None


def runs_on_reference(op: str, input: Tensor, state: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(op, input.device.type)
    reason = fallback_reason(input, state, params)
    if reason is not None:
        _backend.fallback(op, reason)
    return reason is not None


def _cpu_kernel(dtype: torch.dtype) -> str:
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so (ptkernels._introspect, which names its kernels, is not built for this Python)"
    name: str = introspection.kernel_table()[OP][str(dtype).removeprefix("torch.")]
    return name


def _hints(input: Tensor, batch: int) -> list[str]:
    hints = []
    if input.device.type == "cpu":
        hints += _loader.isa_hints(input.dtype)
    if batch == 1 and input.device.type == "cpu":
        hints.append("one sequence at a time reads all weights for every token: batched sequences share them")
    return hints


def explain_layer(op: str, args: Any, all_cells: bool = False, options: Options = PLAIN) -> Explanation:
    """Account of a call of the operator with these arguments, without making it."""
    input, sizes, sorted_indices, state, params, batch_size, layout, mode, both = args
    check_layer(op, input, sizes, sorted_indices, state, params, batch_size, layout, mode, both, all_cells, *options)
    if _backend.state.backend == "reference":
        return Explanation(op, _COMPOSITION, "reference", _REQUESTED, ["leave ptkernels.backend('reference')"])
    device = input.device.type
    _backend.check_requested(op, device)
    if reason := fallback_reason(input, state, params):
        return Explanation(op, _COMPOSITION, "reference", reason)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    if _backend.runs_on_triton(device, library.DEVICES):
        return Explanation(op, "Triton", "triton", f"{reason}; {_triton.NOT_YET_RUN}", _hints(input, batch_size))
    kernel = _cpu_kernel(input.dtype) if device == "cpu" else "shape propagation"
    return Explanation(op, kernel, device, reason, _hints(input, batch_size))


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Account of the call :func:`ptkernels.packed_rnn` would make with these arguments, without making it.

    Raises what the call would raise for bad arguments.
    """
    from ptkernels.cli.arguments import bind
    from ptkernels.ops.packed_rnn import layer

    named = bind(layer.packed_rnn, args, kwargs)
    del named["recompute"], named["train"]  # which the same kernels serve
    all_cells = named.pop("return_cells")
    options = layer.as_options(named.pop("eps"), named.pop("zoneout"), train=False)
    weights = tuple(named.pop(name) for name in layer.WEIGHTS)
    return explain_layer(OP, layer.as_op_arguments(weights=weights, **named), all_cells, options)


def kernels() -> list[KernelInfo]:
    """Every implementation and whether it can run in this process."""
    introspection = _loader.introspection()
    by_name: dict[str, list[str]] = {}
    if introspection is not None:
        for dtype, name in introspection.kernel_table()[OP].items():
            by_name.setdefault(name, []).append(dtype)
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    cpu = [KernelInfo(name, "cpu", tuple(names), True) for name, names in by_name.items()]
    return [
        *(cpu or [KernelInfo("libptkernels.so", "cpu", dtypes, True, "ptkernels._introspect is not built")]),
        triton_row(),
        KernelInfo(_COMPOSITION, "reference", dtypes, True),
    ]
