"""Drop-in modules over the operators, with constructors, parameters and state_dict of their torch.nn originals."""

from __future__ import annotations

from ptkernels.nn.attention import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from ptkernels.nn.cells import (
    CellLayer,
    LayerNormGRUCell,
    LayerNormLSTMCell,
    PeepholeLSTMCell,
    ResetBeforeGRUCell,
    ZoneoutCell,
)
from ptkernels.nn.conv import (
    ConvBNReLU1d,
    ConvBNReLU2d,
    ConvBNReLU3d,
    ConvTransposeBNReLU1d,
    ConvTransposeBNReLU2d,
    ConvTransposeBNReLU3d,
    ReLUConvBN1d,
    ReLUConvBN2d,
    ReLUConvBN3d,
)
from ptkernels.nn.quantized import LoRALinear, QuantizedEmbedding, QuantizedLinear, quantize_
from ptkernels.nn.rnn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from ptkernels.nn.synchronized import SyncBatchNorm

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CellLayer",
    "ConvBNReLU1d",
    "ConvBNReLU2d",
    "ConvBNReLU3d",
    "ConvTransposeBNReLU1d",
    "ConvTransposeBNReLU2d",
    "ConvTransposeBNReLU3d",
    "GRUCell",
    "LSTMCell",
    "LayerNormGRUCell",
    "LayerNormLSTMCell",
    "LoRALinear",
    "MultiheadAttention",
    "PeepholeLSTMCell",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RNNCell",
    "ReLUConvBN1d",
    "ReLUConvBN2d",
    "ReLUConvBN3d",
    "ResetBeforeGRUCell",
    "SyncBatchNorm",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "ZoneoutCell",
    "quantize_",
]
