"""From floating weights to codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.quantized_matmul.formats import (
    FP4,
    NF4,
    SCHEMES,
    CodeFormat,
    Scheme,
    group_count,
    pack_codes,
    spread_groups,
)
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight, check_group_size

OP = "quantize_weight"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def quantize_weight(
    weight: Tensor,
    scheme: str,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    input_scale: Tensor | float | None = None,
) -> QuantizedWeight:
    """Quantize the weight of a linear layer, rounding every entry to the nearest code.

    Args:
        weight: ``[N, K]`` (out features, in features), float64, float32, bfloat16 or float16, any strides, finite. Or
            ``[E, N, K]``: the stacked weights of experts, for ``quantized_linear(..., counts=...)``.
        scheme: what to store, and what the product does with its input:

            - ``"int8_dynamic"``: 8-bit weights; the input is quantized to 8 bits too, by the largest magnitude of each
              of its rows. ``"int8_static"``: by ``input_scale`` instead.
            - ``"int8_weight_only"``, ``"int4_weight_only"``, ``"int3_weight_only"``, ``"int2_weight_only"``: integers,
              input as it is.
            - ``"int4_int8"``: 4-bit weights, input quantized as in ``int8_dynamic``.
            - ``"nf4"``, ``"mxfp4"``, ``"fp8"``: 4-bit quantiles of a normal distribution, 4-bit floats with
              power-of-two scales, 8-bit floats (e4m3); input as it is. ``"fp8_blocks"``: one scale for every 128 rows
              by 128 columns.
        group_size: consecutive columns that share a scale, a multiple of 16, or -1 for a whole row. Default: -1 for 8
            bits, 128 for 4-bit integers, 64 for nf4 and 3-bit integers, 32 for 2-bit integers; mxfp4 (32) and
            fp8_blocks (128) take no other.
        symmetric: without zero points; False, for integer schemes of at most 4 bits, adds one to every group.
        input_scale: for ``int8_static``: the step of the input's 8-bit grid (its largest magnitude / 127).

    Returns:
        The quantized weight, on the device of ``weight``.

    Raises:
        TypeError: ``weight`` is not a dense floating tensor, or an argument has the wrong type.
        ValueError: the scheme is unknown, a number is out of range, or the weight is not finite.

    Note:
        8-bit scales are the largest magnitude / 127; 4-, 3- and 2-bit symmetric groups map their entry of largest
        magnitude to the code that has no opposite (-8, -4, -2), which costs a group nothing and makes its grid finer.
        A group of zeros has scale 0 and codes that stand for 0. Time and memory are O(N K).

    Example:
        >>> import torch, ptkernels as ptk
        >>> quantized = ptk.quantize_weight(torch.eye(3, 40), "int8_dynamic")
        >>> quantized.codes[0, :3].tolist()
        [127, 0, 0]
        >>> torch.equal(quantized.dequantize(), torch.eye(3, 40))
        True
    """
    spec, group_size = check_arguments(OP, weight, scheme, group_size, symmetric, input_scale)
    values = weight.detach().to(torch.float32).flatten(0, -2)
    scales, zeros = group_scales(grouped(values, group_size), spec.code, symmetric)
    if spec.block_rows > 1:
        scales = torch.cat([_share_rows(part, spec.block_rows) for part in scales.split(weight.size(-2) or 1)])
    codes = encode(values, scales, zeros, spec.code, group_size)
    step = None
    if spec.is_static:
        step = torch.as_tensor(input_scale, dtype=torch.float32, device=weight.device).detach().reshape(1).clone()
    experts = weight.size(0) if weight.dim() == 3 else None
    return QuantizedWeight(codes, scales, zeros, step, scheme, group_size, weight.size(-1), experts)


def check_arguments(
    op: str, weight: Any, scheme: Any, group_size: Any = None, symmetric: Any = True, input_scale: Any = None
) -> tuple[Scheme, int]:
    """What ``scheme`` names and the group size to use, or the precise error, in the name of ``op``."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{op}: weight: got {type(weight).__name__}, expected torch.Tensor")
    if weight.layout is not torch.strided or weight.is_nested or weight.is_quantized or weight.dtype not in _FLOATS:
        raise TypeError(f"{op}: weight: got {weight.dtype} {weight.layout}, expected a dense floating tensor")
    if weight.dim() != 2 and not (weight.dim() == 3 and op == OP):
        raise ValueError(f"{op}: weight: got shape {list(weight.shape)}, expected [out_features, in_features]")
    if scheme not in SCHEMES:
        raise ValueError(f"{op}: scheme: got {scheme!r}, expected one of {', '.join(SCHEMES)}")
    spec = SCHEMES[scheme]
    if not isinstance(symmetric, bool):
        raise TypeError(f"{op}: symmetric: got {type(symmetric).__name__}, expected bool")
    if not symmetric and spec.code.name not in ("u4", "u3", "u2"):
        raise ValueError(f"{op}: symmetric: got False with {scheme}, expected True")
    if spec.is_static != (input_scale is not None):
        expected = "a positive number" if spec.is_static else "None"
        raise ValueError(f"{op}: input_scale: got {input_scale} with {scheme}, expected {expected}")
    if spec.is_static and not (torch.as_tensor(input_scale).numel() == 1 and float(input_scale) > 0.0):
        raise ValueError(f"{op}: input_scale: got {input_scale}, expected a positive number")
    size = spec.group_size if group_size is None else group_size
    check_group_size(size)
    if spec.group_sizes and size not in spec.group_sizes:
        raise ValueError(f"{op}: group_size: got {size}, expected {spec.group_sizes[0]} for {scheme}")
    if not bool(weight.detach().isfinite().all()):
        raise ValueError(f"{op}: weight: got infinities or NaN, expected finite numbers")
    return spec, size


def grouped(values: Tensor, group_size: int) -> Tensor:
    """``[N, K]`` as ``[N, groups, size]``, the last group filled up with zeros."""
    size = max(values.size(1), 1) if group_size == -1 else group_size
    count = group_count(values.size(1), group_size)
    padded = torch.nn.functional.pad(values, (0, count * size - values.size(1)))
    return padded.reshape(values.size(0), count, size)


def _share_rows(scales: Tensor, rows: int) -> Tensor:
    """The largest scale of every block of so many rows, for each of them."""
    padded = torch.nn.functional.pad(scales, (0, 0, 0, -scales.size(0) % rows))
    shared: Tensor = padded.unflatten(0, (-1, rows)).amax(1).repeat_interleave(rows, 0)
    return shared[: scales.size(0)]


def group_scales(groups: Tensor, code: CodeFormat, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales, and zeros unless symmetric, of ``[N, groups, size]``."""
    if groups.numel() == 0:
        empty = groups.new_zeros(groups.shape[:2])
        return empty, None if symmetric else empty.clone()
    top = groups.abs().amax(-1)
    if not symmetric:
        low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
        scales = (high - low) / (2**code.bits - 1)
        first = (-low / scales).nan_to_num(0.0).round()  # the code that stands for 0
        return scales, first - code.offset
    if code.name == "s8":
        return top / 127.0, None
    if code.name in ("u4", "u3", "u2"):
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        return extreme / -code.offset, None
    if code.name == "nf4":
        return top, None
    if code.name == "fp8":
        return top / 448.0, None
    # Microscaling: the power of two that leaves the largest magnitude within e2m1's last binade.
    exponent = torch.frexp(top).exponent - 3
    return torch.where(top > 0.0, torch.ldexp(torch.ones_like(top), exponent.clamp(-126, 127)), 0.0), None


def encode(values: Tensor, scales: Tensor, zeros: Tensor | None, code: CodeFormat, group_size: int) -> Tensor:
    """Codes of the nearest representable numbers for given scales; where a scale is 0, the code of 0."""
    in_features = values.size(1)
    scale = spread_groups(scales, in_features, group_size)
    scaled = torch.where(scale == 0.0, 0.0, values / scale)
    if code.name == "fp8":
        return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    if code.name in ("nf4", "fp4"):
        return pack_codes(_nearest(scaled, NF4 if code.name == "nf4" else FP4), code)
    if zeros is not None:
        scaled = scaled + spread_groups(zeros, in_features, group_size)
    if code.name == "s8":
        return scaled.round().clamp(-127, 127).to(torch.int8)
    return pack_codes((scaled.round() + code.offset).clamp(0, 2**code.bits - 1), code)


def _nearest(values: Tensor, book: tuple[float, ...]) -> Tensor:
    """Index of the nearest number of the book; halfway, of the one with the even index."""
    numbers, order = torch.tensor(book, device=values.device).sort(stable=True)
    middles = (numbers[1:] + numbers[:-1]) / 2
    low = torch.bucketize(values, middles, right=False)
    high = torch.bucketize(values, middles, right=True)
    index = torch.where(order[low] % 2 == 0, low, high)
    return order[index].to(torch.uint8)
