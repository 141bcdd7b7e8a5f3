"""Models built from ptkernels operators."""

from __future__ import annotations

from .recurrent import LSTMLanguageModel, SentimentAnalyzer, SpeakerEncoder, load_speaker_encoder
from .sentence_encoder import SentenceEncoder, SentenceEncoderConfig, load_sentence_encoder

__all__ = [
    "LSTMLanguageModel",
    "SentenceEncoder",
    "SentenceEncoderConfig",
    "SentimentAnalyzer",
    "SpeakerEncoder",
    "load_sentence_encoder",
    "load_speaker_encoder",
]
