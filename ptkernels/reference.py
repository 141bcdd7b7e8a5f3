"""The oracles: one plain PyTorch function per operator, with the operator's signature.

They are differentiable any number of times, in forward and in reverse mode, run on every device and dtype PyTorch
supports, and in float64 they are what tests and benchmarks compare with.
"""

from __future__ import annotations

from ptkernels.ops.attention.reference import attention
from ptkernels.ops.attention_kv_cache.reference import attention_with_kv_cache
from ptkernels.ops.attention_varlen.reference import attention_varlen
from ptkernels.ops.conv_bn_relu.reference import conv_bn_relu
from ptkernels.ops.conv_transpose_bn_relu.reference import conv_transpose_bn_relu
from ptkernels.ops.packed_rnn.oracle import gru, lstm, rnn
from ptkernels.ops.packed_rnn.reference import packed_rnn
from ptkernels.ops.quantized_matmul.reference import quantized_linear
from ptkernels.ops.rotary_embedding.reference import rotary_embedding

__all__ = [
    "attention",
    "attention_varlen",
    "attention_with_kv_cache",
    "conv_bn_relu",
    "conv_transpose_bn_relu",
    "gru",
    "lstm",
    "packed_rnn",
    "quantized_linear",
    "rnn",
    "rotary_embedding",
]
