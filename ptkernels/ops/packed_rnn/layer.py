"""One recurrent layer, both directions inside: from the arguments of a call to the operator or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from ptkernels import _backend
from ptkernels._distributed import is_distributed
from ptkernels.ops.packed_rnn import reference, routing, torchscript
from ptkernels.ops.packed_rnn.checks import OP, check_layer, check_values
from ptkernels.ops.packed_rnn.library import rnn_op
from ptkernels.ops.packed_rnn.reference import PLAIN, Options
from ptkernels.ops.packed_rnn.register import autocast

OpArguments = tuple[Tensor, Tensor | None, Tensor | None, list[Tensor], list[Tensor], int, str, str, bool]


def host_integers(tensor: Tensor | None) -> Tensor | None:
    """Lengths and the like as the operator reads them: int64 on the CPU."""
    if tensor is None or (tensor.dtype == torch.int64 and tensor.device.type == "cpu"):
        return tensor
    return tensor.to("cpu", torch.int64)


def _is_plain(input: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Whether a call is what the CPU operator takes as it is: nothing to cast, trace, transform or differentiate."""
    return (
        type(input) is Tensor
        and input.is_cpu
        and _backend.state.backend in (None, "cpu")
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not (torch.is_grad_enabled() and torch._C._any_requires_grad(input, *tensors))
    )


def run_layer(
    op: str, args: OpArguments, recompute: bool = False, all_cells: bool = False, options: Options = PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments to output, h_n and c_n (empty where there are no cells).

    With ``recompute`` the backward runs the forward again instead of keeping its gates and cells. With ``all_cells``
    the rows of output go on with the cells of their token: :func:`split_cells` takes them apart.

    Raises:
        TypeError: something is not a tensor of the right kind and dtype.
        ValueError: a shape, a device or a length is wrong.
    """
    input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional = args
    if torch._C._get_tracing_state() is not None and layout in ("time_first", "batch_first"):
        traced: tuple[Tensor, Tensor, Tensor] = torchscript.padded_layer(
            input, sizes, list(state), list(params), layout, mode, bidirectional, all_cells, *options
        )
        return traced
    if _is_plain(input, (*state, *params)):
        # The operator checks everything itself; what it refuses is looked at again for the error that names it best.
        try:
            with torch._C._AutoDispatchBelowAutograd():
                # What is at its default is left out, which saves its conversion.
                plain = not all_cells and options is PLAIN
                output, h_n, c_n, _, _ = rnn_op(*args) if plain else rnn_op(*args, False, False, all_cells, *options)
            return output, h_n, c_n
        except (RuntimeError, TypeError):
            check_layer(op, *args, all_cells, *options)
            check_values(op, input, sizes, sorted_indices, batch_size, layout)
            raise
    if is_distributed(input):
        from ptkernels.integrations import dtensor

        return dtensor.packed_rnn(op, args, recompute, all_cells, options)
    device_type = input.device.type
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type):
        input, *others = autocast(device_type, (input, *state, *params))
        state, params = others[: len(state)], others[len(state) :]
    if not state and torch.compiler.is_exporting():
        state = _zero_state(input, params, batch_size, mode, bidirectional)
    args = (input, sizes, sorted_indices, state, params, batch_size, layout, mode, bidirectional)
    check_layer(op, *args, all_cells, *options)
    symbolic = torch.compiler.is_compiling() or isinstance(sizes, FakeTensor) or isinstance(input, FakeTensor)
    if not symbolic and not torch._C._are_functorch_transforms_active():
        check_values(op, input, sizes, sorted_indices, batch_size, layout)
    if routing.runs_on_reference(op, input, state, params):
        with torch.autocast(device_type, enabled=False):
            return reference.layer(*args, all_cells, options)
    output, h_n, c_n, _, _ = rnn_op(*args, False, recompute, all_cells, *options)
    return output, h_n, c_n


def split_cells(output: Tensor, h_n: Tensor) -> tuple[Tensor, Tensor]:
    """h and c of every token, from an output with both."""
    features = h_n.size(0) * h_n.size(-1)
    return output[..., :features], output[..., features:]


def as_results(found: tuple[Tensor, Tensor, Tensor], mode: str, return_cells: bool) -> tuple[Tensor, ...]:
    """What :func:`packed_rnn` returns of a layer's output, h_n and c_n."""
    output, h_n, c_n = found
    if not reference.has_cells(mode):
        return output, h_n
    if not return_cells:
        return output, h_n, c_n
    output, cells = split_cells(output, h_n)
    return output, h_n, c_n, cells


def _zero_state(
    input: Tensor, params: Sequence[Tensor], batch_size: int, mode: str, bidirectional: bool
) -> list[Tensor]:
    """The states that no states stand for: what AOTInductor compiles takes no empty list of tensors."""
    directions = 2 if bidirectional else 1
    weights = reference.split_weights(params, directions, mode)[0]
    hidden = weights["weight_hh"].size(0) // reference.GATES[mode]
    outputs = weights["weight_hr"].size(0) if "weight_hr" in weights else hidden
    sizes = [outputs, *([hidden] if reference.has_cells(mode) else [])]
    return [input.new_zeros(directions, batch_size, size) for size in sizes]


WEIGHTS = (
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "weight_peephole",
    "norm_hidden",
    "norm_cell",
)


def as_op_arguments(
    input: Tensor,
    weights: Sequence[Tensor | None],
    hx: Tensor | None,
    cx: Tensor | None,
    mode: str,
    sizes: Tensor | None,
    layout: str,
    batch_size: int | None,
    sorted_indices: Tensor | None,
) -> OpArguments:
    """Arguments of :func:`packed_rnn` as the operator takes them, the weights in the order of ``WEIGHTS``.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: the mode has other weights, a state comes without the other, or the weights disagree on the number
            of directions.
    """
    present = [weight for weight in weights if weight is not None]
    if not isinstance(input, Tensor) or (mode, *[weight is None for weight in weights]) not in _FITTING:
        _refuse(input, dict(zip(WEIGHTS, weights, strict=True)), mode)
    if cx is not None and (hx is None or not reference.has_cells(mode)):
        raise ValueError(f"{OP}: cx: got cells {'without hx' if hx is None else f'for {mode}'}, expected None")
    stacked = present[0].dim() == 3
    params = present
    if stacked:
        first = next(name for name, weight in zip(WEIGHTS, weights, strict=True) if weight is not None)
        if present[0].size(0) != 2:
            raise ValueError(f"{OP}: {first}: got {present[0].size(0)} directions, expected 2, or two dimensions")
        for weight in present:
            if weight.dim() < 2 or weight.size(0) != 2:
                raise ValueError(f"{OP}: weights: got shape {list(weight.shape)}, expected [2, ..] like {first}")
        params = [weight[d] for d in (0, 1) for weight in present]
    state: list[Tensor] = []
    if hx is not None:
        state = [hx]
        if reference.has_cells(mode):
            if cx is None:
                hidden = present[0].size(-2) // reference.GATES[mode]
                cx = hx.new_zeros(*hx.shape[:-1], hidden)
            state.append(cx)
    if sizes is not None:
        sizes = host_integers(sizes)
    if sorted_indices is not None:
        sorted_indices = host_integers(sorted_indices)
    if batch_size is None:
        batch_size = _batch_of(input, sizes, sorted_indices, state, layout)
    return input, sizes, sorted_indices, state, params, batch_size, layout, mode, stacked


_FITTING = {
    (mode, *[name not in order for name in WEIGHTS])
    for mode in reference.GATES
    for order in reference.param_orders(mode)
}
"""Modes, each with the weights that it lacks: every combination that makes a layer."""


def _refuse(input: Tensor, given: dict[str, Tensor | None], mode: str) -> None:
    """Raise for what is missing or too much; a mode that there is not is the operator's to name."""
    orders = reference.param_orders(mode)
    required = [name for name in WEIGHTS if all(name in order for order in orders)]
    for name, value in {"input": input, **{name: given[name] for name in required}}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{OP}: {name}: got {type(value).__name__} for {mode}, expected torch.Tensor")
    for name, value in given.items():
        if value is not None and not any(name in order for order in orders):
            raise ValueError(f"{OP}: {name}: got a tensor for {mode}, expected None")
    if mode in reference.GATES:
        raise ValueError(f"{OP}: bias_hh: got one bias without the other, expected both or neither")


def as_options(eps: float, zoneout: float | tuple[float, float], train: bool) -> Options:
    """Options of a call, with a seed where zoneout is drawn.

    Raises:
        ValueError: zoneout is neither a probability nor two of them.
    """
    shares = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if len(shares) != 2:
        raise ValueError(f"{OP}: zoneout: got {zoneout!r}, expected a probability, or one for h and one for c")
    if not any(shares):
        return PLAIN if eps == PLAIN.eps else Options(eps)
    return Options(eps, *shares, draw_seed() if train else None)


def draw_seed() -> Tensor:
    """From torch's generator on the CPU, for every device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")


def _batch_of(
    input: Tensor, sizes: Tensor | None, sorted_indices: Tensor | None, state: Sequence[Tensor], layout: str
) -> Any:
    """How many sequences a call has, from what is known without reading data where possible."""
    if layout in ("time_first", "batch_first"):
        return input.size(0 if layout == "batch_first" else 1) if input.dim() == 3 else 0
    if layout == "varlen":
        return max(sizes.size(0) - 1, 0) if sizes is not None else 0
    if sorted_indices is not None:
        return sorted_indices.size(0)
    if state and state[0].dim() == 3:
        return state[0].size(1)
    return int(sizes[0].item()) if sizes is not None and sizes.numel() else 0


def packed_rnn(
    input: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    hx: Tensor | None = None,
    cx: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    mode: str = "lstm",
    sizes: Tensor | None = None,
    layout: str = "packed",
    batch_size: int | None = None,
    sorted_indices: Tensor | None = None,
    recompute: bool = False,
    return_cells: bool = False,
    weight_peephole: Tensor | None = None,
    norm_hidden: Tensor | None = None,
    norm_cell: Tensor | None = None,
    eps: float = 1e-5,
    zoneout: float | tuple[float, float] = 0.0,
    train: bool = False,
) -> tuple[Tensor, ...]:
    r"""One recurrent layer over ragged sequences, forward or in both directions, as one operator.

    The layer under :func:`ptkernels.lstm`, :func:`ptkernels.gru` and :func:`ptkernels.rnn`, which take the usual inputs
    and stack layers. Weights have the shapes of ``torch.nn``, for two directions stacked in a leading dimension.

    Args:
        input: float64, float32, bfloat16 or float16, as ``layout`` says.
        weight_ih: ``[gates * hidden, features]``, or ``[2, gates * hidden, features]`` for two directions; gates are
            4 (i, f, g, o) for an LSTM, 3 (r, z, n) for a GRU, 1 for ``"tanh"`` and ``"relu"``. None for the modes with
            layer normalisation, whose input is those products: ``features`` are ``directions * gates * hidden``.
        weight_hh: ``[.., gates * hidden, outputs]``, where outputs is hidden, or that of the projection.
        bias_ih: ``[.., gates * hidden]``, together with ``bias_hh`` or not at all; alone for ``"peephole_lstm"`` and
            ``"reset_before_gru"``.
        bias_hh: as ``bias_ih``.
        hx: ``[directions, batch, outputs]``. Default: zeros.
        cx: ``[directions, batch, hidden]``, for an LSTM only. Default: zeros.
        weight_hr: ``[.., outputs, hidden]``, the projection of ``"lstm"``. Default: none.
        mode: ``"lstm"``, ``"gru"``, ``"tanh"``, ``"relu"``; ``"peephole_lstm"``, whose gates see the cell;
            ``"reset_before_gru"``, whose r multiplies h before the product; ``"layer_norm_lstm"`` and
            ``"layer_norm_gru"``, which normalise the recurrent products. Their equations are those of
            :class:`ptkernels.nn.PeepholeLSTMCell` and so on.
        sizes: int64; ``batch_sizes`` of packed input, ``cu_seqlens`` of concatenated, ``lengths`` of padded input,
            which may be None where all sequences are full.
        layout: ``"packed"`` (``[tokens, features]``, step after step), ``"varlen"`` (``[tokens, features]``, sequence
            after sequence), ``"time_first"`` (``[steps, batch, features]``) or ``"batch_first"``.
        batch_size: number of sequences. Default: found from the others.
        sorted_indices: of packed input, which sequence (row of ``hx``) is longest, next longest, and so on.
        recompute: run the forward again in the backward instead of keeping its gates and cells: a sixth (LSTM, float32)
            or a fifth (GRU) of the memory, a third more time. The gradients are the same bits.
        return_cells: return the cells of every token as well, for an LSTM only. ``output`` holds every h.
        weight_peephole: ``[.., 3, hidden]``, what i, f and o multiply the cell by; for ``"peephole_lstm"``.
        norm_hidden: ``[.., 2, gates * hidden]``, weight and bias of the normalised recurrent products: of all gates
            together for ``"layer_norm_lstm"``, of r and z together and of n for ``"layer_norm_gru"``.
        norm_cell: ``[.., 2, hidden]``, weight and bias of the normalised cells, for ``"layer_norm_lstm"``.
        eps: added to the variances.
        zoneout: probability for a unit of h to keep its value in a step, or that and the one for c; not with a
            projection, nor for ``"tanh"`` and ``"relu"``.
        train: draw which units zoneout keeps, from a seed of torch's generator on the CPU; otherwise every unit takes
            the mean of both.

    Returns:
        ``output`` laid out like ``input``, padding 0; ``h_n`` like ``hx``; for an LSTM also ``c_n`` like ``cx``, and
        with ``return_cells`` the cells, ``[.., directions * hidden]`` laid out like ``output``.

    Raises:
        TypeError: an argument has a type or dtype that the layer does not take.
        ValueError: shapes, devices or lengths do not fit; the message names the argument.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.

    Note:
        Time is ``O(tokens * gates * hidden * (features + outputs))``: padding costs nothing. Sums and cells are kept in
        float32 (float64 for float64); gates and h are rounded to the input's dtype. Results depend neither on the
        number of threads nor on how sequences are cut into calls; a sequence alone is summed in another order than one
        of a batch, and reads its weights where they are. For the backward an LSTM keeps its gates and cells, a GRU its
        gates and the recurrent term of n: per token and direction ``4 * hidden`` numbers, and for an LSTM ``hidden`` in
        float32; layer normalisation keeps the normalised products as well. Which units zoneout keeps is a function of
        the seed and of the token's place in its sequence: every layout and every replay keeps the same. Double
        backward and forward-mode differentiation run on the reference, with a warning.

    Example:
        >>> import torch, ptkernels as ptk
        >>> data = torch.randn(7, 3)  # lengths 3, 3 and 1
        >>> output, h_n, c_n = ptk.packed_rnn(
        ...     data, torch.randn(16, 3), torch.randn(16, 4), sizes=torch.tensor([3, 2, 2])
        ... )
        >>> output.shape, h_n.shape
        (torch.Size([7, 4]), torch.Size([1, 3, 4]))
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, norm_hidden, norm_cell)
    args = as_op_arguments(input, weights, hx, cx, mode, sizes, layout, batch_size, sorted_indices)
    options = PLAIN if not zoneout and eps == PLAIN.eps else as_options(eps, zoneout, train)
    found = run_layer(OP, args, recompute, return_cells, options)
    return as_results(found, mode, return_cells)
