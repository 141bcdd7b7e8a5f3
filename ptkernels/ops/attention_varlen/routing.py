"""Where a call of packed attention runs, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptkernels import _backend, _triton
from ptkernels._autograd import has_tangent
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.attention import routing as dense
from ptkernels.ops.attention.checks import check_window
from ptkernels.ops.attention.options import Options, resolve
from ptkernels.ops.attention.register import FORWARD_MODE, autocast_if_enabled
from ptkernels.ops.attention_varlen import library
from ptkernels.ops.attention_varlen.checks import OP, check_inputs

_LOOP = "plain torch loop over sequences"


def fallback_reason(query: Tensor, key: Tensor, value: Tensor, options: Options) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    tangent = FORWARD_MODE if has_tangent(query, key, value, *options.learned) else None
    if _backend.runs_on_triton(query.device.type, library.DEVICES):
        if options.relative_bias is not None:
            return "the Triton kernels have no relative_bias"
        return dense.uncovered_by_triton(query, value) or tangent
    if not _backend.has_kernel(query.device.type, (*library.DEVICES, "meta")):
        return _backend.no_kernel(query.device.type, library.DEVICES)
    if query.is_cuda and options.relative_bias is not None:
        return "the CUDA kernels have no relative_bias"
    return tangent


def runs_on_reference(query: Tensor, key: Tensor, value: Tensor, options: Options) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for."""
    _backend.check_batch_invariant(OP, query.device.type)
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(OP, query.device.type)
    reason = fallback_reason(query, key, value, options)
    if reason is not None:
        _backend.check_batch_invariant(OP, query.device.type, reason)
        _backend.fallback(OP, reason)
    return reason is not None


def explain(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    bottom_right: bool = False,
    scale: float | None = None,
    window: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    relative_bias: Any = None,
    return_lse: bool = False,
) -> Explanation:
    """Account of the call :func:`ptkernels.attention_varlen` would make with these arguments, without making it."""
    query, key, value, _ = autocast_if_enabled(query, key, value, None)
    check_window(window)
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias)
    _, options = resolve(query.dtype, None, dropout_p, is_causal, scale, *beyond, draw=False)
    bounds = [-1 if bound is None else bound for bound in (max_seqlen_q, max_seqlen_k)]
    options = options._replace(bottom_right=bottom_right)
    check_inputs(query, key, value, cu_seqlens_q, cu_seqlens_k, bounds[0], bounds[1], options=options)
    _backend.check_batch_invariant(OP, query.device.type)
    if _backend.state.backend == "reference":
        reason = "backend 'reference' was asked for"
        return Explanation(OP, _LOOP, "reference", reason, ["leave ptkernels.backend('reference')"])
    device = query.device.type
    _backend.check_requested(OP, device)
    if uncovered := fallback_reason(query, key, value, options):
        _backend.check_batch_invariant(OP, device, uncovered)
        return Explanation(OP, _LOOP, "reference", uncovered)
    if _backend.runs_on_triton(device, library.DEVICES):
        return Explanation(OP, "Triton", "triton", f"fused kernel for {device} tensors; {_triton.NOT_YET_RUN}")
    # The choice of kernel is that of one batch as long as the longest sequence.
    kernel, reason = "shape propagation", f"fused kernel for {device} tensors"
    if _backend.state.batch_invariant:
        reason += f"; {_backend.BATCH_INVARIANT}"
    if device == "cuda":
        kernel, reason = dense.cuda_kernel(query, key, value, reason)
    if device == "cpu":
        rows, keys = (
            int(offsets.diff().max()) if offsets.numel() > 1 else 0 for offsets in (cu_seqlens_q, cu_seqlens_k)
        )
        longest = (query[:rows], key[:keys], value[:keys])
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in longest)
        kernel = dense.cpu_kernel(q, k, v, None, is_causal)
    return Explanation(OP, kernel, device, reason + dense.precision_note(kernel))


def kernels() -> list[KernelInfo]:
    """Every implementation of packed attention and whether it can run in this process."""
    found = [info for info in dense.kernels() if info.backend in ("cpu", "cuda")]
    return [*found, triton_row(), KernelInfo(_LOOP, "reference", found[0].dtypes, True)]
