"""Policies: the native bidirectional decoder, and how to load one."""

from .corruption import Absorbing, Corruption, Uniform
from .decoder import DecoderOutput, MaskedDecoder
from .decoder_config import MaskedDecoderConfig
from .loading import load_model
from .tokenizers import load_tokenizer, stop_token_ids

__all__ = [
    "Absorbing",
    "Corruption",
    "DecoderOutput",
    "MaskedDecoder",
    "MaskedDecoderConfig",
    "Uniform",
    "load_model",
    "load_tokenizer",
    "stop_token_ids",
]
