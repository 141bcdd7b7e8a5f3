"""Launching attention's Triton kernels: tile sizes, strides, and the order of the backward's kernels.

The device code, with its equation, layout and tiling, is in ``triton_kernels``. :func:`forward` and :func:`backward`
take the arguments of ``ptkernels::attention`` and ``ptkernels::_attention_backward``; :func:`varlen_forward` and
:func:`varlen_backward` the packed layout. Nothing here waits for the GPU or reads a tensor on the host, so all of it
can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton import tuning
from ptkernels._triton.dispatch import Launcher, identity
from ptkernels.ops.attention import triton_kernels as kernels

KEEP_ALL = 1 << 16
UNBOUNDED = -1


class Tile(NamedTuple):
    """Sizes of one program: rows, keys, warps, and how many key blocks are in flight."""

    m: int
    n: int
    warps: int
    stages: int


# By kernel, widest head dim, and generation of the GPU (the first digit of its compute capability), best guess first;
# the last is the one whose registers hold every option at once.
# wgmma and tcgen05 take no fewer than 64 rows: of the queries in `forward` and `dq`, of the keys in `dkdv`.
_TILES: dict[str, dict[int, dict[int, tuple[Tile, ...]]]] = {
    "forward": {
        64: {8: (Tile(128, 64, 8, 2),), 9: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)), 10: (Tile(128, 64, 8, 3),)},
        128: {8: (Tile(64, 32, 4, 2),), 9: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)), 10: (Tile(128, 64, 8, 3),)},
        256: {8: (Tile(64, 32, 8, 2),), 9: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)), 10: (Tile(128, 32, 8, 2),)},
        512: {8: (Tile(32, 16, 8, 1),), 9: (Tile(32, 16, 8, 1),), 10: (Tile(32, 16, 8, 1),)},
    },
    "dq": {
        64: {8: (Tile(32, 64, 4, 2),), 9: (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)), 10: (Tile(64, 64, 8, 2),)},
        128: {
            8: (Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
            9: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
            10: (Tile(64, 64, 8, 2),),
        },
        256: {8: (Tile(32, 32, 8, 1),), 9: (Tile(32, 32, 8, 1),), 10: (Tile(32, 32, 8, 1),)},
        512: {8: (Tile(16, 16, 8, 1),), 9: (Tile(16, 16, 8, 1),), 10: (Tile(16, 16, 8, 1),)},
    },
    "dkdv": {
        64: {
            8: (Tile(32, 64, 4, 2), Tile(16, 64, 4, 2)),
            9: (Tile(64, 128, 8, 2), Tile(32, 64, 4, 2)),
            10: (Tile(32, 64, 4, 2),),
        },
        128: {
            8: (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
            9: (Tile(32, 64, 8, 2), Tile(16, 64, 8, 2)),
            10: (Tile(32, 64, 8, 2), Tile(32, 64, 8, 1)),
        },
        256: {8: (Tile(16, 32, 8, 1),), 9: (Tile(16, 32, 8, 1),), 10: (Tile(16, 32, 8, 1),)},
        512: {8: (Tile(16, 16, 8, 1),), 9: (Tile(16, 16, 8, 1),), 10: (Tile(16, 16, 8, 1),)},
    },
}
# Products in IEEE float32 run on the plain cores, out of registers: a bigger tile would not fit in them.
_FLOAT32_TILES = {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1), 512: Tile(16, 16, 8, 1)}


def tiles(kernel: str, dtype: torch.dtype, dim: int, dim_v: int, arch: int, crowded: bool) -> list[Tile]:
    """The tile sizes worth trying for ``forward``, ``dq`` or ``dkdv`` on an architecture, best guess first.

    With a bias or much arithmetic on the scores (``crowded``), only the one that leaves room for it.
    """
    widest = max(64, _triton.power_of_2(dim), _triton.power_of_2(dim_v))
    if dtype == torch.float64:
        # Up to a head dim of 128: see ``routing.uncovered_by_triton``.
        return [Tile(16, 16 if kernel == "dkdv" else 32, 8, 1)]
    if dtype == torch.float32:
        return [_FLOAT32_TILES[widest]]
    by_generation = _TILES[kernel][widest]
    # GPUs of compute capability 8.6, 8.9 and 12.0 have the shared memory that the first generation's tiles leave.
    generation = arch // 10 if _triton.shared_memory(arch) > 128 * 1024 else 8
    found = by_generation.get(generation, by_generation[8])
    return list(found[-1:] if crowded else found)


class Call(NamedTuple):
    """What forward and backward share of one call: the operator's options, and the geometry of packed sequences."""

    is_causal: bool = False
    scale: float | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    mask_block_size: int = 1


def _shape(query: Tensor, key: Tensor, call: Call) -> tuple[int, int, int, int]:
    """batch, heads, and the longest queries and keys."""
    if call.cu_seqlens_q is None:
        return query.size(0), query.size(1), query.size(2), key.size(2)
    return call.cu_seqlens_q.numel() - 1, query.size(1), call.max_seqlen_q, call.max_seqlen_k


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, head, length and dim; those of a packed ``[tokens, heads, dim]`` with a batch stride of 0."""
    if tensor.dim() == 3:
        return 0, tensor.stride(1), tensor.stride(0), tensor.stride(2)
    return tuple(tensor.stride())


def _statistics_strides(lse: Tensor) -> tuple[int, int]:
    """Of batch and head of a contiguous ``[batch, heads, length]``, or ``[heads, tokens]``."""
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def _broadcast_strides(tensor: Tensor | None, shape: Sequence[int]) -> tuple[int, ...]:
    return (0,) * len(shape) if tensor is None else tuple(tensor.expand(shape).stride())


class _Arguments:
    """The parts of every launch that depend on the call alone."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call) -> None:
        self.batch, self.heads, self.len_q, self.len_k = _shape(query, key, call)
        self.group = self.heads // max(key.size(1), 1)
        self.dtype, self.arch, self.device = query.dtype, _triton.arch_of(query), query.device
        dim, dim_v = query.size(-1), value.size(-1)
        self.scale = 1.0 / math.sqrt(dim) if call.scale is None else call.scale
        right = 0 if call.is_causal else call.window_right
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        self.mask = query if mask is None else mask
        mask_kind = int((kernels.NO_MASK if mask is None else kernels.FLOAT_MASK).value)
        if mask is not None and mask.dtype == torch.uint8:
            mask_kind = call.mask_block_size
        self.has_blocks = mask_kind > 1
        lead = (self.batch, self.heads)
        blocks = (-(-length // call.mask_block_size) for length in (self.len_q, self.len_k))
        self.mask_strides = _broadcast_strides(mask, (*lead, *blocks))
        self.slope_strides = _broadcast_strides(call.alibi_slopes, lead)
        self.sink_strides = _broadcast_strides(call.sinks, lead)
        self.slopes = query if call.alibi_slopes is None else call.alibi_slopes
        self.has_sinks = call.sinks is not None
        self.sinks = query if call.sinks is None else call.sinks
        keep_below = round((1.0 - call.dropout_p) * KEEP_ALL)
        dropout = call.dropout_seed is not None and keep_below < KEEP_ALL
        # Drawn by torch's generator on the host; a copy of eight bytes from there does not wait for the GPU.
        seed = call.dropout_seed if dropout else None
        self.seed = query if seed is None else seed.to(query.device, non_blocking=True)
        self.cu_q = query if call.cu_seqlens_q is None else call.cu_seqlens_q
        self.cu_k = query if call.cu_seqlens_k is None else call.cu_seqlens_k
        self.problem = (
            self.len_q,
            self.len_k,
            self.len_k - self.len_q if call.bottom_right else 0,
            call.window_left,
            right,
            _triton.number(self.scale, query),
            _triton.number(call.softcap, query),
            keep_below,
            _triton.number(KEEP_ALL / max(keep_below, 1), query),
            self.batch // seed.numel() if seed is not None else 1,
        )
        self.dims = {
            "D": dim,
            "DV": dim_v,
            "BLOCK_D": _triton.power_of_2(dim),
            "BLOCK_DV": _triton.power_of_2(dim_v),
        }
        self.switches = {
            "MASK": mask_kind,
            "ALIBI": call.alibi_slopes is not None,
            "SOFTCAP": call.softcap != 0.0,
            "LEFT": call.window_left != UNBOUNDED,
            "RIGHT": right != UNBOUNDED,
            "DROPOUT": dropout,
            "PRECISION": _triton.dot_precision(query.dtype),
        }
        self.packed = {"VARLEN": call.cu_seqlens_q is not None, "BOTTOM_RIGHT": call.bottom_right}

    def tile(self, kernel: str) -> Tile:
        crowded = any(self.switches[name] for name in ("MASK", "ALIBI", "SOFTCAP", "DROPOUT"))
        candidates = tiles(kernel, self.dtype, self.dims["D"], self.dims["DV"], self.arch, crowded)
        key = (self.dtype, self.dims["D"], self.dims["DV"], self.switches["RIGHT"], crowded)
        tile = tuning.pick(f"attention_{kernel}", key, candidates, self.device)
        if kernel == "forward" and self.has_blocks:
            # Places in a mask of blocks take the registers of half of the keys, and of those that are in flight.
            return tile._replace(n=min(tile.n, 32), stages=1)
        return tile


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "num_warps": tile.warps, "num_stages": tile.stages}


def _launch_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: Call, out: Tensor, lse: Tensor, wrap: Launcher
) -> None:
    a = _Arguments(query, key, value, mask, call)
    tile = a.tile("forward")
    wrap(kernels.forward)[(triton.cdiv(a.len_q, tile.m), a.batch * a.heads)](
        query, key, value, a.mask, a.slopes, a.sinks, a.seed, a.cu_q, a.cu_k, out, lse,
        *_strides(query), *_strides(key), *_strides(value), *_strides(out), *a.mask_strides,
        *a.slope_strides, *a.sink_strides, *_statistics_strides(lse), a.heads, a.group, *a.problem,
        SINK=a.has_sinks, **a.dims, **a.switches, **a.packed, **_blocks(tile),
    )  # fmt: skip


def _heads_inside(like: Tensor, batch: int, heads: int, length: int, dim: int) -> Tensor:
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, call: Call, wrap: Launcher = identity
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of ``ptkernels::attention`` for arguments that were checked."""
    batch, heads, length, _ = query.shape
    out = _heads_inside(query, batch, heads, length, value.size(-1))
    lse = query.new_empty(batch, heads, length, dtype=_triton.sum_dtype(query.dtype))
    if out.numel() > 0:
        _launch_forward(query, key, value, attn_mask, call, out, lse, wrap)
    return out, lse


def varlen_forward(
    query: Tensor, key: Tensor, value: Tensor, call: Call, wrap: Launcher = identity
) -> tuple[Tensor, Tensor]:
    """``out`` of shape ``[tokens, heads, dim_v]`` and ``lse`` ``[heads, tokens]`` of packed sequences."""
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.size(-1))
    lse = query.new_empty(heads, tokens, dtype=_triton.sum_dtype(query.dtype))
    if out.numel() > 0:
        _launch_forward(query, key, value, None, call, out, lse, wrap)
    return out, lse


class Gradients(NamedTuple):
    """None where a gradient was not asked for, or its input is absent."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    call: Call,
    needed: Sequence[bool] = (True,) * 6,
    wrap: Launcher = identity,
) -> Gradients:
    """Gradients of ``ptkernels::attention`` with respect to query, key, value, attn_mask, alibi_slopes and sinks."""
    dq = _heads_inside(query, *query.shape)
    dk = _heads_inside(key, *key.shape)
    dv = _heads_inside(value, *value.shape)
    return _backward(grad_out, grad_lse, query, key, value, out, lse, attn_mask, call, needed, (dq, dk, dv), wrap)


def varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Call,
    needed: Sequence[bool] = (True,) * 6,
    wrap: Launcher = identity,
) -> Gradients:
    """The same for packed sequences."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    return _backward(grad_out, grad_lse, query, key, value, out, lse, None, call, needed, grads, wrap)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    call: Call,
    needed: Sequence[bool],
    grads: tuple[Tensor, Tensor, Tensor],
    wrap: Launcher,
) -> Gradients:
    want_dq, want_dk, want_dv, want_mask, want_slopes, want_sinks = (*needed, *(True,) * (6 - len(needed)))
    want_mask = want_mask and mask is not None and mask.is_floating_point()
    want_slopes = want_slopes and call.alibi_slopes is not None
    want_sinks = want_sinks and call.sinks is not None
    if query.numel() == 0 or key.numel() == 0 or value.numel() == 0:
        empty = [grad.zero_() if wanted else None for grad, wanted in zip(grads, needed, strict=False)]
        dmask = torch.zeros_like(mask) if want_mask and mask is not None else None
        dslopes = torch.zeros_like(call.alibi_slopes) if want_slopes and call.alibi_slopes is not None else None
        delta = -grad_lse if grad_lse is not None else torch.zeros_like(lse)
        dsinks = _sinks_gradient(lse, delta, call.sinks, call) if want_sinks and call.sinks is not None else None
        return Gradients(empty[0], empty[1], empty[2], dmask, dslopes, dsinks)

    a = _Arguments(query, key, value, mask, call)
    delta = _delta(grad_out, grad_lse, out, lse, a, wrap)
    strides = (*_strides(query), *_strides(key), *_strides(value), *_strides(grad_out))
    masks = (*a.mask_strides, *a.slope_strides, *_statistics_strides(lse))
    inputs = (query, key, value, a.mask, a.slopes, a.seed)
    statistics = (lse, delta, _factor(query, key, lse, a, wrap))
    common = {**a.dims, **a.switches, **a.packed}
    dq, dk, dv = grads

    dslope_rows = torch.empty_like(lse) if want_slopes else lse
    if want_dq or want_slopes:
        tile = a.tile("dq")
        wrap(kernels.backward_dq)[(triton.cdiv(a.len_q, tile.m), a.batch * a.heads)](
            *inputs, a.cu_q, a.cu_k, grad_out, *statistics, dq, dslope_rows, *strides, *_strides(dq), *masks,
            a.heads, a.group, *a.problem, WRITE_DSLOPE=want_slopes, **common, **_blocks(tile),
        )  # fmt: skip
    if want_dk or want_dv:
        tile = a.tile("dkdv")
        heads_kv = key.size(1)
        wrap(kernels.backward_dkdv)[(triton.cdiv(a.len_k, tile.n), a.batch * heads_kv)](
            *inputs, a.cu_q, a.cu_k, grad_out, *statistics, dk, dv, *strides, *_strides(dk), *_strides(dv), *masks,
            heads_kv, a.group, *a.problem, **common, **_blocks(tile),
        )  # fmt: skip
    dmask = _mask_gradient(mask, a, inputs, grad_out, statistics, strides, masks, wrap) if want_mask else None
    dslopes = _sum_rows(dslope_rows, call.alibi_slopes, call) if want_slopes else None
    dsinks = _sinks_gradient(lse, delta, call.sinks, call) if want_sinks and call.sinks is not None else None
    return Gradients(dq if want_dq else None, dk if want_dk else None, dv if want_dv else None, dmask, dslopes, dsinks)


def _delta(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, a: _Arguments, wrap: Launcher
) -> Tensor:
    delta = torch.empty_like(lse)
    dlse = lse if grad_lse is None else grad_lse
    dlse_strides = (0, dlse.stride(0), dlse.stride(1)) if dlse.dim() == 2 else dlse.stride()
    block_m = max(16, 8192 // a.dims["BLOCK_DV"])
    wrap(kernels.backward_delta)[(triton.cdiv(a.len_q, block_m), a.batch * a.heads)](
        grad_out, out, lse, dlse, delta, a.cu_q, *_strides(grad_out), *_strides(out), *_statistics_strides(lse),
        *dlse_strides, a.heads, a.len_q, DV=a.dims["DV"], HAS_DLSE=grad_lse is not None, VARLEN=a.packed["VARLEN"],
        BLOCK_M=block_m, BLOCK_DV=a.dims["BLOCK_DV"], num_warps=4,
    )  # fmt: skip
    return delta


def _factor(query: Tensor, key: Tensor, lse: Tensor, a: _Arguments, wrap: Launcher) -> Tensor:
    """Correction of each row's weights; only a bias makes one necessary, and elsewhere nothing is read."""
    if a.switches["MASK"] != kernels.FLOAT_MASK.value:
        return lse
    factor = torch.empty_like(lse)
    tile = a.tile("dq")
    switches = {name: a.switches[name] for name in ("ALIBI", "SOFTCAP", "LEFT", "RIGHT", "PRECISION")}
    wrap(kernels.backward_factor)[(triton.cdiv(a.len_q, tile.m), a.batch * a.heads)](
        query, key, a.mask, a.slopes, a.sinks, lse, factor, *_strides(query), *_strides(key), *a.mask_strides,
        *a.slope_strides, *a.sink_strides, *_statistics_strides(lse), a.heads, a.group, *a.problem[:7],
        SINK=a.has_sinks, D=a.dims["D"], BLOCK_D=a.dims["BLOCK_D"], **switches, **_blocks(tile),
    )  # fmt: skip
    return factor


def _mask_gradient(
    mask: Tensor | None,
    a: _Arguments,
    inputs: tuple[Any, ...],
    grad_out: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, ...],
    masks: tuple[int, ...],
    wrap: Launcher,
) -> Tensor | None:
    """Gradient of a bias of any broadcast shape, in memory of the bias and, where it is a vector, of a few tiles."""
    if mask is None:
        return None
    batch, heads, rows, keys = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    tile = a.tile("dq")
    tiles_m, tiles_n = triton.cdiv(a.len_q, tile.m), triton.cdiv(a.len_k, tile.n)
    sum_rows, sum_keys = rows == 1 and a.len_q > 1, keys == 1 and a.len_k > 1
    partial = statistics[0].new_empty(batch, heads, tiles_m if sum_rows else a.len_q, tiles_n if sum_keys else a.len_k)
    switches = {name: value for name, value in a.switches.items() if name != "MASK"}
    wrap(kernels.backward_dbias)[(tiles_m * tiles_n, batch * heads)](
        *inputs, grad_out, *statistics, partial, *strides, *partial.stride()[:3], *masks,
        heads, a.batch // batch, a.heads // heads, a.group, *a.problem,
        SUM_ROWS=sum_rows, SUM_KEYS=sum_keys, **a.dims, **switches, **_blocks(tile),
    )  # fmt: skip
    return partial.sum_to_size((batch, heads, rows, keys)).view(mask.shape).to(mask.dtype)


def _per_sequence(like: Tensor, call: Call) -> Tensor | None:
    """Lengths of packed sequences whose heads have a number each per sequence; None where they share one."""
    return None if call.cu_seqlens_q is None or like.dim() < 2 else call.cu_seqlens_q.diff()


def _sum_rows(rows: Tensor, like: Tensor | None, call: Call) -> Tensor | None:
    """Sum ``[batch, heads, length]``, or ``[heads, tokens]``, over rows into the shape of ``like``."""
    if like is None:
        return None
    lengths = _per_sequence(like, call)
    if lengths is None:
        total = rows.sum(-1).view(-1, rows.size(-2))
    else:
        total = torch.segment_reduce(rows.t().contiguous(), "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return total.sum_to_size(like.shape).to(like.dtype)


def _sinks_gradient(lse: Tensor, delta: Tensor, sinks: Tensor, call: Call) -> Tensor | None:
    """A sink is one more score without a value: its dS is its weight times -delta."""
    lengths, scores = _per_sequence(sinks, call), sinks.to(lse.dtype).unsqueeze(-1)
    if lengths is not None:
        scores = sinks.to(lse.dtype).repeat_interleave(lengths, 0, output_size=lse.size(-1)).t()
    weights = torch.exp(scores - lse).masked_fill(lse == -math.inf, 0.0)
    return _sum_rows(-weights * delta, sinks, call)
