"""The specifications of all operators: importing one registers its operator in :mod:`ptkernels._registry`."""

from ptkernels.ops.attention import spec as attention
from ptkernels.ops.attention_kv_cache import spec as attention_kv_cache
from ptkernels.ops.attention_varlen import spec as attention_varlen
from ptkernels.ops.conv_bn_relu import spec as conv_bn_relu
from ptkernels.ops.conv_transpose_bn_relu import spec as conv_transpose_bn_relu
from ptkernels.ops.packed_rnn import spec as packed_rnn
from ptkernels.ops.quantized_matmul import spec as quantized_matmul
from ptkernels.ops.rotary_embedding import spec as rotary_embedding

__all__ = [
    "attention",
    "attention_kv_cache",
    "attention_varlen",
    "conv_bn_relu",
    "conv_transpose_bn_relu",
    "packed_rnn",
    "quantized_matmul",
    "rotary_embedding",
]
