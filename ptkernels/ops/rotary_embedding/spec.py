"""rotary_embedding's entry in the table of operators: sample calls, torch's own version, shapes of real models."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, register
from ptkernels.ops.rotary_embedding import reference, rotary_embedding, routing


@dataclass(frozen=True)
class _Case:
    name: str
    length: int
    d: int = 16
    batch: int = 2
    heads: int = 3
    kv_heads: int = 1
    rotary: int | None = None
    """Values that are rotated; default: all."""
    norm: str = "qk"
    positions: int = 0
    """Dimensions of ``positions``."""
    interleaved: bool = False
    tables: torch.dtype | None = None
    """Default: float32, float64 for float64."""
    transposed: bool = False

    def sample(self, dtype: torch.dtype, device: str, requires_grad: bool) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))

        def draw(*shape: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype)
            if self.transposed and len(shape) == 4:
                drawn = drawn.mT.contiguous().mT
            return drawn.requires_grad_(requires_grad)

        operands = [draw(self.batch, heads, self.length, self.d) for heads in (self.heads, self.kv_heads)]
        rows = self.length + 7
        rotary = self.d if self.rotary is None else self.rotary
        angles = torch.rand(rows, rotary // 2, generator=generator, device=device, dtype=torch.float64) * 6.0
        tables = [t.to(self.tables or reference.compute_dtype(dtype)) for t in (angles.cos(), angles.sin())]
        kwargs: dict[str, Any] = {}
        learned = ["query", "key"]
        for name, letter in (("query_norm_weight", "q"), ("key_norm_weight", "k")):
            if letter in self.norm:
                kwargs[name] = draw(self.d)
                learned.append(name)
        if self.positions:
            shape = (self.batch, self.length)[-self.positions :]
            kwargs["positions"] = torch.randint(0, rows, shape, generator=generator, device=device)
        if self.interleaved:
            kwargs["interleaved"] = True
        return Sample(self.name, (*operands, *tables), kwargs, tuple(learned), ("query", "key"))


_GRADCHECK = [
    _Case("plain", 3, d=4),
    _Case("rotation-alone", 3, d=4, norm="", positions=2),
    _Case("interleaved-part", 3, d=6, heads=2, rotary=4, interleaved=True),
    _Case("one-norm", 2, d=4, norm="k"),
]
_QUICK = [
    *(_Case(f"{norm or 'no'}-norm-dim-{d}", 33, d=d, norm=norm) for d in (2, 40, 64, 128) for norm in ("qk", "")),
    *(_Case(f"interleaved-dim-{d}", 17, d=d, interleaved=True) for d in (2, 40, 128)),
    *(
        _Case(f"part-{rotary}-of-{d}{'-interleaved' * pairs}", 17, d=d, rotary=rotary, interleaved=pairs)
        for d, rotary in ((80, 32), (59, 18), (128, 96), (16, 0))
        for pairs in (False, True)
    ),
    _Case("positions", 37, positions=1),
    _Case("positions-per-batch", 37, positions=2, norm="q"),
    _Case("transposed", 21, d=24, transposed=True),
    _Case("tables-in-bfloat16", 21, tables=torch.bfloat16, norm=""),
    _Case("many-heads", 70, heads=32, kv_heads=8, d=64),
    _Case("no-tokens", 0),
    _Case("no-batch", 3, batch=0),
]
_FULL = [*_QUICK, _Case("long", 2048, d=128, batch=1, heads=8, kv_heads=2), _Case("head-dim-512", 31, d=512)]
_CASES: dict[Level, list[_Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny, ``quick`` has every feature and known trap, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    for case in (_Case("op-plain", 5, d=8), _Case("op-positions", 5, d=8, norm="q", positions=2, interleaved=True)):
        sample = case.sample(dtype, device, requires_grad=True)
        names = ("positions", "query_norm_weight", "key_norm_weight")
        options = (*(sample.kwargs.get(name) for name in names), case.interleaved, 1e-5)
        yield "ptkernels::rotary_embedding", (*sample.args, *options)
        grads = [torch.randn_like(tensor).requires_grad_() for tensor in sample.args[:2]]
        wanted = [True, True, "q" in case.norm, "k" in case.norm]
        yield "ptkernels::_rotary_embedding_backward", (*grads, *sample.args, *options, wanted)


def composition(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """As models write it: normalisation in float32, rounded; rotation in the dtype of query and key."""
    dtype, length = query.dtype, query.size(2)
    c, s = (reference.angles(table, positions, length).to(dtype) for table in (cos, sin))

    def embed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            wide = x.to(reference.compute_dtype(dtype))
            x = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)).to(dtype)
        return reference.rotate(x, c, s, interleaved)

    return embed(query, query_norm_weight), embed(key, key_norm_weight)


# name, model, batch, heads, kv heads, length, head dim, normalised
_MODELS = [
    ("llama3-8b-2048", "Llama-3-8B", 1, 32, 8, 2048, 128, False),
    ("qwen3-8b-2048", "Qwen3-8B", 1, 32, 8, 2048, 128, True),
    ("qwen3-0.6b-512", "Qwen3-0.6B", 2, 16, 8, 512, 128, True),
    ("llama3-8b-decode", "Llama-3-8B", 1, 32, 8, 1, 128, False),
]


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    needs_grad = direction == "forward+backward"

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=generator.device).to(dtype)

    batch, length, dim = shape["B"], shape["L"], shape["D"]
    # As a projection leaves them.
    operands = [draw(batch, length, shape[h], dim).transpose(1, 2).requires_grad_(needs_grad) for h in ("Hq", "Hkv")]
    position = torch.arange(length, dtype=torch.float32, device=generator.device)
    angles = torch.outer(position, 10000.0 ** (-torch.arange(dim // 2, device=generator.device) / (dim // 2)))
    names = ("query_norm_weight", "key_norm_weight") if shape["norm"] else ()
    return (*operands, angles.cos(), angles.sin()), {name: draw(dim).requires_grad_(needs_grad) for name in names}


def bench_cases() -> list[BenchCase]:
    """Queries and keys of named models, in both directions but for decoding."""
    cases = []
    for name, model, batch, heads, kv_heads, length, dim, norm in _MODELS:
        shape = {"B": batch, "Hq": heads, "Hkv": kv_heads, "L": length, "D": dim, "norm": norm}
        values = batch * (heads + kv_heads) * length * dim
        directions: tuple[Direction, ...] = ("forward", "forward+backward") if length > 1 else ("forward",)
        for dtype in (torch.float32, torch.bfloat16):
            for direction in directions:
                passes = 1 if direction == "forward" else 2
                flops = values * passes * (8 if norm else 4)
                traffic = values * dtype.itemsize * (2 * passes + (norm and passes > 1))
                make = partial(_make_inputs, shape, dtype, direction)
                cases.append(BenchCase(name, model, shape, dtype, direction, make, flops, traffic))
    return cases


SPEC = register(
    OpSpec(
        name="rotary_embedding",
        function=rotary_embedding,
        reference=reference.rotary_embedding,
        baseline=composition,
        torch_ops=("ptkernels::rotary_embedding", "ptkernels::_rotary_embedding_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=routing.explain,
        kept_by_autocast=("cos", "sin"),
        peers={"torch composition": composition},
        one_call_under_vmap=("query", "key"),
    )
)
