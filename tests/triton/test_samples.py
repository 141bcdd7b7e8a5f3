"""Operators' samples on the Triton backend, through their public functions: values and gradients by the error rule.

A sample that the kernels do not cover must say so by name.
"""

from __future__ import annotations

import functools
from typing import Any

import op_checks as contract
import pytest
import torch
from comparing import DEVICE

import ptkernels as ptk
from ptkernels import _registry
from ptkernels._registry import Sample
from ptkernels.errors import BackendError

OPS = (
    "packed_rnn",
    "conv_bn_relu",
    "quantized_matmul",
    "attention_varlen",
    "attention_with_kv_cache",
    "rotary_embedding",
)
EVERY = {torch.float32: 1, torch.bfloat16: 4, torch.float64: 41}
UNCOVERED = r"have no (statistics of every image|relative_bias|float64 above a head dim)"
# The interpreter takes up to a minute for each of these.
LARGE = ("lstm-concatenated", "gru-many-rows", "many-heads", "lstm-zoneout", "gru-zoneout")
LARGE += tuple(
    f"{cell}-concatenated" for cell in ("peephole-lstm", "reset-before-gru", "layer-norm-lstm", "layer-norm-gru")
)


@functools.cache
def samples(name: str, dtype: torch.dtype) -> dict[str, Sample]:
    return {sample.name: sample for sample in _registry.get(name).samples(dtype, DEVICE, False, "quick")}


def cases(name: str, dtype: torch.dtype) -> list[Any]:
    names = list(samples(name, dtype))
    if DEVICE != "cuda":
        # Other numbers take the same paths but for their conversion, which any few samples have.
        names = [sample for sample in names if sample not in LARGE][:: EVERY[dtype]]
    return [pytest.param(name, dtype, sample, id=f"{name}-{str(dtype)[6:]}-{sample}") for sample in names]


@pytest.mark.parametrize(
    ("name", "dtype", "sample"), [case for op in OPS for dtype in EVERY for case in cases(op, dtype)]
)
def test_values_and_gradients(name: str, dtype: torch.dtype, sample: str) -> None:
    spec, call = _registry.get(name), samples(name, dtype)[sample]
    with ptk.backend("triton"):
        if spec.explain(*call.args, **call.kwargs).backend != "triton":
            with pytest.raises(BackendError, match=UNCOVERED):
                spec.function(*call.args, **call.kwargs)
            return
        ours = contract.value_and_gradients(spec.function, spec, call)
    contract.assert_results_within_rule(spec, call, dtype, ours)
