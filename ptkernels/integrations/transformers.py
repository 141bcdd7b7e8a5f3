"""Hugging Face transformers: ``attn_implementation="ptkernels"``.

    from ptkernels.integrations import transformers as ptk_transformers

    ptk_transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="ptkernels")
    model.set_attn_implementation("ptkernels")  # or later

Masks stay boolean, grouped heads are not repeated, and what transformers' own SDPA path refuses or leaves to eager code
runs in the kernels: softcap (Gemma 2), learnable sinks (GPT-OSS), position biases with a gradient (T5). Needs
transformers >= 4.56, where masks have an interface of their own.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ptkernels.ops.attention import attention

NAME = "ptkernels"


def register() -> None:
    """Make ``attn_implementation="ptkernels"`` known to transformers, for attention and for its masks.

    With transformers 5 or newer, models quantized by :class:`.transformers_quantizer.PtKernelsConfig` are known too.

    Raises:
        ImportError: transformers is not installed, or too old to have the interfaces.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, __version__
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if int(__version__.partition(".")[0]) >= 5:
        importlib.import_module("ptkernels.integrations.transformers_quantizer")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer, asked for ``is_causal`` where the call does not say.
        query: ``[batch, heads, length, dim]``.
        key: ``[batch, kv_heads, kv_length, dim]``; ``kv_heads`` divides ``heads``.
        value: ``[batch, kv_heads, kv_length, dim_v]``.
        attention_mask: boolean, True where to attend, or added to the scores; None with ``is_causal`` is a causal mask
            from the top left, which leaves a static cache's unused slots alone.
        dropout: probability of dropping a weight.
        scaling: factor of the scores.
        is_causal: see ``attention_mask``.
        position_bias: added to the scores.
        softcap: bound of the scores, as in Gemma 2.
        s_aux: one logit per head that joins the softmax, as in GPT-OSS.
        **kwargs: whatever else models pass; attention needs none of it, masks hold it already.

    Raises:
        ValueError: the call comes from continuous batching, whose paged cache is not read here.

    Returns:
        ``[batch, length, heads, dim_v]``, and None where eager attention has its weights.
    """
    if kwargs.get("cache") is not None:
        raise ValueError(f"{NAME}: cache: got the paged cache of continuous batching, expected none; use generate()")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.size(2) > 1 and attention_mask is None and causal
    mask = attention_mask
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = position_bias.masked_fill(~mask, -torch.inf)
        else:
            mask = position_bias + mask
    # Options that models leave at None, and attention at its defaults.
    given = {"softcap": softcap, "sinks": s_aux}
    options: dict[str, Any] = {name: option for name, option in given.items() if option is not None}
    out: Tensor = attention(query, key, value, mask, dropout, causal, scaling, True, **options)
    return out.transpose(1, 2), None
