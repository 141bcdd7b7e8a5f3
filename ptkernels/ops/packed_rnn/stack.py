"""Stacked recurrent layers: what ``torch.lstm``, ``torch.gru`` and ``torch.rnn_tanh`` do, for any form of input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.packed_rnn.checks import check_tensor
from ptkernels.ops.packed_rnn.inputs import Sequences, sequences_of
from ptkernels.ops.packed_rnn.layer import run_layer, split_cells
from ptkernels.ops.packed_rnn.resets import split_at_resets


def _states(op: str, hx: Any, mode: str, unbatched: bool) -> list[Tensor]:
    """h, and for lstm c, with the batch dimension that unbatched ones lack."""
    if hx is None:
        return []
    if mode == "lstm":
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise TypeError(f"{op}: hx: got {type(hx).__name__}, expected a pair of tensors (h_0, c_0)")
        states = list(hx)
    else:
        states = [hx]
    for name, state in zip(("hx", "cx"), states, strict=False):
        check_tensor(op, name, state)
        wanted = 2 if unbatched else 3
        if state.dim() != wanted:
            raise ValueError(
                f"{op}: {name}: got shape {list(state.shape)}, expected {wanted} dimensions like the input"
            )
    return [state.unsqueeze(1) for state in states] if unbatched else states


def _check_options(op: str, num_layers: Any, dropout: Any, params: Any, has_biases: bool, directions: int) -> int:
    """Returns how many parameters a direction of a layer has."""
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
        raise ValueError(f"{op}: num_layers: got {num_layers!r}, expected a positive integer")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{op}: dropout: got {dropout!r}, expected a probability from 0 to 1")
    if not isinstance(params, (tuple, list)):
        raise TypeError(f"{op}: params: got {type(params).__name__}, expected a sequence of tensors")
    each, rest = divmod(len(params), num_layers * directions)
    base = 4 if has_biases else 2
    if rest or each not in ((base, base + 1) if op == "lstm" else (base,)):
        raise ValueError(
            f"{op}: params: got {len(params)} tensors, expected {base} for each of {num_layers} layers x "
            f"{directions} directions" + (", or one more with projections" if op == "lstm" else "")
        )
    return each


def run_stack(
    op: str,
    sequences: Sequences,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    mode: str,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    each: int,
    recompute: bool = False,
    all_states: bool = False,
) -> tuple[Any, Tensor, Tensor, Any]:
    """All layers; output in the form of the input, states ``[layers * directions, batch, features]``.

    The last result is None, or with ``all_states`` those of every token, layer by layer: h, for lstm a pair.
    """
    directions = 2 if bidirectional else 1
    per_layer = each * directions
    for index, tensor in enumerate(state):
        if tensor.size(0) != num_layers * directions:
            name = ("hx", "cx")[index]
            raise ValueError(f"{op}: {name}: got {tensor.size(0)} states, expected {num_layers * directions}")
    data, h_n, c_n, of_tokens = sequences.data, [], [], []
    all_cells = all_states and mode == "lstm"
    for index in range(num_layers):
        own = [tensor[index * directions : (index + 1) * directions] for tensor in state]
        weights = list(params[index * per_layer : (index + 1) * per_layer])
        place = (sequences.batch_size, sequences.layout, mode, bidirectional)
        args = (data, sequences.sizes, sequences.sorted_indices, own, weights, *place)
        data, h, c = run_layer(op, args, recompute, all_cells)
        h_n.append(h)
        c_n.append(c)
        if all_cells:
            data, cells = split_cells(data, h)
            of_tokens.append((sequences.restore(data), sequences.restore(cells)))
        elif all_states:
            of_tokens.append(sequences.restore(data))
        if dropout and index + 1 < num_layers:
            data = torch.dropout(data, dropout, True)
    states = [found[0] if num_layers == 1 else torch.cat(found) for found in (h_n, c_n)]
    if sequences.unbatched:
        states = [tensor.squeeze(1) if tensor.dim() == 3 else tensor for tensor in states]
    return sequences.restore(data), states[0], states[1], tuple(of_tokens) if all_states else None


def run_with_resets(
    op: str,
    sequences: Sequences,
    state: Sequence[Tensor],
    params: Sequence[Tensor],
    resets: Tensor | None,
    mode: str,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    each: int,
    recompute: bool = False,
    all_states: bool = False,
) -> tuple[Any, Tensor, Tensor, Any]:
    """:func:`run_stack`, with the states cleared before the tokens that ``resets`` marks."""
    options = (mode, num_layers, dropout, bidirectional, each, recompute, all_states)
    if resets is None:
        return run_stack(op, sequences, state, params, *options)
    directions = 2 if bidirectional else 1
    pieces = split_at_resets(op, sequences, resets)
    own = pieces.states_of_pieces(state, directions)
    output, *final, of_tokens = run_stack(op, pieces.sequences, own, params, *options)
    before = [*state, *[None] * (2 - len(state))]
    h_n, c_n = (pieces.states_of_sequences(f, b, directions) for f, b in zip(final, before, strict=True))
    return output, h_n, c_n, of_tokens


def _call(
    op: str,
    mode: str,
    input: Any,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    resets: Tensor | None,
    recompute: bool,
    return_all_states: bool,
) -> tuple[Any, ...]:
    each = _check_options(op, num_layers, dropout, params, has_biases, 2 if bidirectional else 1)
    first = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
    sequences = sequences_of(op, input, first, batch_first, lengths, cu_seqlens)
    state = _states(op, hx, mode, sequences.unbatched)
    active = dropout if train else 0.0
    options = (mode, num_layers, active, bidirectional, each, recompute, return_all_states)
    output, h_n, c_n, of_tokens = run_with_resets(op, sequences, state, params, resets, *options)
    final = (h_n, c_n) if mode == "lstm" else (h_n,)
    return (output, *final, of_tokens) if return_all_states else (output, *final)


def lstm(
    input: Any,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    r"""Long short-term memory over ragged sequences: ``torch.lstm``'s arguments, at the cost of real tokens only.

    Args:
        input: one of

            - a :class:`torch.nn.utils.rnn.PackedSequence`, sorted or not;
            - a padded tensor ``[steps, batch, features]`` (``[batch, steps, features]`` with ``batch_first``), with
              ``lengths`` or, where all sequences are full, without;
            - concatenated sequences ``[tokens, features]`` with ``cu_seqlens``;
            - a jagged nested tensor ``[batch, *, features]``;
            - one sequence ``[steps, features]``.

            float64, float32, bfloat16 or float16.
        hx: ``h_0`` ``[layers * directions, batch, outputs]`` and ``c_0`` ``[layers * directions, batch, hidden]``, any
            strides, without ``batch`` for one sequence. None means zeros.
        params: for each layer and direction ``weight_ih, weight_hh[, bias_ih, bias_hh][, weight_hr]``, the order of
            ``torch.nn.LSTM.parameters()``.
        has_biases: whether the biases are among them.
        num_layers: layers, each reading the outputs of the one before.
        dropout: probability of dropping an output between layers, while ``train``. Drawn from torch's generator.
        train: whether dropout is applied.
        bidirectional: run each layer in both directions and concatenate their outputs.
        batch_first: where the batch of a padded input is.
        lengths: ``[batch]`` integers from 0 to steps, on any device.
        cu_seqlens: ``[batch + 1]`` integers, where each sequence begins, and the end.
        resets: booleans, one for each token, laid out like the input without its features (in a packed input, like its
            ``data``): the states are zeros again before the tokens marked, in either direction's own order. As many
            pieces as that makes run at once.
        recompute: as for :func:`ptkernels.packed_rnn`.
        return_all_states: return the states after every token of every layer as well.

    Returns:
        ``(output, h_n, c_n)``: output in the form of the input, ``[.., directions * outputs]``, padding 0; states after
        the last token of every sequence (the first one for the reverse direction), ``h_0`` and ``c_0`` for those of
        length 0. With ``return_all_states`` also a tuple with ``(h, c)`` of every layer, each in the form of the input,
        ``[.., directions * outputs]`` and ``[.., directions * hidden]``, padding 0, before any dropout.

    Raises:
        TypeError: an argument has a type or dtype that the layers do not take.
        ValueError: shapes, devices or lengths do not fit; the message names the argument.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.

    Note:
        Complexity and numerics are those of :func:`ptkernels.packed_rnn`, layer by layer. Feeding a sequence in pieces,
        with the states carried over, gives the results of one call bit for bit (in float32 and float64). The equations
        are those of ``torch.nn.LSTM`` (Hochreiter and Schmidhuber, 1997; projections: Sak et al., 2014).

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = torch.nn.LSTM(3, 4)
        >>> padded, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
        >>> output, h_n, c_n = ptk.lstm(padded, None, list(layer.parameters()), lengths=lengths)
        >>> output.shape, h_n.shape
        (torch.Size([5, 2, 4]), torch.Size([1, 2, 4]))
        >>> torch.equal(h_n[0, 1], output[1, 1])  # the second sequence ends at its second token
        True
    """
    options = (
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        lengths,
        cu_seqlens,
        resets,
        recompute,
        return_all_states,
    )
    return _call("lstm", "lstm", input, hx, params, *options)


def gru(
    input: Any,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    r"""Gated recurrent units over ragged sequences: ``torch.gru``'s arguments, at the cost of real tokens only.

    As :func:`ptkernels.lstm`, with one state. The equations are those of ``torch.nn.GRU``: the reset gate multiplies
    the recurrent term of the candidate after its product, and ``h' = (1 - z) n + z h`` (Cho et al., 2014; Chung et al.,
    2014).

    Args:
        input: as for :func:`ptkernels.lstm`.
        hx: ``[layers * directions, batch, hidden]``; None means zeros.
        params: for each layer and direction ``weight_ih, weight_hh[, bias_ih, bias_hh]``.
        has_biases: whether the biases are among them.
        num_layers: layers, each reading the outputs of the one before.
        dropout: probability of dropping an output between layers, while ``train``.
        train: whether dropout is applied.
        bidirectional: run each layer in both directions and concatenate their outputs.
        batch_first: where the batch of a padded input is.
        lengths: ``[batch]`` integers from 0 to steps, on any device.
        cu_seqlens: ``[batch + 1]`` integers, where each sequence begins, and the end.
        resets: booleans, one for each token, laid out like the input without its features (in a packed input, like its
            ``data``): the states are zeros again before the tokens marked, in either direction's own order. As many
            pieces as that makes run at once.
        recompute: as for :func:`ptkernels.packed_rnn`.
        return_all_states: return h after every token of every layer as well.

    Returns:
        ``(output, h_n)``, as for :func:`ptkernels.lstm`; with ``return_all_states`` also a tuple with h of every layer.

    Raises:
        TypeError: an argument has a type or dtype that the layers do not take.
        ValueError: shapes, devices or lengths do not fit; the message names the argument.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = torch.nn.GRU(3, 4, bidirectional=True)
        >>> data, cu_seqlens = torch.randn(9, 3), torch.tensor([0, 4, 4, 9])
        >>> output, h_n = ptk.gru(data, None, list(layer.parameters()), bidirectional=True, cu_seqlens=cu_seqlens)
        >>> output.shape, h_n.shape
        (torch.Size([9, 8]), torch.Size([2, 3, 4]))
    """
    options = (
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        lengths,
        cu_seqlens,
        resets,
        recompute,
        return_all_states,
    )
    return _call("gru", "gru", input, hx, params, *options)


def rnn(
    input: Any,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    return_all_states: bool = False,
) -> tuple[Any, ...]:
    r"""Plain recurrent layers over ragged sequences, ``h' = tanh(W x + b + U h + b')`` or ``relu`` of it.

    As :func:`ptkernels.gru`, with ``torch.rnn_tanh``'s arguments and one more.

    Args:
        input: as for :func:`ptkernels.lstm`.
        hx: ``[layers * directions, batch, hidden]``; None means zeros.
        params: for each layer and direction ``weight_ih, weight_hh[, bias_ih, bias_hh]``.
        has_biases: whether the biases are among them.
        num_layers: layers, each reading the outputs of the one before.
        dropout: probability of dropping an output between layers, while ``train``.
        train: whether dropout is applied.
        bidirectional: run each layer in both directions and concatenate their outputs.
        batch_first: where the batch of a padded input is.
        nonlinearity: ``"tanh"`` or ``"relu"``.
        lengths: ``[batch]`` integers from 0 to steps, on any device.
        cu_seqlens: ``[batch + 1]`` integers, where each sequence begins, and the end.
        resets: booleans, one for each token, laid out like the input without its features (in a packed input, like its
            ``data``): the states are zeros again before the tokens marked, in either direction's own order. As many
            pieces as that makes run at once.
        recompute: as for :func:`ptkernels.packed_rnn`.
        return_all_states: return h after every token of every layer as well.

    Returns:
        ``(output, h_n)``, as for :func:`ptkernels.lstm`; with ``return_all_states`` also a tuple with h of every layer.

    Raises:
        TypeError: an argument has a type or dtype that the layers do not take.
        ValueError: shapes, devices or lengths do not fit; the message names the argument.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = torch.nn.RNN(3, 4, nonlinearity="relu")
        >>> output, h_n = ptk.rnn(torch.randn(6, 3), None, list(layer.parameters()), nonlinearity="relu")
        >>> output.shape, h_n.shape
        (torch.Size([6, 4]), torch.Size([1, 4]))
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity: got {nonlinearity!r}, expected tanh or relu")
    options = (
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        batch_first,
        lengths,
        cu_seqlens,
        resets,
        recompute,
        return_all_states,
    )
    return _call("rnn", nonlinearity, input, hx, params, *options)
