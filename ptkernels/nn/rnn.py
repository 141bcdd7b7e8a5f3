"""Recurrent modules: ``torch.nn``'s own, running on fused kernels and taking sequences in every form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ptkernels.nn import torchscript
from ptkernels.ops.packed_rnn.inputs import sequences_of
from ptkernels.ops.packed_rnn.layer import run_layer
from ptkernels.ops.packed_rnn.stack import _states, run_with_resets

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _weights(module: nn.Module, names: Sequence[str]) -> list[Tensor]:
    own = module._parameters  # in most modules all are there; getattr finds the others, more slowly
    return [weight if (weight := own.get(name)) is not None else getattr(module, name) for name in names]


class _Stack(nn.RNNBase):
    """What the three have in common.

    ``RNNBase`` has the parameters, their names and their initialisation; torch.compile refuses subclasses of
    ``torch.nn.LSTM`` and the others themselves.
    """

    # On the class for layers of torch's that `ptkernels.replace` gives this class.
    weight_dropout: float = 0.0
    recompute: bool = False

    def __init__(self, *args: Any, weight_dropout: float, recompute: bool, **kwargs: Any) -> None:
        if isinstance(weight_dropout, bool) or not 0.0 <= weight_dropout <= 1.0:
            raise ValueError(f"{args[0]}: weight_dropout: got {weight_dropout!r}, expected a probability from 0 to 1")
        self.weight_dropout = weight_dropout
        self.recompute = recompute
        super().__init__(*args, **kwargs)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        text += f", weight_dropout={self.weight_dropout}" if self.weight_dropout else ""
        return text + (", recompute=True" if self.recompute else "")

    def _params(self) -> list[Tensor]:
        """By name, not from _flat_weights: a reparametrised or replaced weight counts as it is now."""
        names = [name for names in self._all_weights for name in names]
        found = _weights(self, names)
        if self.weight_dropout and self.training:
            dropped = zip(names, found, strict=True)
            found = [
                torch.dropout(weight, self.weight_dropout, True) if name.startswith("weight_hh") else weight
                for name, weight in dropped
            ]
        return found

    def _run(
        self,
        op: str,
        mode: str,
        input: Any,
        hx: Any,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        resets: Tensor | None,
        return_all_states: bool,
    ) -> tuple[Any, ...]:
        first = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
        sequences = sequences_of(op, input, first, self.batch_first, lengths, cu_seqlens)
        if sequences.data.size(-1) != self.input_size:
            raise ValueError(f"{op}: input: got {sequences.data.size(-1)} features, expected {self.input_size}")
        state = _states(op, hx, mode, sequences.unbatched)
        dropout = self.dropout if self.training else 0.0
        output, h_n, c_n, of_tokens = run_with_resets(
            op,
            sequences,
            state,
            self._params(),
            resets,
            mode,
            self.num_layers,
            dropout,
            self.bidirectional,
            len(self._all_weights[0]),
            self.recompute,
            return_all_states,
        )
        final = (h_n, c_n) if mode == "lstm" else h_n
        return (output, final, of_tokens) if return_all_states else (output, final)


class LSTM(_Stack):
    """``torch.nn.LSTM`` on :func:`ptkernels.lstm`: same constructor, parameters, initialisation and ``state_dict``.

    Args:
        input_size: features of the input.
        hidden_size: units.
        num_layers: layers, each reading the outputs of the one before.
        bias: whether there are biases.
        batch_first: where the batch of padded inputs and outputs is; states are ``[.., batch, features]`` either way.
        dropout: probability of dropping an output between layers in training.
        bidirectional: run in both directions.
        proj_size: features that h is projected to; 0 means no projection.
        device: of the parameters.
        dtype: of the parameters.
        weight_dropout: probability of dropping an entry of the recurrent weights in training, anew in every call and
            the same for all its steps (Merity et al., "Regularizing and optimizing LSTM language models", 2018).
        recompute: keep neither gates nor cells for the backward, which computes them again: see
            :func:`ptkernels.packed_rnn`.

    Shape:
        Call with ``(input, hx=None, *, lengths=None, cu_seqlens=None, resets=None, return_all_states=False)``; returns
        ``(output, (h_n, c_n))``, and the states of every token as a third with ``return_all_states``.
        Forms of input, shapes and errors are those of :func:`ptkernels.lstm`.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = ptk.nn.LSTM(8, 16, num_layers=2, bidirectional=True, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 8), lengths=torch.tensor([5, 0, 2]))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 32]), torch.Size([4, 3, 16]))
        >>> bool((output[1] == 0).all())
        True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(
            "LSTM",
            *sizes,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
            weight_dropout=weight_dropout,
            recompute=recompute,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]:
        return self._run("lstm", "lstm", input, hx, lengths, cu_seqlens, resets, return_all_states)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.LSTM(self)


class GRU(_Stack):
    """``torch.nn.GRU`` on :func:`ptkernels.gru`: same constructor, parameters, initialisation and ``state_dict``.

    Arguments are those of :class:`ptkernels.nn.LSTM` without ``proj_size``.

    Shape:
        Call with ``(input, hx=None, *, lengths=None, cu_seqlens=None, resets=None, return_all_states=False)``; returns
        ``(output, h_n)``, and h of every token as a third with ``return_all_states``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> output, h_n = ptk.nn.GRU(8, 16)(torch.randn(5, 3, 8))
        >>> output.shape
        torch.Size([5, 3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(
            "GRU",
            *sizes,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            weight_dropout=weight_dropout,
            recompute=recompute,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]:
        return self._run("gru", "gru", input, hx, lengths, cu_seqlens, resets, return_all_states)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.RNN(self)


class RNN(_Stack):
    """``torch.nn.RNN`` on :func:`ptkernels.rnn`: same constructor, parameters, initialisation and ``state_dict``.

    Arguments are those of :class:`ptkernels.nn.GRU`, with ``nonlinearity``, ``"tanh"`` or ``"relu"``, after
    ``num_layers``.

    Shape:
        Call with ``(input, hx=None, *, lengths=None, cu_seqlens=None, resets=None, return_all_states=False)``; returns
        ``(output, h_n)``, and h of every token as a third with ``return_all_states``.

    Example:
        >>> import torch, ptkernels as ptk
        >>> output, h_n = ptk.nn.RNN(8, 16, nonlinearity="relu")(torch.randn(5, 3, 8))
        >>> output.shape
        torch.Size([5, 3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"RNN: nonlinearity: got {nonlinearity!r}, expected tanh or relu")
        self.nonlinearity = nonlinearity
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            *sizes,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            weight_dropout=weight_dropout,
            recompute=recompute,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        resets: Tensor | None = None,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]:
        return self._run("rnn", self.nonlinearity, input, hx, lengths, cu_seqlens, resets, return_all_states)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.RNN(self)


def _cell(op: str, mode: str, module: nn.RNNCellBase, input: Tensor, hx: Any) -> tuple[Tensor, Tensor]:
    """One step of the operator: the cell's batch is its only step."""
    if not isinstance(input, Tensor) or input.dim() not in (1, 2):
        shape = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"{op}: input: got {shape}, expected [batch, features] or [features]")
    unbatched = input.dim() == 1
    data = input.unsqueeze(0) if unbatched else input
    state = []
    if hx is not None:
        given = list(hx) if mode == "lstm" else [hx]
        for name, tensor in zip(("hx", "cx"), given, strict=False):
            if not isinstance(tensor, Tensor) or tensor.dim() != input.dim():
                raise ValueError(f"{op}: {name}: got another number of dimensions, expected {input.dim()} like input")
        state = [(tensor.unsqueeze(0) if unbatched else tensor).unsqueeze(0) for tensor in given]
    params = _weights(module, _CELL_WEIGHTS if module.bias else _CELL_WEIGHTS[:2])
    batch = data.size(0)
    args = (data.unsqueeze(0), None, None, state, params, batch, "time_first", mode, False)
    _, h, c = run_layer(op, args)
    h, c = h.squeeze(0), c.squeeze(0) if mode == "lstm" else c
    return (h.squeeze(0), c.squeeze(0)) if unbatched else (h, c)


class LSTMCell(nn.LSTMCell):
    """``torch.nn.LSTMCell`` on the fused kernels: same constructor, parameters and results.

    Example:
        >>> import torch, ptkernels as ptk
        >>> h, c = ptk.nn.LSTMCell(8, 16)(torch.randn(3, 8))
        >>> h.shape
        torch.Size([3, 16])
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return _cell("LSTMCell", "lstm", self, input, hx)

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.LSTMCell(self)


class GRUCell(nn.GRUCell):
    """``torch.nn.GRUCell`` on the fused kernels: same constructor, parameters and results.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.nn.GRUCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell("GRUCell", "gru", self, input, hx)[0]

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.RNNCell(self)


class RNNCell(nn.RNNCell):
    """``torch.nn.RNNCell`` on the fused kernels: same constructor, parameters and results.

    Example:
        >>> import torch, ptkernels as ptk
        >>> ptk.nn.RNNCell(8, 16)(torch.randn(3, 8)).shape
        torch.Size([3, 16])
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return _cell("RNNCell", self.nonlinearity, self, input, hx)[0]

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.RNNCell(self)
