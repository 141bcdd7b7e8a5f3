"""Keys and values of the tokens that a model has seen: the state that decoding goes on with."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer ``[batch, kv_heads, capacity, head_dim]`` keys and values, of which every row has filled ``lengths``.

    Rows may be filled unequally: each one's next token goes behind its own last one. What lies beyond ``lengths`` is
    never read, so that forgetting tokens (:meth:`crop`) costs nothing.

    Args:
        num_layers: layers of the model.
        batch_size: sequences decoded side by side.
        num_kv_heads: heads of the keys, per layer.
        capacity: tokens that a row has room for.
        head_dim: features of a head.
        dtype: of the model, or ``torch.int8``: each key and value is then stored in 8 bits with one scale, half or a
            quarter of the memory that decoding reads.
        device: of the model.

    Example:
        >>> cache = KVCache(num_layers=2, batch_size=3, num_kv_heads=4, capacity=16, head_dim=8)
        >>> cache.lengths.tolist(), cache.keys[0].shape
        ([0, 0, 0], torch.Size([3, 4, 16, 8]))
        >>> cache.reorder(torch.tensor([2, 0]))
        >>> cache.keys[0].shape
        torch.Size([2, 4, 16, 8])
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (batch_size, num_kv_heads, capacity, head_dim)
        self.capacity = capacity
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        # Zeros, not whatever memory holds: where a mask hides slots, 0 times what they hold is added.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)] for _ in range(2)
        )
        self.key_scales: list[Tensor] = []
        self.value_scales: list[Tensor] = []
        if dtype == torch.int8:
            self.key_scales, self.value_scales = (
                [torch.zeros(shape[:-1], device=device) for _ in range(num_layers)] for _ in range(2)
            )

    def scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Of the keys and of the values of a layer, float32 ``[batch, kv_heads, capacity]``; None unless 8 bits."""
        return (self.key_scales[layer], self.value_scales[layer]) if self.key_scales else (None, None)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[batch, kv_heads, n, head_dim]`` behind what every row holds; keys and values up to the longest row.

        For attention that takes no cache, such as one with a bias per position: what rows have not filled is for its
        mask to hide. ``lengths`` is left to the caller, who advances it after the last layer.
        """
        slots = self.lengths[:, None] + torch.arange(key.size(2), device=key.device)
        rows = torch.arange(len(slots), device=key.device)[:, None]
        longest = int(slots.max()) + 1
        if longest > self.capacity:
            raise ValueError(f"KVCache: append: got {longest} tokens in a row, expected at most {self.capacity}")
        for tensors, new in ((self.keys, key), (self.values, value)):
            tensors[layer][rows, :, slots] = new.transpose(1, 2)
        return self.keys[layer][:, :, :longest], self.values[layer][:, :, :longest]

    def reorder(self, index: Tensor) -> None:
        """Make row ``i`` what row ``index[i]`` was; ``index`` may be of another length than the batch.

        Args:
            index: int64 ``[new batch]``.
        """
        self.lengths = self.lengths[index]
        for tensors in (self.keys, self.values, self.key_scales, self.value_scales):
            tensors[:] = [tensor.index_select(0, index) for tensor in tensors]

    def crop(self, lengths: Tensor) -> None:
        """Forget what every row holds beyond ``lengths``, int64 ``[batch]``."""
        self.lengths = torch.minimum(self.lengths, lengths)
