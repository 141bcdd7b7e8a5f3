"""Generation for every model that scores the next token: greedy, sampled, beam search, speculative.

A model takes part by three methods, those of :class:`Generator`; what it remembers between calls is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Tokens = Tensor | Sequence[Tensor]


class DecoderState(Protocol):
    """What a model keeps of the tokens it has seen, one row per sequence."""

    def reorder(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was; ``index`` may be longer than the batch."""

    def crop(self, lengths: Tensor) -> None:
        """Forget all but the first ``lengths[i]`` tokens of row ``i`` (only speculative decoding asks for it)."""


class Generator(Protocol):
    """A model that :func:`generate` can drive."""

    def new_state(self, batch_size: int, capacity: int) -> Any:
        """An empty state with room for ``capacity`` tokens a row."""

    def step(self, tokens: Tensor, state: Any, lengths: Tensor | None = None) -> Tensor:
        """Take in ``tokens [B, n]``, of which row ``i`` has ``lengths[i]``; the scores ``[B, V]`` after its last."""

    def score(self, tokens: Tensor, state: Any) -> Tensor:
        """Take in ``tokens [B, n]``; the scores ``[B, n, V]`` after every one (only speculative decoding asks)."""


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The distribution to draw the next token from, ``[..., V]`` in float32 or wider.

    Args:
        logits: ``[..., V]``, any floating dtype.
        temperature: divides the logits; 0 puts all probability on the best token.
        top_k: keep the ``top_k`` best tokens (and those equal to the last of them). Default: all.
        top_p: keep the smallest set of best tokens whose probabilities, after ``top_k``, sum to at least ``top_p``
            (nucleus; Holtzman et al., 2020, https://arxiv.org/abs/1904.09751). Default: all.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> probabilities(logits, top_k=2)
        tensor([0.7311, 0.2689, 0.0000, 0.0000])
        >>> probabilities(logits, temperature=0.0)
        tensor([1., 0., 0., 0.])
    """
    _check_sampling(temperature, top_k, top_p)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0.0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays as long as those before it do not reach top_p: the best one always does.
        dropped = ordered.cumsum(-1) - ordered >= top_p
        probs = probs.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature >= 0.0:
        raise ValueError(f"generate: temperature: got {temperature}, expected at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k: got {top_k}, expected at least 1 or None")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p: got {top_p}, expected 0 < top_p <= 1 or None")


class _Sampling(NamedTuple):
    temperature: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | None

    def probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.temperature, self.top_k, self.top_p)

    def draw(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1) if self.temperature == 0.0 else _draw(self.probabilities(logits), self.generator)


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """One token of every distribution, ``[...]``."""
    return torch.multinomial(probs.flatten(0, -2), 1, generator=generator).view(probs.shape[:-1])


def _padded(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Prompts as one tensor padded behind, and their lengths."""
    if isinstance(tokens, Tensor):
        if tokens.dim() != 2 or tokens.size(1) == 0:
            raise ValueError(f"generate: tokens: got shape {list(tokens.shape)}, expected [batch, length >= 1]")
        return tokens, torch.full((tokens.size(0),), tokens.size(1), device=tokens.device)
    if not tokens or any(row.dim() != 1 or row.numel() == 0 for row in tokens):
        raise ValueError("generate: tokens: got no rows, or an empty one, expected one-dimensional tensors of tokens")
    lengths = torch.tensor([row.numel() for row in tokens], device=tokens[0].device)
    return torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True), lengths


@torch.no_grad()
def generate(
    model: Generator,
    tokens: Tokens,
    max_new_tokens: int,
    *,
    state: Any = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    draft: Generator | None = None,
    num_draft_tokens: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue every prompt by up to ``max_new_tokens`` tokens.

    Args:
        model: in evaluation mode, unless its dropout is wanted.
        tokens: prompts, int64 ``[B, L]``, or one tensor per prompt where they are of unequal length. For an
            encoder-decoder model, the tokens its answers start with.
        max_new_tokens: most tokens to add to each.
        state: what the model already knows, such as an encoded source; it is used up. Default: nothing.
        do_sample: draw from :func:`probabilities`; otherwise take the best token.
        temperature, top_k, top_p: of :func:`probabilities`, with ``do_sample``.
        num_beams: sequences kept per prompt by a beam search; the best finished one is returned.
        length_penalty: a finished beam is ranked by its log-probability / length ** length_penalty.
        eos_token_id: the token that ends a sequence. Default: none does.
        pad_token_id: what fills rows that ended early. Default: ``eos_token_id``.
        draft: a small model of the same vocabulary that proposes tokens, which ``model`` then verifies all at once
            (Leviathan et al., 2023, https://arxiv.org/abs/2211.17192). The result is distributed as without; without
            ``do_sample`` it is the same tokens.
        num_draft_tokens: how many it proposes at a time.
        generator: source of random numbers. Default: torch's.

    Returns:
        The new tokens ``[B, n]``, without the prompts; ``n <= max_new_tokens`` is that of the longest row.

    Raises:
        ValueError: an argument is out of its range, or two of them exclude each other.

    Example:
        >>> from ptkernels.models import DecoderConfig, DecoderLM
        >>> model = DecoderLM(DecoderConfig(vocab_size=50, hidden_size=16, num_layers=1, num_heads=2)).eval()
        >>> prompts = [torch.tensor([3, 1, 4, 1, 5]), torch.tensor([9, 2])]
        >>> generate(model, prompts, 6).shape
        torch.Size([2, 6])
        >>> generate(model, prompts, 6, num_beams=3, eos_token_id=0).shape[0]
        2
    """
    _check_sampling(temperature, top_k, top_p)
    if num_beams > 1 and (do_sample or draft is not None):
        raise ValueError(f"generate: num_beams: got {num_beams} with do_sample or draft, expected 1")
    for name, number in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if number < 1:
            raise ValueError(f"generate: {name}: got {number}, expected at least 1")
    prompt, lengths = _padded(tokens)
    # Speculation runs ahead by one round, for rows that have already run ahead of their end by another.
    room = prompt.size(1) + max_new_tokens + (2 * (num_draft_tokens + 1) if draft is not None else 0)
    state = model.new_state(prompt.size(0), room) if state is None else state
    end = -1 if eos_token_id is None else eos_token_id
    pad = max(end, 0) if pad_token_id is None else pad_token_id
    if num_beams > 1:
        return _beam_search(model, prompt, lengths, state, max_new_tokens, num_beams, length_penalty, end, pad)
    sampling = _Sampling(temperature if do_sample else 0.0, top_k, top_p, generator)
    if draft is not None:
        if num_draft_tokens < 1:
            raise ValueError(f"generate: num_draft_tokens: got {num_draft_tokens}, expected at least 1")
        known = (state, draft.new_state(prompt.size(0), room))
        rows = _speculate((model, draft), prompt, lengths, known, max_new_tokens, num_draft_tokens, sampling, end)
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=prompt.device)
    return _one_by_one(model, prompt, lengths, state, max_new_tokens, sampling, end, pad)


def _one_by_one(
    model: Generator,
    prompt: Tensor,
    lengths: Tensor,
    state: Any,
    most: int,
    sampling: _Sampling,
    end: int,
    pad: int,
) -> Tensor:
    logits = model.step(prompt, state, lengths)
    done = torch.zeros(prompt.size(0), dtype=torch.bool, device=prompt.device)
    chosen: list[Tensor] = []
    while True:
        token = sampling.draw(logits).masked_fill(done, pad)
        chosen.append(token)
        done = done | (token == end)
        if len(chosen) == most or bool(done.all()):
            return torch.stack(chosen, 1)
        logits = model.step(token[:, None], state)


def _beam_search(
    model: Generator,
    prompt: Tensor,
    lengths: Tensor,
    state: Any,
    most: int,
    beams: int,
    penalty: float,
    end: int,
    pad: int,
) -> Tensor:
    """Every row keeps ``beams`` live sequences and, apart from them, the ``beams`` best that have ended."""
    batch, device = prompt.size(0), prompt.device
    log_probs = model.step(prompt, state, lengths).float().log_softmax(-1)
    vocab = log_probs.size(-1)
    state.reorder(torch.arange(batch, device=device).repeat_interleave(beams))
    log_probs = log_probs.repeat_interleave(beams, 0)
    first = torch.arange(batch, device=device)[:, None] * beams
    live = torch.zeros(batch, beams, 0, dtype=torch.int64, device=device)
    # All beams of a row are equal at first: only one of them counts.
    scores = torch.zeros(batch, beams, device=device)
    scores[:, 1:] = -torch.inf
    ended = torch.full((batch, beams, most), pad, device=device)
    ended_scores = torch.full((batch, beams), -torch.inf, device=device)
    ended_lengths = torch.full((batch, beams), most, device=device)
    step = 0
    while True:
        step += 1
        total = (scores[:, :, None] + log_probs.view(batch, beams, vocab)).flatten(1)
        # Twice as many as needed: should all of the first half end, as many go on. Of those that end, only the first
        # half counts.
        best, index = total.topk(min(2 * beams, total.size(1)))
        token = index % vocab
        paths = torch.cat([_rows(live, index // vocab), token[..., None]], 2)
        ends = token == end if step < most else torch.ones_like(token, dtype=torch.bool)
        ends[:, beams:] = False
        ranked = (best / step**penalty).masked_fill(~ends, -torch.inf)
        ended_scores, keep = torch.cat([ended_scores, ranked], 1).topk(beams)
        padding = torch.full((*paths.shape[:2], most - step), pad, device=device)
        ended = _rows(torch.cat([ended, torch.cat([paths, padding], 2)], 1), keep)
        ended_lengths = torch.cat([ended_lengths, torch.full_like(token, step)], 1).gather(1, keep)
        scores, keep = best.masked_fill(token == end, -torch.inf).topk(beams)
        # Log-probabilities only fall; a longer sequence is at best divided by the length it can still reach.
        reachable = scores[:, 0] / (most if penalty > 0 else step) ** penalty
        if step == most or bool((ended_scores[:, 0] >= reachable).all()):
            return ended[:, 0, : int(ended_lengths[:, 0].max())]
        live, token = _rows(paths, keep), token.gather(1, keep)
        state.reorder((first + (index // vocab).gather(1, keep)).flatten())
        log_probs = model.step(token.view(-1, 1), state).float().log_softmax(-1)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """``tensor[b, index[b, i]]`` of ``tensor [B, K, n]``."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.size(2)))


def _speculate(
    models: tuple[Generator, Generator],
    prompt: Tensor,
    lengths: Tensor,
    states: tuple[Any, Any],
    most: int,
    proposed: int,
    sampling: _Sampling,
    end: int,
) -> list[list[int]]:
    """Both states hold every token of a row but the last, which is what the next round begins with."""
    (model, draft), (state, draft_state) = models, states
    token = sampling.draw(model.step(prompt, state, lengths))
    draft.step(prompt, draft_state, lengths)
    rows: list[list[int]] = [[int(first)] for first in token]
    while True:
        going = torch.tensor([len(row) < most and row[-1] != end for row in rows], device=prompt.device)
        if not bool(going.any()):
            return [row[:most] for row in rows]
        candidates, guesses = [token], []
        for _ in range(proposed):
            guess = sampling.probabilities(draft.step(candidates[-1][:, None], draft_state))
            guesses.append(guess)
            candidates.append(_draw(guess, sampling.generator))
        draft.step(candidates[-1][:, None], draft_state)
        chunk, q = torch.stack(candidates, 1), torch.stack(guesses, 1)
        p = sampling.probabilities(model.score(chunk, state))
        accepted, token = _verify(p, q, chunk[:, 1:], sampling.generator)
        for index, row in enumerate(rows):
            if going[index]:
                row.extend([*chunk[index, 1 : 1 + int(accepted[index])].tolist(), int(token[index])])
                if end in row:
                    del row[row.index(end) + 1 :]
        # The last token of a row is in neither state yet; a row that has ended stays where it was.
        lengths = lengths + torch.where(going, 1 + accepted, 0)
        state.crop(lengths)
        draft_state.crop(lengths)


def _verify(p: Tensor, q: Tensor, tokens: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """How many proposed tokens ``[B, n]`` stand, and the token that follows them, so that all are distributed as ``p``.

    ``p [B, n + 1, V]`` is what the model would draw from, ``q [B, n, V]`` what the tokens were drawn from. A token
    stands with probability ``min(1, p / q)``; in place of the first that does not, one is drawn from ``max(p - q, 0)``.
    """
    picked = tokens[..., None]
    chance = p[:, :-1].gather(2, picked).squeeze(2) / q.gather(2, picked).squeeze(2)
    drawn = torch.rand(chance.shape, generator=generator, device=chance.device, dtype=chance.dtype)
    accepted = (drawn < chance).long().cumprod(1).sum(1)
    # Behind the last proposal nothing was rejected: q counts as 0 there.
    q = torch.cat([q, torch.zeros_like(q[:, :1])], 1)
    at = accepted[:, None, None].expand(-1, 1, p.size(2))
    left = (p.gather(1, at) - q.gather(1, at)).squeeze(1).clamp(min=0.0)
    # p equal to q up to rounding leaves nothing, and is never rejected but by rounding.
    left = torch.where(left.sum(1, keepdim=True) > 0, left, p.gather(1, at).squeeze(1))
    return accepted, _draw(left, generator)
