"""One small network of every family of modules, all from ``[batch, 6, 8]`` to ``[batch, 4]``, ours and torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from as_torch import torch_functions, torch_modules
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ptkernels as ptk

SHAPE = (6, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ptk.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Convolution(nn.Module):
    """Normalised by running statistics when evaluating, by the batch's when training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ptk.nn.ConvBNReLU1d(6, 5, 3, padding=1, activation="silu")
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ptk.nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = ptk.nn.GRUCell(8, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = None
        for step in x.unbind(1):
            hidden = self.layer(step, hidden)
        return self.head(hidden)


class Quantized(nn.Module):
    """Frozen codes with a trained addition."""

    def __init__(self) -> None:
        super().__init__()
        base = ptk.nn.QuantizedLinear.from_float(nn.Linear(8, 8), "int8_weight_only")
        self.layer = ptk.nn.LoRALinear(base, rank=2)
        nn.init.normal_(self.layer.lora_b)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)).mean(1))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "convolution": Convolution,
    "recurrent": Recurrent,
    "gated": Gated,
    "quantized": Quantized,
}


def network(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]().to(dtype)


@contextlib.contextmanager
def torch_side(model: nn.Module) -> Iterator[nn.Module]:
    """The same network on torch's modules and functions, differentiable twice; quantized codes on the reference."""
    with torch_functions(), ptk.backend("reference"), sdpa_kernel(SDPBackend.MATH):
        yield torch_modules(model)


def batch(count: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(4, (count,), generator=generator)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
