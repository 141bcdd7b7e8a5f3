"""States that begin anew inside a sequence: each stretch between two resets is a sequence of its own.

So a reset costs nothing in the kernels, stretches run side by side, and nothing crosses a reset in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.packed_rnn.inputs import Sequences
from ptkernels.ops.packed_rnn.reference import order_of


@dataclass(frozen=True)
class Pieces:
    """Stretches as concatenated sequences, and where the states of the sequences they come from belong."""

    sequences: Sequences
    unbatched: bool
    batch: int
    cut_at_start: Tensor
    """Per non-empty sequence, whether its first token is marked."""
    owners: Tensor
    """The non-empty sequences."""
    first: Tensor
    """The first piece of each of them."""
    last: Tensor

    def states_of_pieces(self, state: Sequence[Tensor], directions: int) -> list[Tensor]:
        """States before the first token of every piece: of the sequence, or zeros."""
        found = []
        for tensor in state:
            rows = tensor.unflatten(0, (-1, directions)).unbind(1)
            count = self.sequences.batch_size
            keep = ~self.cut_at_start
            forward = rows[0].new_zeros(rows[0].size(0), count, tensor.size(2))
            parts = [forward.index_copy(1, self.first[keep], rows[0].index_select(1, self.owners[keep]))]
            if directions == 2:
                parts.append(forward.index_copy(1, self.last, rows[1].index_select(1, self.owners)))
            found.append(torch.stack(parts, 1).flatten(0, 1))
        return found

    def states_of_sequences(self, final: Tensor, state: Tensor | None, directions: int) -> Tensor:
        """States after the last token of every sequence, the first one for the reverse direction."""
        if final.dim() == 1:
            return final
        before = final.new_zeros(final.size(0), self.batch, final.size(2)) if state is None else state
        old, new = (tensor.unflatten(0, (-1, directions)).unbind(1) for tensor in (before, final))
        parts = [
            old[d].index_copy(1, self.owners, new[d].index_select(1, end))
            for d, end in zip(range(directions), (self.last, self.first), strict=False)
        ]
        found = torch.stack(parts, 1).flatten(0, 1)
        return found.squeeze(1) if self.unbatched else found


def _by_sequence(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Rows of the tokens, sequence after sequence, in the data as a matrix; and the sequence of each."""
    batch = sequences.batch_size
    order = order_of(sequences.data, sequences.sizes, sequences.sorted_indices, batch, sequences.layout)
    running = torch.tensor(order.batch_sizes, dtype=torch.int64)
    step = torch.arange(len(running)).repeat_interleave(running)
    slot = torch.arange(len(step)) - (running.cumsum(0) - running).repeat_interleave(running)
    owner = order.slots.cpu()[slot]
    rank = (owner * max(len(running), 1) + step).argsort()
    return order.rows[rank.to(order.rows.device)], owner[rank]


def _check(op: str, sequences: Sequences, resets: Any) -> None:
    if not isinstance(resets, Tensor):
        raise TypeError(f"{op}: resets: got {type(resets).__name__}, expected torch.Tensor")
    if resets.dtype != torch.bool:
        raise TypeError(f"{op}: resets: got dtype {str(resets.dtype).removeprefix('torch.')}, expected bool")
    expected = list(sequences.data.shape[:-1])
    shape = list(resets.shape)
    if shape + [1] * sequences.unbatched != expected:
        expected = expected[: len(expected) - sequences.unbatched]
        raise ValueError(f"{op}: resets: got shape {shape}, expected {expected}, one for each token")


def split_at_resets(op: str, sequences: Sequences, resets: Tensor) -> Pieces:
    """Cut sequences before the tokens marked.

    Raises:
        TypeError: the resets are no tensor of booleans.
        ValueError: their shape is not that of the data without its features.
    """
    _check(op, sequences, resets)
    rows, owner = _by_sequence(sequences)
    marked = resets.flatten().cpu()[rows.cpu()]
    begins = torch.ones_like(marked)
    begins[1:] = owner[1:] != owner[:-1]
    starts = (begins | marked).nonzero().flatten()
    owner_of_piece = owner[starts]
    is_first = torch.ones_like(owner_of_piece, dtype=torch.bool)
    is_first[1:] = owner_of_piece[1:] != owner_of_piece[:-1]
    first = is_first.nonzero().flatten()
    last = torch.cat([first[1:], torch.tensor([len(starts)])])[: len(first)] - 1
    flat = sequences.data.flatten(0, -2)
    device = flat.device

    def restore(data: Tensor) -> Any:
        laid_out = data.new_zeros(flat.size(0), data.size(1)).index_copy(0, rows, data)
        return sequences.restore(laid_out.unflatten(0, sequences.data.shape[:-1]))

    cu_seqlens = torch.cat([starts, torch.tensor([len(owner)])])
    pieces = Sequences(flat.index_select(0, rows), cu_seqlens, None, len(starts), "varlen", restore)
    places = (owner_of_piece[first], first, last)
    return Pieces(
        pieces,
        sequences.unbatched,
        sequences.batch_size,
        marked[starts[first]].to(device),
        *(place.to(device) for place in places),
    )
