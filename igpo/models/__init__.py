"""Policies: the native bidirectional decoder, and how to load one."""

from .decoder import DecoderOutput, MaskedDecoder
from .decoder_config import MaskedDecoderConfig
from .loading import load_model

__all__ = ["DecoderOutput", "MaskedDecoder", "MaskedDecoderConfig", "load_model"]
