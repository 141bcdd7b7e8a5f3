"""The random bits of kernels, as their references draw them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def philox(counter: Sequence[Tensor], key: tuple[Tensor, Tensor]) -> Sequence[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four words of 32 random bits, in int64, for each counter of four words."""
    low = 0xFFFFFFFF
    for _ in range(10):
        first, third = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = (
            (third >> 32 & low) ^ counter[1] ^ key[0],
            third & low,
            (first >> 32 & low) ^ counter[3] ^ key[1],
            first & low,
        )
        key = (key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low
    return counter
