"""Every module of ptkernels.nn, each from one tensor to one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import ptkernels as ptk


class SelfAttention(nn.Module):
    """MultiheadAttention on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = ptk.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Decoder(nn.Module):
    """TransformerDecoderLayer on one input, which is its memory too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ptk.nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1), tgt_is_causal=True)


class Images(nn.Module):
    """A block over images or volumes, the rows of the input being their last dimensions."""

    def __init__(self, block: nn.Module, space: tuple[int, ...]) -> None:
        super().__init__()
        self.block, self.space = block, space

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.unflatten(-1, self.space))


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, without its states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Cell(nn.Module):
    """One step of a cell, for every token by itself."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        result = self.cell(x.flatten(0, 1))
        return result[0] if isinstance(result, tuple) else result


def fused_block() -> nn.Module:
    """A residual block whose forward replace() has rewritten."""
    block = nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5), nn.ReLU())
    ptk.replace(block, "conv_bn_relu")
    return block


def quantized() -> nn.Module:
    return ptk.nn.QuantizedLinear.from_float(nn.Linear(8, 6), "int8_weight_only")


def embedding() -> nn.Module:
    return ptk.nn.QuantizedEmbedding.from_float(nn.Embedding(20, 16), "int4_weight_only", 16)


CELLS = ("LSTMCell", "GRUCell", "RNNCell")
CELLS += ("LayerNormLSTMCell", "LayerNormGRUCell", "PeepholeLSTMCell", "ResetBeforeGRUCell")

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": SelfAttention,
    "TransformerEncoderLayer": lambda: ptk.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    "TransformerDecoderLayer": Decoder,
    "ConvBNReLU1d": lambda: ptk.nn.ConvBNReLU1d(5, 4, 3, padding=1),
    "ConvBNReLU2d": lambda: Images(ptk.nn.ConvBNReLU2d(5, 4, 3, padding=1, activation="silu"), (4, 2)),
    "ConvBNReLU3d": lambda: Images(ptk.nn.ConvBNReLU3d(5, 4, 2, bias=True, activation="gelu"), (2, 2, 2)),
    "ConvTransposeBNReLU1d": lambda: ptk.nn.ConvTransposeBNReLU1d(5, 4, 3, 2, norm="instance", activation="tanh"),
    "ConvTransposeBNReLU2d": lambda: Images(ptk.nn.ConvTransposeBNReLU2d(5, 4, 3, 2, activation="silu"), (4, 2)),
    "ConvTransposeBNReLU3d": lambda: Images(
        ptk.nn.ConvTransposeBNReLU3d(5, 4, 2, bias=True, norm="group", num_groups=2, activation="gelu"), (2, 2, 2)
    ),
    "ReLUConvBN1d": lambda: ptk.nn.ReLUConvBN1d(5, 4, 3, padding=1, pre_activation="silu"),
    "ReLUConvBN2d": lambda: Images(ptk.nn.ReLUConvBN2d(5, 4, 3, padding=1, pre_activation="silu"), (4, 2)),
    "ReLUConvBN3d": lambda: Images(ptk.nn.ReLUConvBN3d(5, 4, 2, bias=True, pre_activation="gelu"), (2, 2, 2)),
    "SyncBatchNorm": lambda: ptk.nn.SyncBatchNorm(5),
    "QuantizedLinear": quantized,
    "QuantizedEmbedding": embedding,
    "LoRALinear": lambda: ptk.nn.LoRALinear(quantized(), 2),
    "LSTM": lambda: Recurrent(ptk.nn.LSTM(8, 6, batch_first=True)),
    "GRU": lambda: Recurrent(ptk.nn.GRU(8, 6, batch_first=True)),
    "RNN": lambda: Recurrent(ptk.nn.RNN(8, 6, batch_first=True)),
    **{name: lambda name=name: Cell(getattr(ptk.nn, name)(8, 6)) for name in CELLS},
    "ZoneoutCell": lambda: Cell(ptk.nn.ZoneoutCell(ptk.nn.PeepholeLSTMCell(8, 6), 0.25)),
    "CellLayer": lambda: Recurrent(ptk.nn.CellLayer(*(ptk.nn.LayerNormGRUCell(8, 6) for _ in range(2)), True)),
    "replaced Sequential": fused_block,
}
TRAINED = [name for name in MAKERS if name not in ("QuantizedLinear", "QuantizedEmbedding")]


def made(name: str, training: bool = True) -> nn.Module:
    torch.manual_seed(0)
    module = MAKERS[name]()
    for part in module.modules():
        if isinstance(part, ptk.nn.LoRALinear):
            nn.init.normal_(part.lora_b)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module.train(training)


def example(name: str, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "QuantizedEmbedding":
        return torch.randint(20, (count, 5), generator=generator)
    return torch.randn(count, 5, 8, generator=generator)


def called(module: nn.Module, x: Tensor) -> Tensor:
    """With the same random numbers every time."""
    torch.manual_seed(2)
    return module(x)


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(called(module, x).sin().sum(), list(trained_parameters(module).values()))
