"""Where a model's files are.

Two layouts are read: that of FLUX.2 (`text_encoder/` and `tokenizer/` in one folder) and that of a plain checkpoint
(everything in one folder). Weights are safetensors only. From the hub only those files come that hold something needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer

from encoder.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Attributes:
        name: the folder or hub id, as it was given.
        model_dir: holds `config.json` and the safetensors files.
        tokenizer_dir: holds the tokenizer and its chat template.
        revision: commit of the hub snapshot; None for a plain folder.
        snapshot: folder of the hub snapshot; None for a plain folder.
    """

    name: str
    model_dir: Path
    tokenizer_dir: Path
    revision: str | None = None
    snapshot: Path | None = None

    def text_config(self, model_types: Collection[str] = ()) -> PreTrainedConfig:
        """Return the configuration of the language model inside.

        Args:
            model_types: those that will do; empty for all.

        Raises:
            CheckpointError: `config.json` cannot be read, or describes another family of models.
        """
        try:
            config = AutoConfig.from_pretrained(self.model_dir, trust_remote_code=False)
        except Exception as exc:  # transformers lets through whatever a broken file makes fail
            raise CheckpointError(f"{self.model_dir}: config.json cannot be used: {_reason(exc)}") from exc
        if model_types and config.model_type not in model_types:
            raise CheckpointError(
                f"{self.model_dir}: config.json says model_type {config.model_type!r}; this preset is for "
                f"{', '.join(model_types)}"
            )
        text_config: PreTrainedConfig = config.get_text_config()
        if any(getattr(each, "quantization_config", None) for each in (config, text_config)):
            raise CheckpointError(f"{self.model_dir}: quantized weights (quantization_config) are not supported")
        return text_config

    def has_random_weights(self) -> bool:
        """Whether this is the demo checkpoint of `encoder.tiny`, good for trying things out and for nothing else."""
        config = json.loads((self.model_dir / "config.json").read_text(encoding="utf-8"))
        return bool(config.get("layerstack_random_weights", False))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            CheckpointError: it cannot be read, or lacks a pad token.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_dir, trust_remote_code=False)
        except Exception as exc:  # the same
            raise CheckpointError(f"{self.tokenizer_dir}: no tokenizer can be loaded: {_reason(exc)}") from exc
        if tokenizer.pad_token_id is None:
            raise CheckpointError(f"{self.tokenizer_dir}: the tokenizer has no pad token (tokenizer_config.json)")
        return tokenizer

    def weight_files(self) -> dict[str, Path]:
        """Map every tensor's name to the safetensors file that holds it.

        Raises:
            CheckpointError: there are no safetensors files, or the index cannot be read.
        """
        index = self.model_dir / _INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {key: self.model_dir / file for key, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise CheckpointError(f"{index} is damaged: {_reason(exc)}") from exc
        single = self.model_dir / _SINGLE
        self.fetch({single})
        if not single.is_file():
            raise CheckpointError(f"{self.model_dir}: no {_SINGLE} and no {_INDEX}")
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except SafetensorError as exc:
            raise CheckpointError(f"{single} is damaged: {exc}") from exc

    def fetch(self, files: Collection[Path]) -> None:
        """Download those of `files` that are not there, if this is a snapshot of the hub.

        Raises:
            CheckpointError: the hub does not give them.
        """
        absent = sorted(file for file in files if not file.is_file())
        if self.snapshot is not None and absent:
            patterns = [file.relative_to(self.snapshot).as_posix() for file in absent]
            _download(self.name, self.revision, patterns)

    def text_files(self) -> list[Path]:
        """Return the small files that decide the numbers beside the weights."""
        return [self.model_dir / "config.json", *sorted(self.tokenizer_dir.glob("tokenizer*.json"))]


def locate(model: str | Path, revision: str | None = None, subfolder: str | None = None) -> Checkpoint:
    """Find the files of a local folder or a hub id, downloading the small ones that a hub id needs and the cache lacks.

    Args:
        model: a folder or a hub id.
        revision: branch, tag or commit of a hub id.
        subfolder: where in the folder or repository the model is.

    Raises:
        CheckpointError: the folder does not exist, is in neither layout, or the hub does not have it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _in_folder(str(model), folder / subfolder if subfolder else folder)
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{model}: no such folder, and not a hub id of the form 'owner/name'")
    inside = PurePosixPath(subfolder or "text_encoder")
    places = (inside, inside.parent / "tokenizer", inside / "text_encoder", inside / "tokenizer")
    snapshot = _download(str(model), revision, [str(place / name) for place in places for name in _TEXT_FILES])
    if subfolder is None and not (snapshot / "text_encoder").is_dir():
        snapshot = _download(str(model), revision, list(_TEXT_FILES))
    return _in_folder(str(model), snapshot / subfolder if subfolder else snapshot, snapshot)


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(f"{repository}: no such folder, and the hub does not give it: {exc}") from exc


def _in_folder(name: str, folder: Path, snapshot: Path | None = None) -> Checkpoint:
    """Recognise the layout of `folder`."""
    revision = snapshot.name if snapshot else None
    if (folder / "text_encoder").is_dir():
        found = Checkpoint(name, folder / "text_encoder", folder / "tokenizer", revision, snapshot)
    elif (folder.parent / "tokenizer").is_dir() and not any(folder.glob("tokenizer*.json")):
        found = Checkpoint(name, folder, folder.parent / "tokenizer", revision, snapshot)
    else:
        found = Checkpoint(name, folder, folder, revision, snapshot)
    if not (found.model_dir / "config.json").is_file():
        raise CheckpointError(f"{folder} is no checkpoint: neither text_encoder/config.json nor config.json is there")
    if not any(found.tokenizer_dir.glob("tokenizer*.json")):
        raise CheckpointError(f"{found.tokenizer_dir}: no tokenizer.json and no tokenizer_config.json")
    return found


def _reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"
