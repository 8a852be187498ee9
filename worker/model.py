"""The encoder that the settings ask for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

from encoder import Encoder, EncoderConfig, EncoderConfigError
from encoder.encoder import Attention
from jobs.errors import SettingsError
from jobs.settings import DEMO_MODEL, Settings
from jobs.tensors import DtypeName

logger = logging.getLogger(__name__)


def check_settings(settings: Settings) -> None:
    """Find out whether preset, dtype and attention are some that there are, before anything is read or downloaded.

    Raises:
        EncoderConfigError: one of them is not.
    """
    EncoderConfig.preset(settings.preset)
    for name, value, known in (
        ("dtype", settings.dtype, get_args(DtypeName)),
        ("attention", settings.attention, get_args(Attention)),
    ):
        if value is not None and value not in known:
            raise EncoderConfigError(f"{name} {value!r} is not one of {', '.join(known)}")


def load_encoder(settings: Settings) -> Encoder:
    """Load the model of the settings; the demo checkpoint is made first if it is not there.

    Raises:
        SettingsError: no model is named.
        EncoderError: it cannot be loaded; the message says why.
        OSError: the demo checkpoint cannot be written.
    """
    if settings.model is None:
        raise SettingsError("LAYERSTACK_MODEL is not set: name a folder or a hub id, or 'demo'")
    check_settings(settings)
    return Encoder.load(
        _demo(settings) if settings.model == DEMO_MODEL else settings.model,
        settings.preset,
        revision=settings.model_revision,
        subfolder=settings.model_subfolder,
        device=settings.device,
        device_map=settings.device_map,
        dtype=settings.dtype,
        attention=settings.attention,
        token_budget=settings.token_budget,
        deterministic=settings.deterministic,
    )


def _demo(settings: Settings) -> Path:
    """Return the demo checkpoint's folder, with the checkpoint in it."""
    from encoder import tiny  # noqa: PLC0415 - needs the real vocabulary's package, which only the demo does

    family: tiny.Family = "qwen3" if "qwen3" in EncoderConfig.preset(settings.preset).model_types else "mistral3"
    folder = settings.local_folder / f"demo-encoder-{family}"
    if not folder.is_dir():
        logger.info("making the demo checkpoint in %s", folder)
        try:
            tiny.write(folder, family=family)
        except OSError:
            if not folder.is_dir():  # else another worker was faster
                raise
    return folder
