"""Launching the recurrent layers' Triton kernels, and the products over all tokens around them.

The device code, with its equations, layout and tiling, is in ``triton_kernels``; cells that need more of a step than
one product are launched in ``triton_cells``. :func:`rnn` and :func:`rnn_backward`
are ``ptkernels::packed_rnn`` and ``ptkernels::_packed_rnn_backward`` on a GPU, and save the same tensors as the CPU
kernels. Lengths are on the host, so nothing waits for the GPU; full sequences copy nothing from there, and a call can
be captured in a CUDA graph, as can one whose lengths are in pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton import tuning
from ptkernels._triton.dispatch import Launcher, identity
from ptkernels.ops.packed_rnn import triton_cells
from ptkernels.ops.packed_rnn import triton_kernels as kernels
from ptkernels.ops.packed_rnn.reference import GATES, NORMALISED, Options, param_names
from ptkernels.ops.packed_rnn.triton_order import Order, order_of

MODES = {"lstm": kernels.LSTM.value, "gru": kernels.GRU.value, "tanh": kernels.TANH.value, "relu": kernels.RELU.value}


# Where the gradients of a cell's own vectors are among those that its backward adds up.
OWN = {"weight_peephole": slice(0, 3), "norm_hidden": slice(0, 8), "norm_cell": slice(8, 10)}
# In 32 bits.
LARGEST_OFFSET = 2**31 - 1


class Tile(NamedTuple):
    """Sequences, units, depth of the sum, warps, stages. A persistent program owns all units."""

    b: int
    n: int
    k: int
    warps: int
    stages: int


def persistent_tiles(dtype: torch.dtype, hidden: int, arch: int) -> list[Tile]:
    """Tiles worth trying for programs that keep all of U, best guess first; none where it does not fit beside them."""
    units = _triton.power_of_2(hidden)
    # Products in IEEE float32 are made of registers alone, which cannot hold U as well; nor can they in float64.
    if dtype in (torch.float32, torch.float64) or units > (128 if _triton.shared_memory(arch) > 160 * 1024 else 64):
        return []
    return [Tile(16, units, units, 8 if units == 128 else 4, 1)]


def step_tiles(dtype: torch.dtype, batch: int, projected: bool) -> list[Tile]:
    """Tiles worth trying for one launch per step, best guess first: few units, so that many programs share a step.

    The batch matters only by how many rows of a tile it fills.
    """
    if dtype == torch.float64:
        return [Tile(16, 16, 16, 2, 1)]
    if dtype == torch.float32:
        # Beside a projection's addresses, sums of more rows leave the registers of sm_80.
        return [Tile(16, 16, 16, 4, 1) if projected else Tile(32, 16, 16, 8, 1)]
    rows = min(_triton.power_of_2(batch), 64)
    return [Tile(rows, 16, 64, 4, 3), Tile(rows, 32, 32, 4, 3)]


class Step(NamedTuple):
    """A kernel that is launched in each of the first rounds, and what for."""

    kernel: Any
    rounds: int
    columns: int
    """Units or outputs, which its programs share."""
    args: tuple[Any, ...]
    switches: dict[str, Any]


class _Layer:
    """A call's sizes, and its tensors as the kernels take them."""

    def __init__(
        self,
        input: Tensor,
        sizes: Tensor | None,
        sorted_indices: Tensor | None,
        state: Sequence[Tensor],
        params: Sequence[Tensor],
        batch: int,
        layout: str,
        mode: str,
        bidirectional: bool,
    ) -> None:
        self.input, self.state, self.params, self.batch, self.mode = input, state, params, batch, mode
        self.directions = 2 if bidirectional else 1
        self.each = len(params) // self.directions
        self.gates = GATES[mode]
        self.names = param_names(mode, self.each)
        self.hidden = params[0].size(0) // self.gates
        self.projected = "weight_hr" in self.names
        self.outputs = params[self.names.index("weight_hh")].size(1)
        self.dtype, self.wide = input.dtype, _triton.sum_dtype(input.dtype)
        self.order: Order = order_of(input, sizes, sorted_indices, batch, layout)
        self.saved_rows = input.numel() // input.size(-1)
        self.has_padding = sizes is not None and layout in ("time_first", "batch_first")
        self.has_bias = "bias_hh" in self.names
        self.precision = _triton.dot_precision(input.dtype)

    def of_params(self, index: int) -> list[Tensor]:
        return [self.params[d * self.each + index] for d in range(self.directions)]

    def stacked(self, index: int) -> Tensor:
        """One parameter of both directions, ``[directions, ..]`` contiguous."""
        return torch.stack(self.of_params(index)) if self.directions == 2 else self.params[index].contiguous()

    def packed_input(self) -> Tensor:
        """``[tokens, features]``, step after step; the input itself where it is in that order."""
        data = self.input.reshape(-1, self.input.size(-1))
        return data if self.order.rows is None else data.index_select(0, self.order.rows)

    def by_slot(self, tensor: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
        """A copy of states ``[directions, batch, width]`` in the order of slots; zeros for None."""
        if tensor is None:
            return self.input.new_zeros(self.directions, self.batch, width, dtype=dtype)
        ordered = tensor if self.order.slots is None else tensor.index_select(1, self.order.slots)
        return ordered.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def by_sequence(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse."""
        if self.order.slots is not None:
            tensor = torch.empty_like(tensor).index_copy_(1, self.order.slots, tensor)
        return tensor.to(dtype)

    def states(self) -> tuple[Tensor, Tensor]:
        """h in the dtype of the input and c in that of sums before the first step."""
        given = (*self.state, None, None)
        h = self.by_slot(given[0], self.outputs, self.dtype)
        return h, self.by_slot(given[1], self.hidden, self.wide)

    def plan(self, arch: int) -> tuple[Tile, bool]:
        """The tile, and whether a program runs all steps."""
        persistent = persistent_tiles(self.dtype, self.hidden, arch)
        if persistent and not self.projected:
            return tuning.pick("rnn", (self.mode, self.dtype, self.hidden), persistent, self.input.device), True
        return self.step_tile(), False

    def step_tile(self) -> Tile:
        """That of a launch per step."""
        stepwise = step_tiles(self.dtype, self.batch, self.projected)
        key = (self.mode, self.dtype, self.hidden, self.outputs, stepwise[0].b)
        return tuning.pick("rnn_step", key, stepwise, self.input.device)

    def switches(self) -> dict[str, Any]:
        return {
            "MODE": MODES[self.mode],
            "HIDDEN": self.hidden,
            "GATE_COUNT": self.gates,
            "HAS_ROWS": self.order.rows is not None,
            "PRECISION": self.precision,
            "WIDE": self.is_wide(),
        }

    def is_wide(self) -> bool:
        """Whether offsets of the second direction, in the largest tensor of gates, need 64 bits."""
        return self.directions == 2 and self.saved_rows * 4 * self.hidden > LARGEST_OFFSET

    def launch(self, whole: Any, args: tuple[Any, ...], switches: dict[str, Any], steps: Sequence[Step]) -> None:
        """Run ``whole`` once, or ``steps`` one after the other for every round."""
        tile, persistent = self.plan(_triton.arch_of(self.input))
        blocks = triton.cdiv(self.batch, tile.b)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        if persistent:
            whole[(blocks, self.directions)](*args, **switches, BLOCK_B=tile.b, BLOCK_H=tile.n, **options)
            return
        options |= {"BLOCK_B": tile.b, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        for round in range(max(step.rounds for step in steps)):
            for step in steps:
                if round < step.rounds:
                    grid = (blocks, triton.cdiv(step.columns, tile.n), self.directions)
                    step.kernel[grid](*step.args, round, self.order.steps, **step.switches, **options)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def rnn(
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool = False,
    save: bool = False,
    recompute: bool = False,
    all_cells: bool = False,
    *options: Any,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``output, h_n, c_n, gates, cells`` of checked arguments; ``recompute`` concerns only who saves them."""
    a = _Layer(input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional)
    of_cells = Options(*options)
    if triton_cells.covers(mode, of_cells, all_cells and not a.projected):
        return triton_cells.forward(a, save, all_cells, of_cells, wrap)
    make = input.new_zeros if a.has_padding else input.new_empty
    output = make((*input.shape[:-1], a.directions * a.outputs))
    all_c = make((*input.shape[:-1], a.directions * a.hidden)) if all_cells else output
    h_start, c = a.states()
    h_n = h_start.clone()
    saves = save and mode in ("lstm", "gru")
    gates = make((a.directions, a.saved_rows, 4, a.hidden)) if saves else input.new_empty(0)
    cells = input.new_empty(0, dtype=a.wide)
    if saves and mode == "lstm":
        cells = make((a.directions, a.saved_rows, a.hidden), dtype=a.wide)
    if a.order.tokens > 0:
        weights = torch.cat(a.of_params(0)) if a.directions == 2 else params[0]
        from_input = a.packed_input() @ weights.t()
        hidden_weight = a.stacked(1)
        biases = (a.stacked(2), a.stacked(3)) if a.has_bias else (from_input, from_input)
        rows = _or(a.order.rows, a.order.first)
        args = (
            from_input, hidden_weight, *biases, h_start, c, a.order.first, a.order.lengths, rows, output, h_n, gates,
            cells, a.batch, a.saved_rows, a.directions,
        )  # fmt: skip
        switches = {**a.switches(), "HAS_BIAS": a.has_bias, "SAVE": saves}
        steps = _forward_steps(a, args, all_c if all_cells else None, switches, wrap)
        a.launch(wrap(kernels.forward), args, switches, steps)
    c_n = a.by_sequence(c, input.dtype) if mode == "lstm" else input.new_empty(0)
    output = torch.cat([output, all_c], -1) if all_cells else output
    return output, a.by_sequence(h_n, input.dtype), c_n, gates, cells


def _forward_steps(
    a: _Layer, args: tuple[Any, ...], all_cells: Tensor | None, switches: dict[str, Any], wrap: Launcher
) -> list[Step]:
    sizes = {"OUTPUTS": a.outputs, "PROJECTED": a.projected, "ALL_CELLS": all_cells is not None}
    *_, first, lengths, rows, output, h_n, _, _, _, _, _ = args
    unprojected = a.input.new_empty(a.directions, a.batch, a.hidden) if a.projected else h_n
    args = (*args, unprojected, _or(all_cells, output))
    cells = Step(wrap(kernels.forward_step), a.order.steps, a.hidden, args, {**switches, **sizes})
    if not a.projected:
        return [cells]
    args = (unprojected, a.stacked(a.each - 1), first, lengths, rows, output, h_n, a.batch, a.directions)
    switches = {name: switches[name] for name in ("HIDDEN", "HAS_ROWS", "PRECISION")}
    switches["OUTPUTS"] = a.outputs
    return [cells, Step(wrap(kernels.project_step), a.order.steps, a.outputs, args, switches)]


def rnn_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    sizes: Tensor | None,
    sorted_indices: Tensor | None,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_size: int,
    layout: str,
    mode: str,
    bidirectional: bool,
    output_mask: Sequence[bool],
    all_cells: bool = False,
    *options: Any,
    wrap: Launcher = identity,
) -> list[Tensor]:
    """Gradients of input, states and parameters: those that ``output_mask`` asks for."""
    a = _Layer(input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional)
    dh, dc = a.by_slot(grad_h_n, a.outputs, a.wide), a.by_slot(grad_c_n, a.hidden, a.wide)
    if a.order.tokens == 0:
        of_states = [a.by_sequence(grad, input.dtype) for grad in (dh, dc)][: len(state)]
        found = [torch.zeros_like(input), *of_states, *(torch.zeros_like(param) for param in params)]
        return [grad for grad, wanted in zip(found, output_mask, strict=True) if wanted]
    output = output[..., : a.directions * a.outputs].contiguous()
    # h before every step: what U multiplied, and what z of a gru multiplied.
    of_hidden = any(output_mask[1 + len(state) + d * a.each + a.names.index("weight_hh")] for d in range(a.directions))
    before = _previous_states(a, output, wrap) if of_hidden or a.gates == 3 else output.new_empty(a.directions, 0)
    d_out = input.new_empty(a.directions, a.order.tokens if a.projected else 0, a.outputs)
    own = dh.new_empty(a.directions, 0)
    of_cells = Options(*options)
    if triton_cells.covers(mode, of_cells, all_cells and not a.projected):
        saved = (gates, cells)
        dg, own = triton_cells.backward(a, grad_output, dh, dc, before, saved, all_cells, of_cells, wrap)
    else:
        grads = [grad_output, None]
        if all_cells and grad_output is not None:
            grads = list(grad_output.split([output.size(-1), a.directions * a.hidden], -1))
        dg = _gate_gradients(a, grads, dh, dc, before, output, gates, cells, d_out, wrap)

    of_states = [a.by_sequence(grad, input.dtype) for grad in (dh, dc)][: len(state)]
    wanted = iter(output_mask)
    results = [_input_gradient(a, dg)] if next(wanted) else []
    results += [grad for grad in of_states if next(wanted)]
    for d in range(a.directions):
        for index, name in enumerate(a.names):
            if not next(wanted):
                continue
            if name == "weight_hr":
                unprojected = gates[d, : a.order.tokens, 3] * cells[d, : a.order.tokens].tanh()
                grad = d_out[d].t() @ unprojected.to(a.dtype)
            elif name in OWN:
                grad = own[d, OWN[name]].reshape(params[index].shape)
            else:
                grad = _weight_gradient(a, name, dg[d], before[d], gates[d] if gates.numel() else gates)
            results.append(grad.to(a.dtype))
    return results


def _gate_gradients(
    a: _Layer,
    grads: Sequence[Tensor | None],
    dh: Tensor,
    dc: Tensor,
    before: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    d_out: Tensor,
    wrap: Launcher,
) -> Tensor:
    """``[directions, tokens, .., hidden]``, as :func:`triton_cells.backward` gives them; writes ``d_out`` as well.

    ``grads`` are those of every token's h and of its cells.
    """
    _, c_start = a.states()
    stored = triton_cells.STORED[a.mode]
    dg = a.input.new_empty(a.directions, a.order.tokens, stored, a.hidden)
    rows = _or(a.order.rows, a.order.first)
    of_output, of_cells = (None if grad is None else grad.contiguous() for grad in grads)
    args = (
        a.stacked(1), gates, cells, c_start, before, output, _or(of_output, output), a.order.first, a.order.lengths,
        rows, dh, dc, dg, a.batch, a.order.tokens, a.saved_rows, a.directions,
    )  # fmt: skip
    switches = {**a.switches(), "STORED": stored, "HAS_GRAD": of_output is not None}
    a.launch(wrap(kernels.backward), args, switches, _backward_steps(a, args, d_out, of_cells, switches, wrap))
    return dg


def _backward_steps(
    a: _Layer,
    args: tuple[Any, ...],
    d_out: Tensor,
    grad_cells: Tensor | None,
    switches: dict[str, Any],
    wrap: Launcher,
) -> list[Step]:
    hidden_weight, *_, grad_rows, first, lengths, rows, dh, _, dg, batch, tokens, _, directions = args
    projection = a.stacked(a.each - 1) if a.projected else dg
    switches = {**switches, "OUTPUTS": a.outputs}
    of_cells = {**switches, "PROJECTED": a.projected, "ALL_CELLS": grad_cells is not None}
    kernel, rounds = wrap(kernels.backward_step), a.order.steps + (not a.projected)
    cells = Step(kernel, rounds, a.hidden, (*args, projection, d_out, _or(grad_cells, d_out)), of_cells)
    if not a.projected:
        return [cells]
    args = (hidden_weight, grad_rows, first, lengths, rows, dh, dg, d_out, batch, tokens, directions)
    return [Step(wrap(kernels.output_gradient_step), a.order.steps + 1, a.outputs, args, switches), cells]


def _previous_states(a: _Layer, output: Tensor, wrap: Launcher) -> Tensor:
    h_start, _ = a.states()
    rows = _or(a.order.rows, a.order.first)
    previous = output.new_empty(a.directions, a.order.tokens, a.outputs)
    block = min(_triton.power_of_2(a.batch), 32)
    wrap(kernels.previous_states)[(a.order.steps, triton.cdiv(a.batch, block), a.directions)](
        output, h_start, a.order.first, a.order.lengths, rows, previous, a.batch, a.order.tokens, a.directions,
        OUTPUTS=a.outputs, HAS_ROWS=a.order.rows is not None, BLOCK_B=block,
        BLOCK_N=min(_triton.power_of_2(a.outputs), 512 // a.wide.itemsize), num_warps=4,
    )  # fmt: skip
    return previous


def _of_input(a: _Layer, dg: Tensor) -> Tensor:
    """Gradients of the gates' input terms ``[tokens, gates * hidden]`` of one direction."""
    return dg[:, : a.gates].reshape(dg.size(0), -1)


def _of_state(a: _Layer, dg: Tensor) -> Tensor:
    """Those of the recurrent terms: the last ones, but that r and z of a gru have one for both terms."""
    if a.mode == "gru":
        return torch.cat([dg[:, :2].flatten(1), dg[:, 3]], 1)
    return dg[:, -a.gates :].reshape(dg.size(0), -1)


def _weight_gradient(a: _Layer, name: str, dg: Tensor, before: Tensor, gates: Tensor) -> Tensor:
    """Of one matrix or bias of a direction."""
    if name == "weight_ih":
        return _of_input(a, dg).t() @ a.packed_input()
    if name == "bias_ih":
        return _of_input(a, dg).sum(0, dtype=a.wide)
    if name == "bias_hh":
        return _of_state(a, dg).sum(0, dtype=a.wide)
    if a.mode == "reset_before_gru":  # U_n multiplied r h
        reset_h = gates[: a.order.tokens, 0] * before
        return torch.cat([dg[:, :2].flatten(1).t() @ before, dg[:, 2].t() @ reset_h])
    return _of_state(a, dg).t() @ before


def _input_gradient(a: _Layer, dg: Tensor) -> Tensor:
    own = [_of_input(a, of_direction) for of_direction in dg]
    if a.mode in NORMALISED:  # whose input is products already
        grad = torch.cat(own, 1)
    else:
        weights = a.of_params(0)
        grad = own[0] @ weights[0]
        grad = torch.addmm(grad, own[1], weights[1]) if a.directions == 2 else grad
    if a.order.rows is not None:
        whole = a.input.new_zeros if a.has_padding else a.input.new_empty
        grad = whole((a.saved_rows, a.input.size(-1))).index_copy_(0, a.order.rows, grad)
    return grad.view(a.input.shape)


def sees_through(*args: Any, **kwargs: Any) -> bool:
    """Whether a call can be traced: its launches must follow from shapes, not from the numbers in ``sizes``."""
    forward = isinstance(args[7], str)
    input, sizes, params, layout, mode = (args[i] for i in ((0, 1, 4, 6, 7) if forward else (3, 4, 7, 12, 13)))
    bidirectional, extras = (args[8:9], args[11:]) if forward else (args[14:15], args[16:])
    names = param_names(mode, len(params) // (2 if any(bidirectional) else 1))
    if "weight_hr" in names or triton_cells.covers(mode, Options(*extras[1:]), any(extras[:1])):
        return False
    hidden = params[0].size(0) // GATES[mode]
    persistent = persistent_tiles(input.dtype, hidden, _triton.arch_of(input))
    return bool(persistent) and (layout == "packed" or sizes is None)
