"""Environment variables of ptkernels: the only module that reads them, once, at import.

============================= ==================================================================================
``PTKERNELS_BACKEND``         ``cpu``, ``cuda``, ``triton`` or ``reference``: what `ptkernels.backend` starts as
``PTKERNELS_STRICT``          ``1``: a call that the fused kernels cannot take raises instead of running the reference
``PTKERNELS_MAX_ISA``         highest instruction set the CPU kernels may use: ``baseline``, ``avx2``, ``avx512``,
                              ``avx512_vnni``, ``avx512_bf16`` or ``amx``
``PTKERNELS_PACKED_MB``       MiB of packed weights that CPU kernels may keep between calls; default 256, 0 for none
``PTKERNELS_BATCH_INVARIANT`` ``1``: what `ptkernels.batch_invariant` starts as
``PTKERNELS_WINOGRAD``        ``0``: no convolution is computed by Winograd's transforms
``PTKERNELS_CUDA_ARCH``       newest CUDA C++ kernels to use, whether or not they have passed on a GPU: ``cuda_cores``,
                              ``sm_80`` or ``sm_90a``. Default: the newest that have
``PTKERNELS_LIBRARY``         path of the libptkernels.so to load instead of the installed one
============================= ==================================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

BACKENDS = ("cpu", "cuda", "triton", "reference")
CUDA_ARCHITECTURES = ("cuda_cores", "sm_80", "sm_90a")
ISA_LEVELS = ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for; None and False where it is silent."""

    backend: str | None = None
    strict: bool = False
    max_isa: str | None = None
    packed_mb: int | None = None
    batch_invariant: bool = False
    winograd: bool = True
    cuda_arch: str | None = None
    library: Path | None = None


def _choice(environ: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str | None:
    value = environ.get(name, "")
    if value and value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(allowed)}")
    return value or None


def _flag(environ: Mapping[str, str], name: str) -> bool:
    return _choice(environ, name, ("0", "1")) == "1"


def _count(environ: Mapping[str, str], name: str) -> int | None:
    value = environ.get(name, "")
    if value and not value.isdecimal():
        raise ValueError(f"{name}: got {value!r}, expected a number of 0 or more")
    return int(value) if value else None


def read(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check every variable.

    Args:
        environ: the environment; an unset and an empty variable mean the same.

    Raises:
        ValueError: a variable holds something other than what it may hold.

    >>> read({"PTKERNELS_STRICT": "1"}).strict
    True
    """
    library = environ.get("PTKERNELS_LIBRARY", "")
    return Settings(
        backend=_choice(environ, "PTKERNELS_BACKEND", BACKENDS),
        strict=_flag(environ, "PTKERNELS_STRICT"),
        max_isa=_choice(environ, "PTKERNELS_MAX_ISA", ISA_LEVELS),
        packed_mb=_count(environ, "PTKERNELS_PACKED_MB"),
        batch_invariant=_flag(environ, "PTKERNELS_BATCH_INVARIANT"),
        winograd=_choice(environ, "PTKERNELS_WINOGRAD", ("0", "1")) != "0",
        cuda_arch=_choice(environ, "PTKERNELS_CUDA_ARCH", CUDA_ARCHITECTURES),
        library=Path(library) if library else None,
    )


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the package may keep files of its own: ``$XDG_CACHE_HOME/ptkernels``, or ``~/.cache/ptkernels``."""
    root = environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "ptkernels"


settings = read()
