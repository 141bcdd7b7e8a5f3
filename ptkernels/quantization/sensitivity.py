"""Which layers bear which scheme: one layer quantized at a time, the model's output compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptkernels.nn.quantized import QuantizedLinear
from ptkernels.ops.quantized_matmul.formats import SCHEMES


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer does to a model."""

    layer: str
    scheme: str
    sqnr: float
    """Decibels between the model's output and its change; infinite where nothing changed."""
    nbytes: int
    """Of the quantized weight."""


def sensitivity(
    model: nn.Module, batches: Iterable[Any], schemes: Sequence[str] = ("int8_dynamic", "int4_weight_only")
) -> list[LayerSensitivity]:
    """Quantize every linear layer alone under every scheme and measure the model's output, most harmful first.

    Args:
        model: returns a tensor, or a tuple or mapping whose first element is one; is left as it was.
        batches: samples of what the model will see (a tuple as its arguments).
        schemes: names as for :func:`ptkernels.quantize_weight`; all but ``int8_static``.

    Returns:
        One entry for each layer and scheme, in rising order of ``sqnr``.

    Raises:
        ValueError: a scheme is unknown or static.

    Note:
        Runs the model once for every layer, scheme and batch.

    Example:
        >>> import torch, ptkernels as ptk
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
        >>> report = ptk.quantization.sensitivity(model, [torch.randn(16, 32)])
        >>> report[0].scheme, sorted({entry.layer for entry in report})
        ('int4_weight_only', ['0', '2'])
    """
    for scheme in schemes:
        if scheme not in SCHEMES or SCHEMES[scheme].is_static:
            known = ", ".join(name for name, spec in SCHEMES.items() if not spec.is_static)
            raise ValueError(f"sensitivity: schemes: got {scheme!r}, expected some of {known}")
    kept = list(batches)
    expected = _outputs(model, kept)
    found = []
    for name, layer in [item for item in model.named_modules() if type(item[1]) is nn.Linear]:
        parent = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        for scheme in schemes:
            quantized = QuantizedLinear.from_float(layer, scheme)
            setattr(parent, child, quantized)
            try:
                actual = _outputs(model, kept)
            finally:
                setattr(parent, child, layer)
            found.append(LayerSensitivity(name, scheme, _sqnr(actual, expected), quantized.weight.nbytes))
    return sorted(found, key=lambda entry: entry.sqnr)


def _outputs(model: nn.Module, batches: list[Any]) -> list[Tensor]:
    outputs = []
    with torch.no_grad():
        for batch in batches:
            out = model(*batch) if isinstance(batch, tuple) else model(batch)
            while not isinstance(out, Tensor):
                out = next(iter(out.values() if hasattr(out, "values") else out))
            outputs.append(out.double())
    return outputs


def _sqnr(actual: list[Tensor], expected: list[Tensor]) -> float:
    signal = sum(float(e.square().sum()) for e in expected)
    noise = sum(float((a - e).square().sum()) for a, e in zip(actual, expected, strict=True))
    return math.inf if noise == 0.0 else 10 * math.log10(max(signal, 1e-300) / noise)
