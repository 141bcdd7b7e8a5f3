"""Every bad call on a cache names the argument, before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import ptkernels as ptk
from ptkernels.errors import BackendError

B, H, HKV, LQ, CAPACITY, D = 2, 4, 2, 3, 16, 8


def t(*shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, **options)


def good() -> dict[str, Any]:
    """A valid call that appends and rotates, to be spoiled in one place."""
    return {
        "query": t(B, H, LQ, D),
        "k_cache": t(B, HKV, CAPACITY, D),
        "v_cache": t(B, HKV, CAPACITY, D),
        "k": t(B, HKV, LQ, D),
        "v": t(B, HKV, LQ, D),
        "cache_seqlens": torch.tensor([5, 0]),
        "rotary_cos": t(CAPACITY, D // 2),
        "rotary_sin": t(CAPACITY, D // 2),
    }


def pages(table: list[list[int]], count: int = 4, **options: Any) -> dict[str, Any]:
    """The changes that make a paged call of it: pages of 4 slots."""
    caches = {name: t(count, HKV, 4, D) for name in ("k_cache", "v_cache")}
    return {**caches, "block_table": torch.tensor(table), **options}


def codes(dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    caches = {name: torch.zeros(B, HKV, CAPACITY, D, dtype=dtype) for name in ("k_cache", "v_cache")}
    return {**caches, "k_scale": torch.ones(HKV), "v_scale": torch.ones(HKV), **options}


def old(**options: Any) -> dict[str, Any]:
    return {"k": None, "v": None, "rotary_cos": None, "rotary_sin": None, **options}


@dataclass(frozen=True)
class Bad:
    name: str
    changes: Callable[[], dict[str, Any]]
    error: type[Exception]
    message: str


BAD = [
    # what the tensors are
    Bad("query None", lambda: {"query": None}, TypeError, "query: got .*NoneType, expected torch.Tensor"),
    Bad("cache list", lambda: {"k_cache": [1.0]}, TypeError, "k_cache: got .*list, expected torch.Tensor"),
    Bad("k number", lambda: {"k": 1.0}, TypeError, "k: got .*float, expected torch.Tensor"),
    Bad("sparse cache", lambda: {"v_cache": t(B, HKV, CAPACITY, D).to_sparse()}, TypeError, "v_cache: got layout"),
    Bad("query rank", lambda: {"query": t(B, LQ, D)}, ValueError, "query: got 3 dimensions, expected 4"),
    Bad("cache rank", lambda: {"k_cache": t(HKV, CAPACITY, D)}, ValueError, "k_cache: got 3 dimensions, expected 4"),
    Bad("device", lambda: {"k_cache": t(B, HKV, CAPACITY, D, device="meta")}, ValueError, "k_cache: got device meta"),
    # dtypes
    Bad("query int", lambda: {"query": torch.ones(B, H, LQ, D).int()}, TypeError, "query: got dtype int32"),
    Bad(
        "query half",
        lambda: {"query": t(B, H, LQ, D).half()},
        TypeError,
        "k_cache: got dtype float32, expected float16 or int8 or float8_e4m3fn",
    ),
    Bad(
        "cache uint8",
        lambda: {"k_cache": torch.ones(B, HKV, CAPACITY, D).byte()},
        TypeError,
        "k_cache: got dtype uint8",
    ),
    Bad(
        "v_cache half",
        lambda: {"v_cache": t(B, HKV, CAPACITY, D).half()},
        TypeError,
        "v_cache: got dtype float16, expected float32",
    ),
    Bad("k bfloat16", lambda: {"k": t(B, HKV, LQ, D).bfloat16()}, TypeError, "k: got dtype bfloat16, expected float32"),
    Bad(
        "seqlens float", lambda: {"cache_seqlens": t(B)}, TypeError, "cache_seqlens: got dtype float32, expected int32"
    ),
    Bad("seqlens list", lambda: {"cache_seqlens": [5, 0]}, TypeError, "cache_seqlens: got list, expected torch.Tensor"),
    Bad("seqlens bool", lambda: {"cache_seqlens": True}, TypeError, "cache_seqlens: got bool, expected torch.Tensor"),
    Bad("seqlens half", lambda: {"cache_seqlens": 2.5}, TypeError, "cache_seqlens: got float, expected torch.Tensor"),
    Bad(
        "table float",
        lambda: pages([[0, 1], [2, 3]]) | {"block_table": t(2, 2)},
        TypeError,
        "block_table: got dtype float32, expected int32 or int64",
    ),
    Bad("cos half", lambda: {"rotary_cos": t(CAPACITY, 4).half()}, TypeError, "rotary_cos: got dtype float16"),
    Bad("sin bfloat16", lambda: {"rotary_sin": t(CAPACITY, 4).bfloat16()}, TypeError, "rotary_sin: got dtype bfloat16"),
    Bad("slopes double", lambda: {"alibi_slopes": t(H).double()}, TypeError, "alibi_slopes: got dtype float64"),
    Bad("sinks half", lambda: {"sinks": t(H).half()}, TypeError, "sinks: got dtype float16, expected float32"),
    # shapes
    Bad(
        "head dims", lambda: {"query": t(B, H, LQ, D + 1)}, ValueError, r"k_cache: got shape \[2, 2, 16, 8\], expected"
    ),
    Bad(
        "kv heads",
        lambda: {"query": t(B, 3, LQ, D)},
        ValueError,
        "k_cache: got 2 heads, expected a divisor of query's 3",
    ),
    Bad("cache heads", lambda: {"v_cache": t(B, 1, CAPACITY, D)}, ValueError, "v_cache: got shape"),
    Bad("capacities", lambda: {"v_cache": t(B, HKV, CAPACITY + 1, D)}, ValueError, "v_cache: got shape"),
    Bad(
        "batch",
        lambda: {"query": t(1, H, LQ, D), "k": t(1, HKV, LQ, D), "v": t(1, HKV, LQ, D), "cache_seqlens": 0},
        ValueError,
        "k_cache: got batch size 2, expected 1 like query",
    ),
    Bad(
        "dim 513",
        lambda: old(**{n: t(B, HKV, 4, 513) for n in ("query", "k_cache", "v_cache")}, cache_seqlens=2),
        ValueError,
        "query: got head dim 513, expected 1 to 512",
    ),
    Bad(
        "strided cache",
        lambda: {"k_cache": t(B, HKV, D, CAPACITY).mT},
        ValueError,
        "k_cache: got stride 16 in its last dimension, expected 1",
    ),
    Bad("k without v", lambda: {"v": None}, ValueError, "v: got None, expected both of k and v or neither"),
    Bad("v without k", lambda: {"k": None}, ValueError, "k: got None, expected both of k and v or neither"),
    Bad("k heads", lambda: {"k": t(B, H, LQ, D)}, ValueError, "k: got shape"),
    Bad("v length", lambda: {"v": t(B, HKV, LQ + 1, D)}, ValueError, "v: got shape"),
    Bad(
        "expanded cache",
        lambda: {"k_cache": t(1, HKV, CAPACITY, D).expand(B, -1, -1, -1)},
        ValueError,
        "k_cache: got stride 0 in dimension 0, expected a cache whose elements",
    ),
    Bad(
        "seqlens shape", lambda: {"cache_seqlens": torch.zeros(3).int()}, ValueError, r"cache_seqlens: got shape \[3\]"
    ),
    Bad("seqlens scalar", lambda: {"cache_seqlens": torch.tensor(3)}, ValueError, r"cache_seqlens: got shape \[\]"),
    Bad(
        "leftpad shape", lambda: {"cache_leftpad": torch.zeros(1).int()}, ValueError, r"cache_leftpad: got shape \[1\]"
    ),
    Bad(
        "table rank",
        lambda: pages([[0, 1], [2, 3]]) | {"block_table": torch.zeros(2).int()},
        ValueError,
        "block_table: got 1 dimensions, expected 2",
    ),
    Bad(
        "table batch", lambda: pages([[0, 1, 2, 3]]), ValueError, r"block_table: got shape \[1, 4\], expected \[2, 4\]"
    ),
    Bad(
        "page 513",
        lambda: {**{n: t(2, HKV, 513, D) for n in ("k_cache", "v_cache")}, "block_table": torch.tensor([[0], [1]])},
        ValueError,
        "k_cache: got page size 513, expected 1 to 512",
    ),
    Bad(
        "table and index",
        lambda: pages([[0, 1], [2, 3]], cache_batch_idx=torch.tensor([0, 1])),
        ValueError,
        "cache_batch_idx: got a tensor, expected None where block_table",
    ),
    Bad("cos alone", lambda: {"rotary_sin": None}, ValueError, "rotary_sin: got None, expected both of rotary_cos"),
    Bad("sin shape", lambda: {"rotary_sin": t(CAPACITY, 3)}, ValueError, r"rotary_sin: got shape \[16, 3\]"),
    Bad(
        "angles",
        lambda: {n: t(CAPACITY, 5) for n in ("rotary_cos", "rotary_sin")},
        ValueError,
        "rotary_cos: got 5 angles, expected at most half of 8",
    ),
    Bad("rotary rank", lambda: {"rotary_cos": t(CAPACITY, 4, 1)}, ValueError, "rotary_cos: got 3 dimensions"),
    Bad(
        "rotary without keys",
        lambda: {"k": None, "v": None},
        ValueError,
        "rotary_cos: got a tensor, expected None without new keys",
    ),
    Bad(
        "rotated lengths",
        lambda: {"k": t(B, HKV, 2, D), "v": t(B, HKV, 2, D)},
        ValueError,
        "k: got length 2, expected query's 3 where both are rotated",
    ),
    Bad("slopes shape", lambda: {"alibi_slopes": t(H + 1)}, ValueError, r"alibi_slopes: got shape \[5\]"),
    Bad("sinks shape", lambda: {"sinks": t(B, H)}, ValueError, r"sinks: got shape \[2, 4\]"),
    # scales
    Bad("scale for floats", lambda: {"k_scale": torch.ones(HKV)}, ValueError, "k_scale: got a tensor, expected None"),
    Bad(
        "no scale", lambda: codes(torch.int8, v_scale=None), ValueError, "v_scale: got None, expected the scales of the"
    ),
    Bad(
        "scale heads",
        lambda: codes(torch.float8_e4m3fn, k_scale=torch.ones(H)),
        ValueError,
        r"k_scale: got shape \[4\]",
    ),
    Bad(
        "scale dtype",
        lambda: codes(torch.int8, k_scale=torch.ones(HKV).half()),
        TypeError,
        "k_scale: got dtype float16",
    ),
    Bad("scale slots", lambda: codes(torch.int8, k_scale=torch.ones(B, HKV, 3)), ValueError, "k_scale: got shape"),
    Bad(
        "expanded scale",
        lambda: codes(torch.int8, v_scale=torch.ones(1).expand(B, HKV, CAPACITY)),
        ValueError,
        "v_scale: got stride 0 in dimension 0",
    ),
    # values
    Bad(
        "beyond capacity",
        lambda: {"cache_seqlens": torch.tensor([14, 0])},
        ValueError,
        r"cache_seqlens: got 14 for sequence 0, expected 0 to 13 \(a capacity of 16, 3 of it for new keys\)",
    ),
    Bad("int beyond capacity", lambda: old(cache_seqlens=17), ValueError, "cache_seqlens: got 17 for sequence 0"),
    Bad(
        "negative length",
        lambda: {"cache_seqlens": torch.tensor([0, -1])},
        ValueError,
        "cache_seqlens: got -1 for sequence 1",
    ),
    Bad("huge length", lambda: {"cache_seqlens": torch.tensor([2**62, 0])}, ValueError, "cache_seqlens: got 4611"),
    Bad(
        "beyond pages",
        lambda: pages([[0, 1], [2, 3]], cache_seqlens=torch.tensor([6, 0])),
        ValueError,
        "cache_seqlens: got 6 for sequence 0, expected 0 to 5",
    ),
    Bad(
        "block 4",
        lambda: pages([[0, 4], [2, 3]]),
        ValueError,
        "block_table: got 4 for block 1 of sequence 0, expected 0 to 3",
    ),
    Bad("block -1", lambda: pages([[0, 1], [-1, 3]]), ValueError, "block_table: got -1 for block 0 of sequence 1"),
    Bad(
        "block twice",
        lambda: pages([[0, 1], [1, 3]]),
        ValueError,
        "block_table: got row 1 of the cache twice among those that are appended to",
    ),
    Bad(
        "row 2",
        lambda: {"cache_batch_idx": torch.tensor([0, 2])},
        ValueError,
        "cache_batch_idx: got 2 for sequence 1, expected 0 to 1",
    ),
    Bad(
        "row twice",
        lambda: {"cache_batch_idx": torch.tensor([1, 1])},
        ValueError,
        "cache_batch_idx: got row 1 of the cache twice",
    ),
    Bad(
        "leftpad",
        lambda: {"cache_leftpad": torch.tensor([2, 1])},
        ValueError,
        "cache_leftpad: got 1 for sequence 1, expected 0 to its cache_seqlens, 0",
    ),
    Bad(
        "negative leftpad",
        lambda: {"cache_leftpad": torch.tensor([-1, 0])},
        ValueError,
        "cache_leftpad: got -1 for sequence 0",
    ),
    Bad(
        "angles of 7 slots",
        lambda: {n: t(7, 4) for n in ("rotary_cos", "rotary_sin")},
        ValueError,
        "rotary_cos: got 7 positions, expected at least 8",
    ),
    # numbers
    Bad("scale inf", lambda: {"scale": math.inf}, ValueError, "scale: got inf, expected a finite number"),
    Bad("scale text", lambda: {"scale": "1"}, TypeError, "scale: got str, expected float"),
    Bad("softcap negative", lambda: {"softcap": -1.0}, ValueError, "softcap: got -1.0, expected a finite number"),
    Bad("softcap nan", lambda: {"softcap": math.nan}, ValueError, "softcap: got nan, expected a finite number"),
    Bad("causal", lambda: {"is_causal": "yes"}, TypeError, "is_causal: got str, expected bool"),
    Bad("interleaved", lambda: {"rotary_interleaved": "no"}, TypeError, "rotary_interleaved: got str, expected bool"),
    Bad("window number", lambda: {"window": 5}, TypeError, "window: got 5, expected None or a pair of ints"),
    Bad("window triple", lambda: {"window": (1, 2, 3)}, TypeError, r"window: got \(1, 2, 3\), expected None or a pair"),
    Bad("window float", lambda: {"window": (0.5, 1)}, TypeError, r"window: got \(0.5, 1\), expected None or a pair"),
]

each_bad = pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)


def test_names_are_unique() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD)


@each_bad
def test_public_function(bad: Bad) -> None:
    arguments = good() | bad.changes()
    caches = [arguments[name] for name in ("k_cache", "v_cache")]
    caches = [cache for cache in caches if isinstance(cache, Tensor) and cache.layout is torch.strided]
    before = [cache.clone() for cache in caches]
    with pytest.raises(bad.error, match=f"^attention_with_kv_cache: {bad.message}"):
        ptk.attention_with_kv_cache(**arguments)
    assert all(torch.equal(*pair) for pair in zip(caches, before, strict=True) if not pair[0].is_meta)


@each_bad
def test_reference_backend(bad: Bad) -> None:
    with ptk.backend("reference"), pytest.raises(bad.error, match=f"^attention_with_kv_cache: {bad.message}"):
        ptk.attention_with_kv_cache(**(good() | bad.changes()))


@each_bad
def test_explain(bad: Bad) -> None:
    with pytest.raises(bad.error, match=f"^attention_with_kv_cache: {bad.message}"):
        ptk.explain(ptk.attention_with_kv_cache, **(good() | bad.changes()))


@each_bad
def test_operator_underneath(bad: Bad) -> None:
    """Raises as well, with the words of the C++ glue or of torch's dispatcher."""
    arguments = good() | bad.changes()
    if "window" in arguments or not isinstance(arguments["cache_seqlens"], Tensor):
        pytest.skip("another type in the operator's schema")
    op = torch.ops.ptkernels.attention_with_kv_cache_append
    if arguments["k"] is None and arguments["v"] is None and bad.name != "rotary without keys":
        arguments = {name: value for name, value in arguments.items() if value is not None}
        op = torch.ops.ptkernels.attention_with_kv_cache
    with pytest.raises((RuntimeError, ValueError, TypeError)) as raised:
        op(**arguments)
    assert str(raised.value)


def test_good_calls_are_good() -> None:
    for changes in ({}, pages([[0, 1], [2, 3]]), codes(torch.int8), codes(torch.float8_e4m3fn), old(cache_seqlens=2)):
        ptk.attention_with_kv_cache(**(good() | changes))


def test_missing_lengths() -> None:
    arguments = good()
    del arguments["cache_seqlens"]
    with pytest.raises(TypeError, match="cache_seqlens"):
        ptk.attention_with_kv_cache(**arguments)


def test_bad_call_in_a_compiled_function() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ptk.attention_with_kv_cache, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"k: got shape \[2, 2, 3, 9\], expected \[2, 2, 3, 8\]"):
        compiled(**(good() | {"k": t(B, HKV, LQ, D + 1)}))


def test_backend_of_another_device() -> None:
    arguments = {n: value.to("meta") if isinstance(value, Tensor) else value for n, value in good().items()}
    ptk.attention_with_kv_cache(**arguments)
    with ptk.backend("cpu"), pytest.raises(BackendError, match=r"backend 'cpu' was asked for, got .* meta"):
        ptk.attention_with_kv_cache(**arguments)
