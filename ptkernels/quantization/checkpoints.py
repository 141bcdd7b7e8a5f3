"""Weights that others have quantized, taken over code by code: GPTQ and AWQ checkpoints, GGUF blocks.

What comes in, as far as it is used here (little endian everywhere):

    GPTQ    qweight  int32 [K * bits / 32, N]  a column's codes along K, packed as one stream of bits
            qzeros   int32 [G, N * bits / 32]  the same along N; a stored zero point is one less than the real one
            scales   float [G, N]              weight[k, n] = scales[g[k], n] * (code - zero), g from `g_idx` int32 [K]
    AWQ     qweight  int32 [K, N / 8]          eight columns to a word, from the lowest bits on: 0 2 4 6 1 3 5 7
            qzeros   int32 [G, N / 8]          the same; scales as above, groups in the order of K
    Q4_0    18 bytes for 32 columns: float16 scale, 16 bytes; byte j holds columns j (low half) and j + 16, code - 8
    Q8_0    34 bytes for 32 columns: float16 scale, 32 signed bytes
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptkernels.ops.quantized_matmul.formats import CODE_FORMATS, SCHEMES, pack_codes
from ptkernels.ops.quantized_matmul.weight import QuantizedWeight, check_group_size

_SCHEME_OF_BITS = {2: "int2_weight_only", 3: "int3_weight_only", 4: "int4_weight_only", 8: "int8_weight_only"}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def from_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    bits: int = 4,
    zero_offset: int = 1,
) -> tuple[QuantizedWeight, Tensor | None]:
    """A linear layer's weight from the tensors of a GPTQ checkpoint.

    Args:
        qweight: int32 ``[K * bits / 32, N]``.
        qzeros: int32 ``[G, N * bits / 32]``.
        scales: floating ``[G, N]``.
        g_idx: int32 ``[K]``, the group of every column; default: groups in the order of K.
        bits: 2, 3, 4 or 8.
        zero_offset: added to stored zero points: 1, or 0 for the second version of the format.

    Returns:
        The weight, and the order its columns are in: None where that is the checkpoint's own, else a permutation
        ``[K]`` to call ``quantized_linear(x[..., permutation], weight)`` with (checkpoints made with activation order).

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit together, or the groups have unequal sizes.

    Example:
        >>> import torch, ptkernels as ptk
        >>> words = torch.full((4, 8), 0x99999999 - (1 << 32), dtype=torch.int32)  # 32 x 8 codes, all 9
        >>> zeros = torch.full((1, 1), 0x77777777, dtype=torch.int32)              # stored 7: 8
        >>> weight, order = ptk.quantization.from_gptq(words, zeros, torch.full((1, 8), 0.5))
        >>> weight.dequantize().unique(), order
        (tensor([0.5000]), None)
    """
    op = "from_gptq"
    if bits not in _SCHEME_OF_BITS:
        raise ValueError(f"{op}: bits: got {bits}, expected one of 2, 3, 4, 8")
    _check_words(op, qweight=qweight, qzeros=qzeros)
    codes = _unpack_stream(qweight.T, bits)
    out_features, in_features = codes.shape
    zeros = _unpack_stream(qzeros, bits)[:, :out_features].T + zero_offset
    groups = scales.size(0) if scales.dim() == 2 else -1
    if scales.shape != (groups, out_features) or zeros.shape != (out_features, groups):
        raise ValueError(
            f"{op}: scales: got shape {list(scales.shape)} with qzeros {list(qzeros.shape)}, "
            f"expected [groups, {out_features}] for both"
        )
    group_size = -(-in_features // max(groups, 1))
    order = None
    if g_idx is not None:
        if g_idx.shape != (in_features,):
            raise ValueError(f"{op}: g_idx: got shape {list(g_idx.shape)}, expected [{in_features}]")
        expected = torch.arange(in_features, device=g_idx.device) // group_size
        if not torch.equal(g_idx.long(), expected):
            order = g_idx.argsort(stable=True)
            if not torch.equal(g_idx[order].long(), expected):
                raise ValueError(f"{op}: g_idx: got groups of unequal sizes, expected {group_size} columns to each")
            codes = codes[:, order]
    return _integer_weight(op, codes, scales.T, zeros, bits, group_size), order


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantizedWeight:
    """A linear layer's weight from the tensors of an AWQ checkpoint (4 bits).

    Args:
        qweight: int32 ``[K, N / 8]``.
        qzeros: int32 ``[G, N / 8]``.
        scales: floating ``[G, N]``.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit together.

    Example:
        >>> import torch, ptkernels as ptk
        >>> words = torch.zeros(16, 1, dtype=torch.int32)
        >>> words[:, 0] = 0x50                               # bits 4 to 7 belong to column 2
        >>> weight = ptk.quantization.from_awq(words, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8))
        >>> weight.dequantize()[:, 0].tolist()
        [0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    op = "from_awq"
    _check_words(op, qweight=qweight, qzeros=qzeros)
    place = torch.tensor(_AWQ_ORDER, device=qweight.device).argsort()
    codes, zeros = (
        _unpack_stream(words, 4).unflatten(1, (-1, 8))[..., place].flatten(1).T for words in (qweight, qzeros)
    )
    if scales.shape != zeros.T.shape or codes.size(0) != zeros.size(0):
        raise ValueError(
            f"{op}: scales: got shape {list(scales.shape)} with qzeros {list(qzeros.shape)} and qweight "
            f"{list(qweight.shape)}, expected [groups, {codes.size(0)}]"
        )
    return _integer_weight(op, codes, scales.T, zeros, 4, -(-codes.size(1) // max(scales.size(0), 1)))


def from_gguf(blocks: Tensor, kind: str, in_features: int) -> QuantizedWeight:
    """A linear layer's weight from the blocks of a GGUF file.

    Args:
        blocks: uint8, all blocks of the tensor in the file's order, any shape.
        kind: ``"Q4_0"`` or ``"Q8_0"``.
        in_features: ``K``, a multiple of 32; the number of rows follows.

    Raises:
        TypeError: ``blocks`` are not bytes.
        ValueError: the kind is another, or the bytes do not make whole rows.

    Example:
        >>> import torch, ptkernels as ptk
        >>> scale = torch.tensor([0.25], dtype=torch.float16).view(torch.uint8)
        >>> block = torch.cat([scale, torch.full((16,), 0x9C, dtype=torch.uint8)])
        >>> ptk.quantization.from_gguf(block, "Q4_0", 32).dequantize()[0, [0, 16]].tolist()
        [1.0, 0.25]
    """
    op = "from_gguf"
    if kind not in ("Q4_0", "Q8_0"):
        raise ValueError(f"{op}: kind: got {kind!r}, expected Q4_0 or Q8_0")
    if blocks.dtype != torch.uint8:
        raise TypeError(f"{op}: blocks: got dtype {blocks.dtype}, expected torch.uint8")
    size = 18 if kind == "Q4_0" else 34
    if in_features <= 0 or in_features % 32 != 0 or blocks.numel() % (in_features // 32 * size) != 0:
        raise ValueError(
            f"{op}: blocks: got {blocks.numel()} bytes for rows of {in_features}, expected whole rows of blocks of "
            f"{size} bytes for 32 columns"
        )
    parts = blocks.reshape(-1, in_features // 32, size)
    scales = parts[..., :2].contiguous().view(torch.float16).squeeze(-1).float()
    payload = parts[..., 2:].contiguous()
    if kind == "Q8_0":
        codes = payload.view(torch.int8).flatten(1)
        return QuantizedWeight(codes, scales, None, None, "int8_weight_only", 32, in_features)
    nibbles = torch.cat([payload & 15, payload >> 4], -1).flatten(1)
    codes = pack_codes(nibbles, CODE_FORMATS["u4"])
    return QuantizedWeight(codes, scales, None, None, "int4_weight_only", 32, in_features)


def _check_words(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise TypeError(f"{op}: {name}: got dtype {tensor.dtype}, expected torch.int32")
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name}: got {tensor.dim()} dimensions, expected 2")


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes along the last dimension of int32 words, read as one stream of bits; int32."""
    octets = words.contiguous().view(torch.uint8)
    places = torch.arange(8, device=words.device, dtype=torch.uint8)
    stream = ((octets.unsqueeze(-1) >> places) & 1).flatten(1)
    codes = stream[:, : stream.size(1) // bits * bits].unflatten(1, (-1, bits)).int()
    total: Tensor = (codes << torch.arange(bits, device=words.device)).sum(-1, dtype=torch.int32)
    return total


def _integer_weight(
    op: str, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int
) -> QuantizedWeight:
    """``scales * (codes - zeros)`` with unsigned codes and zero points ``[N, ...]``."""
    in_features = codes.size(1)
    check_group_size(group_size if scales.size(1) > 1 else -1)
    scheme = _SCHEME_OF_BITS[bits]
    code, half = SCHEMES[scheme].code, 1 << (bits - 1)
    packed = (codes - half).to(torch.int8) if code.name == "s8" else pack_codes(codes, code)
    shift = (zeros - half).to(torch.float32)
    return QuantizedWeight(
        packed.contiguous(),
        scales.to(torch.float32).contiguous(),
        shift.contiguous() if bool(shift.any()) else None,
        None,
        scheme,
        group_size if scales.size(1) > 1 else -1,
        in_features,
    )
