"""BERT-style sentence encoder: post-norm transformer, mean pooling, unit-length output.

The attention function is an argument, so that one set of weights runs with any implementation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AttentionFunction = Callable[..., Tensor]
"""``attention(query, key, value, attn_mask) -> out`` on ``[B, H, L, D]``, and ``dropout_p`` behind them where weights
are dropped: the signature ``ptkernels.attention`` and ``scaled_dot_product_attention`` share."""


@dataclass(frozen=True)
class SentenceEncoderConfig:
    """Sizes of a :class:`SentenceEncoder`; the defaults are those of all-MiniLM-L6-v2.

    Raises:
        ValueError: ``hidden_size`` is not a multiple of ``num_heads``.

    >>> SentenceEncoderConfig().hidden_size
    384
    """

    vocab_size: int = 30522
    hidden_size: int = 384
    num_layers: int = 6
    num_heads: int = 12
    intermediate_size: int = 1536
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads != 0:
            raise ValueError(
                f"SentenceEncoderConfig: hidden_size: got {self.hidden_size}, "
                f"expected a multiple of num_heads ({self.num_heads})"
            )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward block, each followed by a residual sum and a layer norm.

    Takes and returns ``hidden [B, L, hidden_size]``; ``attn_mask`` is boolean, broadcastable to ``[B, H, L, L]``,
    True where attention is allowed.
    """

    def __init__(self, config: SentenceEncoderConfig, attention: AttentionFunction) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.attention = attention
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.attention_output = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        dropout = (self.dropout.p,) if self.training and self.dropout.p > 0 else ()
        attended = self.attention(query, key, value, attn_mask, *dropout).transpose(1, 2).flatten(2)
        hidden = self.attention_norm(hidden + self.dropout(self.attention_output(attended)))
        inner = self.output(F.gelu(self.intermediate(hidden)))
        return cast(Tensor, self.output_norm(hidden + self.dropout(inner)))


class SentenceEncoder(nn.Module):
    """Maps tokenised sentences to unit-length embeddings.

    Args:
        config: the sizes of the model.
        attention: called as ``attention(query, key, value, attn_mask)`` in every layer; ``ptkernels.attention`` when
            not given.

    The model is the encoder of Devlin et al. 2018 (https://arxiv.org/abs/1810.04805) with the mean pooling of
    Reimers and Gurevych 2019 (https://arxiv.org/abs/1908.10084). Time is O(B * L * (L + hidden_size)) per layer.

    >>> _ = torch.manual_seed(0)
    >>> config = SentenceEncoderConfig(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
    >>> encoder = SentenceEncoder(config, attention=F.scaled_dot_product_attention).eval()
    >>> tokens = torch.tensor([[1, 2, 3], [4, 5, 0]])
    >>> embedding = encoder(tokens, tokens != 0)
    >>> embedding.shape
    torch.Size([2, 8])
    >>> bool(torch.allclose(embedding.norm(dim=1), torch.ones(2)))
    True
    """

    def __init__(self, config: SentenceEncoderConfig, attention: AttentionFunction | None = None) -> None:
        super().__init__()
        if attention is None:
            # Imported late: the operators must not be needed to build the model on another attention function.
            from ptkernels import attention as ptk_attention

            attention = cast(AttentionFunction, ptk_attention)
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        # A single sentence has one segment, so one row of the segment table is all that is ever read.
        self.segment_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config, attention) for _ in range(config.num_layers))

    def set_attention(self, attention: AttentionFunction) -> None:
        """Use another attention function in every layer; the weights stay."""
        for layer in self.layers:
            cast(EncoderLayer, layer).attention = attention

    def forward(self, input_ids: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Embed a batch of tokenised sentences.

        Args:
            input_ids: token ids ``[B, L]``, int64, ``1 <= L <= config.max_positions``.
            padding_mask: bool ``[B, L]``, True at real tokens, at least one per row; None when nothing is padded.

        Returns:
            ``[B, hidden_size]`` in the dtype of the weights, each row of Euclidean length 1.

        Raises:
            ValueError: a wrong rank, length or mask shape.
            TypeError: a mask that is not boolean.
        """
        self._check(input_ids, padding_mask)
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        hidden = self.embedding_norm(self.word_embeddings(input_ids) + positions + self.segment_embedding)
        attn_mask = None if padding_mask is None else padding_mask[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, attn_mask)
        if padding_mask is None:
            pooled = hidden.mean(dim=1)
        else:
            weights = padding_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return F.normalize(pooled, dim=1)

    def _check(self, input_ids: Tensor, padding_mask: Tensor | None) -> None:
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[1] <= self.config.max_positions:
            raise ValueError(
                f"SentenceEncoder: input_ids: got shape {list(input_ids.shape)}, "
                f"expected [B, L] with 1 <= L <= {self.config.max_positions}"
            )
        if padding_mask is None:
            return
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"SentenceEncoder: padding_mask: got {padding_mask.dtype}, expected torch.bool")
        if padding_mask.shape != input_ids.shape:
            raise ValueError(
                f"SentenceEncoder: padding_mask: got shape {list(padding_mask.shape)}, "
                f"expected {list(input_ids.shape)} like input_ids"
            )


_EMBEDDING_NAMES = {
    "embeddings.word_embeddings.weight": "word_embeddings.weight",
    "embeddings.position_embeddings.weight": "position_embeddings.weight",
    "embeddings.LayerNorm.weight": "embedding_norm.weight",
    "embeddings.LayerNorm.bias": "embedding_norm.bias",
}
ENCODER_LAYER_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


def load_sentence_encoder(
    directory: str | Path, attention: AttentionFunction | None = None, dtype: torch.dtype = torch.float32
) -> SentenceEncoder:
    """Load a BERT sentence encoder saved by sentence-transformers (``config.json`` and ``model.safetensors``).

    Args:
        directory: the folder that holds both files.
        attention: as for :class:`SentenceEncoder`.
        dtype: the dtype of the returned weights (CPU).

    Returns:
        The model in eval mode. The tokenizer is not loaded: any tokenizer of the same vocabulary serves.

    Raises:
        FileNotFoundError: one of the files is missing.
        ModuleNotFoundError: ``safetensors`` is not installed (``pip install ptkernels[bench]``).
        ValueError: the folder holds another kind of model.
        KeyError: a weight is missing.
    """
    from safetensors.torch import load_file

    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    kind = (config.get("model_type"), config.get("hidden_act"), config.get("position_embedding_type", "absolute"))
    if kind != ("bert", "gelu", "absolute"):
        raise ValueError(
            f"load_sentence_encoder: directory: got {kind} in {directory / 'config.json'}, "
            "expected a BERT model with gelu and absolute positions"
        )
    model = SentenceEncoder(
        SentenceEncoderConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            max_positions=config["max_position_embeddings"],
            layer_norm_eps=config["layer_norm_eps"],
        ),
        attention,
    )
    saved = load_file(directory / "model.safetensors")
    state = {ours: saved[theirs] for theirs, ours in _EMBEDDING_NAMES.items()}
    state["segment_embedding"] = saved["embeddings.token_type_embeddings.weight"][0]
    for index in range(config["num_hidden_layers"]):
        for theirs, ours in ENCODER_LAYER_NAMES.items():
            for part in ("weight", "bias"):
                state[f"layers.{index}.{ours}.{part}"] = saved[f"encoder.layer.{index}.{theirs}.{part}"]
    model.load_state_dict(state)
    return model.to(dtype).eval()
