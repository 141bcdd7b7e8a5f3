"""Which implementation a call may use, and the promise that no call changes implementation silently."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from types import TracebackType

import torch

from ptkernels import _cuda, _env, _loader, _triton
from ptkernels.errors import BackendError, FallbackError, FallbackWarning


class _State:
    __slots__ = ("backend", "batch_invariant", "strict", "warned")

    def __init__(self, backend: str | None, strict: bool, batch_invariant: bool) -> None:
        self.backend = backend
        self.strict = strict
        self.batch_invariant = batch_invariant
        self.warned: set[tuple[str, str]] = set()


# Process-wide on purpose, like torch.backends: torch.compile guards on it, and worker threads see the same choice.
state = _State(_env.settings.backend, _env.settings.strict, _env.settings.batch_invariant)


def unavailable(name: str) -> str | None:
    """Why the backend cannot run in this process, or None where it can."""
    if name == "cuda":
        for library in _loader.load():
            if library.name == "libptkernels_cuda.so" and not library.loaded:
                return f"{library.name} is not loaded: {library.reason}"
        return None if torch.cuda.is_available() else "torch finds no CUDA device"
    if name == "triton":
        return _triton.unavailable()
    return None


class backend(contextlib.ContextDecorator):  # noqa: N801 - used as a function, like torch.no_grad
    """Run every operator on one backend, or fail: a context manager, also usable as a decorator.

    The choice holds for the whole process while the context is entered, as ``torch.backends`` flags do; contexts nest.
    ``PTKERNELS_BACKEND`` sets the choice the process starts with. Without one, each call takes the fastest kernel for
    its device, which :func:`ptkernels.explain` names.

    Args:
        name: ``"cpu"`` or ``"cuda"`` (the compiled kernels of that device; a call with tensors elsewhere raises),
            ``"triton"``, or ``"reference"`` (plain torch, on any device).

    Raises:
        ValueError: the name is none of those.
        BackendError: the backend cannot run in this process, with the reason.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x = torch.randn(1, 2, 5, 8)
        >>> with ptk.backend("reference"):
        ...     out = ptk.attention(x, x, x)
        >>> torch.testing.assert_close(out, ptk.attention(x, x, x))
    """

    def __init__(self, name: str) -> None:
        if name not in _env.BACKENDS:
            raise ValueError(f"backend: name: got {name!r}, expected one of {', '.join(_env.BACKENDS)}")
        if reason := unavailable(name):
            raise BackendError(f"backend: {name!r} cannot run here: {reason}")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> backend:
        self._outer.append(state.backend)
        state.backend = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state.backend = self._outer.pop()


class batch_invariant(contextlib.ContextDecorator):  # noqa: N801 - used as a function, like torch.no_grad
    """Give a row of attention the same bits whatever else is in the call: a context manager, also a decorator.

    :func:`ptkernels.attention`, :func:`ptkernels.attention_varlen` and :func:`ptkernels.attention_with_kv_cache` then
    return, for one query and the keys and values it sees, results that are equal bit by bit, log-sum-exp included, in
    a prefill of the whole sequence, in a prefill in chunks and in decoding token by token; alone and in a batch; padded
    (with a boolean mask) and packed; in a contiguous cache and in pages of any size; with any number of threads. That
    holds for every dtype and with every option but dropout, which depends on a row's place in the call, between calls
    of the same head dims and the same ISA level. A quantised cache agrees with itself, not with tensors.

    Other operators are as they are, the backward of attention among them: a model's output is invariant only where its
    other layers are. There are kernels for it on CPUs only; calls that would run elsewhere raise.

    The choice holds for the whole process while the context is entered, contexts nest, and a compiled function follows
    the choice at the time it runs: enter it outside of ``torch.compile``. ``PTKERNELS_BATCH_INVARIANT=1`` enters it at
    import. A prefill takes 1.0 to 1.04 times as long, decoding 1.2 to 1.9 times
    (csrc/ops/attention/README.md).

    Raises:
        ptkernels.errors.BackendError: by calls for which there is no such kernel.

    Example:
        >>> import torch, ptkernels as ptk
        >>> query, key, value = (torch.randn(2, 4, 300, 64) for _ in range(3))
        >>> with ptk.batch_invariant():
        ...     whole = ptk.attention(query, key, value, is_causal=True)
        ...     last = ptk.attention(query[1:, :, -1:], key[1:], value[1:])
        >>> torch.equal(whole[1:, :, -1:], last)
        True
    """

    def __init__(self) -> None:
        self._outer: list[bool] = []

    def __enter__(self) -> batch_invariant:
        self._outer.append(state.batch_invariant)
        _set_batch_invariant(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set_batch_invariant(self._outer.pop())


def _set_batch_invariant(wanted: bool) -> None:
    _loader.load()
    torch.ops.ptkernels._batch_invariant(wanted)
    state.batch_invariant = wanted


BATCH_INVARIANT = "batch invariant: a row has the same bits whatever else is in the call"


def check_batch_invariant(op: str, device_type: str, fallback_reason: str | None = None) -> None:
    """Raise where batch invariance was asked for and is not to be had."""
    if not state.batch_invariant:
        return
    reason = fallback_reason
    if state.backend not in (None, "cpu"):
        reason = f"backend {state.backend!r} does not offer it"
    elif device_type not in ("cpu", "meta"):
        reason = f"got tensors on {device_type}, expected them on the cpu: no other device's kernels offer it"
    if reason is not None:
        raise BackendError(f"{op}: batch_invariant() was asked for: {reason}")


def check_requested(op: str, device_type: str) -> None:
    """Raise where the backend asked for cannot run a call on that device; the reference always can."""
    name = state.backend
    if name is None or name == "reference":
        return
    if reason := unavailable(name):
        raise BackendError(f"{op}: backend {name!r} was asked for and cannot run here: {reason}")
    if name == "triton" and (device_type == "cuda" or _triton.interpreted()):
        from ptkernels._triton import dispatch  # which is built on this module

        dispatch.stand_by()
        return
    if name != device_type:
        raise BackendError(f"{op}: backend {name!r} was asked for, got tensors on {device_type}")


def runs_on_triton(device_type: str, devices: Sequence[str]) -> bool:
    """Whether a call goes to an operator's Triton kernels: they were asked for, or the device has no others.

    ``devices`` are those that the operator has compiled kernels for.
    """
    if state.backend == "triton":
        return True
    on_cuda_alone = device_type == "cuda" and not has_kernel(device_type, devices)
    return on_cuda_alone and state.backend is None and unavailable("triton") is None


def has_kernel(device_type: str, devices: Sequence[str]) -> bool:
    """Whether an operator that has compiled kernels for ``devices`` may run one of them."""
    return device_type in devices and (device_type != "cuda" or _cuda.newest() is not None)


def no_kernel(device_type: str, devices: Sequence[str] = ()) -> str:
    """Why a device without compiled kernels, or with such as may not be chosen, has no others either."""
    reason = _cuda.unavailable() if device_type in devices else None
    reason = reason or f"no kernel for {device_type} tensors"
    if device_type == "cuda" and state.backend is None:
        reason += f"; Triton's cannot run: {unavailable('triton')}"
    return reason


def fallback(op: str, reason: str) -> None:
    """Announce that a call leaves the kernels for the reference.

    Raises:
        BackendError: a compiled backend was asked for by name.
        FallbackError: ``PTKERNELS_STRICT=1``.
    """
    if state.backend not in (None, "reference"):
        raise BackendError(f"{op}: backend {state.backend!r} was asked for and has no kernel for this call: {reason}")
    if state.strict:
        raise FallbackError(f"{op}: no kernel for this call: {reason}; PTKERNELS_STRICT=1 forbids the reference")
    if torch.compiler.is_compiling():
        return  # a warning would break the graph; explain() gives the account
    if (op, reason) in state.warned:
        return
    state.warned.add((op, reason))
    warnings.warn(f"{op}: runs on the reference: {reason}", FallbackWarning, stacklevel=4)
