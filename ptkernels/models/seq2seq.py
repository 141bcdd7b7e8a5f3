"""Sequences to sequences with recurrent layers: a decoder that looks back at every step of the source by attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.nn.rnn import GRU
from ptkernels.ops.attention import attention


class RecurrentState:
    """The hidden state of a recurrent decoder, and what else it needs of each sequence: tensors whose rows move along.

    Args:
        hidden: a tensor ``[layers, batch, units]``, or two of them, or None before the first token.
        rows: tensors ``[batch, ...]`` that stay as they are, or None.
    """

    def __init__(self, hidden: Any, *rows: Tensor | None) -> None:
        self.hidden, self.rows = hidden, rows

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was; ``index`` may be longer than the batch."""
        if isinstance(self.hidden, Tensor):
            self.hidden = self.hidden.index_select(1, index)
        elif self.hidden is not None:
            self.hidden = tuple(part.index_select(1, index) for part in self.hidden)
        self.rows = tuple(None if row is None else row.index_select(0, index) for row in self.rows)

    def crop(self, lengths: Tensor) -> None:
        """A recurrent state cannot forget tokens."""
        raise ValueError("generate: draft: got one, expected None: a recurrent model's state cannot be rolled back")


class Seq2Seq(nn.Module):
    """A bidirectional GRU reads the source, another GRU writes the answer, with attention in between.

    The decoder's state asks, the source's states answer (Luong et al., 2015, https://arxiv.org/abs/1508.04025). In
    training all steps of an answer are asked at once.

    Args:
        source_vocab: tokens of the source.
        target_vocab: tokens of the answer.
        embedding_dim: features of a token.
        hidden_dim: units of the decoder; each direction of the encoder has half, so it must be even.
        num_layers: layers of both.
        dropout: probability of dropping between layers and before the scores.

    Shape:
        ``source`` int64 ``[B, S]``, ``target`` int64 ``[B, L]``, which starts with a start token, ``source_lengths``
        int64 ``[B]``; to ``[B, L, target_vocab]``.

    Example:
        >>> from ptkernels.models import generate
        >>> model = Seq2Seq(30, 20, embedding_dim=8, hidden_dim=16).eval()
        >>> source, lengths = torch.randint(30, (2, 7)), torch.tensor([7, 4])
        >>> model(source, torch.randint(20, (2, 5)), lengths).shape
        torch.Size([2, 5, 20])
        >>> start = torch.zeros(2, 1, dtype=torch.int64)
        >>> generate(model, start, 6, state=model.start(source, lengths), num_beams=3).shape
        torch.Size([2, 6])
    """

    def __init__(
        self,
        source_vocab: int,
        target_vocab: int,
        embedding_dim: int,
        hidden_dim: int,
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if hidden_dim % 2 != 0:
            raise ValueError(f"Seq2Seq: hidden_dim: got {hidden_dim}, expected an even number")
        self.source_embedding = nn.Embedding(source_vocab, embedding_dim)
        self.target_embedding = nn.Embedding(target_vocab, embedding_dim)
        options: dict[str, Any] = {"num_layers": num_layers, "batch_first": True}
        # Dropout between layers only: a single layer has no place for it.
        options["dropout"] = dropout if num_layers > 1 else 0.0
        self.encoder = GRU(embedding_dim, hidden_dim // 2, bidirectional=True, **options)
        self.decoder = GRU(embedding_dim, hidden_dim, **options)
        self.query = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.combine = nn.Linear(2 * hidden_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.scores = nn.Linear(hidden_dim, target_vocab)

    def start(self, source: Tensor, source_lengths: Tensor | None = None) -> RecurrentState:
        """The state to write an answer from: the decoder begins where both directions of the encoder ended."""
        memory, hidden = self.encoder(self.source_embedding(source), lengths=source_lengths)
        hidden = torch.cat([hidden[0::2], hidden[1::2]], 2)
        mask = None
        if source_lengths is not None:
            mask = torch.arange(source.size(1), device=source.device) < source_lengths.to(source.device)[:, None]
        return RecurrentState(hidden, memory, mask)

    def new_state(self, batch_size: int, capacity: int) -> RecurrentState:
        """An answer needs a source: see :meth:`start`."""
        raise ValueError("generate: state: got None, expected that of Seq2Seq.start(source)")

    def _decode(self, target: Tensor, state: RecurrentState, lengths: Tensor | None = None) -> Tensor:
        memory, mask = state.rows
        out, state.hidden = self.decoder(self.target_embedding(target), state.hidden, lengths=lengths)
        keys = memory.unsqueeze(1)  # type: ignore[union-attr]
        context = attention(self.query(out)[:, None], keys, keys, None if mask is None else mask[:, None, None])
        return self.dropout(torch.tanh(self.combine(torch.cat([out, context.squeeze(1)], 2))))  # type: ignore[no-any-return]

    def forward(self, source: Tensor, target: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        return self.score(target, self.start(source, source_lengths))

    def loss(
        self, source: Tensor, answer: Tensor, source_lengths: Tensor | None = None, start_token: int = 0
    ) -> Tensor:
        """Mean cross entropy of the tokens of an answer ``[B, L]``, each given those before it."""
        target = F.pad(answer[:, :-1], (1, 0), value=start_token)
        return F.cross_entropy(self(source, target, source_lengths).flatten(0, 1), answer.flatten())

    def score(self, tokens: Tensor, state: RecurrentState) -> Tensor:
        """Scores ``[B, n, target_vocab]`` after every token that the answer goes on with."""
        scores: Tensor = self.scores(self._decode(tokens, state))
        return scores

    def step(self, tokens: Tensor, state: RecurrentState, lengths: Tensor | None = None) -> Tensor:
        """Scores ``[B, target_vocab]`` after the last token of each row, of which row ``i`` has ``lengths[i]``."""
        hidden = self._decode(tokens, state, lengths)
        rows = torch.arange(len(hidden), device=hidden.device)
        scores: Tensor = self.scores(hidden[:, -1] if lengths is None else hidden[rows, lengths - 1])
        return scores
