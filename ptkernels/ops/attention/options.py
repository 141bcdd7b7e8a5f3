"""What a call of attention says beyond its operands, in the form and order that the operators take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNBOUNDED = -1
KEEP_ALL = 1 << 16


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax statistics: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


class Options(NamedTuple):
    """Arguments of ``ptkernels::attention`` from ``is_causal`` on."""

    is_causal: bool = False
    scale: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    relative_bias: Tensor | None = None
    mask_block_size: int = 1

    def diagonal(self, queries: int, keys: int) -> int:
        """Key that row 0 is aligned with."""
        return keys - queries if self.bottom_right else 0

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """What is given per head."""
        return self.alibi_slopes, self.sinks

    @property
    def learned(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What has a gradient."""
        return self.alibi_slopes, self.sinks, self.relative_bias

    @property
    def shared(self) -> tuple[Any, ...]:
        """What the Triton kernels take as well."""
        return (*self[:-2], self.mask_block_size)

    @property
    def packed(self) -> tuple[Any, ...]:
        """What the operator of packed sequences takes as well."""
        return self[:-1]

    @property
    def keep_below(self) -> int:
        """Of 65536 equally likely numbers, how many let a weight survive dropout."""
        return round((1.0 - self.dropout_p) * KEEP_ALL)


# Positions in the arguments of ``ptkernels::_attention_backward``: seven tensors, attn_mask, is_causal, scale, then
# output_mask, then what is left of the options.
OUTPUT_MASK = 10
_DEFAULTS: tuple[Any, ...] = (None, False, None, (True, True, True), *Options()[2:])


def complete_backward(args: Sequence[Any], filling: Any = ...) -> tuple[Any, ...]:
    """Arguments of the backward operator, which dispatch cuts after the last that is not its default, in full."""
    missing = _DEFAULTS[len(args) - 7 :]
    return (*args, *(missing if filling is ... else (filling,) * len(missing)))


def backward_options(args: Sequence[Any]) -> Options:
    """The options among the complete arguments of the backward operator."""
    return Options(args[8], args[9], *args[11:])


def backward_tail(options: Options, output_mask: Sequence[bool]) -> tuple[Any, ...]:
    """Arguments of the backward operator after ``attn_mask``."""
    return (options.is_causal, options.scale, output_mask, *options[2:])


def is_triangle(attn_mask: Any) -> bool:
    """Whether a mask is one of ``torch.nn.attention.bias``, which stand for a triangle and hold no data.

    Told by name: that module imports the whole of torch.compile.
    """
    return type(attn_mask).__name__ == "CausalBias"


def resolve(
    dtype: torch.dtype,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    window: Sequence[int | None] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    relative_bias: Tensor | None = None,
    mask_block_size: int = 1,
    *,
    draw: bool = True,
) -> tuple[Tensor | None, Options]:
    """Public arguments, checked or about to be, as the operator's mask and options.

    Dropout takes its seed from torch's default generator on the CPU, the one that ``torch.manual_seed`` sets and
    checkpointing replays, unless ``draw`` is False.
    """
    bottom_right = False
    if is_triangle(attn_mask):
        is_causal, bottom_right = True, attn_mask.variant.name == "LOWER_RIGHT"
        attn_mask = None
    left, right = (UNBOUNDED if side is None else side for side in (window or (None, None)))
    wide = compute_dtype(dtype)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu") if draw and dropout_p > 0.0 else None
    return attn_mask, Options(
        is_causal,
        scale,
        None if alibi_slopes is None else alibi_slopes.to(wide),
        None if sinks is None else sinks.to(wide),
        seed,
        left,
        right,
        bottom_right,
        float(softcap),
        float(dropout_p),
        None if relative_bias is None else relative_bias.to(wide),
        mask_block_size,
    )
