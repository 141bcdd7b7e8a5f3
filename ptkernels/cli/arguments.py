"""Arguments of operators: bound by name, and read from the command line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

import torch


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, defaults filled in."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def parse_dtype(text: str) -> torch.dtype:
    """A torch dtype from its name.

    Raises:
        ValueError: torch has no such dtype.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {text!r}, expected a torch dtype such as float32")
    return dtype


def parse_shape(text: str) -> tuple[str | None, tuple[int, ...], str | None]:
    """Read ``[NAME=]N,N,...[:DTYPE]``.

    Raises:
        ValueError: a size is not a number.

    >>> parse_shape("key=1,8,2048,128:bfloat16")
    ('key', (1, 8, 2048, 128), 'bfloat16')
    >>> parse_shape("4,3")
    (None, (4, 3), None)
    """
    name, equals, rest = text.rpartition("=")
    sizes, colon, dtype = rest.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise ValueError(f"shape: got {text!r}, expected [NAME=]N,N,...[:DTYPE]") from None
    return name if equals else None, shape, dtype if colon else None


def parse_setting(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``, the value being a Python literal or true, false, none.

    Raises:
        ValueError: there is no ``=``, or the value is neither.

    >>> parse_setting("is_causal=true")
    ('is_causal', True)
    """
    name, equals, value = text.partition("=")
    words = {"true": True, "false": False, "none": None}
    try:
        if not equals:
            raise ValueError
        return name, words[value.lower()] if value.lower() in words else ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(f"set: got {text!r}, expected NAME=VALUE") from None
