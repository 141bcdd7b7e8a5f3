"""The quantized linear layer in plain torch: the weight dequantized, the input rounded to its grid, a product.

Differentiable any number of times in input, bias and residual. Where the input is quantized, its gradient is that of
the product with the input itself: the straight-through estimator of Bengio et al. (2013).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ptkernels.ops.quantized_matmul.formats import dequantize
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def input_codes(x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """8-bit codes and scales ``[..., 1]``, float32, of the rows of ``[..., K]``; found in float32 whatever the dtype.

    Without ``input_scale``, a row's scale is its largest magnitude / 127. Rows below 2^-100 have scale 0 and codes 0; a
    row with a NaN, or without ``input_scale`` an infinity, has scale NaN.
    """
    narrow = x.detach().to(torch.float32)
    if input_scale is not None:
        scale = input_scale.to(torch.float32).expand(*x.shape[:-1], 1)
        broken = narrow.isnan().any(-1, keepdim=True)
        factor = 1.0 / scale
    else:
        top = narrow.abs().amax(-1, keepdim=True) if x.size(-1) else narrow.new_zeros(*x.shape[:-1], 1)
        broken = ~top.isfinite()
        tiny = top < 2.0**-100
        scale = torch.where(tiny, 0.0, top / 127.0)
        # A tensor over a tensor: for a number over a tensor torch multiplies by the reciprocal, which rounds twice.
        factor = torch.where(tiny, 0.0, torch.full_like(top, 127.0) / top)
    codes = torch.where(broken, 0.0, (narrow * factor).clamp(-127.0, 127.0).round())
    return codes, torch.where(broken, float("nan"), scale)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The named activation; ``swiglu`` multiplies silu of the first half of the columns by the second half."""
    if activation is None or activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "silu":
        return F.silu(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def quantized_linear(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Same signature and results as :func:`ptkernels.quantized_linear`, by the dequantized weight in O(N K) memory."""
    return product(
        x,
        qweight.codes,
        qweight.scales,
        qweight.zeros,
        bias if counts is None or bias is None else bias.flatten(),
        residual,
        qweight.spec.code.name,
        qweight.group_size,
        qweight.spec.quantizes_input,
        qweight.input_scale,
        activation,
        out_dtype,
        counts,
    )


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    code_format: str,
    group_size: int,
    quantize_input: bool,
    input_scale: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
    counts: Tensor | None = None,
) -> Tensor:
    """The same with the operator's own arguments."""
    if counts is not None:
        parts = [codes, scales, zeros, bias]
        per_expert = zip(*(expert_parts(tensor, counts.numel()) for tensor in parts), strict=True)
        rows = counts.tolist()
        residuals = [None] * len(rows) if residual is None else residual.split(rows)
        options: Any = (code_format, group_size, quantize_input, input_scale, activation, out_dtype)
        arguments: Any = zip(x.split(rows), per_expert, residuals, strict=True)
        one: Any = product
        return torch.cat([one(part, *stored, added, *options) for part, stored, added in arguments])
    wide = compute_dtype(x.dtype)
    value = x.to(wide)
    if quantize_input:
        value = straight_through(value, input_scale)
    out = value @ dequantize(codes, scales, zeros, code_format, group_size, x.size(-1), wide).T
    if bias is not None:
        out = out + bias.to(wide)
    if residual is not None:
        out = out + residual.to(wide)
    return activate(out, activation).to(x.dtype if out_dtype is None else out_dtype)


def expert_parts(tensor: Tensor | None, experts: int) -> tuple[Tensor | None, ...]:
    """Each expert's share of what is stacked along the first dimension."""
    return (None,) * experts if tensor is None else tensor.chunk(experts) if tensor.size(0) else (tensor,) * experts


class _StraightThrough(torch.autograd.Function):
    """Another value in place of the input, the derivative of the input itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: torch.autograd.function.FunctionCtx, tangent: Tensor, _: Tensor | None) -> Tensor:
        return tangent


def straight_through(x: Tensor, input_scale: Tensor | None) -> Tensor:
    """The input rounded to its 8-bit grid, in its own dtype; gradients pass unchanged."""
    codes, scale = input_codes(x, input_scale)
    rounded = codes.to(x.dtype) * scale.to(x.dtype)
    return _StraightThrough.apply(x, rounded)  # type: ignore[no-any-return,no-untyped-call]
