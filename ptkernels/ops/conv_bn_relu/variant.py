"""What makes a call another than a convolution with a normalisation over the batch, as users and operators say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

OP, TRANSPOSED_OP = "conv_bn_relu", "conv_transpose_bn_relu"
NORMS = ("batch", "instance", "group")


class Variant(NamedTuple):
    """The last arguments of both operators."""

    transposed: bool = False
    output_padding: Sequence[int] | None = None
    num_groups: int = 0
    """Groups of channels whose statistics every image has of its own, -1 for every channel; 0: there are none such."""
    pre_activation: str = "none"

    @property
    def op(self) -> str:
        """The public function that such a call is of."""
        return TRANSPOSED_OP if self.transposed else OP


PLAIN = Variant()

# From activation on, what calls of conv_bn_relu and of its backward may leave out.
_FORWARD = ("relu", 0.01, False, *PLAIN)
_BACKWARD = ("relu", 0.01, (True,) * 6, *PLAIN)


def complete_forward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All 21 arguments of ``ptkernels::conv_bn_relu``."""
    return args if len(args) == 21 else (*args, *_FORWARD[len(args) - 14 :])


def complete_backward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All 23 arguments of ``ptkernels::_conv_bn_relu_backward``."""
    return args if len(args) == 23 else (*args, *_BACKWARD[len(args) - 16 :])


def is_integer(value: Any) -> bool:
    """Whether a value is an int, if only a symbolic one; a bool is none."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def num_groups_of(op: str, norm: Any, num_groups: Any) -> int:
    """The operator's argument for a normalisation and its number of groups as they were given."""
    if not isinstance(norm, str):
        raise TypeError(f"{op}: norm: got {type(norm).__name__}, expected str")
    if norm not in NORMS:
        raise ValueError(f"{op}: norm: got {norm!r}, expected one of {', '.join(NORMS)}")
    if norm != "group":
        if num_groups is not None:
            raise ValueError(f"{op}: num_groups: got {num_groups!r}, expected None with norm={norm!r}")
        return 0 if norm == "batch" else -1
    if not is_integer(num_groups):
        raise TypeError(f"{op}: num_groups: got {num_groups!r}, expected an int with norm='group'")
    if num_groups < 1:
        raise ValueError(f"{op}: num_groups: got {num_groups}, expected at least 1")
    return num_groups  # type: ignore[no-any-return]
