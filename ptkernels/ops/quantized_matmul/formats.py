"""How quantized weights are stored: codes, scales and zero points as plain tensors, the same on every machine.

    weight[n, k] = scales[n, k // group] * (value(codes[n, k]) - zeros[n, k // group])

Version 1 of the format. ``codes`` is ``[N, bytes of a row]``, a row's codes in the order of ``k`` from the lowest bits
of its first byte on; ``scales`` and ``zeros`` are float32 ``[N, ceil(K / group)]``; ``zeros`` is absent where it would
be 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FORMAT_VERSION = 1

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 16 values of nf4: Dettmers et al., QLoRA (2023), appendix E."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 values of e2m1: OCP Microscaling Formats 1.0 (2023)."""


@dataclass(frozen=True)
class CodeFormat:
    """How one weight is coded."""

    name: str
    bits: int
    offset: int = 0
    """Subtracted from an unsigned code to give its value."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.name == "s8" else torch.uint8

    def row_bytes(self, in_features: int) -> int:
        return (in_features * self.bits + 7) // 8


CODE_FORMATS = {
    code.name: code
    for code in (
        CodeFormat("s8", 8),
        CodeFormat("u4", 4, 8),
        CodeFormat("u3", 3, 4),
        CodeFormat("u2", 2, 2),
        CodeFormat("nf4", 4),
        CodeFormat("fp4", 4),
        CodeFormat("fp8", 8),
    )
}


@dataclass(frozen=True)
class Scheme:
    """What ``quantize_weight`` does under a name."""

    name: str
    code: CodeFormat
    number: int
    """Stands for the name in stored tensors; never reused."""
    group_size: int = -1
    """Default: columns that share a scale, -1 for a whole row."""
    quantizes_input: bool = False
    is_static: bool = False
    """The input's scale is calibrated ahead instead of taken from every row."""
    group_sizes: tuple[int, ...] = ()
    """The only group sizes it takes; empty for any."""
    block_rows: int = 1
    """Rows that share a scale too; it is stored for each of them."""


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8_dynamic", CODE_FORMATS["s8"], 1, quantizes_input=True),
        Scheme("int8_static", CODE_FORMATS["s8"], 2, quantizes_input=True, is_static=True),
        Scheme("int8_weight_only", CODE_FORMATS["s8"], 3),
        Scheme("int4_weight_only", CODE_FORMATS["u4"], 4, group_size=128),
        Scheme("int4_int8", CODE_FORMATS["u4"], 5, group_size=128, quantizes_input=True),
        Scheme("int2_weight_only", CODE_FORMATS["u2"], 6, group_size=32),
        Scheme("nf4", CODE_FORMATS["nf4"], 7, group_size=64),
        Scheme("mxfp4", CODE_FORMATS["fp4"], 8, group_size=32, group_sizes=(32,)),
        Scheme("fp8", CODE_FORMATS["fp8"], 9),
        Scheme("int3_weight_only", CODE_FORMATS["u3"], 10, group_size=64),
        Scheme("fp8_blocks", CODE_FORMATS["fp8"], 11, group_size=128, group_sizes=(128,), block_rows=128),
    )
}
SCHEMES_BY_NUMBER = {scheme.number: scheme for scheme in SCHEMES.values()}


def group_count(in_features: int, group_size: int) -> int:
    """Scales of one row."""
    if group_size == -1:
        return min(in_features, 1)
    return math.ceil(in_features / group_size)


def pack_codes(values: Tensor, code: CodeFormat) -> Tensor:
    """Unsigned codes ``[N, K]`` of fewer than 8 bits, packed into the bytes of the format."""
    count, size = _word(code)
    padded = torch.nn.functional.pad(values.to(torch.int32), (0, -values.size(1) % count))
    words = (padded.unflatten(1, (-1, count)) << _shifts(count, code.bits, values.device)).sum(-1, dtype=torch.int32)
    octets = (words.unsqueeze(-1) >> _shifts(size, 8, values.device)) & 255
    packed: Tensor = octets.to(torch.uint8).flatten(1)[:, : code.row_bytes(values.size(1))]
    return packed.contiguous()


def unpack_codes(codes: Tensor, code: CodeFormat, in_features: int) -> Tensor:
    """The inverse of :func:`pack_codes`."""
    if code.bits == 8:
        return codes
    count, size = _word(code)
    padded = torch.nn.functional.pad(codes, (0, -codes.size(1) % size)).int()
    words = (padded.unflatten(1, (-1, size)) << _shifts(size, 8, codes.device)).sum(-1, dtype=torch.int32)
    spread = (words.unsqueeze(-1) >> _shifts(count, code.bits, codes.device)) & ((1 << code.bits) - 1)
    unpacked: Tensor = spread.to(torch.uint8).flatten(1)[:, :in_features]
    return unpacked


def _word(code: CodeFormat) -> tuple[int, int]:
    """The least number of codes that fill whole bytes, and how many bytes."""
    return (8, 3) if code.bits == 3 else (8 // code.bits, 1)


def _shifts(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.int32) * bits


def code_values(codes: Tensor, code: CodeFormat, in_features: int, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, before scales: ``[N, K]`` in ``dtype``."""
    if code.name == "fp8":
        return codes.view(torch.float8_e4m3fn).to(dtype)
    unpacked = unpack_codes(codes, code, in_features)
    if code.name in ("nf4", "fp4"):
        values = NF4 if code.name == "nf4" else FP4
        # Not torch.tensor(), which cannot be traced where a decomposition is.
        book = torch.stack([torch.full((), value, dtype=torch.float32, device=codes.device) for value in values])
        return book[unpacked.long()].to(dtype)
    return unpacked.to(dtype) - code.offset


def spread_groups(groups: Tensor, in_features: int, group_size: int) -> Tensor:
    """Numbers of groups ``[N, G]`` for every column: ``[N, K]``."""
    if group_size == -1:
        return groups.expand(-1, in_features)
    return groups.repeat_interleave(group_size, 1)[:, :in_features]


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code_format: str,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The whole weight ``[N, K]``; float64 is exact, narrower dtypes are rounded from float32 once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = code_values(codes, CODE_FORMATS[code_format], in_features, wide)
    if zeros is not None:
        weight = weight - spread_groups(zeros.to(wide), in_features, group_size)
    return (weight * spread_groups(scales.to(wide), in_features, group_size)).to(dtype)
