"""Models on ptkernels.nn and on torch.nn, side by side: the same weights, the same real text, the same training."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ptkernels as ptk
from ptkernels.models import LSTMLanguageModel, SentimentAnalyzer, load_speaker_encoder

STACKS = (nn.LSTM, ptk.nn.LSTM)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The work is small, and torch's packed LSTM enters hundreds of parallel regions for it."""
    torch.set_num_threads(1)


def rows() -> list[dict[str, str]]:
    text = resources.files("ptkernels.cli.bench").joinpath("data/sentences.tsv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def tokens(text: str, most: int = 120) -> Tensor:
    """The bytes of a sentence: English and Vietnamese with one vocabulary of 256."""
    return torch.tensor(list(text.encode())[:most])


def losses(make: Callable[[Any], nn.Module], loss: Callable[[nn.Module, int], Tensor], steps: int) -> list[list[float]]:
    """Of the same training with either stack."""
    found = []
    for stack in STACKS:
        torch.manual_seed(0)
        model = make(stack)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        history = []
        for step in range(steps):
            optimizer.zero_grad()
            value = loss(model, step)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            history.append(value.item())
        found.append(history)
    return found


def assert_same_training(found: list[list[float]], tolerance: float) -> None:
    theirs, ours = found
    assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) < tolerance
    assert sum(ours[-3:]) < sum(ours[:3])


def test_language_model_trains_as_with_torch() -> None:
    sentences = [tokens(row[language]) for row in rows() for language in ("english", "vietnamese")]

    def loss(model: Any, step: int) -> Tensor:
        return model.loss(sentences[step * 12 : step * 12 + 12])

    # Dropout included: both draw the same numbers for the same packed layout.
    found = losses(lambda stack: LSTMLanguageModel(256, 32, 64, 2, dropout=0.3, lstm=stack), loss, 12)
    assert_same_training(found, 1e-4)


def test_language_model_in_pieces() -> None:
    model = LSTMLanguageModel(256, 16, 32, 2).eval()
    sequence = tokens(rows()[0]["english"])
    with torch.no_grad():
        whole, _ = model([sequence])
        state, pieces = None, []
        for piece in sequence.split(17):
            scores, state = model([piece], state)
            pieces.append(scores.data)
    torch.testing.assert_close(torch.cat(pieces), whole.data, rtol=1e-6, atol=1e-6)


def test_text_classifier_trains_as_with_torch() -> None:
    """Three classes of real sentences: declarations of rights, a web framework's messages, a shop's."""
    names = sorted({row["source"] for row in rows()})
    assert len(names) == 3
    examples = [
        (tokens(row[language], 60), names.index(row["source"]))
        for row in rows()
        for language in ("english", "vietnamese")
    ]
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()

    def loss(model: Any, step: int) -> Tensor:
        batch = [examples[index] for index in order[step % 3 * 16 : step % 3 * 16 + 16]]
        return F.cross_entropy(model([text for text, _ in batch]), torch.tensor([label for _, label in batch]))

    found = losses(lambda stack: SentimentAnalyzer(256, 24, 32, lstm=stack), loss, 15)
    assert_same_training(found, 1e-4)


# --- a pretrained network


def checkpoint() -> Path:
    """Resemblyzer's weights: from the installed package, or where RESEMBLYZER_CHECKPOINT says."""
    if given := os.environ.get("RESEMBLYZER_CHECKPOINT"):
        return Path(given)
    try:
        from importlib.metadata import files

        found = [file for file in files("Resemblyzer") or [] if file.name == "pretrained.pt"]
        return Path(str(found[0].locate()))
    except (ImportError, IndexError):
        pytest.skip("Resemblyzer is not installed (pip install --no-deps Resemblyzer)")


def speech(seconds: float, pitch: float, generator: torch.Generator) -> Tensor:
    """Mel power spectrogram ``[frames, 40]`` of a synthesised voice: gliding harmonics, three formants, breath."""
    rate, window, hop, channels = 16000, 400, 160, 40
    time = torch.arange(int(seconds * rate)) / rate
    glide = pitch * (1 + 0.05 * torch.sin(2 * math.pi * 3 * time))
    phase = 2 * math.pi * torch.cumsum(glide, 0) / rate
    wave = torch.zeros_like(time)
    for harmonic in range(1, 25):
        frequency = harmonic * pitch
        formants = sum(
            math.exp(-(((frequency - center) / width) ** 2)) for center, width in ((600, 200), (1500, 300), (2600, 400))
        )
        wave += (0.05 + formants) / harmonic * torch.sin(harmonic * phase)
    wave = wave * (0.6 + 0.4 * torch.sin(2 * math.pi * 4 * time)) + 0.01 * torch.randn(len(time), generator=generator)
    power = torch.stft(0.03 * wave, window, hop, window=torch.hann_window(window), return_complex=True).abs() ** 2
    edges = 700 * (10 ** (torch.linspace(0, 2595 * math.log10(1 + 8000 / 700), channels + 2) / 2595) - 1)
    bins = torch.linspace(0, 8000, window // 2 + 1)
    rising, falling = ((bins[:, None] - edges[i : i + channels]) for i in (0, 2))
    widths = edges.diff()
    filters = torch.minimum(rising / widths[:-1], -falling / widths[1:]).clamp(min=0)
    return power.T @ (filters * 2 / (edges[2:] - edges[:-2]))


def test_pretrained_speaker_encoder() -> None:
    path = checkpoint()
    generator = torch.Generator().manual_seed(0)
    voices = [speech(0.7 + 0.31 * index, 95 + 12 * index, generator) for index in range(8)]
    theirs, ours = (load_speaker_encoder(path, stack) for stack in STACKS)
    with torch.no_grad():
        exact = load_speaker_encoder(path, nn.LSTM).double()([voice.double() for voice in voices])
        expected, actual = theirs(voices), ours(voices)
        alone = torch.cat([ours([voice]) for voice in voices])
        rough = [model.bfloat16()([voice.bfloat16() for voice in voices]) for model in (theirs, ours)]
    error = (expected - exact).abs().max().item()
    assert (actual - exact).abs().max().item() <= 2 * error + 1e-6
    torch.testing.assert_close(alone, actual, rtol=1e-5, atol=1e-6)
    errors = [(result.double() - exact).abs().max().item() for result in rough]
    assert errors[1] <= 2 * errors[0]
    # Every voice is nearest to itself across the two precisions.
    assert torch.equal((rough[1].double() @ exact.T).argmax(1), torch.arange(len(voices)))
