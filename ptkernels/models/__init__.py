"""Models built from ptkernels operators."""

from __future__ import annotations

from .decoder import DecoderConfig, DecoderLM
from .decoding import generate, probabilities
from .kv_cache import KVCache
from .recurrent import LSTMLanguageModel, SentimentAnalyzer, SpeakerEncoder, load_speaker_encoder
from .sentence_encoder import SentenceEncoder, SentenceEncoderConfig, load_sentence_encoder

__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "KVCache",
    "LSTMLanguageModel",
    "SentenceEncoder",
    "SentenceEncoderConfig",
    "SentimentAnalyzer",
    "SpeakerEncoder",
    "generate",
    "load_sentence_encoder",
    "load_speaker_encoder",
    "probabilities",
]
