"""Recurrent layers on ragged sequences: ``pytest bench/bench_packed_rnn.py -k "lstm-512 and float32"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "packed_rnn"


def test_packed_rnn(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
