"""Launching the Triton kernels of cells whose step is more than one product, step by step.

The device code, with its equations, layout and tiling, is in ``triton_cell_kernels`` and
``triton_cell_backward_kernels``. It serves the cells that torch lacks, any with zoneout, and those whose cells of every
token are wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton.dispatch import Launcher, to_device
from ptkernels.ops.packed_rnn import triton_cell_backward_kernels as backward_kernels
from ptkernels.ops.packed_rnn import triton_cell_kernels as kernels
from ptkernels.ops.packed_rnn import triton_kernels
from ptkernels.ops.packed_rnn.reference import NORMALISED, Options, has_cells, param_names
from ptkernels.ops.packed_rnn.register import saved_shapes

if TYPE_CHECKING:
    from ptkernels.ops.packed_rnn.triton import _Layer

MODES = {
    "lstm": triton_kernels.LSTM.value,
    "gru": triton_kernels.GRU.value,
    "peephole_lstm": kernels.PEEPHOLE_LSTM.value,
    "reset_before_gru": kernels.RESET_BEFORE_GRU.value,
    "layer_norm_lstm": kernels.LAYER_NORM_LSTM.value,
    "layer_norm_gru": kernels.LAYER_NORM_GRU.value,
}
# Gradients of a unit that the backward keeps: of the gates' input terms, then of the recurrent ones that differ.
STORED = {
    "lstm": 4,
    "gru": 4,
    "tanh": 1,
    "relu": 1,
    "peephole_lstm": 4,
    "reset_before_gru": 3,
    "layer_norm_lstm": 8,
    "layer_norm_gru": 6,
}
# Vectors of units that a mode has besides its matrices and biases.
VECTORS = {"peephole_lstm": 3, "layer_norm_lstm": 10, "layer_norm_gru": 6}


def covers(mode: str, options: Options, all_cells: bool) -> bool:
    """Whether a call goes to these kernels."""
    return mode in VECTORS or mode == "reset_before_gru" or all_cells or bool(options.zoneout or options.zoneout_cell)


class _Cells:
    """What forward and backward share: parameters by name, and what every launch gets."""

    def __init__(self, a: _Layer, options: Options, all_cells: bool, wrap: Launcher) -> None:
        self.a, self.wrap, self.all_cells = a, wrap, all_cells
        self.names = param_names(a.mode, a.each)
        self.u = self.stacked("weight_hh").view(a.directions, -1, a.hidden)
        self.vectors = [self.stacked(name) for name in ("weight_peephole", "norm_hidden", "norm_cell")]
        self.rows = a.order.first if a.order.rows is None else a.order.rows
        self.place = (a.order.first, a.order.lengths, self.rows)
        width = _triton.power_of_2(a.hidden, 1)
        # 32 bytes of a tile for a thread: a step of a normalised cell has a dozen tiles alive.
        self.block_b = min(max(1024 // width, 1), _triton.power_of_2(a.batch, 1))
        self.options = {
            "HIDDEN": a.hidden, "HAS_ROWS": a.order.rows is not None, "BLOCK_B": self.block_b, "BLOCK_H": width,
            "num_warps": min(max(self.block_b * width * a.wide.itemsize // 1024, 1), 16),
        }  # fmt: skip
        shares = options[1:3]
        self.zoneout = (
            *(_triton.number(float(share), a.input) for share in shares),
            *(round(share * 2**24) for share in shares),
        )
        kind = kernels.NOTHING if not any(shares) else kernels.SHARES if options.seed is None else kernels.DRAWN
        saved_gates, _ = saved_shapes(a.input, a.mode, a.directions, a.hidden)
        self.switches = {
            "MODE": MODES[a.mode], "SAVED": saved_gates[2], "ZONEOUT": kind.value,
            "HAS_SLOTS": a.order.slots is not None,
        }  # fmt: skip
        seed = self.rows if options.seed is None else to_device(options.seed, a.input.device)
        self.draws = (seed, self.rows if a.order.slots is None else a.order.slots)

    def stacked(self, name: str) -> Tensor:
        """One parameter of both directions, or U in the place of one that the mode does not have."""
        return self.a.stacked(self.names.index(name if name in self.names else "weight_hh"))

    @property
    def blocks(self) -> int:
        return int(triton.cdiv(self.a.batch, self.block_b))

    def launch(self, kernel: Any, args: tuple[Any, ...], times: tuple[int, int], switches: dict[str, Any]) -> None:
        """Run a kernel at a step of each direction."""
        self.wrap(kernel)[(self.blocks, self.a.directions)](*args, *times, **switches, **self.options)

    def product(self, rows: Tensor, weight: Tensor, out: Tensor, times: tuple[int, int], add: bool = False) -> None:
        """``out = rows @ weight^T``, or that added to it, of ``[directions, batch, ..]`` with stride 1 in the last."""
        a, tile = self.a, self.a.step_tile()
        grid = (triton.cdiv(a.batch, tile.b), triton.cdiv(out.size(-1), tile.n), a.directions)
        self.wrap(kernels.product)[grid](
            rows, weight, out, a.order.lengths, a.batch, out.size(-1), rows.size(-1), *rows.stride()[:2],
            *weight.stride(), *out.stride()[:2], *times, ADD=add, PRECISION=a.precision,
            BLOCK_B=tile.b, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def biases(self) -> tuple[Tensor, Tensor]:
        """What is added to each gate, ``[directions, gates, hidden]``, and to a gru's recurrent n; as sums."""
        a = self.a
        none = a.input.new_zeros(a.directions, a.gates, a.hidden, dtype=a.wide)
        of_input, of_state = (
            self.stacked(name).to(a.wide).view_as(none) if name in self.names else none
            for name in ("bias_ih", "bias_hh")
        )
        total = of_input + of_state
        if a.mode == "gru":
            total[:, 2] = of_input[:, 2]
        return total, of_state[:, -1].contiguous()


def forward(
    a: _Layer, save: bool, all_cells: bool, options: Options, wrap: Launcher
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``output, h_n, c_n, gates, cells`` of a call."""
    make = a.input.new_zeros if a.has_padding else a.input.new_empty
    output = make((*a.input.shape[:-1], a.directions * a.hidden))
    of_cells = make(output.shape) if all_cells else output
    h, c = a.states()
    shapes = saved_shapes(a.input, a.mode, a.directions, a.hidden) if save else ([0], [0])
    saved = (make(shapes[0]), make(shapes[1], dtype=a.wide))
    if a.order.tokens > 0:
        _steps(_Cells(a, options, all_cells, wrap), options.eps, h, c, (output, of_cells), saved, save)
    c_n = a.by_sequence(c, a.dtype) if has_cells(a.mode) else a.input.new_empty(0)
    output = torch.cat([output, of_cells], -1) if all_cells else output
    return output, a.by_sequence(h, a.dtype), c_n, *saved


def _steps(
    f: _Cells,
    eps: float,
    h: Tensor,
    c: Tensor,
    outputs: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    save: bool,
) -> None:
    a = f.a
    # A normalised cell has products in the place of an input.
    products = a.packed_input() if a.mode in NORMALISED else a.packed_input() @ torch.cat(a.of_params(0)).t()
    bias, bias_n = f.biases()
    sums = h.new_empty(a.directions, a.batch, a.gates * a.hidden, dtype=a.wide)
    reset_h, shared = torch.empty_like(h), 2 * a.hidden
    ends = (*saved, a.batch, a.saved_rows, a.directions, _triton.number(eps, a.input), *f.zoneout)
    switches = {"SAVE": save, **f.switches}
    for step in range(a.order.steps):
        times = (step, a.order.steps - 1 - step)
        if a.mode == "reset_before_gru":
            f.product(h, f.u[:, :shared], sums[..., :shared], times)
            sizes = (saved[0], a.batch, a.saved_rows, a.directions)
            f.launch(kernels.reset, (products, sums, bias, h, reset_h, *f.place, *sizes), times, {"SAVE": save})
            f.product(reset_h, f.u[:, shared:], sums[..., shared:], times)
        else:
            f.product(h, f.u, sums, times)
        if has_cells(a.mode):
            args = (products, sums, bias, h, c, *f.vectors, *f.draws, *f.place, *outputs, *ends)
            f.launch(kernels.lstm_cells, args, times, {**switches, "ALL_CELLS": f.all_cells})
        else:
            args = (products, sums, bias, bias_n, h, f.vectors[1], *f.draws, *f.place, outputs[0], *ends)
            f.launch(kernels.gru_cells, args, times, switches)


def backward(
    a: _Layer,
    grad_output: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    before: Tensor,
    saved: tuple[Tensor, Tensor],
    all_cells: bool,
    options: Options,
    wrap: Launcher,
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates, ``[directions, tokens, .., hidden]``, and of the vectors, ``[directions, .., hidden]``.

    ``before`` is h before every token. ``dh`` and ``dc`` come as the gradients of the last states by slot, and leave as
    those of the first.
    """
    f = _Cells(a, options, all_cells, wrap)
    gates, cells = saved
    dg = a.input.new_empty(a.directions, a.order.tokens, STORED[a.mode], a.hidden)
    ds = a.input.new_empty(a.directions, a.batch, a.gates * a.hidden)
    vectors = VECTORS.get(a.mode, 0)
    own = dh.new_zeros(a.directions, f.blocks, vectors, a.hidden)
    features = a.directions * a.hidden
    grads = [dg, dg] if grad_output is None else [part.contiguous() for part in grad_output.split(features, -1)]
    _, c_start = a.states()
    sizes = (a.batch, a.order.tokens, a.saved_rows, a.directions)
    of_reset, shared, to_h = torch.empty_like(dh), 2 * a.hidden, f.u.transpose(1, 2)
    switches = {**f.switches, "STORED": STORED[a.mode], "VECTORS": vectors, "HAS_GRAD": grad_output is not None}
    for step in range(a.order.steps):
        times = (a.order.steps - 1 - step, step)
        if has_cells(a.mode):
            args = (
                gates, cells, c_start, *f.vectors, *f.draws, *f.place, grads[0], grads[-1], dh, dc, dg, ds, own, *sizes,
                *f.zoneout,
            )  # fmt: skip
            of_cells = {"ALL_CELLS": all_cells and grad_output is not None}
            f.launch(backward_kernels.lstm_cells_backward, args, times, {**switches, **of_cells})
        else:
            args = (
                gates, cells, before, f.vectors[1], *f.draws, *f.place, grads[0], dh, dg, ds, own, *sizes, *f.zoneout
            )  # fmt: skip
            f.launch(backward_kernels.gru_cells_backward, args, times, switches)
        if a.mode == "reset_before_gru":
            f.product(ds[..., shared:], to_h[..., shared:], of_reset, times)
            args = (gates, before, of_reset, *f.place, dh, dg, ds, *sizes)
            f.launch(backward_kernels.reset_backward, args, times, {})
            f.product(ds[..., :shared], to_h[..., :shared], dh, times, add=True)
        else:
            f.product(ds, to_h, dh, times, add=True)
    return dg, own.sum(1)
