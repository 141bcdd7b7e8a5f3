"""The forms that sequences come in, each as one layout of the operator and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ptkernels.ops.packed_rnn.checks import check_integers, check_tensor
from ptkernels.ops.packed_rnn.layer import host_integers


@dataclass(frozen=True)
class Sequences:
    """Data as the operator takes it, and how to give results back in the form they came in."""

    data: Tensor
    sizes: Tensor | None
    sorted_indices: Tensor | None
    batch_size: Any
    layout: str
    restore: Callable[[Tensor], Any]
    unbatched: bool = False


def _none(op: str, form: str, **others: Any) -> None:
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{op}: {name}: got a tensor with {form} input, expected None")


def _packed(op: str, packed: PackedSequence, state: Any) -> Sequences:
    sizes = host_integers(packed.batch_sizes)
    assert sizes is not None
    if packed.sorted_indices is not None:
        batch: Any = packed.sorted_indices.size(0)
    elif isinstance(state, Tensor) and state.dim() == 3:
        batch = state.size(1)
    else:
        batch = int(sizes[0].item()) if sizes.numel() else 0

    def restore(data: Tensor) -> PackedSequence:
        return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)

    return Sequences(packed.data, sizes, host_integers(packed.sorted_indices), batch, "packed", restore)


def _nested(op: str, nested: Any) -> Sequences:
    if nested.layout is not torch.jagged or nested.dim() != 3:
        raise ValueError(f"{op}: input: got another nested tensor, expected a jagged one of shape [batch, *, features]")
    if nested.lengths() is not None:
        raise ValueError(f"{op}: input: got a nested tensor with holes, expected a contiguous one")
    offsets = nested.offsets()

    def restore(data: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(data, offsets)

    return Sequences(nested.values(), host_integers(offsets), None, nested.size(0), "varlen", restore)


def sequences_of(
    op: str, input: Any, state: Any, batch_first: bool, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> Sequences:
    """Recognise the form of an input.

    Raises:
        TypeError: it is none of them.
        ValueError: lengths come with a form that has its own, or a tensor has the wrong number of dimensions.
    """
    if isinstance(input, PackedSequence):
        _none(op, "packed", lengths=lengths, cu_seqlens=cu_seqlens)
        return _packed(op, input, state)
    if isinstance(input, Tensor) and input.is_nested:
        _none(op, "nested", lengths=lengths, cu_seqlens=cu_seqlens)
        return _nested(op, input)
    check_tensor(op, "input", input)
    if cu_seqlens is not None:
        _none(op, "concatenated", lengths=lengths)
        check_integers(op, "cu_seqlens", cu_seqlens)
        if input.dim() != 2:
            raise ValueError(f"{op}: input: got shape {list(input.shape)}, expected [tokens, features]")
        sizes = host_integers(cu_seqlens)
        return Sequences(input, sizes, None, max(cu_seqlens.size(0) - 1, 0), "varlen", lambda data: data)
    if input.dim() not in (2, 3):
        raise ValueError(f"{op}: input: got shape {list(input.shape)}, expected 2 (unbatched) or 3 dimensions")
    if lengths is not None:
        check_integers(op, "lengths", lengths)
    sizes = host_integers(lengths)
    if input.dim() == 2:
        _none(op, "unbatched", lengths=lengths)
        return Sequences(input.unsqueeze(1), None, None, 1, "time_first", lambda data: data.squeeze(1), unbatched=True)
    layout = "batch_first" if batch_first else "time_first"
    return Sequences(input, sizes, None, input.size(0 if batch_first else 1), layout, lambda data: data)
