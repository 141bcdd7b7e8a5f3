"""Autograd by hand: what every operator's registration is made of.

``torch.library.register_autograd`` generates a kernel that refuses every functorch transform, drops forward-mode
tangents of inputs that do not require grad, and adds 9 us to a call. An operator has a :class:`Function` for
itself and one for its backward instead, and registers Autograd kernels that :func:`apply` them where a derivative is
asked for and go :func:`below_autograd` where none is.

:class:`Function` is the class under ``torch.autograd.Function``: applied, it records itself at the current functorch
level only, as built-in operators do, where the other would refuse or take the transforms into its own hands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as Function

__all__ = ["Function", "apply", "below_autograd", "forward_of_function", "has_tangent", "in_transform"]


def in_transform() -> bool:
    """Whether a functorch transform or a forward-mode level surrounds the call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation goes through any of the tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def below_autograd(op: Callable[..., Any], keyset: Any, *args: Any) -> Any:
    """Go on below autograd: from ``keyset`` within a dispatch, from the top where it is None."""
    with torch._C._AutoDispatchBelowAutograd():
        if keyset is None:
            return op(*args)
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)  # type: ignore[attr-defined]


def forward_of_function(op: Callable[..., Any], keyset: Any, *args: Any) -> Any:
    """What a Function's forward calls: the operator, seen by the outer levels of a nested transform."""
    if not torch._C._are_functorch_transforms_active():
        return below_autograd(op, keyset, *args)
    # A Function's forward runs with gradients off, which is right for the level it differentiates and wrong for the
    # outer levels of a nested transform, whose turn comes below.
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return below_autograd(op, keyset, *args)


def apply(function: type[Function], *args: Any) -> Any:
    """Apply a Function at the current functorch level."""
    outer = torch._C._functorch.get_single_level_autograd_function_allowed()
    torch._C._functorch.set_single_level_autograd_function_allowed(True)
    try:
        return function.apply(*args)  # type: ignore[attr-defined]
    finally:
        torch._C._functorch.set_single_level_autograd_function_allowed(outer)
