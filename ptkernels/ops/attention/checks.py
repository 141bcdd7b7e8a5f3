"""Validation of attention's arguments: every rule once, for the public function and for shape propagation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptkernels._sizes import holds
from ptkernels.ops.attention.options import KEEP_ALL, Options, compute_dtype, is_triangle
from ptkernels.ops.attention.shapes import lead_shape, split_lead

OP = "attention"
MAX_HEAD_DIM = 512
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_Sizes = Sequence[int]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_one(size: int | torch.SymInt) -> bool:
    # A symbolic size is taken not to be 1: tracing specialises sizes that are, so no guard is needed here.
    return isinstance(size, int) and size == 1


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        kind = type(value)
        raise TypeError(f"{OP}: {name}: got {kind.__module__}.{kind.__qualname__}, expected torch.Tensor")
    if value.is_quantized:
        raise TypeError(
            f"{OP}: {name}: got a quantized tensor ({_dtype_name(value.dtype)}), expected {name}.dequantize()"
        )
    if value.is_nested:
        raise TypeError(f"{OP}: {name}: got a nested tensor, expected all operands to be jagged ones, or none")
    if value.layout is not torch.strided:
        raise TypeError(f"{OP}: {name}: got layout {value.layout}, expected torch.strided (a dense tensor)")


def _check_like_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{OP}: {name}: got device {tensor.device}, expected {query.device} like query")


def _check_operands(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor)
        if tensor.dtype not in DTYPES:
            expected = ", ".join(map(_dtype_name, DTYPES))
            raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(tensor.dtype)}, expected one of {expected}")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"{OP}: {name}: got dtype {_dtype_name(tensor.dtype)}, expected {_dtype_name(query.dtype)} like query"
            )
        _check_like_query(name, tensor, query)


def _check_number(name: str, number: Any, expected: str = "float") -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{OP}: {name}: got {type(number).__name__}, expected {expected}")


def _check_scalars(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any, softcap: Any) -> None:
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{OP}: {name}: got {type(flag).__name__}, expected bool")
    _check_number("dropout_p", dropout_p)
    _check_number("softcap", softcap)
    if scale is not None:
        _check_number("scale", scale, "float or None")
    if isinstance(dropout_p, (int, float)) and not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{OP}: dropout_p: got {dropout_p}, expected a probability from 0 to 1")
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"{OP}: scale: got {scale}, expected a finite number")
    if isinstance(softcap, (int, float)) and not 0.0 <= softcap < math.inf:
        raise ValueError(f"{OP}: softcap: got {softcap}, expected a finite number, 0 or more")


def check_window(window: Any) -> None:
    """Raise unless ``window`` is None or a pair of sizes."""
    if window is None:
        return
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"{OP}: window: got {type(window).__name__}, expected a pair (left, right) or None")
    if len(window) != 2:
        raise ValueError(f"{OP}: window: got {len(window)} entries, expected a pair (left, right)")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, (int, torch.SymInt))):
            raise TypeError(f"{OP}: window: got {type(side).__name__} in it, expected int or None")
        if isinstance(side, int) and side < -1:
            raise ValueError(f"{OP}: window: got {side} in it, expected -1 (unbounded) or more")


def _check_ranks(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    least, form = (3, "[..., heads, length, head_dim]") if enable_gqa else (2, "[..., length, head_dim]")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < least:
            raise ValueError(
                f"{OP}: {name}: got shape {list(tensor.shape)}, expected at least {least} dimensions: {form}"
            )


def _check_lengths_and_dims(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("value", value)):
        head_dim = tensor.size(-1)
        if not (holds(head_dim >= 1) and holds(head_dim <= MAX_HEAD_DIM)):
            raise ValueError(f"{OP}: {name}: got head dim {head_dim}, expected 1 to {MAX_HEAD_DIM}")
    if not holds(key.size(-1) == query.size(-1)):
        raise ValueError(f"{OP}: key: got head dim {key.size(-1)}, expected {query.size(-1)} like query")
    if not holds(value.size(-2) == key.size(-2)):
        raise ValueError(f"{OP}: value: got length {value.size(-2)}, expected {key.size(-2)} like key")


def _check_grouped_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    heads, kv_heads = query.size(-3), key.size(-3)
    if not holds(value.size(-3) == kv_heads):
        raise ValueError(f"{OP}: value: got {value.size(-3)} heads, expected {kv_heads} like key")
    no_heads = isinstance(kv_heads, int) and kv_heads == 0
    if not holds(heads == 0 if no_heads else heads % kv_heads == 0):
        raise ValueError(f"{OP}: key: got {kv_heads} heads, expected a divisor of query's {heads}")


def _check_broadcast(name: str, sizes: _Sizes, like: str, others: _Sizes, heads_last: bool) -> None:
    for back, (size, other) in enumerate(zip(reversed(sizes), reversed(others), strict=False), start=1):
        if _is_one(size) or _is_one(other) or holds(size == other):
            continue
        if heads_last and back == 1:
            raise ValueError(
                f"{OP}: {name}: got {size} heads, expected {other} like {like}; "
                "enable_gqa=True lets groups of query heads share a key and value head"
            )
        raise ValueError(f"{OP}: {name}: got batch size {size}, expected {other} like {like}")


def _check_lead(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    kept = -3 if enable_gqa else -2
    for name, tensor, like, other in (
        ("key", key, "query", query),
        ("value", value, "key", key),
        ("value", value, "query", query),
    ):
        heads_last = not enable_gqa and tensor.dim() > 3
        _check_broadcast(name, tensor.shape[:kept], like, other.shape[:kept], heads_last)


def _check_mask(query: Tensor, mask: Any, scores: _Sizes) -> None:
    _check_tensor("attn_mask", mask)
    allowed = dict.fromkeys((torch.bool, query.dtype, torch.float32))
    if mask.dtype not in allowed:
        expected = ", ".join(map(_dtype_name, allowed))
        is_integer = not (mask.dtype.is_floating_point or mask.dtype.is_complex)
        hint = "; where 1 means attend, pass attn_mask.bool()" if is_integer else ""
        raise TypeError(f"{OP}: attn_mask: got dtype {_dtype_name(mask.dtype)}, expected one of {expected}{hint}")
    _check_like_query("attn_mask", mask, query)
    broadcasts = mask.dim() <= len(scores) and all(
        _is_one(size) or holds(size == full) for size, full in zip(reversed(mask.shape), reversed(scores), strict=False)
    )
    if not broadcasts:
        raise ValueError(
            f"{OP}: attn_mask: got shape {list(mask.shape)}, expected one that broadcasts to {list(scores)}"
        )


def _check_mask_block_size(size: Any, mask: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{OP}: mask_block_size: got {type(size).__name__}, expected int")
    if size < 1:
        raise ValueError(f"{OP}: mask_block_size: got {size}, expected 1 or more")
    if size > 1 and not (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        raise ValueError(f"{OP}: mask_block_size: got {size}, expected 1 unless attn_mask is a boolean tensor")


def _check_triangle(mask: Any, is_causal: bool, scores: _Sizes) -> None:
    if is_causal:
        raise ValueError(f"{OP}: is_causal: got True, expected False beside an attn_mask that is a causal triangle")
    sizes = (mask.seq_len_q, mask.seq_len_kv)
    if not all(holds(size == full) for size, full in zip(sizes, scores[-2:], strict=True)):
        raise ValueError(f"{OP}: attn_mask: got a triangle of {list(sizes)}, expected {list(scores[-2:])}")


def _check_head_values(name: str, tensor: Any, query: Tensor, batch: _Sizes, heads: int) -> None:
    _check_tensor(name, tensor)
    allowed = dict.fromkeys((query.dtype, torch.float32, compute_dtype(query.dtype)))
    if tensor.dtype not in allowed:
        expected = ", ".join(map(_dtype_name, allowed))
        raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(tensor.dtype)}, expected one of {expected}")
    _check_like_query(name, tensor, query)
    sizes, full = tensor.shape, (*batch, heads)
    fits = 1 <= tensor.dim() <= len(full) and holds(sizes[-1] == heads)
    fits = fits and all(
        _is_one(size) or holds(size == other)
        for size, other in zip(reversed(sizes[:-1]), reversed(batch), strict=False)
    )
    if not fits:
        raise ValueError(f"{OP}: {name}: got shape {list(sizes)}, expected [{heads}] or {list(full)}")


def _check_relative_bias(tensor: Any, query: Tensor, batch: _Sizes, heads: int, keys: int) -> None:
    _check_tensor("relative_bias", tensor)
    allowed = dict.fromkeys((query.dtype, torch.float32, compute_dtype(query.dtype)))
    if tensor.dtype not in allowed:
        expected = ", ".join(map(_dtype_name, allowed))
        raise TypeError(f"{OP}: relative_bias: got dtype {_dtype_name(tensor.dtype)}, expected one of {expected}")
    _check_like_query("relative_bias", tensor, query)
    distances = query.size(-2) + keys - 1
    if isinstance(distances, int):
        distances = max(distances, 0)
    sizes = tensor.shape
    fits = 2 <= tensor.dim() <= len(batch) + 2 and holds(sizes[-2] == heads) and holds(sizes[-1] == distances)
    fits = fits and all(
        _is_one(size) or holds(size == other)
        for size, other in zip(reversed(sizes[:-2]), reversed(batch), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{OP}: relative_bias: got shape {list(sizes)}, expected [{heads}, {distances}], a number for every "
            f"distance from key to query, or {[*batch, heads, distances]}"
        )


def refuse_nested(relative_bias: Any, mask_block_size: Any) -> None:
    """Raise where a bias by distance or a mask of blocks comes with nested operands, whose lengths differ."""
    if mask_block_size != 1:
        raise ValueError(f"{OP}: mask_block_size: got {mask_block_size}, expected 1 beside nested tensors")
    if relative_bias is not None:
        raise ValueError(f"{OP}: relative_bias: got a value, expected None beside nested tensors")


def check_inputs(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
    window: Any = None,
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    relative_bias: Any = None,
    mask_block_size: Any = 1,
) -> None:
    """Raise the precise error for the first argument of :func:`ptkernels.attention` that is wrong.

    Reads no data and accepts symbolic sizes.

    Raises:
        TypeError: something is not a dense tensor, or has a dtype or Python type that attention does not take.
        ValueError: a shape, a device or a number is out of range.
    """
    _check_operands(query, key, value)
    _check_scalars(dropout_p, is_causal, scale, enable_gqa, softcap)
    check_window(window)
    _check_ranks(query, key, value, enable_gqa)
    _check_lengths_and_dims(query, key, value)
    if enable_gqa:
        _check_grouped_heads(query, key, value)
    _check_lead(query, key, value, enable_gqa)
    lead = lead_shape(query, key, value, enable_gqa)
    scores = (*lead, query.size(-2), key.size(-2))
    _check_mask_block_size(mask_block_size, attn_mask)
    if is_triangle(attn_mask):
        _check_triangle(attn_mask, is_causal, scores)
    elif attn_mask is not None:
        blocks = [-(-length // mask_block_size) for length in scores[-2:]]
        _check_mask(query, attn_mask, (*lead, *blocks))
    given = Options(alibi_slopes=alibi_slopes, sinks=sinks, relative_bias=relative_bias)
    if relative_bias is not None:
        _check_relative_bias(relative_bias, query, *split_lead(lead, enable_gqa, given), key.size(-2))
    for name in ("alibi_slopes", "sinks"):
        if (tensor := getattr(given, name)) is not None:
            _check_head_values(name, tensor, query, *split_lead(lead, enable_gqa, given))


def check_op_inputs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, options: Options) -> None:
    """:func:`check_inputs` for the operator itself, which takes four dimensions and broadcasts no batch."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{OP}: {name}: got {tensor.dim()} dimensions, expected 4: [batch, heads, length, dim]")
        if not holds(tensor.size(0) == query.size(0)):
            raise ValueError(f"{OP}: {name}: got batch size {tensor.size(0)}, expected {query.size(0)} like query")
    check_inputs(
        query,
        key,
        value,
        attn_mask,
        dropout_p=options.dropout_p,
        scale=options.scale,
        enable_gqa=True,
        window=(options.window_left, options.window_right),
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        sinks=options.sinks,
        relative_bias=options.relative_bias,
        mask_block_size=options.mask_block_size,
    )
    check_seed(options, query.size(0))


def check_seed(options: Options, batch: int) -> None:
    """Raise unless dropout, where there is any, has a seed that fits the batch."""
    if options.keep_below == KEEP_ALL:
        return
    seed = options.dropout_seed
    if seed is None or seed.dtype != torch.int64 or seed.dim() > 1 or not holds(batch % max(seed.numel(), 1) == 0):
        raise ValueError(f"{OP}: dropout_seed: expected an int64 tensor of shape [] or [a divisor of the batch size]")


def check_backward_inputs(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    *,
    options: Options,
) -> None:
    """The same for ``torch.ops.ptkernels._attention_backward``."""
    check_op_inputs(query, key, value, attn_mask, options)
    out_like = ((*query.shape[:3], value.size(3)), query.dtype)
    lse_like = (tuple(query.shape[:3]), compute_dtype(query.dtype))
    for name, tensor, (shape, dtype) in (
        ("grad_out", grad_out, out_like),
        ("grad_lse", grad_lse, lse_like),
        ("out", out, out_like),
        ("lse", lse, lse_like),
    ):
        if tensor is None:
            continue
        _check_like_query(name, tensor, query)
        if tensor.dtype != dtype:
            raise TypeError(f"{OP}: {name}: got dtype {_dtype_name(tensor.dtype)}, expected {_dtype_name(dtype)}")
        sizes = zip(tensor.shape, shape, strict=False)
        if tensor.dim() != len(shape) or not all(holds(size == wanted) for size, wanted in sizes):
            raise ValueError(f"{OP}: {name}: got shape {list(tensor.shape)}, expected {list(shape)}")
