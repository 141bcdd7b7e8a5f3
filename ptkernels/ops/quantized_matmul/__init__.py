"""Linear layers whose weight is stored in 8, 4 or 2 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkernels import _backend
from ptkernels._autograd import in_transform
from ptkernels._distributed import is_distributed
from ptkernels._sizes import holds
from ptkernels.ops.quantized_matmul import checks, reference, register, routing
from ptkernels.ops.quantized_matmul.library import DEVICES, embedding_op, linear_op
from ptkernels.ops.quantized_matmul.quantize import quantize_weight
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "quantize_weight", "quantized_embedding", "quantized_linear"]


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
        counts: ``[E]``, int64, on the CPU: with a stacked weight ``[E, N, K]``, how many rows of ``x`` (``[T, K]``,
            ordered by expert) go to each; they sum to ``T``. The bias is ``[E, N]`` then.

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
    if is_distributed(x) and isinstance(qweight, QuantizedWeight):
        from ptkernels.integrations import dtensor

        operands = {"x": x, "bias": bias, "residual": residual}
        operands |= {name: getattr(qweight, name) for name in ("codes", "scales", "zeros", "input_scale")}
        given = {"activation": activation, "out_dtype": out_dtype}
        return dtensor.quantized_linear(operands, qweight, counts, given)
    try:
        return _quantized_linear(x, qweight, bias, residual, activation, out_dtype, counts)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        checks.check_inputs(x, qweight, bias, residual, activation, out_dtype, counts)
        raise


def _quantized_linear(
    x: Any,
    qweight: Any,
    bias: Any,
    residual: Any,
    activation: str | None,
    out_dtype: torch.dtype | None,
    counts: Any,
) -> Tensor:
    x, bias, residual = register.autocast_if_enabled(x, bias, residual)
    if _backend.state.backend is not None or x.device.type != "cpu":
        checks.check_inputs(x, qweight, bias, residual, activation, out_dtype, counts)
        if routing.runs_on_reference(x, bias, residual):
            with torch.autocast(x.device.type, enabled=False):
                return reference.quantized_linear(
                    x, qweight, bias, residual=residual, activation=activation, out_dtype=out_dtype, counts=counts
                )
    name = checks.ACTIVATIONS[activation]
    spec, shape = qweight.spec, x.shape
    # What the operator would not notice; check_inputs words it.
    if (
        not holds(shape[-1] == qweight.in_features)
        or spec.is_static != (qweight.input_scale is not None)
        or any(tensor is not None and tensor.device != x.device for tensor in (qweight.codes, bias, residual))
        or (counts is None) != (qweight.experts is None)
    ):
        raise ValueError("arguments that do not fit together")
    if counts is not None:
        if len(shape) != 2 or counts.shape != (qweight.experts,):
            raise ValueError("arguments that do not fit together")
        if bias is not None:
            if bias.shape != (qweight.experts, qweight.out_features):
                raise ValueError("bias does not fit qweight")
            bias = bias.flatten()
    if len(shape) != 2:
        if residual is not None:
            if residual.shape[:-1] != shape[:-1]:
                raise ValueError("residual does not fit x")
            residual = _as_matrix(residual)
        x = _as_matrix(x)
    args = (
        x, qweight.codes, qweight.scales, qweight.zeros, bias, residual, spec.code.name, qweight.group_size,
        spec.quantizes_input, qweight.input_scale, name, out_dtype, counts,
    )  # fmt: skip
    out: Tensor
    if torch.compiler.is_compiling() or in_transform() or _records(x, bias, residual):
        out = linear_op(*args)
    else:
        # Nothing to record: the autograd kernel, which is Python, would double the latency.
        with torch._C._AutoDispatchBelowAutograd():
            out = linear_op(*args)
    return out if len(shape) == 2 else out.view(*shape[:-1], out.size(-1))


def _records(*tensors: Tensor | None) -> bool:
    """Whether autograd has to know of the call."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def quantized_embedding(input: Tensor, qweight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of a quantized table, decoded as they are looked up.

    Args:
        input: ``[...]``, int64 or int32, indices of rows, on the device of ``qweight``.
        qweight: ``[num_embeddings, embedding_dim]``, from :func:`ptkernels.quantize_weight`, not stacked.
        dtype: of the result: float64, float32, bfloat16 or float16.

    Returns:
        ``[..., embedding_dim]``: ``qweight.dequantize(dtype)[input]``, to the last bit, without ever holding the table.
        Not differentiable: the table is frozen.

    Raises:
        TypeError: indices or dtype are of a type the operator does not take.
        ValueError: the weight is stacked or on another device.
        RuntimeError: an index is out of range.

    Example:
        >>> import torch, ptkernels as ptk
        >>> table = ptk.quantize_weight(torch.randn(10, 64), "nf4")
        >>> rows = ptk.quantized_embedding(torch.tensor([7, 0]), table)
        >>> torch.equal(rows, table.dequantize()[[7, 0]])
        True
    """
    if is_distributed(input) and isinstance(qweight, QuantizedWeight):
        from ptkernels.integrations import dtensor

        return dtensor.quantized_embedding(input, qweight, dtype)
    checks.check_embedding(input, qweight, dtype)
    spec = qweight.spec
    if _backend.state.backend == "reference" or input.device.type not in (*DEVICES, "meta"):
        return qweight.dequantize(dtype)[input.long()]
    arguments = (qweight.codes, qweight.scales, qweight.zeros, spec.code.name, qweight.group_size, qweight.in_features)
    rows: Tensor = embedding_op(input.reshape(-1).long(), *arguments, dtype)
    return rows.view(*input.shape, qweight.in_features)
