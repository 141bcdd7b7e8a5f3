"""Models built from ptkernels operators."""

from __future__ import annotations

from .bert import Bert, BertClassifier, BertForMaskedLM
from .convnet import ConvNet
from .crf import CRF, BiLSTMCRF
from .darts import DARTSCell
from .decoder import DecoderConfig, DecoderLM
from .decoding import generate, probabilities
from .efficientnet import EfficientNetLite0
from .gan import Critic, ImageGenerator, PatchGAN, Pix2PixGenerator, gradient_penalty
from .graph import DynamicGraphLSTM, GatedGraphConv, GraphConv
from .image_to_image import EDSR, EDSRBlock, StyleTransferNet, UNet, gram_matrix
from .kv_cache import KVCache
from .mlp import MLP
from .recurrent import LSTMLanguageModel, SentimentAnalyzer, SpeakerEncoder, load_speaker_encoder
from .resnet import ResNet, resnet18, resnet34, resnet50
from .self_supervised import (
    BYOL,
    CPC,
    MaskedAutoencoder,
    MoCo,
    SimCLR,
    distillation_loss,
    info_nce,
    nt_xent,
    update_average,
)
from .sentence_encoder import SentenceEncoder, SentenceEncoderConfig, load_sentence_encoder
from .seq2seq import Seq2Seq
from .t5 import T5, T5Config
from .text import RestaurantReviewClassifier, SequenceTagger, TextClassifier, TourismRatingPredictor
from .vision_transformer import Swin, ViT

__all__ = [
    "BYOL",
    "CPC",
    "CRF",
    "EDSR",
    "MLP",
    "T5",
    "Bert",
    "BertClassifier",
    "BertForMaskedLM",
    "BiLSTMCRF",
    "ConvNet",
    "Critic",
    "DARTSCell",
    "DecoderConfig",
    "DecoderLM",
    "DynamicGraphLSTM",
    "EDSRBlock",
    "EfficientNetLite0",
    "GatedGraphConv",
    "GraphConv",
    "ImageGenerator",
    "KVCache",
    "LSTMLanguageModel",
    "MaskedAutoencoder",
    "MoCo",
    "PatchGAN",
    "Pix2PixGenerator",
    "ResNet",
    "RestaurantReviewClassifier",
    "SentenceEncoder",
    "SentenceEncoderConfig",
    "SentimentAnalyzer",
    "Seq2Seq",
    "SequenceTagger",
    "SimCLR",
    "SpeakerEncoder",
    "StyleTransferNet",
    "Swin",
    "T5Config",
    "TextClassifier",
    "TourismRatingPredictor",
    "UNet",
    "ViT",
    "distillation_loss",
    "generate",
    "gradient_penalty",
    "gram_matrix",
    "info_nce",
    "load_sentence_encoder",
    "load_speaker_encoder",
    "nt_xent",
    "probabilities",
    "resnet18",
    "resnet34",
    "resnet50",
    "update_average",
]
