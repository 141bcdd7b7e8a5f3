"""Attention on the shapes of named models: ``pytest bench/bench_attention.py -k "bert and float32"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "attention"


def test_attention(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
