"""What transformers share: the feed-forward block, and the sum with the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.nn.quantized import QuantizedLinear


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _geglu_tanh(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "geglu_tanh": _geglu_tanh,
    "swiglu": _swiglu,
}
"""Of feed-forward blocks; those that end in ``glu`` multiply the activated first half by the second (Shazeer, 2020)."""

_IN_KERNEL = ("gelu", "gelu_tanh", "relu", "silu", "swiglu")


def project(layer: nn.Module, x: Tensor, residual: Tensor, dropout: nn.Module) -> Tensor:
    """``residual + dropout(layer(x))``; a quantized layer adds the residual in its kernel."""
    if isinstance(layer, QuantizedLinear) and not dropout.training:
        return layer(x, residual)  # type: ignore[no-any-return]
    return residual + dropout(layer(x))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """``residual + dropout(down(activation(up(x))))``; a gated ``up`` gives the gate and the factor side by side.

    Args:
        hidden_size: features of the stream.
        inner_size: features between the two products.
        activation: one of :data:`ACTIVATIONS`.
        bias: whether the products have one.
        dropout: probability of dropping an output.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 3, 8)
        >>> FeedForward(8, 16, "swiglu")(x, residual=x).shape
        torch.Size([2, 3, 8])
    """

    def __init__(
        self, hidden_size: int, inner_size: int, activation: str, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"FeedForward: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        gated = activation in ("swiglu", "geglu_tanh")
        self.up = nn.Linear(hidden_size, 2 * inner_size if gated else inner_size, bias)
        self.down = nn.Linear(inner_size, hidden_size, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        inner = self.up(x)
        if not (isinstance(self.up, QuantizedLinear) and self.up.activation is not None):
            inner = ACTIVATIONS[self.activation](inner)
        return project(self.down, inner, residual, self.dropout)


def fuse_activations(model: nn.Module) -> None:
    """Let quantized feed-forward blocks compute their activation in the kernel of the product before it."""
    for module in model.modules():
        if isinstance(module, FeedForward) and isinstance(module.up, QuantizedLinear):
            module.up.activation = module.activation if module.activation in _IN_KERNEL else None
