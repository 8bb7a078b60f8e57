"""Small transformers whose attention mechanism is an argument."""

from approx_attn.models.attention_pooling import AttentionPooling
from approx_attn.models.base import SequenceModel, attention_mechanisms
from approx_attn.models.encoder_classifier import EncoderClassifier
from approx_attn.models.encoder_decoder import EncoderDecoder
from approx_attn.models.feed_forward import FeedForward, TopKFeedForward
from approx_attn.models.language_model import LanguageModel
from approx_attn.models.transformer import Transformer, TransformerBlock

__all__ = [
    "AttentionPooling",
    "EncoderClassifier",
    "EncoderDecoder",
    "FeedForward",
    "LanguageModel",
    "SequenceModel",
    "TopKFeedForward",
    "Transformer",
    "TransformerBlock",
    "attention_mechanisms",
]
