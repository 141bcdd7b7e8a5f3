"""Recurrent cells that torch lacks, and a layer that runs any cell over ragged sequences.

They are plain torch, one step after the other: the fused kernels cover the cells of :mod:`ptkernels.nn.rnn` only. What
they share with those is that padding is never computed, that sequences come in every form, and that the product of the
inputs is taken for all tokens at once.
"""

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
from ptkernels.ops.packed_rnn.reference import order_of

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
    """A cell in two parts: the product of its input, which :class:`CellLayer` takes for all steps at once, and a step.

    Called by itself it is a cell as torch's are: ``(input, hx=None)`` to h, or to (h, c).
    """

    gates: int
    num_states: int

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
        rows = self.gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, device=device, dtype=dtype))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ``hidden_size ** -0.5``, as torch's cells."""
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in (self.weight_ih, self.weight_hh, self.bias):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}" + ("" if self.bias is not None else ", bias=False")

    def input_product(self, input: Tensor) -> Tensor:
        """``W x + b``, any number of rows."""
        return F.linear(input, self.weight_ih, self.bias)

    def step(self, product: Tensor, state: State) -> State:
        """States after a step, from the product of its input and the states before."""
        raise NotImplementedError

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if hx is None:
            hx = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * self.num_states
        state = self.step(self.input_product(input), tuple(hx) if isinstance(hx, (tuple, list)) else (hx,))
        return state if self.num_states > 1 else state[0]

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.refuse(self)


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

    gates, num_states = 4, 2

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **factory)
        self.norm_ih, self.norm_hh = (nn.LayerNorm(4 * hidden_size, eps, **factory) for _ in range(2))
        self.norm_c = nn.LayerNorm(hidden_size, eps, **factory)

    def input_product(self, input: Tensor) -> Tensor:
        normal: Tensor = self.norm_ih(F.linear(input, self.weight_ih))
        return normal if self.bias is None else normal + self.bias

    def step(self, product: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = (product + self.norm_hh(F.linear(h, self.weight_hh))).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * self.norm_c(c).tanh(), c


class LayerNormGRUCell(_Cell):
    """GRU whose products are normalised (Ba et al., "Layer normalization", 2016).

    ``r, z = LN(W x) + LN(U h) + b``, ``n = tanh(LN(W_n x) + b_n + r LN(U_n h))``, ``h' = (1 - z) n + z h``. Shapes are
    those of ``torch.nn.GRUCell``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.nn.LayerNormGRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    gates, num_states = 3, 1

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, eps: float = 1e-5, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **factory)
        self.norm_ih, self.norm_hh = (nn.LayerNorm(2 * hidden_size, eps, **factory) for _ in range(2))
        self.norm_in, self.norm_hn = (nn.LayerNorm(hidden_size, eps, **factory) for _ in range(2))

    def _normalised(self, product: Tensor, gates: nn.Module, candidate: nn.Module) -> Tensor:
        shared, own = product.split([2 * self.hidden_size, self.hidden_size], -1)
        return torch.cat([gates(shared), candidate(own)], -1)

    def input_product(self, input: Tensor) -> Tensor:
        normal = self._normalised(F.linear(input, self.weight_ih), self.norm_ih, self.norm_in)
        return normal if self.bias is None else normal + self.bias

    def step(self, product: Tensor, state: State) -> State:
        (h,) = state
        r, z, n = product.chunk(3, -1)
        hr, hz, hn = self._normalised(F.linear(h, self.weight_hh), self.norm_hh, self.norm_hn).chunk(3, -1)
        z = (z + hz).sigmoid()
        return ((1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * h,)


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

    gates, num_states = 4, 2

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, **factory: Any) -> None:
        super().__init__(input_size, hidden_size, bias, **factory)
        bound = 1 / math.sqrt(hidden_size)
        self.weight_peephole = nn.Parameter(torch.empty(3, hidden_size, **factory).uniform_(-bound, bound))

    def step(self, product: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = (product + F.linear(h, self.weight_hh)).chunk(4, -1)
        of_i, of_f, of_o = self.weight_peephole
        c = (f + of_f * c).sigmoid() * c + (i + of_i * c).sigmoid() * g.tanh()
        return (o + of_o * c).sigmoid() * c.tanh(), c


class ResetBeforeGRUCell(_Cell):
    """GRU as first published: the reset gate multiplies h before the product (Cho et al., 2014).

    ``n = tanh(W_n x + b_n + U_n (r h))``, where ``torch.nn.GRUCell`` has ``r (U_n h)``; ``h' = (1 - z) n + z h``.
    Shapes are those of ``torch.nn.GRUCell``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.nn.ResetBeforeGRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    gates, num_states = 3, 1

    def step(self, product: Tensor, state: State) -> State:
        (h,) = state
        shared, candidate = self.weight_hh.split([2 * self.hidden_size, self.hidden_size])
        r, z, n = product.chunk(3, -1)
        hr, hz = F.linear(h, shared).chunk(2, -1)
        z = (z + hz).sigmoid()
        return ((1 - z) * (n + F.linear((r + hr).sigmoid() * h, candidate)).tanh() + z * h,)


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

    def extra_repr(self) -> str:
        return f"probabilities={self.probabilities}"

    def input_product(self, input: Tensor) -> Tensor:
        return self.cell.input_product(input)

    def step(self, product: Tensor, state: State) -> State:
        return tuple(
            torch.where(torch.rand_like(old) < p, old, new) if self.training else torch.lerp(new, old, p)
            for old, new, p in zip(state, self.cell.step(product, state), self.probabilities, strict=False)
        )

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return _Cell.forward(self, input, hx)  # type: ignore[arg-type]

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.refuse(self)


class CellLayer(nn.Module):
    """One recurrent layer of any cell of this module, over ragged sequences in every form.

    Args:
        cell: runs from the first token to the last.
        reverse_cell: runs from the last to the first; its outputs stand behind the others'. Default: none.
        batch_first: where the batch of padded inputs is.

    Shape:
        Call with ``(input, hx=None, *, lengths=None, cu_seqlens=None)``; returns ``(output, h_n)``, or
        ``(output, (h_n, c_n))`` for cells with two states. Forms of input and shapes are those of
        :func:`ptkernels.lstm` with one layer. Every step is some operators of torch: there is no kernel.

    Raises:
        TypeError: the input has none of those forms.
        ValueError: shapes or lengths do not fit.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = ptk.nn.CellLayer(ptk.nn.LayerNormLSTMCell(8, 16), batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 8), lengths=torch.tensor([5, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 16]), torch.Size([1, 3, 16]))
    """

    def __init__(self, cell: Any, reverse_cell: Any = None, batch_first: bool = False) -> None:
        super().__init__()
        if reverse_cell is not None and (reverse_cell.hidden_size, reverse_cell.num_states) != (
            cell.hidden_size,
            cell.num_states,
        ):
            raise ValueError("CellLayer: reverse_cell: got other states than the cell's, expected the same")
        self.cell, self.reverse_cell, self.batch_first = cell, reverse_cell, batch_first

    def _run(self, cell: Any, x: Sequence[Tensor], state: State, reverse: bool) -> tuple[Tensor, State]:
        outputs = []
        for rows in reversed(x) if reverse else x:
            running = rows.size(0)
            new = cell.step(rows, tuple(s[:running] for s in state))
            outputs.append(new[0])
            state = tuple(torch.cat([n, s[running:]]) for n, s in zip(new, state, strict=True))
        return torch.cat(outputs[::-1] if reverse else outputs), state

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
        order = order_of(data, sequences.sizes, sequences.sorted_indices, batch, sequences.layout)
        flat = data.flatten(0, -2)
        rows = flat.index_select(0, order.rows)
        found = []
        for index, cell in enumerate(cells):
            state = tuple(s[index].index_select(0, order.slots) for s in given)
            state = state or (data.new_zeros(batch, cell.hidden_size),) * cell.num_states
            if order.batch_sizes:
                found.append(self._run(cell, cell.input_product(rows).split(order.batch_sizes), state, index == 1))
            else:
                found.append((rows.new_zeros(0, cell.hidden_size), state))
        output = torch.cat([out for out, _ in found], -1)
        output = output.new_zeros(flat.size(0), output.size(1)).index_copy(0, order.rows, output)
        unsorted = order.slots.argsort()
        final = [torch.stack(own).index_select(1, unsorted) for own in zip(*(state for _, state in found), strict=True)]
        final = [s.squeeze(1) for s in final] if sequences.unbatched else final
        restored = sequences.restore(output.unflatten(0, data.shape[:-1]))
        return restored, tuple(final) if len(final) > 1 else final[0]

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.refuse(self)
