"""Models around a recurrent stack: a language model, a text classifier, a speaker encoder.

The stack's class is an argument, so that one set of weights runs on ``ptkernels.nn`` and on ``torch.nn``. Sequences are
packed: padding is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from ptkernels.models.seq2seq import RecurrentState
from ptkernels.nn import LSTM, MultiheadAttention

Stack = Callable[..., nn.Module]
State = tuple[Tensor, Tensor]


def _pack(sequences: Sequence[Tensor]) -> PackedSequence:
    return pack_sequence(list(sequences), enforce_sorted=False)


def _like(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


class LSTMLanguageModel(nn.Module):
    """Next-token scores of ragged sequences: embedding, LSTM stack, dropout, linear.

    Args:
        vocab_size: number of tokens.
        embedding_dim: features of a token.
        hidden_dim: units of every layer.
        num_layers: layers of the stack.
        dropout: probability of dropping, between layers and before the scores.
        lstm: class of the stack, ``ptkernels.nn.LSTM`` or ``torch.nn.LSTM``.

    Example:
        >>> import torch
        >>> model = LSTMLanguageModel(vocab_size=50, embedding_dim=8, hidden_dim=16, num_layers=2).eval()
        >>> tokens = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2])]
        >>> scores, state = model(tokens)
        >>> scores.data.shape
        torch.Size([7, 50])
        >>> model.loss(tokens).dim()
        0
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        num_layers: int,
        dropout: float = 0.5,
        lstm: Stack = LSTM,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        # Dropout between layers only: a single layer has no place for it.
        self.lstm = lstm(embedding_dim, hidden_dim, num_layers, dropout=dropout if num_layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden_dim, vocab_size)

    def forward(self, tokens: Sequence[Tensor], state: State | None = None) -> tuple[PackedSequence, State]:
        """Scores ``[tokens, vocab]`` in packed order, and the state to go on with."""
        packed = _pack(tokens)
        output, final = self.lstm(_like(packed, self.embedding(packed.data)), state)
        return _like(packed, self.linear(self.dropout(output.data))), final

    def new_state(self, batch_size: int, capacity: int) -> RecurrentState:
        """An empty state for :func:`ptkernels.models.generate`."""
        return RecurrentState(None)

    def step(self, tokens: Tensor, state: RecurrentState, lengths: Tensor | None = None) -> Tensor:
        """Scores ``[B, vocab]`` after the last token of each row, of which row ``i`` has ``lengths[i]``."""
        counts = [tokens.size(1)] * len(tokens) if lengths is None else lengths.tolist()
        packed = _pack([row[:count] for row, count in zip(tokens, counts, strict=True)])
        _, state.hidden = self.lstm(_like(packed, self.embedding(packed.data)), state.hidden)
        scores: Tensor = self.linear(self.dropout(state.hidden[0][-1]))
        return scores

    def score(self, tokens: Tensor, state: RecurrentState) -> Tensor:
        """Only speculative decoding asks, whose states must forget."""
        raise ValueError("generate: draft: got one, expected None: a recurrent model's state cannot be rolled back")

    def loss(self, tokens: Sequence[Tensor]) -> Tensor:
        """Mean cross entropy of every token but the first of each sequence, given those before it."""
        scores, _ = self([sequence[:-1] for sequence in tokens])
        return F.cross_entropy(scores.data, _pack([sequence[1:] for sequence in tokens]).data)


class SentimentAnalyzer(nn.Module):
    """Classes of ragged token sequences: embedding, LSTM, self-attention over real tokens, their mean, linear.

    Args:
        vocab_size: number of tokens.
        embed_dim: features of a token.
        hidden_dim: units, a multiple of ``num_heads``.
        classes: number of classes.
        num_heads: heads of the attention.
        dropout: probability of dropping an attention weight.
        lstm: class of the stack, ``ptkernels.nn.LSTM`` or ``torch.nn.LSTM``.

    Example:
        >>> import torch
        >>> model = SentimentAnalyzer(vocab_size=50, embed_dim=8, hidden_dim=16).eval()
        >>> model([torch.tensor([3, 1, 4]), torch.tensor([9])]).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        vocab_size: int = 10000,
        embed_dim: int = 300,
        hidden_dim: int = 256,
        classes: int = 3,
        num_heads: int = 8,
        dropout: float = 0.1,
        lstm: Stack = LSTM,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = lstm(embed_dim, hidden_dim)
        self.attention = MultiheadAttention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.classifier = nn.Linear(hidden_dim, classes)

    def forward(self, tokens: Sequence[Tensor]) -> Tensor:
        """Scores ``[batch, classes]``."""
        packed = _pack(tokens)
        output, lengths = pad_packed_sequence(
            self.lstm(_like(packed, self.embedding(packed.data)))[0], batch_first=True
        )
        lengths = lengths.to(output.device)
        padding = torch.arange(output.size(1), device=output.device) >= lengths[:, None]
        attended, _ = self.attention(output, output, output, key_padding_mask=padding, need_weights=False)
        pooled = attended.masked_fill(padding[..., None], 0.0).sum(1) / lengths[:, None]
        scores: Tensor = self.classifier(pooled)
        return scores


class SpeakerEncoder(nn.Module):
    """Unit-length voice embeddings of ragged mel spectrograms: LSTM stack, last state, linear, ReLU.

    The network of the PyPI package Resemblyzer, whose weights :func:`load_speaker_encoder` reads.

    Args:
        channels: mel channels of a frame.
        hidden_size: units of every layer.
        num_layers: layers of the stack.
        lstm: class of the stack, ``ptkernels.nn.LSTM`` or ``torch.nn.LSTM``.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = SpeakerEncoder(channels=4, hidden_size=8, num_layers=1)
        >>> embeddings = model([torch.rand(20, 4), torch.rand(9, 4)])
        >>> torch.allclose(embeddings.norm(dim=1), torch.ones(2))
        True
    """

    def __init__(self, channels: int = 40, hidden_size: int = 256, num_layers: int = 3, lstm: Stack = LSTM) -> None:
        super().__init__()
        self.lstm = lstm(channels, hidden_size, num_layers)
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, mels: Sequence[Tensor]) -> Tensor:
        """Embeddings ``[batch, hidden_size]`` of spectrograms ``[frames, channels]``."""
        _, (hidden, _) = self.lstm(_pack(mels))
        embeddings = F.relu(self.linear(hidden[-1]))
        unit: Tensor = embeddings / embeddings.norm(dim=1, keepdim=True)
        return unit


def load_speaker_encoder(path: str | Path, lstm: Stack = LSTM) -> SpeakerEncoder:
    """The encoder with the weights of a Resemblyzer checkpoint (``pretrained.pt``), in evaluation mode.

    Args:
        path: the checkpoint; only tensors are read from it.
        lstm: class of the stack.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: its weights are not those of a :class:`SpeakerEncoder`.
    """
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # Beside the network's weights it holds two numbers of the loss it was trained with.
    weights = {name: tensor for name, tensor in checkpoint["model_state"].items() if "similarity" not in name}
    model = SpeakerEncoder(lstm=lstm)
    model.load_state_dict(weights, strict=True)
    return model.eval()
