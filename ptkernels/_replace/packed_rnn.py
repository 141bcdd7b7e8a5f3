"""Which modules packed RNN can run: torch.nn's recurrent layers and cells."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

import ptkernels.nn as ptk_nn
from ptkernels._replace.change import Change, swap
from ptkernels._replace.report import Kept

_NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): getattr(ptk_nn, name) for name in _NAMES}
_EFFECTS = {
    kind: "one operator per step" if kind.__name__.endswith("Cell") else "one operator per layer, ragged input included"
    for kind in _CLASSES
}


class PackedRnnRule:
    """See the module."""

    op = "packed_rnn"

    def plan(self, model: nn.Module) -> Iterator[Change | Kept]:
        """See :class:`ptkernels._replace.change.Rule`."""
        for path, module in model.named_modules():
            if (swapped := swap(path, module, self.op, _CLASSES, _EFFECTS)) is not None:
                yield swapped
