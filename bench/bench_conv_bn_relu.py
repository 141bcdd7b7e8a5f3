"""Convolution layers of named models: ``pytest bench/bench_conv_bn_relu.py -k "56 and float32"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "conv_bn_relu"


def test_conv_bn_relu(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
