"""Turns every benchmark case of an operator, with every contender, into a parameter of its bench file."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from ptkernels._registry import BenchCase, get
from ptkernels.cli.bench.gate import PEER_SLACK, Oracle
from ptkernels.cli.bench.peers import parts_of, peers_of
from ptkernels.cli.bench.problem import Contender, Problem, UnsupportedError, dtype_name
from ptkernels.cli.bench.runner import OURS

CHECK_FLOPS = 5e9


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.module, "OP", None)
    if op is None or "contender" not in metafunc.fixturenames:
        return
    spec = get(op)
    names = [OURS, *(peer.name for peer in peers_of(spec))]
    parameters = [(op, case, name) for case in spec.bench_cases() for name in names]
    ids = [f"{case.name}-{dtype_name(case.dtype)}-{case.direction}-{name}" for _, case, name in parameters]
    metafunc.parametrize("contender", parameters, ids=ids, indirect=True)


@lru_cache(maxsize=1)
def _checked(op: str, index: int) -> tuple[Problem, Oracle]:
    # Contenders of one case follow each other, so that the last problem is all that has to be kept.
    problem = Problem(get(op), get(op).bench_cases()[index])
    outputs = problem.contender(OURS, problem.spec.function).outputs()
    oracle = Oracle(problem, parts_of(problem, CHECK_FLOPS), outputs[: len(outputs) - len(problem.leaves)])
    return problem, oracle


def _prepare(problem: Problem, name: str) -> Contender:
    if name == OURS:
        return problem.contender(OURS, problem.spec.function)
    peer = next(peer for peer in peers_of(problem.spec) if peer.name == name)
    try:
        peer.version()
        return peer.prepare(problem, torch.get_num_threads())
    except (ImportError, UnsupportedError) as reason:
        pytest.skip(str(reason))


@pytest.fixture
def contender(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], object]:
    """What to time; it has passed the check against the float64 reference."""
    op, case, name = request.param
    problem, oracle = _checked(op, _position(op, case))
    prepared = _prepare(problem, name)
    verdict = oracle.check(prepared.outputs(), 1.0 if name == OURS else PEER_SLACK)
    assert verdict.passed, verdict.text
    benchmark.group = f"{op} {case.name} {dtype_name(case.dtype)} {case.direction}"
    benchmark.extra_info.update(shape=case.shape, work_flops=case.work_flops, work_bytes=case.work_bytes)
    return prepared.call


def _position(op: str, case: BenchCase) -> int:
    key = (case.name, case.dtype, case.direction)
    return [(one.name, one.dtype, one.direction) for one in get(op).bench_cases()].index(key)
