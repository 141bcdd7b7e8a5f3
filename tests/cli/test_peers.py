"""The inference engines compute what they are timed for, in every form the cases can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ptkernels._registry import BenchCase, get
from ptkernels.cli.bench.gate import PEER_SLACK, Oracle, whole
from ptkernels.cli.bench.peers import attention, peers_of
from ptkernels.cli.bench.problem import Contender, Problem, UnsupportedError

LK = 9
Options = dict[str, Any]


def padding(generator: torch.Generator) -> Tensor:
    return torch.arange(LK) < torch.tensor([LK, 4])[:, None, None, None]


def bias(generator: torch.Generator) -> Tensor:
    return torch.randn(1, 4, 7, LK, generator=generator)


CALLS: dict[str, tuple[tuple[int, ...], Options]] = {
    # B, Hq, Hkv, Lq, D, Dv and the options; Lk is 9
    "plain": ((2, 4, 4, 7, 16, 16), {}),
    "causal": ((2, 4, 4, 9, 16, 16), {"is_causal": True}),
    "causal-fewer-queries": ((2, 4, 4, 7, 16, 16), {"is_causal": True}),
    "causal-more-queries": ((2, 4, 4, 13, 16, 16), {"is_causal": True}),
    "grouped": ((2, 4, 2, 7, 16, 16), {}),
    "grouped-causal": ((2, 4, 2, 9, 16, 16), {"is_causal": True}),
    "padding": ((2, 4, 4, 7, 16, 16), {"attn_mask": padding}),
    "bias": ((2, 4, 4, 7, 16, 16), {"attn_mask": bias}),
    "grouped-padding-causal": ((2, 4, 2, 7, 16, 16), {"attn_mask": padding, "is_causal": True}),
    "scale": ((2, 4, 4, 7, 16, 16), {"scale": 0.5}),
    "unequal-dims": ((2, 4, 4, 7, 16, 24), {}),
    "decode": ((1, 8, 2, 1, 32, 32), {}),
}


def problem_of(name: str, dtype: torch.dtype) -> Problem:
    (batch, heads, kv_heads, lq, dim, dim_v), options = CALLS[name]

    def make(generator: torch.Generator) -> tuple[tuple[Tensor, ...], Options]:
        shapes = ((batch, heads, lq, dim), (batch, kv_heads, LK, dim), (batch, kv_heads, LK, dim_v))
        operands = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        drawn = {key: value(generator) if callable(value) else value for key, value in options.items()}
        if "attn_mask" in drawn and drawn["attn_mask"].is_floating_point():
            drawn["attn_mask"] = drawn["attn_mask"].to(dtype)
        return operands, {"enable_gqa": heads != kv_heads, **drawn}

    return Problem(get("attention"), BenchCase(name, name, {}, dtype, "forward", make, 1, 1))


def oracle_of(problem: Problem) -> Oracle:
    return Oracle(problem, whole(problem), (problem.spec.reference(*problem.args, **problem.kwargs),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("name", CALLS)
def test_onnxruntime_forms(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    problem = problem_of(name, dtype)
    oracle = oracle_of(problem)
    forms: list[Callable[..., Any]] = [attention._onnx_attention, attention._onnx_mha, attention._onnx_matmul]
    checked = 0
    for form in forms:
        try:
            session, restore = form(problem, 1)
        except UnsupportedError:
            continue
        session.run()
        verdict = oracle.check((restore(session.output()),), PEER_SLACK)
        assert verdict.passed, f"{form.__name__}: {verdict.text}"
        checked += 1
    # The standard's operator takes them all.
    assert checked >= 1


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
@pytest.mark.parametrize("name", CALLS)
def test_openvino(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("openvino")
    problem = problem_of(name, dtype)
    verdict = oracle_of(problem).check(contender("openvino", problem).outputs(), PEER_SLACK)
    assert verdict.passed, verdict.text


@pytest.mark.parametrize("name", CALLS)
def test_eager_composition(name: str) -> None:
    problem = problem_of(name, torch.float64)
    assert oracle_of(problem).check((attention.composition(*problem.args, **problem.kwargs),)).passed


def test_eager_composition_caps_and_sinks() -> None:
    problem = problem_of("grouped-causal", torch.float64)
    options = {"softcap": 0.7, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)}
    found, expected = (
        function(*problem.args, **problem.kwargs, **options)
        for function in (attention.composition, problem.spec.reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_refuse_a_backward(engine: str) -> None:
    problem = problem_of("plain", torch.float32)
    problem.backward = True
    pytest.importorskip(engine)
    with pytest.raises(UnsupportedError, match="no backward"):
        contender(engine, problem)


def contender(name: str, problem: Problem) -> Contender:
    peer = next(peer for peer in peers_of(problem.spec) if peer.name == name)
    return peer.prepare(problem, 1)
