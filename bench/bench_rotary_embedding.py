"""Rotary embedding of queries and keys of named models: ``pytest bench/bench_rotary_embedding.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "rotary_embedding"


def test_rotary_embedding(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
