"""Model rewriting: swap what the operators can run, in place, and tell."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

from torch import nn

from ptkernels._replace import effects as _effects
from ptkernels._replace import verify as _verify
from ptkernels._replace.attention import AttentionRule
from ptkernels._replace.change import Rule
from ptkernels._replace.conv_bn_relu import ConvBnReluRule
from ptkernels._replace.packed_rnn import PackedRnnRule
from ptkernels._replace.quantized_matmul import QuantizedMatmulRule
from ptkernels._replace.report import Kept, Predicted, Replaced, Report, Verified

__all__ = ["Kept", "Predicted", "Replaced", "Report", "Verified", "replace"]

_RULES: dict[str, Rule] = {
    rule.op: rule for rule in (AttentionRule(), ConvBnReluRule(), PackedRnnRule(), QuantizedMatmulRule())
}
# Quantization changes results.
_DEFAULT = tuple(op for op in _RULES if op != QuantizedMatmulRule.op)


def replace(
    model: nn.Module,
    ops: str | Collection[str] = _DEFAULT,
    dry_run: bool = False,
    *,
    verify: bool = False,
    example_inputs: Any = None,
) -> Report:
    """Let the modules of a model run on this package's operators, in place.

    Modules stay the objects they are: parameters, buffers, ``state_dict`` keys, hooks, training mode, device, dtype and
    memory format do not change, so optimizers and tied weights stay valid. A second call finds nothing more to do.

    Args:
        model: any module; changed in place unless ``dry_run``.
        ops: operators to bring in. ``"attention"`` finds ``nn.MultiheadAttention`` (that of ``nn.Transformer`` and its
            decoders too), ``nn.TransformerEncoderLayer``, models of Hugging Face transformers, and modules whose
            ``forward`` calls ``F.scaled_dot_product_attention``, itself or in a helper;
            ``"conv_bn_relu"`` finds convolutions, transposed ones too, whose result only a norm or an activation reads,
            and depthwise ones of at least 25 taps;
            ``"packed_rnn"`` finds ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells; ``"quantized_matmul"`` quantizes
            every ``nn.Linear`` (int8_dynamic), which changes results and ``state_dict``, and therefore has to be asked
            for. Default: all others.
        dry_run: only report; with ``example_inputs``, on what a copy of the model would do.
        verify: run copies of the model before and after on ``example_inputs``, with dropout off, and compare outputs
            and gradients with the original in float64: errors may be at most three times the original's, or of those
            that it has with weights rounded otherwise. Takes three copies of the model, one of them in float64.
        example_inputs: what ``model`` is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.
            Copies of the model run on it once before and once after, for the report's ``predicted``: which kernels ran
            in every changed module, the bytes its operators move and those it keeps for its backward.

    Returns:
        What was replaced, what was left and why, what is to be expected of it; prints as a table. Its ``undo()``
        restores the model exactly.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an operator is unknown, or ``verify`` is asked for without ``example_inputs``, or with
            ``"quantized_matmul"``, whose results differ by more than rounding.
        RuntimeError: an output or gradient is out of bounds; the model is as it was before the call.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> report = ptk.replace(layer, verify=True, example_inputs=torch.randn(2, 10, 64))
        >>> [item.path for item in report.replaced]
        ['', 'self_attn']
        >>> report.undo()
        >>> type(layer) is torch.nn.TransformerEncoderLayer
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace: model: got {type(model).__name__}, expected a torch.nn.Module")
    wanted = [ops] if isinstance(ops, str) else list(ops)
    if unknown := [op for op in wanted if op not in _RULES]:
        raise ValueError(f"replace: ops: got {unknown[0]!r}, expected some of {', '.join(_RULES)}")
    if verify and example_inputs is None:
        raise ValueError("replace: example_inputs: got None, expected the inputs to verify with")
    if verify and QuantizedMatmulRule.op in wanted:
        raise ValueError("replace: verify: got True with 'quantized_matmul', whose results differ by quantization")
    report = Report(dry_run)
    before = None if example_inputs is None else copy.deepcopy(model)
    if dry_run and example_inputs is not None:
        model = copy.deepcopy(model)  # to run it as it would be
    changed = []
    for op in wanted:
        for found in list(_RULES[op].plan(model)):
            if isinstance(found, Kept):
                report.kept.append(found)
                continue
            report.replaced.extend(found.entries)
            changed.append(found.path)
            if not dry_run or before is not None:
                report._undo.append(found.apply())
    if before is not None:
        _try(before, model, example_inputs, changed, verify, report)
    if dry_run:
        report._undo.clear()
    return report


def _try(before: nn.Module, model: nn.Module, inputs: Any, changed: list[str], verify: bool, report: Report) -> None:
    """Run the example; the model is as it was where that fails."""
    try:
        report.predicted = _effects.predict(before, model, inputs, changed)
        if not verify:
            return
        report.verified = _verify.compare(before, model, inputs)
        if failed := [item for item in report.verified if not item.holds]:
            worst = failed[0]
            raise RuntimeError(
                f"replace: {worst.name}: got error {worst.error:.2e} against float64, "
                f"expected at most {worst.bound:.2e} (before: {worst.error_before:.2e}); the model was restored"
            )
    except BaseException:
        report.undo()
        raise
