"""Recurrent layers over ragged sequences with the semantics of ``torch.nn.LSTM``, ``GRU`` and ``RNN``."""

from __future__ import annotations

from ptkernels.ops.packed_rnn.layer import packed_rnn
from ptkernels.ops.packed_rnn.stack import gru, lstm, rnn

__all__ = ["gru", "lstm", "packed_rnn", "rnn"]
