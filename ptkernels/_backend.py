"""Which implementation a call may use, and the promise that no call changes implementation silently."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from types import TracebackType

import torch

from ptkernels import _env, _loader, _triton
from ptkernels.errors import BackendError, FallbackError, FallbackWarning


class _State:
    __slots__ = ("backend", "strict", "warned")

    def __init__(self, backend: str | None, strict: bool) -> None:
        self.backend = backend
        self.strict = strict
        self.warned: set[tuple[str, str]] = set()


# Process-wide on purpose, like torch.backends: torch.compile guards on it, and worker threads see the same choice.
state = _State(_env.settings.backend, _env.settings.strict)


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
    return (
        device_type == "cuda" and device_type not in devices and state.backend is None and unavailable("triton") is None
    )


def no_kernel(device_type: str) -> str:
    """Why a device without compiled kernels has no others either."""
    reason = f"no kernel for {device_type} tensors"
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
