"""Every operator's samples on the Triton backend, through its public function: values and gradients by the error rule.

A sample that the kernels do not cover must say so by name.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_contract as contract
import torch

import ptkernels as ptk
from ptkernels import _registry
from ptkernels.errors import BackendError

OPS = ("packed_rnn", "conv_bn_relu", "quantized_matmul")
# What the kernels are allowed not to cover.
UNCOVERED = r"have no projection"


def cases(name: str, dtype: torch.dtype) -> list[Any]:
    return [
        pytest.param(name, dtype, sample, id=f"{name}-{str(dtype)[6:]}-{sample}")
        for sample in contract.samples_of(name, dtype, "quick")
    ]


@pytest.mark.parametrize(
    ("name", "dtype", "sample"), [case for op in OPS for dtype in (torch.float32, torch.bfloat16) for case in cases(op, dtype)]
)
def test_values_and_gradients(name: str, dtype: torch.dtype, sample: str) -> None:
    spec = _registry.get(name)
    call = contract.sample_of(spec, dtype, sample, "quick")
    with ptk.backend("triton"):
        try:
            chosen = spec.explain(*call.args, **call.kwargs)
        except BackendError as error:
            pytest.skip(str(error))
        if chosen.backend != "triton":
            with pytest.raises(BackendError, match=UNCOVERED):
                spec.function(*call.args, **call.kwargs)
            return
        ours = contract.value_and_gradients(spec.function, spec, call)
    contract.assert_results_within_rule(spec, call, dtype, ours)
