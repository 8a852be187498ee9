"""Prompts to embeddings: the stacked hidden states that FLUX.2 takes as its text conditioning."""

from encoder.config import PRESETS, EncoderConfig
from encoder.encoder import Encoder
from encoder.encoding import Encoding
from encoder.errors import CheckpointError, ConstantRowsError, EncoderConfigError, EncoderError, PromptError

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConstantRowsError",
    "Encoder",
    "EncoderConfig",
    "EncoderConfigError",
    "EncoderError",
    "Encoding",
    "PromptError",
]
