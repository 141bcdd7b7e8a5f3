"""Quantized linear layers of named models: ``pytest bench/bench_quantized_matmul.py -k "bert and int8_dynamic"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "quantized_matmul"


def test_quantized_matmul(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
