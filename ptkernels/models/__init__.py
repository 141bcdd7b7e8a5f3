"""Models built from ptkernels operators."""

from __future__ import annotations

from .sentence_encoder import SentenceEncoder, SentenceEncoderConfig, load_sentence_encoder

__all__ = ["SentenceEncoder", "SentenceEncoderConfig", "load_sentence_encoder"]
