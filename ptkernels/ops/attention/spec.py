"""Attention's entry in the table of operators: sample calls, PyTorch's own version, bench shapes of real models."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels._registry import BenchCase, Direction, Level, OpSpec, Sample, register
from ptkernels.ops.attention import attention, reference, routing
from ptkernels.ops.attention.options import compute_dtype, resolve


def _layout_heads_inside(tensor: Tensor) -> Tensor:
    """A ``[batch, length, heads, dim]`` tensor seen as ``[batch, heads, length, dim]``: a projection's usual output."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _layout_dim_outside(tensor: Tensor) -> Tensor:
    """Last dimension not contiguous, as after a transpose of the wrong pair."""
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


def _layout_every_other(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.size(-1)), math.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _layout_misaligned(tensor: Tensor) -> Tensor:
    """Dense, but starting one element into its storage, with rows padded to an odd pitch."""
    storage = tensor.new_full((*tensor.shape[:-1], tensor.size(-1) + 3), math.nan)
    view = storage[..., 1 : 1 + tensor.size(-1)]
    view.copy_(tensor)
    return view


def _layout_expanded(tensor: Tensor) -> Tensor:
    """One head seen as all of them, through a stride of 0."""
    return tensor[:, :1].expand_as(tensor)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "heads_inside": _layout_heads_inside,
    "dim_outside": _layout_dim_outside,
    "every_other": _layout_every_other,
    "misaligned": _layout_misaligned,
    "expanded": _layout_expanded,
}


@dataclass(frozen=True)
class _Draw:
    """What a mask is drawn from: its full shape, the query's dtype, and randomness."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    generator: torch.Generator

    def keep(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.generator.device) < 0.7

    def blocked(self, value: float, dtype: torch.dtype) -> Tensor:
        """``value``, cast to the dtype, where attention is refused; 0 elsewhere.

        All of row 0 is refused where the scores are lost in such a value whatever the precision: the row is then the
        mean, or nothing for -inf. A smaller value leaves some of the scores, by how they happen to be rounded.
        """
        refused = ~self.keep(*self.shape[2:])
        refused[:1] = value <= -1e30
        return (
            torch.zeros(refused.shape, dtype=torch.float64, device=refused.device).masked_fill(refused, value).to(dtype)
        )


def _mask_bias(draw: _Draw) -> Tensor:
    return torch.randn(draw.shape, generator=draw.generator, device=draw.generator.device).to(draw.dtype)


def _mask_padding(draw: _Draw) -> Tensor:
    """True for the real keys of each sequence of the batch."""
    batch, _, _, keys = draw.shape
    device = draw.generator.device
    lengths = torch.randint(1, keys + 1, (batch,), generator=draw.generator, device=device)
    return torch.arange(keys, device=device) < lengths[:, None, None, None]


def _mask_empty_rows(draw: _Draw) -> Tensor:
    """Whole rows masked, first and last included."""
    mask = draw.keep(*draw.shape)
    mask[..., ::3, :] = False
    mask[..., -1:, :] = False
    return mask


_MASKS: dict[str, Callable[[_Draw], Tensor]] = {
    "bool": lambda draw: draw.keep(*draw.shape),
    "bool_rows": lambda draw: draw.keep(*draw.shape[2:]),
    "padding": _mask_padding,
    "empty_rows": _mask_empty_rows,
    "all_masked": lambda draw: torch.zeros(draw.shape[2:], dtype=torch.bool, device=draw.generator.device),
    "bias": _mask_bias,
    "bias_per_head": lambda draw: _mask_bias(draw)[:1],
    "bias_of_pairs": lambda draw: _mask_bias(draw)[0, 0],
    "bias_of_keys": lambda draw: _mask_bias(draw)[0, 0, :1],
    "bias_of_rows": lambda draw: _mask_bias(draw)[:, :1, :, :1],
    "bias_float32": lambda draw: _mask_bias(draw).float(),
    "minus_inf": lambda draw: draw.blocked(-math.inf, draw.dtype),
    "minus_1e9": lambda draw: draw.blocked(-1e9, draw.dtype),
    "dtype_min": lambda draw: draw.blocked(torch.finfo(draw.dtype).min, draw.dtype),
    "float32_min": lambda draw: draw.blocked(torch.finfo(torch.float32).min, torch.float32),
}


@dataclass(frozen=True)
class _Case:
    name: str
    lq: int
    lk: int
    d: int = 16
    dv: int | None = None
    batch: int = 2
    heads: int = 3
    kv_heads: int | None = None
    causal: bool = False
    mask: str | None = None
    layout: str = "contiguous"
    scale: float | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    slopes: int = 0
    """Dimensions of ``alibi_slopes``."""
    sinks: bool = False
    relative: int = 0
    """Dimensions of ``relative_bias``."""
    dropout: float = 0.0
    block: int = 1
    """Queries and keys per element of the mask."""
    mask_gradient: bool = False

    def sample(self, dtype: torch.dtype, device: str, requires_grad: bool) -> Sample:
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        dv = self.d if self.dv is None else self.dv
        shapes = (
            (self.batch, self.heads, self.lq, self.d),
            (self.batch, kv_heads, self.lk, self.d),
            (self.batch, kv_heads, self.lk, dv),
        )
        operands = tuple(
            _LAYOUTS[self.layout](torch.randn(shape, generator=generator, device=device, dtype=torch.float64).to(dtype))
            .detach()
            .requires_grad_(requires_grad)
            for shape in shapes
        )
        kwargs: dict[str, Any] = {}
        learned = ["query", "key", "value"]
        wide = torch.promote_types(dtype, torch.float32)
        if self.mask is not None:
            rows, columns = (-(-length // self.block) for length in (self.lq, self.lk))
            draw = _Draw((self.batch, self.heads, rows, columns), dtype, generator)
            kwargs["attn_mask"] = _MASKS[self.mask](draw)
            if self.mask_gradient:
                kwargs["attn_mask"].requires_grad_(requires_grad)
                learned.append("attn_mask")
        distances = max(self.lq + self.lk - 1, 0)
        for name, given, full in (
            ("alibi_slopes", self.slopes, (self.batch, self.heads)),
            ("sinks", int(self.sinks), (self.batch, self.heads)),
            ("relative_bias", self.relative, (self.batch, self.heads, distances)),
        ):
            if given:
                # Sixteenths, which every dtype holds: autocast, which leaves them alone, may round them or not.
                shape = full[-given:]
                values = torch.randint(1, 17, shape, generator=generator, device=device) / 16
                kwargs[name] = values.to(wide).requires_grad_(requires_grad)
                learned.append(name)
        for name, value, default in (
            ("is_causal", self.causal, False),
            ("scale", self.scale, None),
            ("enable_gqa", kv_heads != self.heads, False),
            ("window", self.window, None),
            ("softcap", self.softcap, 0.0),
            ("dropout_p", self.dropout, 0.0),
            ("mask_block_size", self.block, 1),
        ):
            if value != default:
                kwargs[name] = value
        return Sample(self.name, operands, kwargs, tuple(learned))


_GRADCHECK = [
    _Case("plain", 3, 4, d=3, dv=2, batch=1, heads=2),
    _Case("causal", 4, 4, d=3, batch=1, heads=1, causal=True),
    _Case("causal-more-queries", 5, 2, d=2, batch=1, heads=1, causal=True),
    _Case("causal-more-keys", 2, 5, d=2, batch=1, heads=1, causal=True),
    _Case("bool-mask", 3, 4, d=2, batch=1, heads=2, mask="bool"),
    _Case("empty-rows", 4, 3, d=2, batch=1, heads=2, mask="empty_rows"),
    _Case("bias", 3, 3, d=2, batch=1, heads=2, mask="bias"),
    _Case("causal-minus-inf", 3, 3, d=2, batch=1, heads=1, mask="minus_inf", causal=True),
    _Case("grouped-heads", 2, 3, d=2, batch=1, heads=4, kv_heads=2),
    _Case("one-shared-head", 2, 3, d=2, batch=2, heads=3, kv_heads=1, scale=0.3),
    _Case("heads-inside", 3, 3, d=2, batch=1, heads=2, layout="heads_inside"),
    _Case("window", 4, 5, d=2, batch=1, heads=1, window=(1, 1)),
    _Case("bias-gradient", 3, 4, d=2, batch=2, heads=2, mask="bias_per_head", mask_gradient=True, window=(None, 1)),
    _Case("shaped", 3, 4, d=2, heads=2, softcap=1.5, slopes=1, sinks=True, mask="bias_of_keys", mask_gradient=True),
    _Case("relative-bias", 3, 4, d=2, heads=2, kv_heads=1, relative=2, causal=True),
    _Case("mask-of-blocks", 5, 7, d=2, heads=2, mask="bool", block=2),
]

_EVERYTHING: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "softcap": 2.0,
    "slopes": 1,
    "sinks": True,
    "relative": 2,
    "dropout": 0.2,
}
_LENGTHS = [(1, 1), (239, 1), (113, 203), (64, 64), (7, 130)]

_QUICK = [
    *(
        _Case(f"{lq}x{lk}{'-causal' * causal}", lq, lk, d=32, causal=causal)
        for lq, lk in _LENGTHS
        for causal in (False, True)
    ),
    *(_Case(f"dim-{d}", 33, 65, d=d, batch=1, causal=d == 59) for d in (1, 40, 59, 64, 111, 512)),
    _Case("dims-192-128", 17, 35, d=192, dv=128, batch=1),
    _Case("dims-5-64", 17, 35, d=5, dv=64, batch=1),
    _Case("decode", 1, 257, d=64, heads=8, kv_heads=2),
    _Case("grouped-heads", 37, 70, heads=6, kv_heads=2, causal=True),
    _Case("one-shared-head", 37, 70, heads=5, kv_heads=1),
    _Case("192x192-bool", 192, 192, d=64, batch=1, heads=2, mask="bool"),
    _Case("causal-and-bool", 70, 70, mask="bool_rows", causal=True),
    _Case("causal-and-bias", 70, 45, mask="bias", causal=True),
    *(_Case(name.replace("_", "-"), 35, 67, mask=name) for name in _MASKS),
    *(_Case(name.replace("_", "-"), 35, 67, layout=name) for name in _LAYOUTS if name != "contiguous"),
    _Case("grouped-heads-inside-bool", 35, 67, heads=4, kv_heads=2, layout="heads_inside", mask="bool"),
    _Case("scale", 21, 22, scale=2.5),
    _Case("scale-zero", 21, 22, scale=0.0),
    _Case("scale-negative", 21, 22, scale=-0.7, causal=True),
    _Case("window", 113, 203, window=(33, 5)),
    _Case("window-causal", 203, 113, window=(16, None), causal=True),
    _Case("window-of-one", 70, 70, window=(0, 0)),
    _Case("window-to-the-right", 37, 170, window=(-1, 60), kv_heads=1, mask="bool"),
    _Case("window-narrow", 530, 530, batch=1, heads=1, window=(20, 0)),
    _Case("softcap", 35, 67, softcap=3.0),
    _Case("slopes", 35, 67, slopes=1, causal=True),
    _Case("slopes-per-batch", 67, 35, slopes=2),
    _Case("sinks", 35, 67, sinks=True, kv_heads=1),
    _Case("sinks-empty-rows", 35, 67, sinks=True, mask="empty_rows"),
    _Case("relative-bias", 35, 67, relative=2),
    _Case("relative-bias-causal", 150, 130, relative=2, causal=True, mask="padding", kv_heads=1),
    _Case("relative-bias-one-row", 1, 300, relative=3),
    _Case("dropout", 35, 67, dropout=0.17, causal=True),
    _Case("mask-of-blocks", 150, 700, mask="bool", block=32),
    _Case("mask-of-blocks-empty-rows", 70, 300, mask="empty_rows", block=7, causal=True, kv_heads=1),
    _Case("mask-of-blocks-few-rows", 2, 600, mask="bool_rows", block=16, window=(300, None)),
    _Case("mask-of-blocks-and-everything", 141, 67, 24, mask="bool", block=12, window=(50, 9), **_EVERYTHING),
    _Case("mask-of-one-block", 35, 67, mask="all_masked", block=1000),
    *(
        _Case(f"{mask.replace('_', '-')}-gradient", 45, 67, mask=mask, mask_gradient=True)
        for mask in ("bias", "bias_per_head", "bias_of_pairs", "bias_of_keys", "bias_of_rows", "bias_float32")
    ),
    _Case("everything", 141, 67, 24, mask="bias_per_head", mask_gradient=True, window=(50, 9), **_EVERYTHING),
    _Case("everything-few-rows", 2, 600, 40, mask="bias", mask_gradient=True, window=(None, 550), **_EVERYTHING),
    _Case("no-batch", 3, 4, batch=0),
    _Case("no-heads", 3, 4, heads=0),
    _Case("no-queries", 0, 4),
    _Case("no-keys", 3, 0),
    _Case("no-keys-causal", 3, 0, causal=True),
    _Case("no-keys-sinks", 3, 0, sinks=True),
]

_FULL = [
    *_QUICK,
    _Case("799x3-causal", 799, 3, d=64, causal=True),
    _Case("1023x1024-causal", 1023, 1024, d=64, batch=1, causal=True),
    _Case("1024x1023-causal", 1024, 1023, d=64, batch=1, causal=True),
    _Case("4224x4224-causal", 4224, 4224, d=64, batch=1, heads=1, causal=True),
    _Case("2047x1025-bool", 2047, 1025, d=96, batch=1, heads=1, mask="bool"),
    _Case("448x448-padding", 448, 448, d=128, batch=3, heads=2, mask="padding"),
    _Case("long-decode", 1, 4096, d=128, batch=1, heads=8, kv_heads=2),
    *(_Case(f"dim-{d}-causal", 129, 257, d=d, batch=1, causal=True) for d in (8, 24, 80, 96, 128, 160, 256, 511)),
    *(
        _Case(f"{layout}-{mask}-causal", 97, 131, d=40, layout=layout, mask=mask, causal=True)
        for layout in ("heads_inside", "misaligned")
        for mask in ("empty_rows", "bias_float32", "dtype_min")
    ),
    *(_Case(f"{n}x{n}-batched", n, n, d=64, batch=5, heads=7) for n in (31, 63, 65, 127)),
]

_CASES: dict[Level, list[_Case]] = {"gradcheck": _GRADCHECK, "quick": _QUICK, "full": _FULL}


def samples(dtype: torch.dtype, device: str, requires_grad: bool, level: Level) -> Iterator[Sample]:
    """Seeded calls: ``gradcheck`` is tiny, ``quick`` has every feature and known trap, ``full`` adds size."""
    return (case.sample(dtype, device, requires_grad) for case in _CASES[level])


def torch_op_samples(dtype: torch.dtype, device: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Direct calls of both registered operators, with gradients required."""
    cases = [
        _Case("op-plain", 3, 5, d=4, dv=6),
        _Case("op-grouped-causal", 5, 5, d=4, heads=4, kv_heads=2, causal=True, layout="heads_inside"),
        _Case("op-bool", 3, 5, d=4, mask="bool"),
        _Case("op-no-keys", 3, 0, d=4, mask="bias_of_keys"),
    ]
    for index, case in enumerate(cases):
        sample = case.sample(dtype, device, requires_grad=True)
        options = (sample.kwargs.get("attn_mask"), case.causal, 0.3 if index % 2 else None)
        yield "ptkernels::attention", (*sample.args, *options)
        operands = [tensor.detach() for tensor in sample.args]
        out, lse = torch.ops.ptkernels.attention(*operands, *options)
        grad_lse = torch.randn_like(lse) if index % 2 else None
        wanted = [True, index != 1, index != 2]
        yield (
            "ptkernels::_attention_backward",
            (*(torch.randn_like(out).requires_grad_(), grad_lse, *sample.args, out, lse, *options, wanted),),
        )


def composition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    mask_block_size: int = 1,
    return_lse: bool = False,
    bottom_right: bool = False,
    first_batch: int = 0,
) -> Any:
    """Attention as models write it out: products in the dtype of the inputs, softmax in float32."""
    dtype = query.dtype
    wide = compute_dtype(dtype)
    if enable_gqa:
        key, value = (reference.share_heads(tensor, query.size(-3)) for tensor in (key, value))
    scores = (query @ key.transpose(-2, -1)).to(wide) * reference.default_scale(query, scale)
    beyond = (window, softcap, alibi_slopes, sinks, relative_bias, mask_block_size)
    attn_mask, options = resolve(dtype, attn_mask, dropout_p, is_causal, scale, *beyond)
    options = options._replace(bottom_right=options.bottom_right or bottom_right)
    weights, _, lse = reference.softmax_of_scores(scores, attn_mask, options)
    if dropout_p > 0.0:
        batch, heads = math.prod(weights.shape[:-3]), query.size(-3)
        weights = weights * reference.dropout_factors(weights, options, batch, heads, first_batch)
    out = weights.to(dtype) @ value
    return (out, lse) if return_lse else out


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Sequence[int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    relative_bias: Tensor | None = None,
    mask_block_size: int = 1,
    return_lse: bool = False,
) -> Any:
    """PyTorch's own attention, and the written-out one for what that refuses or answers with NaN."""
    if attn_mask is not None:
        attn_mask = reference.pairs_of_blocks(attn_mask, mask_block_size, query.size(-2), key.size(-2))
    args = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    learned: dict[str, Any] = {"alibi_slopes": alibi_slopes, "sinks": sinks, "relative_bias": relative_bias}
    beyond: dict[str, Any] = {"window": window, "softcap": softcap, **learned}
    refused = softcap != 0.0 or any(given is not None for given in (window, *learned.values()))
    refused = refused or dropout_p > 0.0
    refused |= attn_mask is not None and (
        is_causal or attn_mask.dim() < 2 or attn_mask.dtype not in (torch.bool, query.dtype)
    )
    if return_lse or refused or 0 in (query.size(-3), key.size(-2)):
        return composition(*args, **beyond, return_lse=return_lse)
    out = F.scaled_dot_product_attention(*args[:6], scale=scale, enable_gqa=enable_gqa)
    return composition(*args) if out.isnan().any() else out


def _scored_pairs(lq: int, lk: int, causal: bool) -> int:
    """Pairs of a query and a key it may attend to."""
    if not causal:
        return lq * lk
    full = max(lq - lk, 0)
    rows = lq - full
    return rows * (rows + 1) // 2 + full * lk


def _make_inputs(
    shape: dict[str, Any], dtype: torch.dtype, direction: Direction, generator: torch.Generator
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    sizes = (
        (shape["B"], shape["Hq"], shape["Lq"], shape["D"]),
        (shape["B"], shape["Hkv"], shape["Lk"], shape["D"]),
        (shape["B"], shape["Hkv"], shape["Lk"], shape["D"]),
    )
    operands = tuple(
        torch.randn(size, generator=generator, device=generator.device)
        .to(dtype)
        .requires_grad_(direction == "forward+backward")
        for size in sizes
    )
    options: dict[str, Any] = {"is_causal": shape["causal"], "enable_gqa": shape["Hq"] != shape["Hkv"]}
    if "block" in shape:
        mask = _local_and_global_blocks(shape).to(generator.device)
        options |= {"attn_mask": mask, "mask_block_size": shape["block"]}
    return operands, options


def _local_and_global_blocks(shape: dict[str, Any]) -> Tensor:
    """Longformer's pattern: ``reach`` blocks to either side, and the first block, which sees and is seen by all."""
    rows, keys = (torch.arange(-(-shape[length] // shape["block"])) for length in ("Lq", "Lk"))
    distances = keys - rows[:, None]
    seen: Tensor = (distances.abs() <= shape["reach"]) | (rows[:, None] == 0) | (keys == 0)
    return seen


def _bench_case(name: str, model: str, shape: dict[str, Any], dtype: torch.dtype, direction: Direction) -> BenchCase:
    batch, heads, kv_heads, lq, lk, dim = (shape[size] for size in ("B", "Hq", "Hkv", "Lq", "Lk", "D"))
    pairs = _scored_pairs(lq, lk, shape["causal"])
    if "block" in shape:
        pairs = int(_local_and_global_blocks(shape).sum()) * shape["block"] ** 2
    flops = 4 * batch * heads * dim * pairs
    query_bytes, kv_bytes = (batch * h * length * dim * dtype.itemsize for h, length in ((heads, lq), (kv_heads, lk)))
    lse_bytes = batch * heads * lq * 4
    traffic = 2 * query_bytes + 2 * kv_bytes + lse_bytes
    if direction == "forward+backward":
        # The backward needs five products where the forward needs two; it reads query, key, value, out, grad_out and
        # lse, and writes three gradients.
        flops = flops + flops * 5 // 2
        traffic += (3 * query_bytes + 2 * kv_bytes + lse_bytes) + (query_bytes + 2 * kv_bytes)
    make = partial(_make_inputs, shape, dtype, direction)
    return BenchCase(name, model, shape, dtype, direction, make, flops, traffic)


_BENCH_SHAPES: list[tuple[str, str, dict[str, int], bool, bool]] = [
    # name, model, sizes (Hkv and Lk default to Hq and Lq), causal, trained with
    ("bert-base-128", "BERT-base", {"B": 8, "Hq": 12, "Lq": 128, "D": 64}, False, True),
    ("bert-base-512", "BERT-base", {"B": 8, "Hq": 12, "Lq": 512, "D": 64}, False, True),
    ("gpt2-1024", "GPT-2", {"B": 1, "Hq": 12, "Lq": 1024, "D": 64}, True, True),
    ("llama3-8b-2048", "Llama-3-8B", {"B": 1, "Hq": 32, "Hkv": 8, "Lq": 2048, "D": 128}, True, True),
    ("llama3-8b-decode", "Llama-3-8B", {"B": 1, "Hq": 32, "Hkv": 8, "Lq": 1, "Lk": 4096, "D": 128}, False, False),
    ("vit-b16-197", "ViT-B/16", {"B": 8, "Hq": 12, "Lq": 197, "D": 64}, False, True),
    ("whisper-base-1500", "Whisper-base", {"B": 1, "Hq": 8, "Lq": 1500, "D": 64}, False, True),
    ("whisper-base-cross", "Whisper-base", {"B": 1, "Hq": 8, "Lq": 448, "Lk": 1500, "D": 64}, False, True),
    ("sd-unet-4096", "SD-UNet", {"B": 1, "Hq": 8, "Lq": 4096, "D": 40}, False, True),
    ("sd-unet-1024", "SD-UNet", {"B": 1, "Hq": 8, "Lq": 1024, "D": 80}, False, True),
    ("sd-unet-cross", "SD-UNet", {"B": 1, "Hq": 8, "Lq": 4096, "Lk": 77, "D": 40}, False, True),
    ("longformer-4096", "Longformer", {"B": 1, "Hq": 12, "Lq": 4096, "D": 64, "block": 64, "reach": 4}, False, True),
]


def bench_cases() -> list[BenchCase]:
    """The attention of named models, in both directions where the model is trained with that shape."""
    cases = []
    for name, model, sizes, causal, trained in _BENCH_SHAPES:
        shape = {"Hkv": sizes["Hq"], "Lk": sizes["Lq"], **sizes, "causal": causal}
        directions: tuple[Direction, ...] = ("forward", "forward+backward") if trained else ("forward",)
        for dtype in (torch.float32, torch.bfloat16):
            cases += [_bench_case(name, model, shape, dtype, direction) for direction in directions]
    return cases


def doubling_cases(longest: int) -> list[BenchCase]:
    """GPT-2's heads, causal, at lengths that double from 128 to ``longest``."""
    cases = []
    directions: tuple[Direction, ...] = ("forward", "forward+backward")
    length = 128
    while length <= longest:
        shape = {"B": 1, "Hq": 12, "Hkv": 12, "Lq": length, "Lk": length, "D": 64, "causal": True}
        for dtype in (torch.float32, torch.bfloat16):
            for direction in directions:
                cases.append(_bench_case(f"doubling-{length}", "GPT-2", shape, dtype, direction))
        length *= 2
    return cases


SPEC = register(
    OpSpec(
        name="attention",
        function=attention,
        reference=reference.attention,
        baseline=torch_attention,
        torch_ops=("ptkernels::attention", "ptkernels::_attention_backward"),
        samples=samples,
        torch_op_samples=torch_op_samples,
        bench_cases=bench_cases,
        kernels=routing.kernels,
        explain=routing.explain,
        peers={"torch SDPA": torch_attention, "torch composition": composition},
    )
)
