"""Triton kernels as an implementation of the package's own operators.

An operator that libptkernels_cuda.so has no kernel for, or none that may be chosen, gets a Python function as its CUDA
implementation, which launches Triton kernels; one that has a kernel runs them where the Triton backend is asked for.
What is registered above (autograd, autocast, vmap, shapes) is that of the operator. Under ``torch.compile`` and
AOTInductor the function is traced in the operator's place, as ``torch.library.triton_op`` does, so that they see its
kernels; ``torch.export`` keeps the operator.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from ptkernels import _backend, _cuda, _triton

Implementation = Callable[..., Any]
"""Takes the operator's arguments, and ``wrap``: the identity, or ``torch.library.wrap_triton`` under tracing."""

Launcher = Callable[[Any], Any]
"""Turns a kernel into what is indexed by a grid: ``identity``, or ``torch.library.wrap_triton`` under tracing."""


def identity(kernel: Any) -> Any:
    """Of a kernel that is launched and not traced."""
    return kernel


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of what the host knows, without a wait."""
    if device.type != "cuda" or tensor.device == device:
        return tensor.to(device)
    if type(tensor) is Tensor and not tensor.is_pinned():
        # From pinned memory the copy is queued behind nothing and waits for nothing; a captured graph reads it again.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _first_tensor(args: Sequence[Any]) -> Tensor | None:
    return next((arg for arg in args if isinstance(arg, Tensor)), None)


def _launch(load: Callable[[], Implementation], args: Sequence[Any]) -> Any:
    tensor = _first_tensor(args)
    if tensor is None or tensor.device.type != "cuda":
        return load()(*args, wrap=identity)
    # Kernels are launched on the current device, which need not be that of the tensors.
    with torch.cuda.device(tensor.device):
        return load()(*args, wrap=identity)


def _on_gpu(name: str, load: Callable[[], Implementation]) -> Callable[..., Any]:
    """The operator's kernel where it has no other."""

    def run(*args: Any) -> Any:
        tensor = _first_tensor(args)
        if tensor is not None and (reason := _triton.unavailable_for(tensor)):
            raise RuntimeError(f"{name}: no kernel for this call: {reason}")
        return _launch(load, args)

    return run


def _instead(op: Any, key: str, load: Callable[[], Implementation]) -> Callable[..., Any]:
    """The operator's compiled kernel, but for calls on the Triton backend."""
    native = torch.library.get_kernel(op, key)

    def run(keyset: Any, *args: Any) -> Any:
        if _backend.state.backend == "triton":
            return _launch(load, args)
        return native.call_boxed(keyset, *args)

    return run


def _has_compiled(name: str) -> bool:
    """Whether an operator has a compiled CUDA kernel that may be chosen."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") and _cuda.newest() is not None


def _traced(name: str, load: Callable[[], Implementation], sees_through: Callable[..., bool]) -> Callable[..., Any]:
    wanted = ("triton",) if _has_compiled(name) else (None, "triton")

    def rule(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        tensor = _first_tensor(args)
        ours = tensor is not None and tensor.device.type == "cuda" and _backend.state.backend in wanted
        runs = ours and _triton.unavailable() is None and not _triton.interpreted()
        if runs and not custom_triton_ops_decomposition_disabled() and sees_through(*args, **kwargs):
            with mode:
                return load()(*args, **kwargs, wrap=torch.library.wrap_triton)
        return mode.__torch_dispatch__(op, types, args, kwargs)

    return rule


def implement(
    library: torch.library.Library,
    op: Any,
    module: str,
    function: str,
    sees_through: str | None = None,
) -> None:
    """Make ``module.function``, which is imported when it is first needed, the operator's CUDA implementation.

    Args:
        library: keeps the registration alive.
        op: the overload, such as ``torch.ops.ptkernels.packed_rnn.default``.
        module: imports Triton, and so not before a call.
        function: its name there; see ``Implementation``.
        sees_through: another function there, of the same arguments: whether they can be traced. Where they cannot, the
            operator stays in the graph. Default: always.
    """
    name = op.name()

    def load() -> Implementation:
        found: Implementation = getattr(importlib.import_module(module), function)
        return found

    def can_trace(*args: Any, **kwargs: Any) -> bool:
        return sees_through is None or getattr(importlib.import_module(module), sees_through)(*args, **kwargs)

    short = name.partition("::")[2]
    # Before the registrations below, which would make the operator look as if it had a compiled CUDA kernel.
    torch.library.register_torch_dispatch(name, FunctionalTensorMode, _traced(name, load, can_trace), lib=library)

    def register(function: Callable[..., Any], key: str, with_keyset: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced, as it should be
            library.impl(short, function, key, with_keyset=with_keyset, allow_override=True)

    if _triton.interpreted():
        register(_instead(op, "CPU", load), "CPU", True)
    if _has_compiled(name):
        # A look at the backend in Python would slow down every call: it comes with the first that may ask for Triton.
        _not_yet_replaced.append(lambda: register(_instead(op, "CUDA", load), "CUDA", True))
    else:
        register(_on_gpu(name, load), "CUDA", False)


_not_yet_replaced: list[Callable[[], None]] = []


def stand_by() -> None:
    """Put Triton kernels in front of compiled CUDA kernels, for calls on the Triton backend."""
    while _not_yet_replaced:
        _not_yet_replaced.pop()()
