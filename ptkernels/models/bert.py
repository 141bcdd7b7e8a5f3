"""A bidirectional transformer encoder (BERT; Devlin et al., 2018) with the heads that are put on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.models.sentence_encoder import EncoderLayer, SentenceEncoderConfig
from ptkernels.ops.attention import attention


class Bert(nn.Module):
    """Features of every token, from all of the others.

    Args:
        config: the sizes.
        segments: kinds of sentences that are told apart.

    Shape:
        ``tokens`` int64 ``[B, L]``; ``padding_mask`` ``[B, L]``, bool or 0 and 1, true at real tokens; ``segment``
        int64 ``[B, L]``; to ``[B, L, hidden_size]``.

    Raises:
        ValueError: more tokens than ``config.max_positions``.

    Example:
        >>> from ptkernels.models import SentenceEncoderConfig
        >>> config = SentenceEncoderConfig(20, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
        >>> tokens = torch.tensor([[5, 7, 9], [3, 0, 0]])
        >>> Bert(config)(tokens, tokens != 0).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, config: SentenceEncoderConfig, segments: int = 2) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.segment_embeddings = nn.Embedding(segments, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(EncoderLayer(config, attention) for _ in range(config.num_layers))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None, segment: Tensor | None = None) -> Tensor:
        if tokens.dim() != 2 or tokens.size(1) > self.config.max_positions:
            expected = f"[B, L] with L <= {self.config.max_positions}"
            raise ValueError(f"Bert: tokens: got shape {list(tokens.shape)}, expected {expected}")
        segment = torch.zeros_like(tokens) if segment is None else segment
        x: Tensor = self.word_embeddings(tokens) + self.segment_embeddings(segment)
        x = self.dropout(self.embedding_norm(x + self.position_embeddings.weight[: tokens.size(1)]))
        mask = None if padding_mask is None else padding_mask.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x

    @classmethod
    def from_transformers(cls, model: Any) -> Bert:
        """A copy of a ``BertModel`` of Hugging Face transformers, without its pooler, in evaluation mode.

        Raises:
            ValueError: another kind of model, or one with an option that this one has not.
        """
        from ptkernels.models.pretrained import bert_from_transformers

        return bert_from_transformers(model)


class BertForMaskedLM(nn.Module):
    """Scores of the token that belongs at every place, ``[B, L, vocab_size]``: what BERT is trained to tell.

    Args:
        bert: the encoder, whose word embeddings score the tokens.

    Example:
        >>> from ptkernels.models import SentenceEncoderConfig
        >>> config = SentenceEncoderConfig(20, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
        >>> model = BertForMaskedLM(Bert(config))
        >>> model(torch.tensor([[5, 7, 9]])).shape
        torch.Size([1, 3, 20])
    """

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        config = bert.config
        self.bert = bert
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder.weight = bert.word_embeddings.weight
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None, segment: Tensor | None = None) -> Tensor:
        hidden = self.bert(tokens, padding_mask, segment)
        scores: Tensor = self.decoder(self.norm(F.gelu(self.transform(hidden))))
        return scores


class BertClassifier(nn.Module):
    """Classes of whole texts, from the features of their first token.

    Args:
        bert: the encoder.
        num_classes: number of classes.

    Example:
        >>> from ptkernels.models import SentenceEncoderConfig
        >>> config = SentenceEncoderConfig(20, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)
        >>> BertClassifier(Bert(config), 3)(torch.tensor([[5, 7, 9]])).shape
        torch.Size([1, 3])
    """

    def __init__(self, bert: Bert, num_classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.pooler = nn.Linear(bert.config.hidden_size, bert.config.hidden_size)
        self.classifier = nn.Linear(bert.config.hidden_size, num_classes)

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        first = self.bert(tokens, padding_mask)[:, 0]
        scores: Tensor = self.classifier(self.bert.dropout(torch.tanh(self.pooler(first))))
        return scores
