"""torch's scaled_dot_product_attention, replaced while asked for."""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Any

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

    def __init__(self) -> None:
        self._outer: list[Any] = []

    def __enter__(self) -> patch_sdpa:
        self._outer.append(F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = attention
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        F.scaled_dot_product_attention = self._outer.pop()
