"""The cache operator's entry in the table: sample calls, PyTorch's own way of doing it, bench shapes of real models."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptkernels._registry import BenchCase, Level, OpSpec, Sample, register
from ptkernels.ops.attention_kv_cache import attention_with_kv_cache, reference, routing


@dataclass(frozen=True)
class _Case:
    """``filled`` are the slots in use per sequence before the call; ``new`` None appends as many keys as queries."""

    name: str
    filled: tuple[int, ...]
    lq: int = 1
    new: int | None = None
    d: int = 16
    dv: int | None = None
    heads: int = 4
    kv_heads: int = 2
    capacity: int = 40
    page: int | None = None
    heads_inside: bool = False
    batch_idx: bool = False
    leftpad: bool = False
    quantized: torch.dtype | None = None
    scale_per_head: bool = False
    rotary: int = 0
    interleaved: bool = False
    alibi: bool = False
    sinks: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def sample(self, dtype: torch.dtype, device: str) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        batch, dv = len(self.filled), self.d if self.dv is None else self.dv
        new = self.lq if self.new is None else self.new

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)

        kwargs: dict[str, Any] = {"cache_seqlens": torch.tensor(self.filled, dtype=torch.int32, device=device)}
        query = draw(batch, self.heads, self.lq, self.d).to(dtype)
        fresh = [draw(batch, self.kv_heads, new, dim).to(dtype) for dim in (self.d, dv)] if new else []
        if self.page is None:
            rows, slots = batch + 2 * self.batch_idx, self.capacity
        else:
            per_sequence = math.ceil(self.capacity / self.page)
            rows, slots = batch * per_sequence + 1, self.page
            order = torch.randperm(rows, generator=generator, device=device)[: batch * per_sequence]
            kwargs["block_table"] = order.view(batch, per_sequence).int()
        if self.batch_idx:
            kwargs["cache_batch_idx"] = torch.randperm(rows, generator=generator, device=device)[:batch]
        if self.leftpad:
            kwargs["cache_leftpad"] = torch.tensor([length // 2 for length in self.filled], device=device)
        caches = []
        for name, dim in (("k_scale", self.d), ("v_scale", dv)):
            cache, scale = self._cache(draw(rows, self.kv_heads, slots, dim), dtype)
            caches.append(cache.transpose(1, 2).contiguous().transpose(1, 2) if self.heads_inside else cache)
            if scale is not None:
                kwargs[name] = scale
        if self.rotary:
            angles = torch.rand(self.capacity, self.rotary // 2, generator=generator, device=device) * 6
            kwargs |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
            kwargs["rotary_interleaved"] = self.interleaved
        if self.alibi:
            kwargs["alibi_slopes"] = draw(self.heads).abs().float()
        if self.sinks:
            kwargs["sinks"] = draw(self.heads).float()
        return Sample(self.name, (query, *caches, *fresh), kwargs | dict(self.options))

    def _cache(self, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if self.quantized is None:
            return values.to(dtype), None
        per_head = values.abs().amax((0, 2, 3)).float() / 100 if self.scale_per_head else None
        codes, scale = reference.quantize(values.movedim(1, 0).flatten(1, 2), self.quantized, per_head)
        codes = codes.view(self.kv_heads, *values.shape[::2][:2], -1).movedim(0, 1).contiguous()
        scale = scale.view(self.kv_heads, *values.shape[::2][:2]).movedim(0, 1).contiguous()
        return codes, scale if per_head is None else per_head


_SMALL = [
    _Case("read-only", (17, 5), new=0),
    _Case("append", (17, 0)),
    _Case("chunk", (11, 3), lq=7),
    _Case("paged", (17, 5), page=4),
    _Case("rotary", (17, 5), rotary=16),
    _Case("read-only-window", (17, 23), new=0, lq=3, options=(("window", (4, 1)), ("is_causal", False))),
    _Case("rotary-interleaved-paged", (9, 5), lq=2, rotary=8, interleaved=True, page=1),
]

_QUICK = [
    *_SMALL,
    *(_Case(f"page-{page}", (30, 17), lq=3, page=page, capacity=64) for page in (1, 5, 64)),
    _Case("long", (1025, 511), capacity=1200, d=64, heads=8),
    _Case("long-paged", (1025, 511), capacity=1200, d=64, heads=8, page=16, heads_inside=True),
    _Case("no-grouping", (33, 9), heads=3, kv_heads=3, d=24),
    _Case("one-shared-head", (33, 9), heads=5, kv_heads=1, d=33, dv=20),
    _Case("chunk-of-70", (130, 9), lq=70, capacity=320, d=40, dv=72),
    _Case("more-new-than-queries", (13, 9), lq=2, new=5),
    _Case("more-queries-than-keys", (0, 3), lq=6, new=1),
    _Case("heads-inside", (17, 5), heads_inside=True),
    _Case("batch-idx", (17, 5), batch_idx=True),
    _Case("leftpad", (20, 31), leftpad=True, lq=2),
    _Case("leftpad-paged-chunk", (20, 31), leftpad=True, lq=9, page=8, heads=8, capacity=48),
    _Case("window", (30, 17), lq=9, options=(("window", (5, -1)),)),
    _Case("window-both", (600, 17), lq=20, capacity=700, options=(("window", (300, 4)), ("is_causal", False))),
    _Case("softcap", (30, 17), options=(("softcap", 3.0), ("scale", 1.5))),
    _Case("alibi", (30, 17), lq=3, alibi=True),
    _Case("sinks", (30, 0), new=0, sinks=True),
    _Case("sinks-chunk", (30, 0), lq=20, sinks=True, capacity=60),
    _Case("scale-negative", (30, 17), options=(("scale", -0.4),)),
    *(
        _Case(
            f"{str(dtype)[6:]}{'-per-head' * per_head}{f'-chunk-of-{lq}' * (lq > 1)}",
            (30, 17),
            lq=lq,
            quantized=dtype,
            scale_per_head=per_head,
            capacity=64,
        )
        for dtype in (torch.int8, torch.float8_e4m3fn)
        for per_head in (False, True)
        for lq in (1, 20)
    ),
    _Case("int8-paged", (30, 17), quantized=torch.int8, page=8, capacity=64),
    _Case("nothing-cached", (0, 0), new=0),
    _Case("no-batch", (), new=0),
    _Case("no-queries", (17, 5), lq=0, new=3),
]

_FULL = [
    *_QUICK,
    _Case("dim-128", (3000,), capacity=3100, d=128, heads=32, kv_heads=8),
    _Case("prefill", (0, 100), lq=300, capacity=500, d=128, heads=8),
    *(_Case(f"dim-{d}", (70,), capacity=100, d=d) for d in (1, 7, 80, 96, 256, 512)),
]

_CASES: dict[Level, list[_Case]] = {"gradcheck": _SMALL, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls; nothing is differentiable, whatever ``requires_grad`` says."""
    return (case.sample(dtype, device) for case in _CASES[level])


_PLACE = ("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad")
_ROTARY = ("rotary_cos", "rotary_sin", "rotary_interleaved")


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators."""
    for case in (*_SMALL[:5], _Case("op-int8", (5, 2), quantized=torch.int8, lq=2)):
        sample = case.sample(dtype, device)
        tail = (None, True, 5, -1, 2.0, None, None, sample.kwargs.get("k_scale"), sample.kwargs.get("v_scale"))
        place = tuple(sample.kwargs.get(name) for name in _PLACE)
        if len(sample.args) == 3:
            yield "ptkernels::attention_with_kv_cache", (*sample.args, *place, *tail)
        else:
            rotary = (*(sample.kwargs.get(name) for name in _ROTARY[:2]), False)
            yield "ptkernels::attention_with_kv_cache_append", (*sample.args, *place, *rotary, *tail)


def composition(query: Tensor, k_cache: Tensor, v_cache: Tensor, *new: Tensor | None, **options: Any) -> Any:
    """As models write it out: gathered pages, products in the query's dtype, softmax in float32."""
    return reference.append_and_attend(query, k_cache, v_cache, *new, **options, product_dtype=query.dtype)


_BENCH_CASES = [
    # name, filled slots, page, dtype, cache
    ("llama3-8b-decode-4096", 4096, None, torch.bfloat16, None),
    ("llama3-8b-decode-4096", 4096, None, torch.float32, None),
    ("llama3-8b-decode-4096-paged", 4096, 16, torch.bfloat16, None),
    ("llama3-8b-decode-4096-int8", 4096, None, torch.bfloat16, torch.int8),
    ("llama3-8b-decode-4096-fp8", 4096, None, torch.bfloat16, torch.float8_e4m3fn),
    ("llama3-8b-decode-32768", 32768, None, torch.bfloat16, None),
    ("llama3-8b-decode-32768-paged", 32768, 16, torch.bfloat16, None),
    ("llama3-8b-decode-32768-int8", 32768, None, torch.bfloat16, torch.int8),
]


def _make_inputs(case: _Case, dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    sample = case.sample(dtype, str(generator.device))
    return sample.args, sample.kwargs


def bench_cases() -> list[BenchCase]:
    """Decoding with the heads of Llama-3-8B: the cache is read once, in the dtype it is kept in."""
    cases = []
    for name, filled, page, dtype, quantized in _BENCH_CASES:
        shape = {"B": 1, "Hq": 32, "Hkv": 8, "Lq": 1, "Lk": filled, "D": 128, "page": page}
        case = _Case(
            name, (filled,), new=0, heads=32, kv_heads=8, d=128, capacity=filled, page=page, quantized=quantized
        )
        rows = 2 * filled * 8
        traffic = rows * (128 * (quantized or dtype).itemsize + 4 * (quantized is not None)) + 2 * 32 * 128 * 2
        make = partial(_make_inputs, case, dtype)
        cases.append(BenchCase(name, "Llama-3-8B", shape, dtype, "forward", make, 4 * 32 * filled * 128, traffic))
    return cases


SPEC = register(
    OpSpec(
        name="attention_with_kv_cache",
        function=attention_with_kv_cache,
        reference=reference.attention_with_kv_cache,
        baseline=composition,
        torch_ops=("ptkernels::attention_with_kv_cache", "ptkernels::attention_with_kv_cache_append"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=routing.explain,
        differentiable=False,
        mutates=("k_cache", "v_cache", "k_scale", "v_scale"),
        peers={"torch composition": composition},
    )
)
