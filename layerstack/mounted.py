"""The model that a platform puts into a folder of the container, as Hugging Face Inference Endpoints do."""

from __future__ import annotations

from pathlib import Path

from jobs.settings import DEMO_MODEL, Settings
from layerstack.errors import LocalStackError


def model_to_serve(settings: Settings) -> str:
    """Return the mounted model, else the one that is named; the demo encoder only where none could be mounted.

    Raises:
        LocalStackError: nothing is mounted where a model should be, and none is named.
    """
    model = mounted_model(settings) or settings.model
    if model is None and settings.model_mount is not None:
        raise LocalStackError(
            f"LAYERSTACK_MODEL_MOUNT={settings.model_mount!r} holds no model: mount one there, or name one with "
            "LAYERSTACK_MODEL; 'demo' is the demo encoder, whose weights are random"
        )
    return model or DEMO_MODEL


def mounted_model(settings: Settings) -> str | None:
    """Return the folder `LAYERSTACK_MODEL_MOUNT` if it holds a model of either layout that the encoder reads.

    An endpoint always has a repository, but not always one with a model in it.
    """
    if settings.model_mount is None:
        return None
    folder = Path(settings.model_mount)
    inside = [settings.model_subfolder] if settings.model_subfolder else ["", "text_encoder"]
    holds_model = any((folder / name / "config.json").is_file() for name in inside)
    return settings.model_mount if holds_model else None
