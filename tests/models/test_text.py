"""Classifiers, taggers, the random field, sequences to sequences, graphs: torch's numbers, brute force, learning."""

from __future__ import annotations

import csv
import itertools
from importlib import resources
from typing import Any

import learning
import pytest
import torch
from as_torch import assert_as_torch, assert_state_round_trip
from torch import Tensor, nn
from torch.nn import functional as F

import ptkernels as ptk
from ptkernels.models import (
    CRF,
    MLP,
    BiLSTMCRF,
    DynamicGraphLSTM,
    GatedGraphConv,
    GraphConv,
    LSTMLanguageModel,
    RestaurantReviewClassifier,
    SentimentAnalyzer,
    Seq2Seq,
    SequenceTagger,
    TextClassifier,
    TourismRatingPredictor,
    generate,
)

LENGTHS = torch.tensor([3, 7, 1, 5])
EDGES = torch.tensor([[0, 1, 2, 3, 3, 0], [1, 2, 0, 0, 1, 4]])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def words(vocab: int = 30) -> Tensor:
    return torch.randint(1, vocab, (4, 7))


def sentences_of_words() -> list[Tensor]:
    return [row[:length] for row, length in zip(words(), LENGTHS, strict=True)]


def spelling() -> Tensor:
    """Characters of words of one to five, none where a sentence is padded."""
    found = torch.randint(1, 20, (4, 7, 5)) * (torch.arange(5) < torch.randint(1, 6, (4, 7, 1)))
    return found * (torch.arange(7) < LENGTHS[:, None])[..., None]


class Dynamic(nn.Module):
    """Graphs as one tensor over time, so that it has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.model = DynamicGraphLSTM(6, 8)

    def forward(self, steps: Tensor) -> Tensor:
        return self.model([(x, EDGES) for x in steps])


MODELS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "TextClassifier": (lambda: TextClassifier(30, 6, 8, 3), (words(), LENGTHS)),
    "TextClassifier, full": (lambda: TextClassifier(30, 6, 8, 3), (words(),)),
    "RestaurantReviewClassifier": (lambda: RestaurantReviewClassifier(30, 6, 8), (words(), LENGTHS)),
    "TourismRatingPredictor": (lambda: TourismRatingPredictor(30, 6, 8), (words(), LENGTHS)),
    "SequenceTagger": (lambda: SequenceTagger(30, 6, 8, 5), (words(), LENGTHS)),
    "SequenceTagger, spelled": (lambda: SequenceTagger(30, 6, 8, 5, 20, 4), (words(), LENGTHS, spelling())),
    **{
        f"SequenceTagger, {how}": (lambda how=how: SequenceTagger(30, 6, 8, 5, combine=how), (words(), LENGTHS))
        for how in ("add", "gated", "attention")
    },
    "SentimentAnalyzer": (lambda: SentimentAnalyzer(30, 6, 16), (sentences_of_words(),)),
    "Seq2Seq": (lambda: Seq2Seq(30, 20, 6, 8, 2), (words(), words(20), LENGTHS)),
    "DynamicGraphLSTM": (Dynamic, (torch.randn(4, 5, 6),)),
    "GatedGraphConv": (lambda: GatedGraphConv(8, 3), (torch.randn(5, 6), EDGES, torch.rand(6))),
    "MLP": (MLP, (torch.rand(4, 50),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_same_as_torch(name: str) -> None:
    make, inputs = MODELS[name]
    model = make()
    assert_as_torch(model, *inputs)
    assert_state_round_trip(model, make(), *inputs)


# --- classifiers on real sentences


def sentences(most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of English (0) and Vietnamese (1) sentences, their lengths, and which is which."""
    text = resources.files("ptkernels.cli.bench").joinpath("data/sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))[:40:2]
    texts = [torch.tensor(list(row[name].encode())[:most]) for row in rows for name in ("english", "vietnamese")]
    lengths = torch.tensor([len(text) for text in texts])
    return nn.utils.rnn.pad_sequence(texts, batch_first=True), lengths, torch.arange(len(texts)) % 2


def learn(model: nn.Module, loss: Any, steps: int, lr: float = 1e-2) -> list[float]:
    return learning.learn(torch.optim.Adam(model.parameters(), lr), loss, steps, clip=1.0)


@pytest.mark.parametrize(
    "make", [lambda: TextClassifier(256, 16, 16, 2), lambda: RestaurantReviewClassifier(256, 16, 32, 2)]
)
def test_classifiers_tell_languages(make: Any) -> None:
    tokens, lengths, labels = sentences(24)
    model = make()
    losses = learn(model, lambda: F.cross_entropy(model(tokens, lengths), labels), 20)
    assert losses[-1] < 0.5 * losses[0]


def test_two_tasks_at_once() -> None:
    tokens, lengths, labels = sentences(24)
    ratings = 1.0 + lengths / 8
    model = TourismRatingPredictor(256, 16, 32)
    losses = learn(model, lambda: model.loss(tokens, ratings, labels, lengths), 20)
    assert losses[-1] < 0.5 * losses[0]


def test_pretrained_embeddings_are_taken_over() -> None:
    table = torch.randn(30, 6)
    model = TextClassifier(30, 6, 8, 3, pretrained_embeddings=table)
    assert torch.equal(model.embedding.weight, table)
    assert model.embedding.weight.requires_grad


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    model = SequenceTagger(30, 6, 8, 5, 20, 4).eval()
    ids, characters = words(), spelling()
    expected = model(ids, LENGTHS, characters)
    inside = torch.arange(7) < LENGTHS[:, None]
    ids[~inside] = 29
    assert torch.equal(model(ids, LENGTHS, characters)[inside], expected[inside])
    with pytest.raises(ValueError, match="characters: got none, expected some"):
        model(ids, LENGTHS)
    with pytest.raises(ValueError, match="characters: got some, expected none"):
        SequenceTagger(30, 6, 8, 5)(ids, LENGTHS, characters)
    with pytest.raises(ValueError, match="how: got 'mean', expected one of concat, add, gated, attention"):
        SequenceTagger(30, 6, 8, 5, combine="mean")


# --- the conditional random field


def all_scores(crf: CRF, emissions: Tensor, length: int) -> dict[tuple[int, ...], Tensor]:
    scores = {}
    for tags in itertools.product(range(emissions.size(1)), repeat=length):
        score = crf.start_transitions[tags[0]] + crf.end_transitions[tags[-1]]
        score = score + sum(emissions[step, tag] for step, tag in enumerate(tags))
        scores[tags] = score + sum(crf.transitions[pair] for pair in itertools.pairwise(tags))
    return scores


def test_partition_score_and_best_sequence_are_those_of_brute_force() -> None:
    crf = CRF(3).double()
    nn.init.normal_(crf.transitions)
    emissions, lengths = torch.randn(4, 5, 3, dtype=torch.float64), torch.tensor([5, 1, 3, 4])
    tags = torch.randint(3, (4, 5))
    partition, score = crf.log_partition(emissions, lengths), crf.score(emissions, tags, lengths)
    best = crf.decode(emissions, lengths)
    for row, length in enumerate(lengths.tolist()):
        scores = all_scores(crf, emissions[row], length)
        torch.testing.assert_close(partition[row], torch.stack(list(scores.values())).logsumexp(0))
        torch.testing.assert_close(score[row], scores[tuple(tags[row, :length].tolist())])
        assert tuple(best[row].tolist()) == max(scores, key=lambda key: scores[key].item())


def test_gradient_of_the_field() -> None:
    crf = CRF(3).double()
    emissions = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    tags, lengths = torch.randint(3, (2, 4)), torch.tensor([4, 2])
    assert torch.autograd.gradcheck(lambda x: crf.log_likelihood(x, tags, lengths), (emissions,))


def test_tagger_learns_a_grammar_that_words_alone_do_not_tell() -> None:
    """B starts an entity, I goes on with one, O is outside: the same word is B or I by what stands before it."""
    ids = torch.randint(1, 12, (16, 8))
    lengths = torch.randint(4, 9, (16,))
    inside = ids >= 8
    before = F.pad(inside[:, :-1], (1, 0))
    tags = torch.where(inside, torch.where(before, 2, 1), 0)
    model = BiLSTMCRF(12, 12, 24, 3, dropout=0.0)
    losses = learn(model, lambda: model.loss(ids, tags, lengths), 25, 2e-2)
    assert losses[-1] < 0.2 * losses[0]
    found = model.eval()(ids, lengths)
    assert [len(row) for row in found] == lengths.tolist()
    wrong = sum(int((row != tags[index, : len(row)]).sum()) for index, row in enumerate(found))
    assert wrong <= 0.05 * int(lengths.sum())


# --- generation by recurrent models


def test_seq2seq_learns_to_reverse() -> None:
    source = torch.randint(1, 8, (32, 4))
    answer = source.flip(1)
    model = Seq2Seq(8, 8, 16, 32)
    losses = learn(model, lambda: model.loss(source, answer), 60, 1e-2)
    assert losses[-1] < 0.3 * losses[0]
    model.eval()
    start = torch.zeros(32, 1, dtype=torch.int64)
    found = generate(model, start, 4, state=model.start(source))
    assert (found == answer).float().mean() > 0.8


@torch.no_grad()
def test_seq2seq_decodes_every_way() -> None:
    model = Seq2Seq(30, 12, 8, 16).eval()
    for parameter in model.parameters():
        parameter.mul_(2.0)
    source, start = words(), torch.zeros(4, 1, dtype=torch.int64)

    def answers(**options: Any) -> Tensor:
        return generate(model, start, 5, state=model.start(source, LENGTHS), **options)

    greedy = answers()
    for row in range(4):
        target = start[row : row + 1]
        for _ in range(5):
            scores = model(source[row : row + 1, : LENGTHS[row]], target)
            target = torch.cat([target, scores[:, -1:].argmax(-1)], 1)
        assert torch.equal(target[0, 1:], greedy[row])
    assert torch.equal(answers(do_sample=True, top_k=1), greedy)
    assert torch.equal(answers(do_sample=True, top_p=1e-6), greedy)
    scores = [log_likelihood(model, source, found) for found in (greedy, answers(num_beams=8))]
    assert bool((scores[1] >= scores[0] - 1e-5).all())
    with pytest.raises(ValueError, match="draft: got one, expected None"):
        answers(draft=LSTMLanguageModel(12, 4, 8, 1).eval())


def log_likelihood(model: Seq2Seq, source: Tensor, answer: Tensor) -> Tensor:
    scores = model(source, F.pad(answer[:, :-1], (1, 0)), LENGTHS).log_softmax(-1)
    return scores.gather(2, answer[..., None]).sum((1, 2))


@torch.no_grad()
def test_language_model_generates() -> None:
    model = LSTMLanguageModel(12, 8, 16, 2).eval()
    prompts = [torch.tensor([3, 1, 4]), torch.tensor([7])]
    found = generate(model, prompts, 6)
    for prompt, row in zip(prompts, found, strict=True):
        tokens = prompt
        for _ in range(6):
            tokens = torch.cat([tokens, model([tokens])[0].data[-1:].argmax(-1)])
        assert torch.equal(tokens[len(prompt) :], row)
    assert generate(model, prompts, 6, num_beams=4, eos_token_id=0).shape[0] == 2
    with pytest.raises(ValueError, match="draft: got one, expected None"):
        generate(model, prompts, 6, draft=model)


# --- graphs


def test_graph_convolution_is_the_dense_formula() -> None:
    model, x = GraphConv(6, 4), torch.randn(5, 6)
    adjacency = torch.eye(5)
    adjacency[EDGES[1], EDGES[0]] += 1
    scale = adjacency.sum(1).rsqrt()
    expected = scale[:, None] * adjacency * scale @ x @ model.linear.weight.T + model.bias
    torch.testing.assert_close(model(x, EDGES), expected)
    with pytest.raises(ValueError, match=r"GatedGraphConv: x: got shape \[5, 6\], expected \[N, F\] with F <= 4"):
        GatedGraphConv(4, 1)(x, EDGES)


def test_graph_models_learn() -> None:
    steps = torch.rand(4, 5, 6)
    model = Dynamic()
    losses = learn(model, lambda: F.mse_loss(model(steps[:-1]), steps[-1]), 20)
    assert losses[-1] < 0.7 * losses[0]
    gated, labels = GatedGraphConv(8, 2), torch.tensor([0, 1, 2, 3, 0])
    losses = learn(gated, lambda: F.cross_entropy(gated(steps[0], EDGES), labels), 20)
    assert losses[-1] < 0.7 * losses[0]


# --- the smallest network


def test_small_network_keeps_its_answers_quantized() -> None:
    """Trained on three blobs; no_grad gives no grad_fn; eight bits change no answer."""
    centers = torch.randn(3, 50)
    x = (centers[:, None] + 0.5 * torch.randn(3, 20, 50)).flatten(0, 1)
    labels = torch.arange(3).repeat_interleave(20)
    model = MLP()
    learn(model, lambda: F.cross_entropy(model(x), labels), 20)
    assert model(x).grad_fn is not None
    with torch.no_grad():
        scores = model(x)
        assert scores.grad_fn is None
        torch.testing.assert_close(scores.softmax(1).sum(1), torch.ones(60))
        best = scores.argmax(1)
        assert (best == labels).float().mean() > 0.95
        for scheme in ("int8_dynamic", "int8_weight_only"):
            smaller = MLP()
            smaller.load_state_dict(model.state_dict())
            ptk.nn.quantize_(smaller, scheme)
            assert torch.equal(smaller(x).argmax(1), best)
