"""``torch.nn``'s attention modules over :func:`ptkernels.attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptkernels import _backend
from ptkernels.nn import torchscript
from ptkernels.ops.attention import attention
from ptkernels.ops.attention.weights import attention_weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of ``torch.nn``'s (True means ignore) as numbers to add to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _merged(attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one of attention's: boolean, where True means attend, as long as neither is a bias."""
    masks = [mask for mask in (attn_mask, padding) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    if len(masks) == 1:
        return _added(masks[0], dtype)
    return _added(masks[0], dtype) + _added(masks[1], dtype)


def _beyond_the_kernels(query: Tensor, need_weights: bool, dropout_p: float) -> str | None:
    if query.is_nested:
        return "nested input runs on torch's own module"
    if need_weights and dropout_p > 0.0:
        return "weights after dropout are torch's own composition: pass need_weights=False"
    return None


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` over the fused operator: same constructor, parameters, arguments and results.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            :class:`torch.nn.MultiheadAttention`, whose ``state_dict`` loads strictly, both ways.

    Differences, all documented here: rows whose every key is masked give 0 (``out_proj.bias`` after the projection)
    where torch gives NaN; ``is_causal=True`` needs no ``attn_mask``, and with one it is taken at its word;
    ``need_weights=True`` computes the output with the fused kernel all the same, and the weights beside it in
    ``O(L * S)`` time and memory. With dropout in training, where the weights returned are those after dropout, torch's
    own composition computes both, with a warning (an error with ``PTKERNELS_STRICT=1``), as it does nested input.

    Example:
        >>> import torch, ptkernels as ptk
        >>> module = ptk.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 64)
        >>> out, _ = module(x, x, x, need_weights=False)
        >>> out.shape
        torch.Size([2, 10, 64])
        >>> plain = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> plain.load_state_dict(module.state_dict())
        <All keys matched successfully>
        >>> torch.testing.assert_close(plain(x, x, x)[0], out)
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in :meth:`torch.nn.MultiheadAttention.forward`."""
        dropout_p = self.dropout if self.training else 0.0
        reason = _beyond_the_kernels(query, need_weights, dropout_p)
        if reason is not None:
            _backend.fallback("MultiheadAttention", reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        batched = query.dim() == 3
        length_dim = 1 if batched and self.batch_first else 0
        q, k, v = (self._heads(projected, batched) for projected in self._project(query, key, value))
        attn_mask = self._head_mask(attn_mask, q.size(0))
        padding = None if key_padding_mask is None else key_padding_mask.reshape(-1, 1, 1, key_padding_mask.size(-1))
        if is_causal:
            attn_mask = None
        k, v, attn_mask, padding = self._extended(k, v, attn_mask, padding)
        mask = _merged(attn_mask, padding, q.dtype)
        out = attention(q, k, v, mask, dropout_p, is_causal)
        # [batch, heads, length, dim] back to the module's layout
        tokens = out.permute(*((0, 2, 1, 3) if length_dim else (2, 0, 1, 3))).flatten(-2)
        result = F.linear(tokens if batched else tokens.squeeze(1), self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return result, None
        weights = attention_weights(q, k, mask, is_causal)
        weights = weights.mean(dim=1) if average_attn_weights else weights
        return result, weights if batched else weights.squeeze(0)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                packed: Tensor = F.linear(query, self.in_proj_weight, bias)
                return packed.chunk(3, dim=-1)
            if key is value:
                sizes = (self.embed_dim, 2 * self.embed_dim)
                first, both = self.in_proj_weight.split(sizes)
                first_bias, both_bias = (None, None) if bias is None else bias.split(sizes)
                return F.linear(query, first, first_bias), *F.linear(key, both, both_bias).chunk(2, dim=-1)
            weights: Any = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(x, weight, b) for x, weight, b in zip(inputs, weights, biases, strict=True))

    def _heads(self, projected: Tensor, batched: bool) -> Tensor:
        """``[batch, heads, length, head_dim]`` as a view."""
        x: Tensor = projected.unflatten(-1, (self.num_heads, self.head_dim))
        if not batched:
            return x.transpose(0, 1).unsqueeze(0)
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def _head_mask(self, attn_mask: Tensor | None, batch: int) -> Tensor | None:
        if attn_mask is None or attn_mask.dim() == 2:
            return attn_mask
        if attn_mask.dim() != 3 or attn_mask.size(0) != batch * self.num_heads:
            raise ValueError(
                f"MultiheadAttention: attn_mask: got shape {tuple(attn_mask.shape)}, expected [L, S] or "
                f"[batch * num_heads, L, S] with batch * num_heads = {batch * self.num_heads}"
            )
        return attn_mask.view(batch, self.num_heads, *attn_mask.shape[1:])

    def _extended(
        self, key: Tensor, value: Tensor, *masks: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys, values and masks with what ``add_bias_kv`` and ``add_zero_attn`` put behind them."""
        batch, heads, _, dim = key.shape
        extra = []
        if self.bias_k is not None and self.bias_v is not None:
            extra.append([b.view(1, heads, 1, dim).expand(batch, -1, -1, -1) for b in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            extra.append([key.new_zeros(batch, heads, 1, dim)] * 2)
        if extra:
            key = torch.cat([key, *(k for k, _ in extra)], dim=2)
            value = torch.cat([value, *(v for _, v in extra)], dim=2)
        attn_mask, padding = (None if mask is None else F.pad(mask, (0, len(extra))) for mask in masks)
        return key, value, attn_mask, padding

    def __prepare_scriptable__(self) -> nn.Module:
        return torchscript.MultiheadAttention(self)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` whose attention is :class:`MultiheadAttention`.

    Same constructor, parameters, arguments and results. torch's own inference fast path, which calls no submodule, is
    not taken.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = ptk.nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()
        >>> layer(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As in :meth:`torch.nn.TransformerEncoderLayer.forward`."""
        masks = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks))
        out: Tensor = self.norm2(x + self._ff_block(x))
        return out


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` whose attention, to itself and to memory, is :class:`MultiheadAttention`.

    Same constructor, parameters, arguments and results.

    Example:
        >>> import torch, ptkernels as ptk
        >>> layer = ptk.nn.TransformerDecoderLayer(64, 4, batch_first=True).eval()
        >>> layer(torch.randn(2, 5, 64), torch.randn(2, 10, 64), tgt_is_causal=True).shape
        torch.Size([2, 5, 64])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention
