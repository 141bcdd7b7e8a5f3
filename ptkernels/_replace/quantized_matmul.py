"""Which modules quantized matmul can run: linear layers, on codes instead of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

import ptkernels.nn as ptk_nn
from ptkernels._replace.change import Change
from ptkernels._replace.report import Kept, Replaced

SCHEME = "int8_dynamic"


class QuantizedMatmulRule:
    """See the module. Unlike the other rules' changes, these change results, so they are made only when asked for."""

    op = "quantized_matmul"

    def plan(self, model: nn.Module) -> Iterator[Change | Kept]:
        """See :class:`ptkernels._replace.change.Rule`."""
        for path, module in model.named_modules():
            for name, child in module.named_children():
                where = f"{path}.{name}" if path else name
                if type(child) is nn.Linear:
                    effect = f"{SCHEME}: weights in a quarter of float32's memory; results differ by quantization"
                    entry = Replaced(where, "Linear", self.op, effect)
                    yield Change(where, [entry], child, custom=_exchange(module, name, child))
                elif isinstance(child, nn.Linear) and type(child).__module__ != "torch.nn.modules.linear":
                    yield Kept(where, type(child).__name__, self.op, "a subclass of Linear")


def _exchange(parent: nn.Module, name: str, linear: nn.Linear) -> Callable[[], Callable[[], None]]:
    def apply() -> Callable[[], None]:
        setattr(parent, name, ptk_nn.QuantizedLinear.from_float(linear, SCHEME))
        return lambda: setattr(parent, name, linear)

    return apply
