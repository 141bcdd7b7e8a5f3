"""The stacked layers on the reference, whatever backend is chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from ptkernels._backend import backend
from ptkernels.ops.packed_rnn import stack

F = TypeVar("F", bound=Callable[..., Any])


def _on_reference(function: F) -> F:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with backend("reference"):
            return function(*args, **kwargs)

    run.__doc__ = (
        f"Plain torch :func:`ptkernels.{function.__name__}`: same arguments and results, one step at a time.\n\n"
        "Differentiable any number of times in forward and reverse mode."
    )
    return run  # type: ignore[return-value]


lstm = _on_reference(stack.lstm)
gru = _on_reference(stack.gru)
rnn = _on_reference(stack.rnn)
