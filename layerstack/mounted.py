"""The model that a platform puts into a folder of the container, as Hugging Face Inference Endpoints do."""

from __future__ import annotations

from pathlib import Path

from jobs.settings import Settings


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
