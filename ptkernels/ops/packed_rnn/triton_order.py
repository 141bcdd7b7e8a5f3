"""How the sequences of a call lie in its tensors, as Triton's kernels read it: on the device, without a wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ptkernels._triton.dispatch import to_device


class Order(NamedTuple):
    """Sequences by slot, longest first; tokens step after step (packed order)."""

    steps: int
    tokens: int
    first: Tensor
    """int64 ``[steps + 1]``: the token of slot 0 at each step."""
    lengths: Tensor
    """int32 ``[batch]``, by slot."""
    slots: Tensor | None
    """int64 ``[batch]``: which sequence has a slot; None where it is the slot's own number."""
    rows: Tensor | None
    """int64 ``[tokens]``: where a token is in the data as a matrix; None where it is in its own place."""


def order_of(input: Tensor, sizes: Tensor | None, sorted_indices: Tensor | None, batch: int, layout: str) -> Order:
    """Read checked lengths on the host, where they are, and send on what the kernels need."""
    device = input.device
    if layout == "packed":
        assert sizes is not None
        first = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
        running = sizes.unsqueeze(1) > torch.arange(batch)
        lengths = running.sum(0).to(torch.int32)
        slots = None if sorted_indices is None else to_device(sorted_indices, device)
        on_device = (to_device(first, device), to_device(lengths, device))
        return Order(sizes.size(0), input.size(0), *on_device, slots, None)
    if sizes is None:
        return _of_full_sequences(input, batch, layout)
    steps_apart, lengths = 1, sizes
    if layout == "varlen":
        starts, lengths = sizes[:-1], sizes.diff()
    else:
        starts = torch.arange(batch) * (input.size(1) if layout == "batch_first" else 1)
        steps_apart = 1 if layout == "batch_first" else batch
    slots = lengths.argsort(descending=True, stable=True)
    lengths, starts = lengths[slots], starts[slots]
    steps = int(lengths[0]) if batch else 0
    running = lengths > torch.arange(steps).unsqueeze(1)
    first = torch.nn.functional.pad(running.sum(1).cumsum(0), (1, 0))
    step, slot = running.nonzero().unbind(1)
    rows = starts[slot] + step * steps_apart
    parts = (first, lengths.to(torch.int32), slots, rows)
    return Order(steps, rows.size(0), *(to_device(part, device) for part in parts))


def _of_full_sequences(input: Tensor, batch: int, layout: str) -> Order:
    """Padded input without padding: everything follows from its shape, so nothing is copied from the host."""
    device = input.device
    steps = input.size(1 if layout == "batch_first" else 0)
    first = torch.arange(steps + 1, device=device) * batch
    lengths = torch.full((batch,), steps, dtype=torch.int32, device=device)
    rows = None
    if layout == "batch_first":
        rows = torch.arange(batch * steps, device=device).view(batch, steps).t().flatten()
    return Order(steps if batch else 0, steps * batch, first, lengths, None, rows)
