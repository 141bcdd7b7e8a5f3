"""Exceptions and warnings of ptkernels.

Bad arguments raise the built-in ``ValueError`` and ``TypeError``, and a shared library that cannot be loaded raises
``ImportError``; only what callers may want to tell apart has a class of its own.
"""

from __future__ import annotations

__all__ = ["BackendError", "FallbackError", "FallbackWarning"]


class BackendError(RuntimeError):
    """The backend asked for with :func:`ptkernels.backend` or ``PTKERNELS_BACKEND`` cannot run this call."""


class FallbackError(RuntimeError):
    """A call would have run on the reference instead of a kernel while ``PTKERNELS_STRICT=1``."""


class FallbackWarning(UserWarning):
    """A call runs on the reference instead of a kernel; issued once per operator and reason."""
