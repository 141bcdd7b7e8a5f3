"""Packed attention on batches of named models: ``pytest bench/bench_attention_varlen.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "attention_varlen"


def test_attention_varlen(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
