"""Where a call of attention runs, and why: the decision itself, and the account of it that ``explain`` gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend, _cuda, _env, _loader, _triton
from ptkernels._autograd import has_tangent
from ptkernels._registry import Explanation, KernelInfo, triton_row
from ptkernels.ops.attention import library, register
from ptkernels.ops.attention.checks import DTYPES, OP, check_inputs, refuse_nested
from ptkernels.ops.attention.options import Options, resolve
from ptkernels.ops.attention.shapes import normalize

# Tiles of wider heads leave neither registers nor shared memory for the backward.
TRITON_FLOAT64_DIM = 128
_COMPOSITION = "plain torch composition"
_REQUESTED = "backend 'reference' was asked for"


def runs_on_triton(device_type: str) -> bool:
    """Whether a call goes to the Triton kernels: they were asked for, or the device has no other."""
    return _backend.runs_on_triton(device_type, library.DEVICES)


def uncovered_by_triton(query: Tensor, value: Tensor) -> str | None:
    """Why the Triton kernels cannot take operands, whatever the options; None where they can."""
    widest = max((*query.shape[-1:], *value.shape[-1:]), default=0)
    if query.dtype == torch.float64 and widest > TRITON_FLOAT64_DIM:
        return f"the Triton kernels have no float64 above a head dim of {TRITON_FLOAT64_DIM}, got {widest}"
    return _triton.uncovered(query)


def triton_op() -> Callable[..., tuple[Tensor, Tensor]]:
    """The Triton operator, which takes what ``ptkernels::attention`` takes."""
    from ptkernels.ops.attention import triton_ops

    op: Callable[..., tuple[Tensor, Tensor]] = triton_ops.attention_op
    return op


def fallback_reason(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Options
) -> str | None:
    """Why no kernel covers a checked call, or None where one does."""
    if runs_on_triton(query.device.type):
        if reason := uncovered_by_triton(query, value):
            return reason
        if options.relative_bias is not None:
            return "the Triton kernels have no relative_bias"
        return register.FORWARD_MODE if has_tangent(query, key, value, attn_mask, *options.tensors) else None
    # On the meta device a call is shape propagation, which the operators have for every device.
    if not _backend.has_kernel(query.device.type, (*library.DEVICES, "meta")):
        return _backend.no_kernel(query.device.type, library.DEVICES)
    if query.is_cuda and options.relative_bias is not None:
        return "the CUDA kernels have no relative_bias"
    if query.is_cuda and options.mask_block_size != 1:
        return "the CUDA kernels have no masks of blocks"
    return register.uncovered(query, key, value, attn_mask, options)


def runs_on_reference(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Options) -> bool:
    """Choose between the kernels and the reference, and announce a reference that was not asked for.

    Raises:
        BackendError: the backend asked for cannot run this call.
        FallbackError: no kernel covers the call, and ``PTKERNELS_STRICT=1``.
    """
    _backend.check_batch_invariant(OP, query.device.type)
    if _backend.state.backend == "reference":
        return True
    _backend.check_requested(OP, query.device.type)
    reason = fallback_reason(query, key, value, attn_mask, options)
    if reason is not None:
        _backend.check_batch_invariant(OP, query.device.type, reason)
        _backend.fallback(OP, reason)
    return reason is not None


def _mask_kind(mask: Tensor | None) -> str:
    return "none" if mask is None else str(mask.dtype).removeprefix("torch.")


def cpu_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> str:
    """Name of the CPU kernel for operands of four dimensions."""
    introspection = _loader.introspection()
    if introspection is None:
        return "libptkernels.so (ptkernels._introspect, which names its kernels, is not built for this Python)"
    name: str = introspection.attention_kernel(
        dtype=str(query.dtype).removeprefix("torch."),
        batch=query.size(0),
        heads_q=query.size(1),
        heads_kv=key.size(1),
        len_q=query.size(2),
        len_k=key.size(2),
        dim_qk=query.size(3),
        dim_v=value.size(3),
        is_causal=is_causal,
        mask=_mask_kind(mask),
    )
    return name


def splits_float32(kernel: str) -> bool:
    """Whether a CPU kernel multiplies float32 in pieces of 16 bits, as torch.set_float32_matmul_precision allows."""
    return "_bf16x" in kernel


def precision_note(kernel: str) -> str:
    """What the account of a call adds for such a kernel."""
    if not splits_float32(kernel):
        return ""
    products, bits = ("three products", 15) if kernel.endswith("x3") else ("one product", 7)
    precision = torch.get_float32_matmul_precision()
    return f"; float32 precision {precision!r}: {products} of bfloat16, relative error below 2^-{bits}"


def cuda_kernel(query: Tensor, key: Tensor, value: Tensor, reason: str) -> tuple[str, str]:
    """Name of the CUDA kernel, and the reason with what is known of it and why it is no newer one."""
    architecture, why_no_newer = _cuda.choose(query, key, value, torch.cuda.get_device_capability(query.device))
    if _env.settings.cuda_arch is not None:
        reason = f"{reason}, PTKERNELS_CUDA_ARCH={_env.settings.cuda_arch}"
    reason = f"{reason}; {_cuda.note(architecture)}"
    if why_no_newer:
        reason = f"{reason}; {why_no_newer}"
    if architecture == "sm_90a":
        reason += "; its backward is that of sm_80"
        if (heads := _cuda.query_heads_per_tile(query.size(1), key.size(1), query.size(2))) > 1:
            reason += f"; rows of {heads} query heads that share a key head are packed into a tile"
    return f"cuda {architecture}", reason


def _hints(query: Tensor, key: Tensor, value: Tensor, kernel: str = "") -> list[str]:
    hints = [
        f"{name}: its last dimension has stride {tensor.stride(-1)}; kernels read rows fastest with stride 1"
        for name, tensor in (("query", query), ("key", key), ("value", value))
        if tensor.numel() > 0 and tensor.size(-1) > 1 and tensor.stride(-1) != 1
    ]
    if query.device.type == "cpu":
        hints += _loader.isa_hints(query.dtype)
        precision = torch.get_float32_matmul_precision()
        if query.dtype == torch.float32 and precision != "highest" and not splits_float32(kernel):
            hints.append(f"float32 precision {precision!r} changes nothing: this kernel multiplies float32 as float32")
    return hints


def explain(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    relative_bias: Any = None,
    mask_block_size: int = 1,
    return_lse: bool = False,
) -> Explanation:
    """Account of the call :func:`ptkernels.attention` would make with these arguments, without making it.

    Raises what the call would raise for bad arguments.
    """
    if isinstance(query, Tensor) and query.is_nested:
        from ptkernels.ops.attention_varlen import jagged, routing  # which are built on this module

        refuse_nested(relative_bias, mask_block_size)
        named = {"window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
        args = (query, key, value, attn_mask, is_causal, enable_gqa)
        packed = jagged.pack(*args, dropout_p=dropout_p, scale=scale, **named)
        return routing.explain(*packed.operands, **packed.kwargs)
    query, key, value, attn_mask = register.autocast_if_enabled(query, key, value, attn_mask)
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias, mask_block_size)
    check_inputs(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, *beyond)
    attn_mask, options = resolve(query.dtype, attn_mask, dropout_p, is_causal, scale, *beyond, draw=False)
    _backend.check_batch_invariant(OP, query.device.type)
    if _backend.state.backend == "reference":
        return Explanation(OP, _COMPOSITION, "reference", _REQUESTED, ["leave ptkernels.backend('reference')"])
    device = query.device.type
    _backend.check_requested(OP, device)
    if reason := fallback_reason(query, key, value, attn_mask, options):
        _backend.check_batch_invariant(OP, device, reason)
        return Explanation(OP, _COMPOSITION, "reference", reason)
    reason = f"fused kernel for {device} tensors"
    if _backend.state.backend is not None:
        reason = f"backend {_backend.state.backend!r} was asked for"
    if _backend.state.batch_invariant:
        reason += f"; {_backend.BATCH_INVARIANT}"
    call = normalize(query, key, value, attn_mask, options, enable_gqa)
    if runs_on_triton(device):
        return Explanation(OP, "Triton", "triton", f"{reason}; {_triton.NOT_YET_RUN}", _hints(query, key, value))
    kernel = "shape propagation"
    if device == "cpu":
        kernel = cpu_kernel(call.query, call.key, call.value, call.attn_mask, is_causal)
    elif device == "cuda":
        kernel, reason = cuda_kernel(call.query, call.key, call.value, reason)
    return Explanation(OP, kernel, device, reason + precision_note(kernel), _hints(query, key, value, kernel))


def kernels() -> list[KernelInfo]:
    """Every implementation of attention and whether it can run in this process."""
    introspection = _loader.introspection()
    by_name: dict[str, list[str]] = {}
    if introspection is not None:
        for dtype, name in introspection.kernel_table()["attention"].items():
            by_name.setdefault(name, []).append(dtype)
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    cpu = [KernelInfo(name, "cpu", tuple(names), True) for name, names in by_name.items()]
    why_no_cuda = _backend.unavailable("cuda")
    return [
        *(cpu or [KernelInfo("libptkernels.so", "cpu", dtypes, True, "ptkernels._introspect is not built")]),
        *(
            KernelInfo(f"cuda {name}", "cuda", held, why_no_cuda is None, why_no_cuda or _cuda.note(name))
            for name, held in (("cuda_cores", dtypes), ("sm_80", dtypes[2:]), ("sm_90a", dtypes[2:]))
        ),
        triton_row(),
        KernelInfo(_COMPOSITION, "reference", dtypes, True),
    ]
