"""Exceptions and warnings of ptkernels."""

from __future__ import annotations

__all__ = ["BackendError", "FallbackError", "FallbackWarning", "LibraryLoadError"]


class LibraryLoadError(ImportError):
    """A shared library of ptkernels is missing or cannot be loaded; names the file, the torch version and the cause."""


class BackendError(RuntimeError):
    """The backend asked for with :func:`ptkernels.backend` or ``PTKERNELS_BACKEND`` cannot run this call."""


class FallbackError(RuntimeError):
    """A call would have run on the reference instead of a kernel while ``PTKERNELS_STRICT=1``."""


class FallbackWarning(UserWarning):
    """A call runs on the reference instead of a kernel; issued once per operator and reason."""
