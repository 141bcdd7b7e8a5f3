"""torch's scaled_dot_product_attention, replaced while asked for."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

from ptkernels.ops.attention import attention


class patch_sdpa(contextlib.ContextDecorator):  # noqa: N801 - used as a function, like torch.no_grad
    """Let ``torch.nn.functional.scaled_dot_product_attention`` be :func:`ptkernels.attention`.

    A context manager, also usable as a decorator; contexts nest. It reaches every caller that looks the function up
    when it calls it (``F.scaled_dot_product_attention(...)``), in the whole process while the context is entered, and
    none that has imported the function itself by name. :func:`ptkernels.replace` does the same for chosen
    modules, for good. Code that ``torch.compile`` has compiled keeps what it found when it was compiled.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x = torch.randn(1, 4, 16, 8)
        >>> with ptk.patch_sdpa():
        ...     ours = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        >>> torch.equal(ours, ptk.attention(x, x, x))
        True
    """

    # Of the process: threads enter and leave in any order, and the last one out puts torch's function back.
    _lock = threading.Lock()
    _entered = 0
    _original: Any = None

    def __enter__(self) -> patch_sdpa:
        self._count(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._count(-1)

    @classmethod
    def _count(cls, change: int) -> None:
        # torch.compile traces in one thread, and knows no locks.
        with contextlib.nullcontext() if torch.compiler.is_compiling() else cls._lock:
            if cls._entered == 0:
                patch_sdpa._original = F.scaled_dot_product_attention
            patch_sdpa._entered += change
            F.scaled_dot_product_attention = attention if cls._entered else cls._original
