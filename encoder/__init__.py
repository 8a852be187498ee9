"""Prompts to embeddings: the stacked hidden states that FLUX.2 takes as its text conditioning."""

from encoder.config import PRESETS, EncoderConfig
from encoder.encoder import Encoder
from encoder.encoding import Encoding
from encoder.engine import Engine
from encoder.errors import (
    CheckpointError,
    DeadlineExceededError,
    DeviceFailedError,
    EncoderConfigError,
    EncoderError,
    EngineClosedError,
    PromptError,
    SelfCheckError,
)
from encoder.stats import EngineStats, Priority

__all__ = [
    "PRESETS",
    "CheckpointError",
    "DeadlineExceededError",
    "DeviceFailedError",
    "Encoder",
    "EncoderConfig",
    "EncoderConfigError",
    "EncoderError",
    "Encoding",
    "Engine",
    "EngineClosedError",
    "EngineStats",
    "Priority",
    "PromptError",
    "SelfCheckError",
]
