"""Better codes than the nearest: GPTQ (against a calibration set) and HQQ (without one)."""

from __future__ import annotations

import torch
from torch import Tensor

from ptkernels.ops.quantized_matmul.formats import code_values, spread_groups
from ptkernels.ops.quantized_matmul.quantize import check_arguments, encode, group_scales, grouped
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight


def gptq(
    weight: Tensor,
    x: Tensor,
    scheme: str = "int4_weight_only",
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    damping: float = 0.01,
) -> QuantizedWeight:
    """Quantize column by column, each column's error made up for by those still to come (Frantar et al., GPTQ, 2023).

    Args:
        weight: ``[N, K]``, as for :func:`ptkernels.quantize_weight`.
        x: ``[..., K]``, inputs of the calibration set; more rows than K are better.
        scheme: any whose input needs no calibrated scale.
        group_size: columns that share a scale; default: the scheme's.
        symmetric: without zero points.
        damping: added to the diagonal of ``x^T x``, as a share of its mean.

    Returns:
        A weight like ``quantize_weight``'s, with less error in ``x weight^T``.

    Raises:
        TypeError, ValueError: as for ``quantize_weight``; ``x`` has other features than the weight.

    Note:
        Time is O(K^3 + N K^2), memory O(K^2).

    Example:
        >>> import torch, ptkernels as ptk
        >>> weight, x = torch.randn(16, 64), torch.randn(256, 64) @ torch.randn(64, 64)
        >>> errors = [
        ...     (x @ (w.dequantize() - weight).T).norm()
        ...     for w in (ptk.quantization.gptq(weight, x), ptk.quantize_weight(weight, "int4_weight_only"))
        ... ]
        >>> bool(errors[0] < errors[1])
        True
    """
    spec, size = check_arguments("gptq", weight, scheme, group_size, symmetric)
    if x.size(-1) != weight.size(1):
        raise ValueError(f"gptq: x: got {x.size(-1)} features, expected {weight.size(1)} like weight")
    columns = weight.size(1)
    left = weight.detach().to(torch.float32).clone()
    factor = _inverse_factor(x, damping)
    span = columns if size == -1 else size
    codes, scales, zeros = [], [], []
    for first in range(0, columns, max(span, 1)):
        group = left[:, first : first + span]
        scale, zero = group_scales(grouped(group, -1), spec.code, symmetric)
        found = torch.empty_like(group)
        for k in range(group.size(1)):
            column, at = group[:, k : k + 1], first + k
            code = encode(column, scale, zero, spec.code, -1)
            value = code_values(code, spec.code, 1, torch.float32)
            rounded = scale * (value if zero is None else value - zero)
            found[:, k] = rounded[:, 0]
            error = (column - rounded) / factor[at, at]
            left[:, at + 1 :] -= error * factor[at, at + 1 :]
        codes.append(found)
        scales.append(scale)
        zeros.append(zero)
    scale = torch.cat(scales, 1)
    zero = None if symmetric else torch.cat([z for z in zeros if z is not None], 1)
    # The values found are on the grid: encoding them again gives their codes, in the format's packing.
    packed = encode(torch.cat(codes, 1), scale, zero, spec.code, size)
    return QuantizedWeight(packed, scale, zero, None, scheme, size, columns)


def _inverse_factor(x: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of ``x^T x``, damped; float32."""
    rows = x.detach().double().flatten(0, -2)
    hessian = rows.T @ rows
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def hqq(
    weight: Tensor, scheme: str = "int4_weight_only", group_size: int | None = 64, iterations: int = 20
) -> QuantizedWeight:
    """Zero points fitted to the weight alone, for a norm that forgives outliers (Badri and Shaji, HQQ, 2023).

    Half-quadratic splitting of ``|weight - rounded|_p^p``, p = 0.7: the residual is shrunk, then the zero points are
    the mean of what the shrunk residual asks for, in turns.

    Args:
        weight: ``[N, K]``, as for :func:`ptkernels.quantize_weight`.
        scheme: one with integers of at most 4 bits.
        group_size: columns that share a scale and a zero point; None: the scheme's.
        iterations: at most so many turns; ends early where the error stops falling.

    Raises:
        TypeError, ValueError: as for ``quantize_weight`` without symmetry.

    Example:
        >>> import torch, ptkernels as ptk
        >>> weight = torch.randn(16, 128)
        >>> fitted, nearest = (
        ...     (w.dequantize() - weight).abs().mean()
        ...     for w in (
        ...         ptk.quantization.hqq(weight),
        ...         ptk.quantize_weight(weight, "int4_weight_only", 64, symmetric=False),
        ...     )
        ... )
        >>> bool(fitted <= nearest)
        True
    """
    spec, size = check_arguments("hqq", weight, scheme, group_size, False)
    values = weight.detach().to(torch.float32)
    columns = values.size(1)
    scales, zeros = group_scales(grouped(values, size), spec.code, False)
    assert zeros is not None
    scale = spread_groups(scales, columns, size)
    power, strength = 0.7, 10.0
    best, best_zeros = float("inf"), zeros
    for _ in range(iterations):
        shift = spread_groups(zeros, columns, size)
        levels = torch.where(scale == 0.0, 0.0, values / scale) + shift
        codes = levels.round().clamp(-spec.code.offset, 2**spec.code.bits - 1 - spec.code.offset)
        residual = values - scale * (codes - shift)
        error = float(residual.abs().pow(power).sum())
        if error >= best:
            break
        best, best_zeros = error, zeros
        magnitude = residual.abs()
        shrunk = residual.sign() * (magnitude - magnitude.clamp(min=1e-8).pow(power - 1) / strength).clamp(min=0.0)
        wanted = codes - torch.where(scale == 0.0, 0.0, (values - shrunk) / scale)
        counts = grouped(torch.ones_like(values[:1]), size).sum(-1)
        zeros = grouped(wanted, size).sum(-1) / counts
        strength *= 1.01
    return QuantizedWeight(
        encode(values, scales, best_zeros, spec.code, size), scales, best_zeros, None, scheme, size, columns
    )
