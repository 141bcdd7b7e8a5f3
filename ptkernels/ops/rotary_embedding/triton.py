"""Launching rotary embedding's Triton kernels: one launch for query and key, forward and backward.

The device code, with its equations, layout and tiling, is in ``triton_kernels``. :func:`rotary_embedding` and
:func:`rotary_embedding_backward` are ``ptkernels::rotary_embedding`` and ``ptkernels::_rotary_embedding_backward`` on a
GPU. Nothing is read on the host, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ptkernels import _triton
from ptkernels._triton import tuning
from ptkernels._triton.dispatch import Launcher, identity
from ptkernels.ops.rotary_embedding import triton_kernels as kernels


class Tile(NamedTuple):
    """Tokens and heads of a program, and its warps."""

    tokens: int
    heads: int
    warps: int


def tiles(width: int) -> list[Tile]:
    """Tiles worth trying for rows of ``width`` sums of 4 bytes, best guess first: a thread loads 8 of each half."""
    tokens = min(max(2048 // width, 1), 64)
    warps = 4 if width <= 2048 else 8
    return [Tile(tokens, 4, warps), Tile(tokens, 1, warps), Tile(tokens, 16, warps)]


class _Call:
    """What forward and backward share: sizes, angles, and how the grid is cut."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        weights: tuple[Tensor | None, Tensor | None],
        interleaved: bool,
        eps: float,
    ) -> None:
        batch, _, self.length, self.dim = query.shape
        self.tokens = batch * self.length
        pairs = cos.size(1)
        blocks = {"BLOCK_P": _triton.power_of_2(pairs, 1), "BLOCK_R": _triton.power_of_2(self.dim - 2 * pairs, 1)}
        key_of_tile = (query.dtype, self.dim, pairs, interleaved)
        width = _triton.power_of_2(self.dim) * _triton.sum_dtype(query.dtype).itemsize // 4
        tile = tuning.pick("rotary", key_of_tile, tiles(width), query.device)
        self.tile, self.eps = tile, _triton.number(eps, query)
        place = (0, 0) if positions is None else (0, 0, *positions.stride())[-2:]
        self.tables = (cos, sin, query if positions is None else positions)
        self.table_rows = cos.size(0)
        self.table_strides = (*cos.stride(), *sin.stride(), *place)
        self.weights = tuple(query if weight is None else weight.contiguous() for weight in weights)
        self.switches: dict[str, Any] = {
            "HAS_WEIGHT_Q": weights[0] is not None, "HAS_WEIGHT_K": weights[1] is not None,
            "HAS_POSITIONS": positions is not None, "D": self.dim, "PAIRS": pairs, "INTERLEAVED": interleaved,
            "BLOCK_T": tile.tokens, "HEADS": tile.heads, **blocks, "num_warps": tile.warps,
        }  # fmt: skip

    @property
    def token_blocks(self) -> int:
        return int(triton.cdiv(self.tokens, self.tile.tokens))

    def slices(self, heads: int) -> int:
        return int(triton.cdiv(heads, self.tile.heads))

    def launch(self, kernel: Any, tensors: tuple[Tensor, ...], heads: Sequence[int], strides: tuple[int, ...]) -> None:
        grid = (self.token_blocks, sum(map(self.slices, heads)))
        if 0 in grid or self.dim == 0:
            return
        kernel[grid](
            *tensors, *self.tables, self.tokens, self.length, self.table_rows, *heads, self.eps, *strides,
            *self.table_strides, **self.switches,
        )  # fmt: skip


def _heads_inside(like: Tensor) -> Tensor:
    """The layout of results: shape ``[batch, heads, length, dim]`` over memory ``[batch, length, heads, dim]``."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
    *,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor]:
    """Query and key of checked arguments, normalised and rotated."""
    call = _Call(query, key, cos, sin, positions, (query_norm_weight, key_norm_weight), interleaved, norm_eps)
    results = _heads_inside(query), _heads_inside(key)
    tensors = (query, key, *call.weights, *results)
    call.launch(wrap(kernels.forward), tensors, (query.size(1), key.size(1)), (*query.stride(), *key.stride()))
    return results


def rotary_embedding_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    query_norm_weight: Tensor | None,
    key_norm_weight: Tensor | None,
    interleaved: bool,
    norm_eps: float,
    output_mask: Sequence[bool],
    *,
    wrap: Launcher = identity,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key and their weights: those that ``output_mask`` asks for."""
    call = _Call(query, key, cos, sin, positions, (query_norm_weight, key_norm_weight), interleaved, norm_eps)
    wanted = dict(zip(("WANT_DQ", "WANT_DK", "WANT_DW_Q", "WANT_DW_K"), output_mask, strict=True))
    call.switches |= wanted
    heads = [x.size(1) if any(output_mask[at::2]) else 0 for at, x in enumerate((query, key))]
    grads = [_heads_inside(x) if output_mask[at] else None for at, x in enumerate((query, key))]
    sums = [
        query.new_empty(call.token_blocks * call.slices(x.size(1)), call.dim, dtype=_triton.sum_dtype(query.dtype))
        if output_mask[2 + at]
        else None
        for at, x in enumerate((query, key))
    ]
    outs = tuple(query if out is None else out for out in (*grads, *sums))
    strides = (*grad_query.stride(), *grad_key.stride(), *query.stride(), *key.stride())
    tensors = (grad_query, grad_key, query, key, *call.weights, *outs)
    call.launch(wrap(kernels.backward), tensors, heads, strides)
    of_weights = [None if rows is None else rows.sum(0, dtype=torch.float64).to(query.dtype) for rows in sums]
    return grads[0], grads[1], of_weights[0], of_weights[1]
