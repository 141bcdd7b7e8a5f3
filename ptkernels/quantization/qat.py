"""Quantization-aware training: rounding in the forward, its derivative replaced by one that can be trained through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptkernels.nn.quantized import QuantizedLinear, replace_linears
from ptkernels.ops.quantized_matmul import quantize_weight, reference
from ptkernels.ops.quantized_matmul.formats import SCHEMES, Scheme, spread_groups
from ptkernels.ops.quantized_matmul.quantize import encode, group_scales, grouped
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight, check_group_size

OP = "fake_quantize"


def fake_quantize(x: Tensor, scale: Tensor, low: int = -127, high: int = 127) -> Tensor:
    r"""``scale * round(clamp(x / scale, low, high))``, with the derivatives of learned step size quantization.

    Args:
        x: any shape, floating.
        scale: positive, broadcasts with ``x``; requires grad where the step is learned.
        low: the smallest code.
        high: the largest code.

    Returns:
        Like ``x``. Rounding is half to even; NaN stays NaN. Where ``scale`` is 0 the result is 0.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: ``low`` is not below ``high``, or ``scale`` does not broadcast to the shape of ``x``.

    Note:
        The rounding residual ``round(v) - v`` counts as a constant. So the gradient of ``x`` is passed through within
        the range and 0 beyond it (the straight-through estimator, Bengio et al., 2013), and that of ``scale`` is
        ``round(v) - v`` within and ``low`` or ``high`` beyond (Esser et al., LSQ, 2020). Gradients of any order are
        those of ``scale * (clamp(x / scale) + residual)``: :func:`fake_quantize_surrogate`, which gradcheck accepts.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x = torch.tensor([0.26, -9.0], requires_grad=True)
        >>> scale = torch.tensor(0.1, requires_grad=True)
        >>> out = ptk.quantization.fake_quantize(x, scale, -8, 7)
        >>> out.sum().backward()
        >>> [round(v, 2) for v in out.tolist()], x.grad.tolist(), round(scale.grad.item(), 2)
        ([0.3, -0.8], [1.0, 0.0], -7.6)
    """
    _check(x, scale, low, high)
    level = _level(x, scale, low, high)
    return fake_quantize_surrogate(x, scale, (level.round() - level).detach(), low, high)


def fake_quantize_surrogate(x: Tensor, scale: Tensor, residual: Tensor, low: int = -127, high: int = 127) -> Tensor:
    """``scale * (clamp(x / scale, low, high) + residual)``: what :func:`fake_quantize` is to differentiation."""
    return (_level(x, scale, low, high) + residual) * scale


def _level(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    safe = torch.where(scale == 0.0, 1.0, scale)
    return torch.where(scale == 0.0, 0.0, x / safe).clamp(low, high)


def _check(x: Any, scale: Any, low: int, high: int) -> None:
    for name, tensor in (("x", x), ("scale", scale)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{OP}: {name}: got {got}, expected a floating tensor")
    if low >= high:
        raise ValueError(f"{OP}: low: got {low}, expected below high, {high}")
    try:
        fits = torch.broadcast_shapes(x.shape, scale.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{OP}: scale: got shape {list(scale.shape)}, expected one that broadcasts to {list(x.shape)}")


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that computes in training what its quantized form will: made by :func:`prepare_`.

    The weight is rounded to the scheme's grid, and the input too where the scheme does that; gradients pass straight
    through to the floating weight. With ``learned_step`` the scales are a parameter (integer schemes), trained as in
    LSQ; else they follow the weight.

    Args:
        linear: the layer to take parameters from.
        scheme: see :func:`ptkernels.quantize_weight`; all but ``int8_static``.
        group_size: columns that share a scale; default: the scheme's.
        learned_step: whether scales are trained.

    Raises:
        ValueError: the scheme is unknown or static, or its steps cannot be learned.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = ptk.quantization.FakeQuantizedLinear(torch.nn.Linear(32, 8), "int4_weight_only", 32)
        >>> x = torch.randn(5, 32)
        >>> torch.allclose(layer.convert()(x), layer(x), atol=1e-5)
        True
    """

    def __init__(
        self, linear: nn.Linear, scheme: str, group_size: int | None = None, learned_step: bool = False
    ) -> None:
        if scheme not in SCHEMES or SCHEMES[scheme].is_static:
            known = ", ".join(name for name, spec in SCHEMES.items() if not spec.is_static)
            raise ValueError(f"FakeQuantizedLinear: scheme: got {scheme!r}, expected one of {known}")
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scheme, self.spec = scheme, SCHEMES[scheme]
        self.group_size = self.spec.group_size if group_size is None else group_size
        check_group_size(self.group_size)
        self.step: nn.Parameter | None = None
        if learned_step:
            if self.spec.code.name not in ("s8", "u4", "u3", "u2"):
                raise ValueError(
                    f"FakeQuantizedLinear: learned_step: got True with {scheme}, expected an integer scheme"
                )
            self.step = nn.Parameter(self._scales().abs())
        self.train(linear.training)

    def _scales(self) -> Tensor:
        groups = grouped(self.weight.detach().float(), self.group_size)
        return group_scales(groups, self.spec.code, True)[0]

    def _range(self) -> tuple[int, int]:
        spec: Scheme = self.spec
        half = spec.code.offset
        return (-127, 127) if spec.code.name == "s8" else (-half, 2**spec.code.bits - 1 - half)

    def rounded_weight(self) -> Tensor:
        """The weight on its grid, differentiable in the weight (and the steps)."""
        if self.step is not None:
            step = spread_groups(self.step, self.in_features, self.group_size).to(self.weight.dtype)
            low, high = self._range()
            # LSQ balances the step's gradient by the number of weights that share it.
            factor = (high * self.weight.numel() / max(self.step.numel(), 1)) ** -0.5
            balanced = step * factor + (step * (1 - factor)).detach()
            return fake_quantize(self.weight, balanced, low, high)
        rounded = quantize_weight(self.weight, self.scheme, self.group_size).dequantize(self.weight.dtype)
        return self.weight + (rounded - self.weight).detach()

    def forward(self, input: Tensor) -> Tensor:
        value = reference.straight_through(input, None) if self.spec.quantizes_input else input
        return F.linear(value, self.rounded_weight(), self.bias)

    def convert(self) -> QuantizedLinear:
        """The layer with its weight in codes."""
        if self.step is None:
            weight = quantize_weight(self.weight, self.scheme, self.group_size)
        else:
            values, scales = self.weight.detach().float(), self.step.detach().float().clone()
            codes = encode(values, scales, None, self.spec.code, self.group_size)
            weight = QuantizedWeight(codes, scales, None, None, self.scheme, self.group_size, self.in_features)
        return QuantizedLinear.from_weight(weight, self.bias).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scheme={self.scheme}, group_size={self.group_size}"


def prepare_(
    model: nn.Module,
    scheme: str,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    *,
    group_size: int | None = None,
    learned_step: bool = False,
) -> list[str]:
    """Replace linear layers of a model by :class:`FakeQuantizedLinear`, in place; arguments as for ``quantize_``.

    Returns:
        The names of the replaced layers.

    Example:
        >>> import torch, ptkernels as ptk
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> ptk.quantization.prepare_(model, "int8_dynamic")        # train, then
        ['0', '2']
        >>> ptk.quantization.convert_(model)
        ['0', '2']
        >>> model[0]
        QuantizedLinear(in_features=32, out_features=16, scheme=int8_dynamic, group_size=-1, bias=True)
    """

    def make(_: str, layer: nn.Linear) -> FakeQuantizedLinear:
        return FakeQuantizedLinear(layer, scheme, group_size, learned_step)

    return replace_linears(model, nn.Linear, make, filter, "prepare_")


def convert_(model: nn.Module) -> list[str]:
    """Replace every :class:`FakeQuantizedLinear` of a trained model by its quantized layer, in place; their names."""
    return replace_linears(model, FakeQuantizedLinear, lambda _, layer: layer.convert(), caller="convert_")
