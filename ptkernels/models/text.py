"""Texts to classes, ratings and tags by recurrent layers, on padded batches with lengths: padding is never computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ptkernels.nn.rnn import LSTM


class TextClassifier(nn.Module):
    """Classes from the last states of both directions of an LSTM.

    Args:
        vocab_size: number of tokens.
        embedding_dim: features of a token.
        hidden_dim: units of each direction.
        num_classes: number of classes.
        pretrained_embeddings: ``[vocab_size, embedding_dim]`` to start from. Default: random.
        dropout: probability of dropping a feature before the scores.

    Shape:
        ``tokens`` int64 ``[B, L]``, ``lengths`` int64 ``[B]``, in any order; to ``[B, num_classes]``.

    Example:
        >>> model = TextClassifier(vocab_size=50, embedding_dim=8, hidden_dim=16, num_classes=3).eval()
        >>> tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 0, 0]])
        >>> scores = model(tokens, lengths=torch.tensor([4, 2]))
        >>> torch.testing.assert_close(scores[1:], model(tokens[1:, :2]))
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        num_classes: int,
        pretrained_embeddings: Tensor | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        if pretrained_embeddings is not None:
            with torch.no_grad():
                self.embedding.weight.copy_(pretrained_embeddings)
        self.lstm = LSTM(embedding_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(2 * hidden_dim, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(tokens), lengths=lengths)
        scores: Tensor = self.classifier(self.dropout(torch.cat([hidden[-2], hidden[-1]], 1)))
        return scores


class RestaurantReviewClassifier(nn.Module):
    """A review's cuisine (Asian, European, Australian, fusion), from the last state of an LSTM.

    Args:
        vocab_size: number of tokens.
        embed_dim: features of a token.
        hidden_dim: units.
        num_cuisines: number of classes.

    Shape:
        ``tokens`` int64 ``[B, L]``, ``lengths`` int64 ``[B]``; to ``[B, num_cuisines]``.

    Example:
        >>> model = RestaurantReviewClassifier()
        >>> sum(parameter.numel() for parameter in model.parameters())
        2246148
        >>> model(torch.randint(8000, (2, 9)), lengths=torch.tensor([9, 4])).shape
        torch.Size([2, 4])
    """

    def __init__(
        self, vocab_size: int = 8000, embed_dim: int = 256, hidden_dim: int = 128, num_cuisines: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = LSTM(embed_dim, hidden_dim, batch_first=True)
        self.classifier = nn.Linear(hidden_dim, num_cuisines)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(tokens), lengths=lengths)
        scores: Tensor = self.classifier(hidden[-1])
        return scores


class TourismRatingPredictor(nn.Module):
    """A review's number of stars and its sentiment, from the same last state: two tasks, one network.

    Args:
        vocab_size: number of tokens.
        embed_dim: features of a token.
        hidden_dim: units.

    Shape:
        ``tokens`` int64 ``[B, L]``, ``lengths`` int64 ``[B]``; to ratings ``[B, 1]`` and sentiments ``[B, 3]``.

    Example:
        >>> rating, sentiment = TourismRatingPredictor()(torch.randint(5000, (2, 9)))
        >>> rating.shape, sentiment.shape
        (torch.Size([2, 1]), torch.Size([2, 3]))
    """

    def __init__(self, vocab_size: int = 5000, embed_dim: int = 200, hidden_dim: int = 100) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.lstm = LSTM(embed_dim, hidden_dim, batch_first=True)
        self.rating_head = nn.Linear(hidden_dim, 1)
        self.sentiment_head = nn.Linear(hidden_dim, 3)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, (hidden, _) = self.lstm(self.embedding(tokens), lengths=lengths)
        return self.rating_head(hidden[-1]), self.sentiment_head(hidden[-1])

    def loss(self, tokens: Tensor, ratings: Tensor, sentiments: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean squared error of the stars ``[B]`` plus cross entropy of the sentiments, int64 ``[B]``."""
        rating, sentiment = self(tokens, lengths)
        return F.mse_loss(rating.squeeze(1), ratings) + F.cross_entropy(sentiment, sentiments)


class CombineDirections(nn.Module):
    """The outputs of both directions of a recurrent layer as one.

    Args:
        hidden_dim: units of each direction.
        how: ``"concat"`` keeps both side by side, ``"add"`` sums them, ``"gated"`` mixes them by a learned gate per
            feature, ``"attention"`` by a learned weight per direction.

    Shape:
        ``[..., 2 * hidden_dim]`` to ``[..., out_features]``, which is ``2 * hidden_dim`` for ``"concat"`` and otherwise
        ``hidden_dim``.

    Raises:
        ValueError: ``how`` is none of the four.

    Example:
        >>> CombineDirections(4, "gated")(torch.randn(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, hidden_dim: int, how: str = "concat") -> None:
        super().__init__()
        outputs = {"concat": 0, "add": 0, "gated": hidden_dim, "attention": 1}
        if how not in outputs:
            raise ValueError(f"CombineDirections: how: got {how!r}, expected one of {', '.join(outputs)}")
        self.how, self.out_features = how, 2 * hidden_dim if how == "concat" else hidden_dim
        inputs = hidden_dim if how == "attention" else 2 * hidden_dim
        self.score = nn.Linear(inputs, outputs[how]) if outputs[how] else None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "concat":
            return x
        forward, backward = x.chunk(2, -1)
        if self.score is None:
            return forward + backward
        if self.how == "gated":
            return torch.lerp(backward, forward, torch.sigmoid(self.score(x)))
        both = torch.stack([forward, backward], -2)
        weight: Tensor = self.score(torch.tanh(both)).softmax(-2)
        return (weight * both).sum(-2)

    def extra_repr(self) -> str:
        return f"how={self.how}"


class SequenceTagger(nn.Module):
    """A tag of every word, named entities or parts of speech: words, their spelling where given, both directions.

    Args:
        vocab_size: number of words.
        embedding_dim: features of a word.
        hidden_dim: units of each direction.
        num_tags: number of tags.
        char_vocab_size: number of characters; 0 is the padding of a word. Default: words are not spelled.
        char_embedding_dim: features of a character, and units of each direction that reads them.
        dropout: probability of dropping a feature before the scores.
        combine: how both directions become one; see :class:`CombineDirections`.

    Shape:
        ``words`` int64 ``[B, L]``, ``lengths`` int64 ``[B]``, ``characters`` int64 ``[B, L, most]``, required with
        ``char_vocab_size``; to ``[B, L, num_tags]``.

    Raises:
        ValueError: characters are missing, or given to a tagger that has no use for them.

    Example:
        >>> model = SequenceTagger(50, 8, 16, num_tags=5, char_vocab_size=30, char_embedding_dim=4)
        >>> words, characters = torch.randint(50, (2, 6)), torch.randint(30, (2, 6, 7))
        >>> model(words, lengths=torch.tensor([6, 3]), characters=characters).shape
        torch.Size([2, 6, 5])
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        num_tags: int,
        char_vocab_size: int | None = None,
        char_embedding_dim: int = 50,
        dropout: float = 0.5,
        combine: str = "concat",
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        options: dict[str, Any] = {"batch_first": True, "bidirectional": True}
        spelled = char_vocab_size is not None
        self.char_embedding = nn.Embedding(char_vocab_size, char_embedding_dim) if char_vocab_size else None
        self.char_lstm = LSTM(char_embedding_dim, char_embedding_dim, **options) if spelled else None
        self.lstm = LSTM(embedding_dim + (2 * char_embedding_dim if spelled else 0), hidden_dim, **options)
        self.combine = CombineDirections(hidden_dim, combine)
        self.dropout = nn.Dropout(dropout)
        self.hidden2tag = nn.Linear(self.combine.out_features, num_tags)

    def forward(self, words: Tensor, lengths: Tensor | None = None, characters: Tensor | None = None) -> Tensor:
        features = self.embedding(words)
        if (characters is None) != (self.char_embedding is None):
            raise ValueError(
                f"SequenceTagger: characters: got {'none' if characters is None else 'some'}, expected "
                f"{'none' if self.char_embedding is None else 'some'} with this char_vocab_size"
            )
        if characters is not None and self.char_embedding is not None and self.char_lstm is not None:
            spelling = characters.flatten(0, 1)
            # A padded word has no characters: a sequence of length 0, whose last states are 0.
            _, (hidden, _) = self.char_lstm(self.char_embedding(spelling), lengths=(spelling != 0).sum(1))
            spelled = torch.cat([hidden[0], hidden[1]], 1).view(*words.shape, -1)
            features = torch.cat([features, spelled], 2)
        output, _ = self.lstm(features, lengths=lengths)
        scores: Tensor = self.hidden2tag(self.dropout(self.combine(output)))
        return scores
