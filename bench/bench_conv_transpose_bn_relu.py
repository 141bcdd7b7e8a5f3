"""Transposed convolutions of generators: ``pytest bench/bench_conv_transpose_bn_relu.py -k "s2 and float32"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "conv_transpose_bn_relu"


def test_conv_transpose_bn_relu(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
