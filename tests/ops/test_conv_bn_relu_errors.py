"""Every bad call of conv_bn_relu names the operator and the argument, before any data is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels.errors import BackendError


def t(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def good() -> dict[str, Any]:
    """A valid call, to be spoiled in one place."""
    return {
        "input": t(2, 4, 6, 6),
        "weight": t(8, 4, 3, 3),
        "bias": t(8),
        "bn_weight": t(8),
        "bn_bias": t(8),
        "running_mean": t(8),
        "running_var": torch.ones(8),
    }


@dataclass(frozen=True)
class Bad:
    name: str
    changes: Callable[[], dict[str, Any]]
    error: type[Exception]
    message: str


BAD = [
    Bad("input None", lambda: {"input": None}, TypeError, "input: got .*NoneType, expected torch.Tensor"),
    Bad("input numpy", lambda: {"input": np.zeros((1, 4, 6, 6))}, TypeError, "input: got numpy.ndarray"),
    Bad("weight list", lambda: {"weight": [1.0]}, TypeError, "weight: got .*list, expected torch.Tensor"),
    Bad("bias number", lambda: {"bias": 1.0}, TypeError, "bias: got .*float, expected torch.Tensor"),
    Bad("bn_weight string", lambda: {"bn_weight": "x"}, TypeError, "bn_weight: got .*str"),
    Bad("residual list", lambda: {"residual": []}, TypeError, "residual: got .*list"),
    Bad("input int", lambda: {"input": torch.ones(2, 4, 6, 6, dtype=torch.int32)}, TypeError, "input: got dtype int32"),
    Bad("input complex", lambda: {"input": t(2, 4, 6, 6, dtype=torch.complex64)}, TypeError, "got dtype complex64"),
    Bad("input sparse", lambda: {"input": t(2, 4, 6, 6).to_sparse()}, TypeError, "input: got layout torch.sparse_coo"),
    Bad(
        "weight double",
        lambda: {"weight": t(8, 4, 3, 3).double()},
        TypeError,
        "weight: got dtype float64, expected float32",
    ),
    Bad("bias half", lambda: {"bias": t(8).half()}, TypeError, "bias: got dtype float16, expected float32"),
    Bad("bn_bias double", lambda: {"bn_bias": t(8).double()}, TypeError, "bn_bias: got dtype float64"),
    Bad(
        "mean int",
        lambda: {"running_mean": torch.ones(8, dtype=torch.int64)},
        TypeError,
        "running_mean: got dtype int64",
    ),
    Bad("residual dtype", lambda: {"residual": t(2, 8, 4, 4).bfloat16()}, TypeError, "residual: got dtype bfloat16"),
    Bad("meta weight", lambda: {"weight": t(8, 4, 3, 3, device="meta")}, ValueError, "weight: got device meta"),
    Bad("meta bias", lambda: {"bias": t(8, device="meta")}, ValueError, "bias: got device meta"),
    Bad("input 2-D", lambda: {"input": t(4, 6)}, ValueError, r"input: got shape \[4, 6\], expected 3 to 5 dimensions"),
    Bad("input 6-D", lambda: {"input": t(1, 4, 2, 2, 2, 2)}, ValueError, "expected 3 to 5 dimensions"),
    Bad("weight 3-D", lambda: {"weight": t(8, 4, 3)}, ValueError, "weight: got 3 dimensions, expected 4 like input"),
    Bad(
        "no channels", lambda: {"input": t(2, 0, 6, 6)}, ValueError, "input: got shape .*expected at least one channel"
    ),
    Bad(
        "empty kernel",
        lambda: {"weight": t(8, 4, 0, 3)},
        ValueError,
        "weight: got shape .*expected a kernel of at least 1",
    ),
    Bad(
        "weight channels",
        lambda: {"weight": t(8, 3, 3, 3)},
        ValueError,
        "weight: got 3 input channels per group, expected 4",
    ),
    Bad("kernel too large", lambda: {"weight": t(8, 4, 7, 3)}, ValueError, "smaller than the dilated kernel"),
    Bad("dilated too far", lambda: {"dilation": 3}, ValueError, "smaller than the dilated kernel"),
    Bad("bias length", lambda: {"bias": t(7)}, ValueError, r"bias: got shape \[7\], expected \[8\]"),
    Bad("bias 2-D", lambda: {"bias": t(8, 1)}, ValueError, r"bias: got shape \[8, 1\], expected \[8\]"),
    Bad("bn_weight length", lambda: {"bn_weight": t(4)}, ValueError, r"bn_weight: got shape \[4\]"),
    Bad("mean length", lambda: {"running_mean": t(4)}, ValueError, r"running_mean: got shape \[4\]"),
    Bad("var length", lambda: {"running_var": t(1)}, ValueError, r"running_var: got shape \[1\]"),
    Bad("mean alone", lambda: {"running_var": None}, ValueError, "running_var: got None, expected a tensor"),
    Bad("var alone", lambda: {"running_mean": None}, ValueError, "running_mean: got None, expected a tensor"),
    Bad(
        "affine without statistics",
        lambda: {"running_mean": None, "running_var": None},
        ValueError,
        "bn_weight: got a tensor, expected None without running statistics or training",
    ),
    Bad(
        "residual shape",
        lambda: {"residual": t(2, 8, 6, 6)},
        ValueError,
        r"residual: got shape .*expected \[2, 8, 4, 4\]",
    ),
    Bad("residual broadcast", lambda: {"residual": t(1, 8, 4, 4)}, ValueError, "residual: got shape"),
    Bad("training int", lambda: {"training": 1}, TypeError, "training: got int, expected bool"),
    Bad("momentum None", lambda: {"momentum": None}, TypeError, "momentum: got NoneType, expected float"),
    Bad("momentum negative", lambda: {"momentum": -0.1}, ValueError, "momentum: got -0.1"),
    Bad("eps string", lambda: {"eps": "small"}, TypeError, "eps: got str, expected float"),
    Bad("eps negative", lambda: {"eps": -1e-5}, ValueError, "eps: got -1e-05"),
    Bad("eps nan", lambda: {"eps": float("nan")}, ValueError, "eps: got nan"),
    Bad("stride zero", lambda: {"stride": 0}, ValueError, r"stride: got \[0, 0\], expected numbers of at least 1"),
    Bad("stride float", lambda: {"stride": 1.0}, TypeError, "stride: got 1.0, expected an int or 2 ints"),
    Bad("stride bool", lambda: {"stride": True}, TypeError, "stride: got True"),
    Bad("stride three", lambda: {"stride": (1, 1, 1)}, ValueError, "stride: got 3 numbers, expected 1 or 2"),
    Bad("padding negative", lambda: {"padding": (1, -1)}, ValueError, r"padding: got \[1, -1\]"),
    Bad(
        "padding word", lambda: {"padding": "full"}, ValueError, "padding: got 'full', expected ints, 'same' or 'valid'"
    ),
    Bad("same strided", lambda: {"padding": "same", "stride": 2}, ValueError, "padding: got 'same' with stride 2"),
    Bad("dilation zero", lambda: {"dilation": (0, 1)}, ValueError, r"dilation: got \[0, 1\]"),
    Bad("groups zero", lambda: {"groups": 0}, ValueError, "groups: got 0, expected at least 1"),
    Bad("groups float", lambda: {"groups": 2.0}, TypeError, "groups: got 2.0, expected an int"),
    Bad(
        "groups of input", lambda: {"groups": 3}, ValueError, "groups: got 3, expected a divisor of input's 4 channels"
    ),
    Bad(
        "groups of weight",
        lambda: {"groups": 4, "weight": t(6, 1, 3, 3)},
        ValueError,
        "groups: got 4, expected a divisor of weight's 6 channels",
    ),
    Bad(
        "activation unknown",
        lambda: {"activation": "swish"},
        ValueError,
        "activation: got 'swish', expected one of none",
    ),
    Bad("activation None", lambda: {"activation": None}, TypeError, "activation: got NoneType, expected str"),
    Bad("slope string", lambda: {"negative_slope": "0.1"}, TypeError, "negative_slope: got str, expected float"),
    Bad(
        "one value per channel",
        lambda: {"input": t(1, 4, 3, 3), "training": True},
        ValueError,
        "expected more than one value per channel when training",
    ),
    Bad("no value", lambda: {"input": t(0, 4, 6, 6), "training": True}, ValueError, "more than one value per channel"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_call(bad: Bad) -> None:
    for function in (ptk.conv_bn_relu, lambda **kwargs: ptk.explain("conv_bn_relu", **kwargs)):
        with pytest.raises(bad.error, match=f"^conv_bn_relu: .*{bad.message}|^conv_bn_relu: {bad.message}"):
            function(**{**good(), **bad.changes()})


def test_good_call() -> None:
    ptk.conv_bn_relu(**good())


def op(**changes: Any) -> Any:
    arguments = {
        **good(),
        "residual": None,
        "training": False,
        "eps": 1e-5,
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
    }
    return torch.ops.ptkernels.conv_bn_relu(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": [1]}, "stride"),
        ({"stride": [0, 1]}, "stride"),
        ({"padding": [-1, 0]}, "padding"),
        ({"dilation": [1, 1, 1]}, "dilation"),
        ({"groups": 0}, "groups"),
        ({"groups": 3}, "weight"),
        ({"eps": float("nan")}, "eps"),
        ({"activation": "swish"}, "activation"),
        ({"bias": torch.ones(7)}, "bias"),
        ({"running_var": None}, "running_var"),
        ({"residual": torch.ones(1)}, "residual"),
        ({"weight": torch.ones(8, 4, 9, 9)}, "input"),
        ({"weight": torch.ones(8, 4, 3)}, "weight"),
        ({"input": torch.ones(4, 6)}, "input"),
        ({"input": torch.ones(2, 4, 6, 6, dtype=torch.int8)}, "input"),
    ],
)
def test_the_operator_checks_for_itself(changes: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"conv_bn_relu: {message}: got"):
        op(**changes)


def test_backend_that_cannot_run() -> None:
    with pytest.raises(BackendError), ptk.backend("cuda"):
        ptk.conv_bn_relu(**good())
