"""Fused operators for PyTorch that are fast on CPUs and GPUs, complete in every kind of differentiation, and honest.

Importing the package loads its shared libraries and registers their operators with torch; it initialises no device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptkernels import errors, nn, quantization, reference
from ptkernels._backend import backend, batch_invariant
from ptkernels._registry import Explanation, get
from ptkernels._replace import replace
from ptkernels._sdpa import patch_sdpa
from ptkernels._version import __version__
from ptkernels.ops import specs  # noqa: F401 - importing the specifications registers the operators
from ptkernels.ops.attention import attention
from ptkernels.ops.attention.relative import t5_relative_bias
from ptkernels.ops.attention.weights import attention_weights
from ptkernels.ops.attention_kv_cache import attention_with_kv_cache
from ptkernels.ops.attention_varlen import attention_varlen
from ptkernels.ops.conv_bn_relu import conv_bn_relu
from ptkernels.ops.conv_transpose_bn_relu import conv_transpose_bn_relu
from ptkernels.ops.packed_rnn import gru, lstm, packed_rnn, rnn
from ptkernels.ops.quantized_matmul import QuantizedWeight, quantize_weight, quantized_embedding, quantized_linear
from ptkernels.ops.rotary_embedding import rotary_embedding

__all__ = [
    "Explanation",
    "QuantizedWeight",
    "__version__",
    "attention",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "backend",
    "batch_invariant",
    "conv_bn_relu",
    "conv_transpose_bn_relu",
    "errors",
    "explain",
    "gru",
    "lstm",
    "nn",
    "packed_rnn",
    "patch_sdpa",
    "quantization",
    "quantize_weight",
    "quantized_embedding",
    "quantized_linear",
    "reference",
    "replace",
    "rnn",
    "rotary_embedding",
    "t5_relative_bias",
]


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tell which kernel a call would run, why, and what would make it faster, without running it.

    Args:
        op: the operator's function, or its name.
        *args: the call's positional arguments.
        **kwargs: its keyword arguments.

    Raises:
        ValueError: there is no such operator; for bad arguments, whatever the call itself would raise.

    Example:
        >>> import torch, ptkernels as ptk
        >>> x = torch.randn(1, 4, 128, 64)
        >>> with ptk.backend("reference"):
        ...     ptk.explain(ptk.attention, x, x, x).reason
        "backend 'reference' was asked for"
        >>> ptk.explain("attention", x, x, x).backend
        'cpu'
    """
    return get(op).explain(*args, **kwargs)
