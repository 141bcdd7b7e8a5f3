"""Linear layers whose weight is stored in 8, 4 or 2 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels.ops.quantized_matmul import checks, reference, register, routing
from ptkernels.ops.quantized_matmul.library import linear_op
from ptkernels.ops.quantized_matmul.quantize import quantize_weight
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "quantize_weight", "quantized_linear"]


def quantized_linear(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""``activation(x @ weight^T + bias + residual)`` with a quantized weight, decoded tile by tile inside the product.

    Args:
        x: ``[..., K]``, float64, float32, bfloat16 or float16, any strides, at least one dimension. Schemes that
            quantize the input (``int8_dynamic``, ``int8_static``, ``int4_int8``) round each of its rows to 8 bits.
        qweight: ``[N, K]``, from :func:`ptkernels.quantize_weight`, on the device of ``x``.
        bias: ``[N]``. It and ``residual`` may have another dtype than ``x``, but float64 goes with float64 only.
        residual: ``[..., N]``, added before the activation. Default: none.
        activation: ``"relu"``, ``"gelu"`` (by the error function), ``"gelu_tanh"``, ``"silu"``, or ``"swiglu"``, which
            multiplies silu of the first N/2 columns by the other N/2. Default: none.
        out_dtype: dtype of the result. Default: that of ``x``.

    Returns:
        ``[..., N]`` (``[..., N/2]`` with swiglu), contiguous.

    Raises:
        TypeError: an argument is not a dense tensor, or has a dtype or Python type the operator does not take.
        ValueError: shapes, devices or names do not fit; the message names the argument.
        ptkernels.errors.FallbackError: no kernel covers the call and ``PTKERNELS_STRICT=1``.
        ptkernels.errors.BackendError: the backend asked for cannot run the call.

    Note:
        Sums are kept in float32 (float64 for float64 ``x``), those of quantized inputs in int32, which is exact, within
        a group of scales. Results do not depend on the number of threads. Time is O(M N K); memory beyond the result is
        O(M K), never a decoded copy of the weight.

        Quantized rows: the scale is the largest magnitude / 127, codes are rounded half to even, all in float32. A row
        of zeros gives ``bias + residual``; a row with a NaN or an infinity gives NaN.

        Differentiable in ``x``, ``bias`` and ``residual``, to any order, the weight being decoded again from its codes;
        a quantized input passes its gradient straight through (Bengio et al., 2013). A call with an activation that
        needs gradients keeps the sums and applies the activation apart. Forward-mode differentiation runs on
        :func:`ptkernels.reference.quantized_linear`, with a warning.

    Example:
        >>> import torch, ptkernels as ptk
        >>> weight, x = torch.randn(64, 128), torch.randn(5, 128)
        >>> qweight = ptk.quantize_weight(weight, "int8_dynamic")
        >>> out = ptk.quantized_linear(x, qweight, activation="relu")
        >>> out.shape
        torch.Size([5, 64])
        >>> error = (out - torch.relu(x @ weight.T)).norm() / out.norm()
        >>> bool(error < 0.02)
        True
    """
    try:
        return _quantized_linear(x, qweight, bias, residual, activation, out_dtype)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        checks.check_inputs(x, qweight, bias, residual, activation, out_dtype)
        raise


def _quantized_linear(
    x: Any, qweight: Any, bias: Any, residual: Any, activation: str | None, out_dtype: torch.dtype | None
) -> Tensor:
    x, bias, residual = register.autocast_if_enabled(x, bias, residual)
    if _backend.state.backend is not None or x.device.type != "cpu":
        checks.check_inputs(x, qweight, bias, residual, activation, out_dtype)
        if routing.runs_on_reference(x, bias, residual):
            with torch.autocast(x.device.type, enabled=False):
                return reference.quantized_linear(
                    x, qweight, bias, residual=residual, activation=activation, out_dtype=out_dtype
                )
    name = checks.ACTIVATIONS[activation]
    spec, shape = qweight.spec, x.shape
    # What the operator would not notice; check_inputs words it.
    if (
        not checks.holds(shape[-1] == qweight.in_features)
        or spec.is_static != (qweight.input_scale is not None)
        or any(tensor is not None and tensor.device != x.device for tensor in (qweight.codes, bias, residual))
    ):
        raise ValueError("arguments that do not fit together")
    if len(shape) != 2:
        if residual is not None:
            if residual.shape[:-1] != shape[:-1]:
                raise ValueError("residual does not fit x")
            residual = _as_matrix(residual)
        x = _as_matrix(x)
    out: Tensor = linear_op(
        x,
        qweight.codes,
        qweight.scales,
        qweight.zeros,
        bias,
        residual,
        spec.code.name,
        qweight.group_size,
        spec.quantizes_input,
        qweight.input_scale,
        name,
        out_dtype,
    )
    return out if len(shape) == 2 else out.view(*shape[:-1], out.size(-1))


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
