"""Packed attention's entry in the table of operators: sample calls, PyTorch's own version, bench cases."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, register
from ptkernels.ops.attention import spec as dense
from ptkernels.ops.attention_varlen import attention_varlen, reference, routing


def offsets(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@dataclass(frozen=True)
class _Case:
    name: str
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    d: int = 16
    dv: int | None = None
    heads: int = 2
    kv_heads: int = 2
    slopes: int = 0
    """Dimensions of ``alibi_slopes``."""
    sinks: bool = False
    relative: int = 0
    """Dimensions of ``relative_bias``."""
    room: int = 32
    """How many times as long as the longest sequence the bounds are, as a caller who compiles for a bucket of lengths
    would leave."""
    layout: str = "contiguous"
    offsets_dtype: torch.dtype = torch.int64
    options: tuple[tuple[str, Any], ...] = ()

    def sample(self, dtype: torch.dtype, device: str, requires_grad: bool) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        lengths_k = self.lengths_q if self.lengths_k is None else self.lengths_k
        shapes = (
            (sum(self.lengths_q), self.heads, self.d),
            (sum(lengths_k), self.kv_heads, self.d),
            (sum(lengths_k), self.kv_heads, self.d if self.dv is None else self.dv),
        )

        def operand(shape: tuple[int, ...]) -> Tensor:
            tensor = torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype)
            if self.layout == "heads_outside":
                tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
            return tensor.detach().requires_grad_(requires_grad)

        operands = tuple(operand(shape) for shape in shapes)
        kwargs: dict[str, Any] = {
            "cu_seqlens_q": offsets(self.lengths_q, self.offsets_dtype).to(device),
            "cu_seqlens_k": offsets(lengths_k, self.offsets_dtype).to(device),
            "max_seqlen_q": self.room * max(self.lengths_q, default=0),
            "max_seqlen_k": self.room * max(lengths_k, default=0),
            **dict(self.options),
        }
        learned = ["query", "key", "value"]
        sizes: tuple[int, ...] = (len(self.lengths_q), self.heads)
        for name, dims in (("alibi_slopes", self.slopes), ("sinks", int(self.sinks))):
            if dims:
                values = torch.randint(1, 17, sizes[-dims:], generator=generator, device=device) / 16
                kwargs[name] = values.to(torch.promote_types(dtype, torch.float32)).requires_grad_(requires_grad)
                learned.append(name)
        if self.relative:
            sizes = (*sizes, max(kwargs["max_seqlen_q"] + kwargs["max_seqlen_k"] - 1, 0))
            values = torch.randn(sizes[-self.relative :], generator=generator, device=device, dtype=torch.float64)
            wide = torch.promote_types(dtype, torch.float32)
            kwargs["relative_bias"] = values.to(wide).requires_grad_(requires_grad)
            learned.append("relative_bias")
        return Sample(self.name, operands, kwargs, tuple(learned))


_CAUSAL = (("is_causal", True),)
_CORNER = (("is_causal", True), ("bottom_right", True), ("window", (9, 0)), ("softcap", 2.0))

_GRADCHECK = [
    _Case("plain", (2, 3), (3, 1), d=2, dv=3),
    _Case("causal", (3, 0, 2), d=2, heads=2, kv_heads=1, options=_CAUSAL),
    _Case("shaped", (2, 3), (4, 2), d=2, slopes=1, sinks=True, options=_CORNER),
    _Case("relative-bias", (2, 3), (3, 1), d=2, relative=2, room=1),
    _Case("relative-bias-each", (3, 0, 2), (1, 2, 2), d=2, relative=3, room=2, options=_CAUSAL),
]

_QUICK = [
    _Case("one", (33,), (65,)),
    _Case("several", (5, 70, 1, 130), (64, 7, 33, 130), dv=24),
    _Case("causal", (5, 70, 1, 130), options=_CAUSAL),
    _Case("empty-ones", (0, 7, 0, 12, 3), (4, 0, 0, 40, 3), options=_CAUSAL),
    _Case("grouped-heads", (17, 40), (30, 60), heads=6, kv_heads=2, offsets_dtype=torch.int32),
    _Case("heads-outside", (17, 40), (30, 60), layout="heads_outside"),
    _Case("few-rows", (1, 2, 1), (257, 5, 700), heads=4, kv_heads=2, d=40),
    _Case(
        "everything", (60, 3, 90), (45, 30, 128), heads=4, slopes=2, sinks=True, options=(*_CORNER, ("dropout_p", 0.2))
    ),
    _Case("relative-bias", (5, 70, 1, 130), (64, 7, 33, 130), relative=2, room=1),
    _Case("relative-bias-causal", (5, 0, 170), (5, 40, 130), heads=4, kv_heads=1, relative=3, room=2, options=_CORNER),
    _Case("relative-bias-few-rows", (1, 2, 1), (257, 5, 700), d=40, relative=2, room=1),
    _Case("no-tokens", (0, 0)),
]

_FULL = [*_QUICK, _Case("many", tuple(range(1, 300, 13)), tuple(range(299, 0, -13)), d=64, options=_CAUSAL)]

_CASES: dict[Level, list[_Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls, as in :mod:`ptkernels.ops.attention.spec`."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with first derivatives required.

    The reference behind second ones reads ``cu_seqlens``, which a graph cannot hold.
    """
    for case in (_Case("op-plain", (3, 5), (4, 2), d=4), _Case("op-causal", (3, 0, 5), d=4, heads=4, options=_CAUSAL)):
        sample = case.sample(dtype, device, requires_grad=True)
        named = sample.kwargs
        packing = (named["cu_seqlens_q"], named["cu_seqlens_k"], named["max_seqlen_q"], named["max_seqlen_k"])
        options = (named.get("is_causal", False), 0.3)
        yield "ptkernels::attention_varlen", (*sample.args, *packing, *options)
        operands = [tensor.detach() for tensor in sample.args]
        out, lse = torch.ops.ptkernels.attention_varlen(*operands, *packing, *options)
        wanted = [True, True, True, False, False, False]
        yield (
            "ptkernels::_attention_varlen_backward",
            (torch.randn_like(out), None, *operands, out, lse, *packing, wanted, *options),
        )


def composition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    bottom_right: bool = False,
    **options: Any,
) -> Tensor:
    """A loop of :func:`ptkernels.ops.attention.spec.composition`, in the dtype of the inputs."""
    outs = []
    rows, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    dropout_p = options.pop("dropout_p", 0.0)
    state = torch.get_rng_state()
    slopes, relative = options.pop("alibi_slopes", None), options.pop("relative_bias", None)
    for index in range(len(rows) - 1):
        operands = (query[rows[index] : rows[index + 1]], *(t[keys[index] : keys[index + 1]] for t in (key, value)))
        q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in operands)
        own = slopes[index] if slopes is not None and slopes.dim() == 2 else slopes
        if relative is not None:
            of_sequence = relative[index] if relative.dim() == 3 else relative
            first = (max_seqlen_q or 0) - q.size(2)
            options["relative_bias"] = of_sequence.narrow(-1, first, max(q.size(2) + k.size(2) - 1, 0))
        torch.set_rng_state(state)  # every sequence draws the seed of the whole batch
        out = dense.composition(
            q,
            k,
            v,
            dropout_p=dropout_p,
            enable_gqa=True,
            alibi_slopes=own,
            bottom_right=bottom_right,
            first_batch=index,
            **options,
        )
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs) if outs else torch.zeros_like(query)


def _spread(tokens: int, shortest: int, longest: int, generator: torch.Generator) -> list[int]:
    """Lengths from a log-uniform distribution until there are ``tokens`` of them."""
    lengths: list[int] = []
    while (rest := tokens - sum(lengths)) > 0:
        draw = torch.rand((), generator=generator).item()
        lengths.append(min(rest, int(shortest * (longest / shortest) ** draw)))
    return lengths


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lengths = shape["lengths"]
    operands = tuple(
        torch.randn(sum(lengths), shape["H"], shape["D"], generator=generator)
        .to(dtype)
        .requires_grad_(direction == "forward+backward")
        for _ in range(3)
    )
    cu_seqlens = offsets(lengths, torch.int32)
    packing = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    bounds = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    return operands, {**packing, **bounds, "is_causal": shape["causal"]}


def bench_cases() -> list[BenchCase]:
    """Batches of sentences and of documents whose lengths spread over a factor of eight."""
    cases = []
    for name, model, shortest, tokens, heads, dim, causal in (
        ("bert-base-sentences", "BERT-base", 16, 2048, 12, 64, False),
        ("gpt2-documents", "GPT-2", 128, 4096, 12, 64, True),
    ):
        lengths = _spread(tokens, shortest, 8 * shortest, torch.Generator().manual_seed(0))
        shape = {"lengths": lengths, "H": heads, "D": dim, "causal": causal}
        pairs = sum(length * (length + 1) // 2 if causal else length * length for length in lengths)
        for dtype in (torch.float32, torch.bfloat16):
            costs: list[tuple[Direction, int, int]] = [("forward", 4, 4), ("forward+backward", 14, 12)]
            for direction, flops, tensors in costs:
                make = partial(_make_inputs, shape, dtype, direction)
                work = flops * heads * dim * pairs
                traffic = tensors * tokens * heads * dim * dtype.itemsize + heads * tokens * 4
                cases.append(BenchCase(name, model, shape, dtype, direction, make, work, traffic))
    return cases


SPEC = register(
    OpSpec(
        name="attention_varlen",
        function=attention_varlen,
        reference=reference.attention_varlen,
        baseline=composition,
        torch_ops=("ptkernels::attention_varlen", "ptkernels::_attention_varlen_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=routing.explain,
        kept_by_autocast=("relative_bias",),
    )
)
