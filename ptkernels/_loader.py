"""Loads the shared libraries, once, and remembers what happened for ``python -m ptkernels env``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from . import _cuda, _env

_PACKAGED = Path(__file__).parent / "lib"
# As csrc/core/float32_precision.h counts them.
_PRECISIONS = ("highest", "high", "medium")


@dataclass(frozen=True)
class Library:
    """One shared library: where it is, whether this process loaded it, and why (not)."""

    name: str
    path: Path
    loaded: bool
    reason: str


def _registered() -> bool:
    return hasattr(torch.ops.ptkernels, "_set_max_isa")


def _load(path: Path) -> None:
    if not path.is_file():
        raise ImportError(
            f"ptkernels: {path} does not exist (torch {torch.__version__}); "
            "build it with `make build` or `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(
            f"ptkernels: cannot load {path} under torch {torch.__version__} (needs torch >= 2.10): "
            f"{error.__cause__ or error}"
        ) from error


def _load_cpu() -> Library:
    path = _env.settings.library or _PACKAGED / "libptkernels.so"
    # A second registration of the namespace would abort the process.
    if _registered() and str(path.resolve()) not in torch.ops.loaded_libraries:
        raise ImportError(f"ptkernels: cannot load {path}: this process has loaded another copy of libptkernels.so")
    _load(path)
    if not _registered():
        raise ImportError(
            f"ptkernels: {path} is no libptkernels.so: it registers no operator (torch {torch.__version__})"
        )
    _tell_float32_precision()
    if _env.settings.max_isa is not None:
        torch.ops.ptkernels._set_max_isa(_env.settings.max_isa)
    if _env.settings.packed_mb is not None:
        torch.ops.ptkernels._limit_packed_weights(_env.settings.packed_mb << 20)
    if _env.settings.batch_invariant:
        torch.ops.ptkernels._batch_invariant(True)
    if not _env.settings.winograd:
        torch.ops.ptkernels._allow_winograd(False)
    return Library("libptkernels.so", path, True, "PTKERNELS_LIBRARY" if _env.settings.library else "packaged")


_library = torch.library.Library("ptkernels", "FRAGMENT")


def _tell_float32_precision() -> None:
    """Let kernels read torch's setting when they run, which its C interface does not let them do."""

    def precision() -> int:
        return _PRECISIONS.index(torch.get_float32_matmul_precision())

    _library.impl("_float32_precision", precision, "CompositeExplicitAutograd")
    torch.ops.ptkernels._tell_float32_precision()


def _load_cuda() -> Library:
    path = _PACKAGED / "libptkernels_cuda.so"

    def result(loaded: bool, reason: str) -> Library:
        return Library("libptkernels_cuda.so", path, loaded, reason)

    if torch.version.cuda is None:
        return result(False, f"torch {torch.__version__} is built without CUDA")
    if not path.is_file():
        return result(False, "not built: no nvcc was found, or PTKERNELS_CUDA=0")
    _load(path)
    if (newest := _cuda.newest()) is not None:
        _cuda.note_built(torch.ops.ptkernels._set_cuda_architecture(newest))
    return result(True, "packaged")


@cache
def load() -> tuple[Library, ...]:
    """Load libptkernels.so, and libptkernels_cuda.so where torch has CUDA; later calls return the first result.

    Raises:
        ImportError: a library that should load does not; names the file, the torch version and the cause.
        RuntimeError: ``PTKERNELS_MAX_ISA`` came too late to be honoured.
    """
    return _load_cpu(), _load_cuda()


@cache
def introspection() -> ModuleType | None:
    """The compiled module `ptkernels._introspect`, or None where it was not built for this Python."""
    load()
    try:
        return importlib.import_module("ptkernels._introspect")
    except ImportError:
        return None


def isa_hints(dtype: torch.dtype) -> list[str]:
    """What ``explain`` says of the ISA level of CPU kernels that multiply ``dtype``: what would make them faster."""
    module = introspection()
    if module is None:
        return []
    active, preferred = module.active_isa(), module.preferred_isa()
    hints = []
    if active != preferred:
        hints.append(f"PTKERNELS_MAX_ISA asks for {active}; this machine's kernels are fastest at {preferred}")
    if dtype == torch.float32 and active == "amx":
        hints.append("bfloat16 inputs would use this machine's AMX tiles")
    return hints
