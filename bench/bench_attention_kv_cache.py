"""Decoding with a cache on the heads of named models: ``pytest bench/bench_attention_kv_cache.py -k int8``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OP = "attention_with_kv_cache"


def test_attention_with_kv_cache(benchmark: Any, contender: Callable[[], object]) -> None:
    benchmark(contender)
