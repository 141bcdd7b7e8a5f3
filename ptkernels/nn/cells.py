"""Recurrent cells that torch lacks, and a layer that runs one of them over ragged sequences: modes of one operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ptkernels.nn import torchscript
from ptkernels.ops.packed_rnn.inputs import sequences_of
from ptkernels.ops.packed_rnn.layer import as_options, run_layer
from ptkernels.ops.packed_rnn.reference import GATES, NORMALISED, PLAIN, Options, Results, has_cells

__all__ = [
    "CellLayer",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "PeepholeLSTMCell",
    "ResetBeforeGRUCell",
    "ZoneoutCell",
]

State = tuple[Tensor, ...]


class _Cell(nn.Module):
    """A cell as torch's are: ``(input, hx=None)`` to h, or to (h, c). A step of the operator, as a layer is many."""

    mode: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        rows = GATES[self.mode] * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def num_states(self) -> int:
        return 2 if has_cells(self.mode) else 1

    def reset_parameters(self) -> None:
        """Uniform within ``hidden_size ** -0.5``, as torch's cells."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in (self.weight_ih, self.weight_hh, self.bias):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is not None else ", bias=False")

    def op_params(self) -> list[Tensor]:
        """The parameters of one direction in the operator's order."""
        return [self.weight_ih, self.weight_hh, *([] if self.bias is None else [self.bias])]

    def op_options(self) -> Options:
        return PLAIN

    def op_input(self, input: Tensor) -> Tensor:
        """What the operator reads in the place of the input."""
        return input

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return _one_step(self, input, hx)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.refuse(self)


def _run(op: str, cells: Sequence[Any], data: Tensor, place: tuple[Any, ...], state: State) -> Results:
    """One layer of the operator: a direction for each cell. ``place`` is sizes, sorted indices, batch and layout."""
    sizes, sorted_indices, batch, layout = place
    inputs = [cell.op_input(data) for cell in cells] if cells[0].mode in NORMALISED else [data]
    params = [param for cell in cells for param in cell.op_params()]
    input = inputs[0] if len(inputs) == 1 else torch.cat(inputs, -1)
    args = (input, sizes, sorted_indices, list(state), params, batch, layout, cells[0].mode, len(cells) == 2)
    return run_layer(op, args, options=cells[0].op_options())


def _one_step(cell: Any, input: Tensor, hx: Any) -> Any:
    name = type(cell).__name__
    if input.dim() not in (1, 2) or input.size(-1) != cell.input_size:
        raise ValueError(f"{name}: input: got {list(input.shape)}, expected [batch, {cell.input_size}] or that of one")
    given = tuple(hx) if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)
    if given and len(given) != cell.num_states:
        raise ValueError(f"{name}: hx: got {len(given)} states, expected {cell.num_states}")
    unbatched = input.dim() == 1
    data = input[None, None] if unbatched else input[None]
    state = tuple(s[None, None] if unbatched else s[None] for s in given)
    _, *found = _run(name, [cell], data, (None, None, data.size(1), "time_first"), state)
    states = tuple(s[0, 0] if unbatched else s[0] for s in found[: cell.num_states])
    return states if cell.num_states > 1 else states[0]


class LayerNormLSTMCell(_Cell):
    """LSTM whose products and cells are normalised (Ba et al., "Layer normalization", 2016, equations 20 to 22).

    ``i, f, g, o = LN(W x) + LN(U h) + b``, ``c' = f c + i g``, ``h' = o tanh(LN(c'))``. Shapes are those of
    ``torch.nn.LSTMCell``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> h, c = ptk.nn.LayerNormLSTMCell(8, 16)(torch.randn(3, 8))
        >>> h.shape
        torch.Size([3, 16])
    """

    mode = "layer_norm_lstm"

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **factory)
        self.norm_ih, self.norm_hh = (nn.LayerNorm(4 * hidden_size, eps, **factory) for _ in range(2))
        self.norm_c = nn.LayerNorm(hidden_size, eps, **factory)

    def op_input(self, input: Tensor) -> Tensor:
        normal: Tensor = self.norm_ih(F.linear(input, self.weight_ih))
        return normal if self.bias is None else normal + self.bias

    def op_params(self) -> list[Tensor]:
        return [self.weight_hh, *(torch.stack([norm.weight, norm.bias]) for norm in (self.norm_hh, self.norm_c))]

    def op_options(self) -> Options:
        return Options(self.norm_hh.eps)


class LayerNormGRUCell(_Cell):
    """GRU whose products are normalised (Ba et al., "Layer normalization", 2016).

    ``r, z = LN(W x) + LN(U h) + b``, ``n = tanh(LN(W_n x) + b_n + r LN(U_n h))``, ``h' = (1 - z) n + z h``. Shapes are
    those of ``torch.nn.GRUCell``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.nn.LayerNormGRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    mode = "layer_norm_gru"

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **factory)
        self.norm_ih, self.norm_hh = (nn.LayerNorm(2 * hidden_size, eps, **factory) for _ in range(2))
        self.norm_in, self.norm_hn = (nn.LayerNorm(hidden_size, eps, **factory) for _ in range(2))

    def op_input(self, input: Tensor) -> Tensor:
        shared, own = F.linear(input, self.weight_ih).split([2 * self.hidden_size, self.hidden_size], -1)
        normal = torch.cat([self.norm_ih(shared), self.norm_in(own)], -1)
        return normal if self.bias is None else normal + self.bias

    def op_params(self) -> list[Tensor]:
        norms = (self.norm_hh, self.norm_hn)
        both = torch.cat([norm.weight for norm in norms]), torch.cat([norm.bias for norm in norms])
        return [self.weight_hh, torch.stack(both)]

    def op_options(self) -> Options:
        return Options(self.norm_hh.eps)


class PeepholeLSTMCell(_Cell):
    """LSTM whose gates see the cell (Gers and Schmidhuber, "Recurrent nets that time and count", 2000).

    ``i, f = sigmoid(W x + U h + b + p c)``, ``c' = f c + i g``, ``o = sigmoid(W_o x + U_o h + b_o + p_o c')``;
    ``weight_peephole`` is ``[3, hidden]``, of i, f and o. Shapes are those of ``torch.nn.LSTMCell``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> h, c = ptk.nn.PeepholeLSTMCell(8, 16)(torch.randn(3, 8))
        >>> c.shape
        torch.Size([3, 16])
    """

    mode = "peephole_lstm"

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **factory)
        bound = 1 / math.sqrt(hidden_size)
        self.weight_peephole = nn.Parameter(torch.empty(3, hidden_size, **factory).uniform_(-bound, bound))

    def op_params(self) -> list[Tensor]:
        return [*super().op_params(), self.weight_peephole]


class ResetBeforeGRUCell(_Cell):
    """GRU as first published: the reset gate multiplies h before the product (Cho et al., 2014).

    ``n = tanh(W_n x + b_n + U_n (r h))``, where ``torch.nn.GRUCell`` has ``r (U_n h)``; ``h' = (1 - z) n + z h``.
    Shapes are those of ``torch.nn.GRUCell``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.nn.ResetBeforeGRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    mode = "reset_before_gru"


class ZoneoutCell(nn.Module):
    """A cell some of whose units keep their value from one step to the next (Krueger et al., "Zoneout", 2017).

    In training each unit keeps its state with the probability given, drawn from torch's generator; in evaluation it
    takes the mean of both.

    Args:
        cell: of this module.
        probability: for h.
        cell_probability: for c, where the cell has one. Default: that for h.

    Example:
        >>> import torch, ptkernels as ptk
        >>> cell = ptk.nn.ZoneoutCell(ptk.nn.PeepholeLSTMCell(8, 16), 0.1, 0.5)
        >>> h, c = cell(torch.randn(3, 8))
        >>> h.shape
        torch.Size([3, 16])
    """

    def __init__(self, cell: _Cell, probability: float, cell_probability: float | None = None) -> None:
        super().__init__()
        for name, value in (("probability", probability), ("cell_probability", cell_probability)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"ZoneoutCell: {name}: got {value!r}, expected a probability from 0 to 1")
        self.cell = cell
        self.probabilities = (probability, probability if cell_probability is None else cell_probability)
        self.input_size, self.hidden_size, self.num_states = cell.input_size, cell.hidden_size, cell.num_states
        self.mode = cell.mode

    def extra_repr(self) -> str:
        return f"probabilities={self.probabilities}"

    def op_params(self) -> list[Tensor]:
        return self.cell.op_params()

    def op_input(self, input: Tensor) -> Tensor:
        return self.cell.op_input(input)

    def op_options(self) -> Options:
        return as_options(self.cell.op_options().eps, self.probabilities, self.training)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return _one_step(self, input, hx)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.refuse(self)


class CellLayer(nn.Module):
    """One recurrent layer of any cell of this module, over ragged sequences in every form.

    Args:
        cell: runs from the first token to the last.
        reverse_cell: runs from the last to the first; its outputs stand behind the others'. Of the same kind. Default:
            none.
        batch_first: where the batch of padded inputs is.

    Shape:
        Call with ``(input, hx=None, *, lengths=None, cu_seqlens=None)``; returns ``(output, h_n)``, or
        ``(output, (h_n, c_n))`` for cells with two states. Forms of input and shapes are those of
        :func:`ptkernels.lstm` with one layer. Cost and numerics are those of :func:`ptkernels.packed_rnn`; what is
        normalised of the input's product is, before the recurrence, by torch.

    Raises:
        TypeError: the input has none of those forms.
        ValueError: shapes or lengths do not fit, or the cells are of two kinds.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = ptk.nn.CellLayer(ptk.nn.LayerNormLSTMCell(8, 16), batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 8), lengths=torch.tensor([5, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    def __init__(self, cell: Any, reverse_cell: Any = None, batch_first: bool = False) -> None:
        super().__init__()
        if reverse_cell is not None:
            if (reverse_cell.hidden_size, reverse_cell.num_states) != (cell.hidden_size, cell.num_states):
                raise ValueError("CellLayer: reverse_cell: got other states than the cell's, expected the same")
            kinds = [(c.mode, c.op_options().eps, getattr(c, "probabilities", None)) for c in (cell, reverse_cell)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"CellLayer: reverse_cell: got the kind {kinds[1]}, expected the cell's, {kinds[0]}")
        self.cell, self.reverse_cell, self.batch_first = cell, reverse_cell, batch_first

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Any, Any]:
        cells = [cell for cell in (self.cell, self.reverse_cell) if cell is not None]
        given = tuple(hx) if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)
        sequences = sequences_of("CellLayer", input, given[0] if given else None, self.batch_first, lengths, cu_seqlens)
        data, batch = sequences.data, sequences.batch_size
        if data.size(-1) != self.cell.input_size:
            raise ValueError(f"CellLayer: input: got {data.size(-1)} features, expected {self.cell.input_size}")
        shape = (len(cells), batch, self.cell.hidden_size)
        given = tuple(s.unsqueeze(1) for s in given) if sequences.unbatched else given
        if given and [tuple(s.shape) for s in given] != [shape] * self.cell.num_states:
            raise ValueError(
                f"CellLayer: hx: got shapes {[list(s.shape) for s in given]}, expected {self.cell.num_states} times "
                f"{list(shape)}"
            )
        place = (sequences.sizes, sequences.sorted_indices, batch, sequences.layout)
        padded = sequences.layout in ("time_first", "batch_first") and sequences.sizes is not None
        if padded and self.cell.mode in NORMALISED:
            output, *final = self._without_padding(cells, data, place, given)
        else:
            output, *final = _run("CellLayer", cells, data, place, given)
        states = tuple(s.squeeze(1) if sequences.unbatched else s for s in final[: self.cell.num_states])
        return sequences.restore(output), states if len(states) > 1 else states[0]

    def _without_padding(self, cells: list[Any], data: Tensor, place: tuple[Any, ...], state: State) -> Results:
        """The products that stand for the input are taken of tokens only."""
        sizes, _, batch, layout = place
        lead = data.shape[:-1]
        sequence, step = (torch.arange(lead[0 if layout == "time_first" else 1]) < sizes[:, None]).nonzero().unbind(1)
        rows = (step * lead[1] + sequence if layout == "time_first" else sequence * lead[1] + step).to(data.device)
        cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        tokens = data.flatten(0, 1).index_select(0, rows)
        output, h_n, c_n = _run("CellLayer", cells, tokens, (cu_seqlens, None, batch, "varlen"), state)
        padded = output.new_zeros(lead.numel(), output.size(1)).index_copy(0, rows, output)
        return padded.unflatten(0, lead), h_n, c_n

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.refuse(self)
