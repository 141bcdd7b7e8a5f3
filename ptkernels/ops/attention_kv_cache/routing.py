"""Where a call on a cache runs, and why: the decision itself, and the account of it that ``explain`` gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend, _cuda, _loader, _triton
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.attention.routing import uncovered_by_triton
from ptkernels.ops.attention_kv_cache import library, register
from ptkernels.ops.attention_kv_cache.checks import OP, check_inputs, check_values

_COMPOSITION = "plain torch composition"
_DTYPES = ("float64", "float32", "bfloat16", "float16")
# Above this many rows (queries times the heads that share a key head) keys are packed for the engine.
_DIRECT_ROWS = 16


def _fallback_reason(query: Tensor, v_cache: Any) -> str | None:
    device = query.device.type
    if _backend.runs_on_triton(device, library.DEVICES):
        # What is no tensor is for the checks, which come after.
        if not isinstance(v_cache, Tensor):
            return _triton.uncovered(query)
        codes = _triton.uncovered_codes(query.dtype) if v_cache.dtype != query.dtype else None
        return uncovered_by_triton(query, v_cache) or codes
    if _backend.has_kernel(device, (*library.DEVICES, "meta")):
        return None
    return _backend.no_kernel(device, library.DEVICES)


def runs_on_reference(query: Any, v_cache: Any) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    if isinstance(query, Tensor):
        _backend.check_batch_invariant(OP, query.device.type)
    if _backend.state.backend == "reference":
        return True
    if not isinstance(query, Tensor):
        return False
    device = query.device.type
    _backend.check_requested(OP, device)
    reason = _fallback_reason(query, v_cache)
    if reason is not None:
        _backend.check_batch_invariant(OP, device, reason)
        _backend.fallback(OP, reason)
    return reason is not None


def check_all(
    query: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, *, cache_seqlens: Any, **options: Any
) -> None:
    """Raise the precise error for the first argument that is wrong, by what it is or by what it holds."""
    check_inputs(query, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, **options)
    register.refuse_derivatives(
        (("query", query), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v), *options.items())
    )
    if query.is_meta or torch.compiler.is_compiling() or isinstance(query, torch._subclasses.FakeTensor):
        return
    place = [options.get(name) for name in ("block_table", "cache_batch_idx", "cache_leftpad", "rotary_cos")]
    check_values(query, k_cache, k, cache_seqlens, *place)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _cpu_kernel(query: Tensor, k_cache: Tensor) -> str:
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so (ptkernels._introspect, which names its kernels, is not built for this Python)"
    name: str = introspection.attention_with_kv_cache_kernel(
        dtype=_dtype_name(query),
        is_quantized=k_cache.dtype != query.dtype,
        heads_q=query.size(1),
        heads_kv=k_cache.size(1),
        len_q=query.size(2),
    )
    return name


def _hints(query: Tensor, k_cache: Tensor, kernel: str) -> list[str]:
    hints = []
    if query.dtype == torch.float32 and k_cache.dtype == torch.float32:
        hints.append("a bfloat16, int8 or float8_e4m3fn cache is read in half or a quarter of the time")
    if kernel.endswith("tiled") and query.size(2) > 1 and query.size(1) // max(k_cache.size(1), 1) <= _DIRECT_ROWS:
        hints.append("keys and values are packed once per call: longer chunks of queries share that cost")
    return hints


def explain(
    query: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, *, cache_seqlens: Any, **options: Any
) -> Explanation:
    """Account of the call :func:`ptkernels.attention_with_kv_cache` would make with these arguments.

    Nothing is appended. Raises what the call would raise for bad arguments.
    """
    options.pop("return_lse", None)
    check_all(query, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, **options)
    _backend.check_batch_invariant(OP, query.device.type)
    if _backend.state.backend == "reference":
        requested = "backend 'reference' was asked for"
        return Explanation(OP, _COMPOSITION, "reference", requested, ["leave ptkernels.backend('reference')"])
    device = query.device.type
    _backend.check_requested(OP, device)
    if reason := _fallback_reason(query, v_cache):
        return Explanation(OP, _COMPOSITION, "reference", reason)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    if _backend.state.batch_invariant:
        reason += f"; {_backend.BATCH_INVARIANT}"
    if _backend.runs_on_triton(device, library.DEVICES):
        return Explanation(OP, "Triton", "triton", f"{reason}; {_triton.NOT_YET_RUN}")
    if device == "cuda":
        return Explanation(OP, "cuda cuda_cores", device, f"{reason}; {_cuda.note('cuda_cores')}")
    if device != "cpu":
        return Explanation(OP, "shape propagation", device, reason)
    kernel = _cpu_kernel(query, k_cache)
    return Explanation(OP, kernel, device, reason, _hints(query, k_cache, kernel))


def kernels() -> list[KernelInfo]:
    """Every implementation and whether it can run in this process."""
    introspection = _loader.introspection()
    by_name: dict[str, list[str]] = {}
    if introspection is not None:
        for dtype in _DTYPES:
            for length in (1, 1024):
                name = introspection.attention_with_kv_cache_kernel(
                    dtype=dtype, is_quantized=False, heads_q=32, heads_kv=8, len_q=length
                )
                by_name.setdefault(name, []).append(dtype)
    cpu = [KernelInfo(name, "cpu", tuple(dtypes), True) for name, dtypes in by_name.items()]
    why_no_cuda = _backend.unavailable("cuda")
    return [
        *(cpu or [KernelInfo("libptkernels.so", "cpu", _DTYPES, True, "ptkernels._introspect is not built")]),
        KernelInfo("cuda cuda_cores", "cuda", _DTYPES, why_no_cuda is None, why_no_cuda or _cuda.note("cuda_cores")),
        triton_row(),
        KernelInfo(_COMPOSITION, "reference", _DTYPES, True),
    ]
