"""Tags that are scored together: a linear-chain conditional random field over a bidirectional LSTM.

A sequence of tags ``y`` of a sentence of ``n`` words scores

    start[y_1] + sum_t emission[t, y_t] + sum_t transition[y_t, y_t+1] + end[y_n]

and has the probability of its score's exponential among all sequences (Lafferty et al., 2001; Lample et al., 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptkernels.models.text import SequenceTagger


class CRF(nn.Module):
    """Scores, normalisation and best sequence of a chain of tags.

    Args:
        num_tags: number of tags.

    Every method takes ``emissions [B, L, num_tags]`` and ``lengths``, int64 ``[B]`` of at least 1. Time is
    ``O(B L num_tags ** 2)``.

    Example:
        >>> crf = CRF(num_tags=3)
        >>> emissions, lengths = torch.randn(2, 4, 3), torch.tensor([4, 2])
        >>> tags = crf.decode(emissions, lengths)
        >>> [len(row) for row in tags]
        [4, 2]
        >>> best = torch.nn.utils.rnn.pad_sequence(tags, batch_first=True)
        >>> bool((crf.log_likelihood(emissions, best, lengths) < 0).all())
        True
    """

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags).uniform_(-0.1, 0.1))
        self.start_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.end_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))

    def score(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Of the sequences ``tags``, int64 ``[B, L]``: ``[B]``. What is beyond ``lengths`` is ignored."""
        mask = _mask(emissions, lengths)
        emitted = emissions.gather(2, tags[..., None]).squeeze(2).masked_fill(~mask, 0.0)
        moved = self.transitions[tags[:, :-1], tags[:, 1:]].masked_fill(~mask[:, 1:], 0.0)
        last = tags.gather(1, lengths[:, None] - 1).squeeze(1)
        return self.start_transitions[tags[:, 0]] + emitted.sum(1) + moved.sum(1) + self.end_transitions[last]

    def log_partition(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """Logarithm of the sum of the exponentials of all sequences' scores, ``[B]``."""
        alpha = self.start_transitions + emissions[:, 0]
        for step in range(1, emissions.size(1)):
            longer = (alpha[:, :, None] + self.transitions).logsumexp(1) + emissions[:, step]
            alpha = torch.where((step < lengths)[:, None], longer, alpha)
        return (alpha + self.end_transitions).logsumexp(1)

    def log_likelihood(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Logarithm of the probability of ``tags``, ``[B]``."""
        return self.score(emissions, tags, lengths) - self.log_partition(emissions, lengths)

    @torch.no_grad()
    def decode(self, emissions: Tensor, lengths: Tensor) -> list[Tensor]:
        """The best sequence of every row (Viterbi), int64 of its length."""
        best, came_from = self.start_transitions + emissions[:, 0], []
        for step in range(1, emissions.size(1)):
            longer, previous = (best[:, :, None] + self.transitions).max(1)
            going = (step < lengths)[:, None]
            best = torch.where(going, longer + emissions[:, step], best)
            # A row that has ended stays on its tag.
            stay = torch.arange(best.size(1), device=best.device).expand_as(previous)
            came_from.append(torch.where(going, previous, stay))
        tags = [(best + self.end_transitions).argmax(1)]
        for previous in reversed(came_from):
            tags.append(previous.gather(1, tags[-1][:, None]).squeeze(1))
        paths = torch.stack(tags[::-1], 1)
        return [path[:length] for path, length in zip(paths, lengths.tolist(), strict=True)]


def _mask(emissions: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(emissions.size(1), device=emissions.device) < lengths[:, None]


class BiLSTMCRF(nn.Module):
    """A :class:`SequenceTagger` whose tags are scored together by a :class:`CRF`.

    Args:
        vocab_size: number of words.
        embedding_dim: features of a word.
        hidden_dim: units of each direction.
        num_tags: number of tags.
        dropout: probability of dropping a feature before the emissions.

    Shape:
        ``words`` int64 ``[B, L]``, ``lengths`` int64 ``[B]``, ``tags`` int64 ``[B, L]``. Calling the model gives the
        best tags of every sentence, of its length.

    Example:
        >>> model = BiLSTMCRF(50, 8, 16, num_tags=5)
        >>> words, lengths = torch.randint(50, (2, 6)), torch.tensor([6, 3])
        >>> model.loss(words, torch.randint(5, (2, 6)), lengths).dim()
        0
        >>> [len(tags) for tags in model(words, lengths)]
        [6, 3]
    """

    def __init__(
        self, vocab_size: int, embedding_dim: int, hidden_dim: int, num_tags: int, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.tagger = SequenceTagger(vocab_size, embedding_dim, hidden_dim, num_tags, dropout=dropout)
        self.crf = CRF(num_tags)

    def loss(self, words: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Mean negative log-likelihood of the tags of a sentence."""
        likelihoods: Tensor = self.crf.log_likelihood(self.tagger(words, lengths), tags, lengths)
        return -likelihoods.mean()

    def forward(self, words: Tensor, lengths: Tensor) -> list[Tensor]:
        return self.crf.decode(self.tagger(words, lengths), lengths)
