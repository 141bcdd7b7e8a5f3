"""``ptkernels::attention_with_kv_cache`` and its appending form on a GPU, by attention's Triton kernels for caches.

Nothing is read on the host, so a step of decoding can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ptkernels._triton.dispatch import Launcher, identity
from ptkernels.ops.attention.triton_decode import Cache, Rotary, append, decode


def attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    added: int = 0,
    rotary: Rotary | None = None,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of checked arguments; ``added`` slots behind ``cache_seqlens`` hold something as well."""
    cache = Cache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, cache_leftpad, k_scale, v_scale)
    return decode(
        query,
        cache,
        added=added,
        scale=scale,
        window_left=max(window_left, -1),
        window_right=0 if is_causal else max(window_right, -1),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        rotary=rotary,
        wrap=wrap,
    )


def append_and_attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    wrap: Launcher = identity,
) -> tuple[Tensor, Tensor]:
    """The same after keys and values were written behind ``cache_seqlens``, in place."""
    cache = Cache(k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx)
    rotary = None
    if rotary_cos is not None and rotary_sin is not None:
        stands_still = not is_causal and window_left < 0 and window_right < 0
        rotary = Rotary(rotary_cos, rotary_sin, rotary_interleaved, stands_still)
    append(k, k_cache, k_scale, cache, rotary, wrap)
    append(v, v_cache, v_scale, cache, None, wrap)
    place = (cache_seqlens, block_table, cache_batch_idx, cache_leftpad)
    options: Any = (scale, is_causal, window_left, window_right, softcap, alibi_slopes, sinks, k_scale, v_scale)
    return attend(query, k_cache, v_cache, *place, *options, added=k.size(2), rotary=rotary, wrap=wrap)
