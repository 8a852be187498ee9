"""Where a model's files are, and how the layers that are needed get from there to the device.

Two layouts are read: that of FLUX.2-dev (`text_encoder/` and `tokenizer/` in one folder) and that of a plain Mistral-3
checkpoint (everything in one folder). Weights are safetensors only. Of a checkpoint of 40 layers, only the embedding
and the layers up to the last one asked for are read: 17.3B of Mistral-Small-3's 24B parameters for layer 30.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from encoder.errors import CheckpointError, EncoderConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FLUX2_FILES = ["text_encoder/*.json", "text_encoder/*.safetensors", "tokenizer/*"]
_PLAIN_FILES = ["*.json", "*.jinja", "model*.safetensors"]
_MODEL_TYPES = ("mistral3", "mistral")
_EMBEDDING = "embed_tokens.weight"
_WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_AUTO_MODEL: Any = AutoModel  # its methods carry no annotations


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model.

    Attributes:
        name: the folder or hub id, as it was given.
        model_dir: holds `config.json` and the safetensors files.
        tokenizer_dir: holds the tokenizer and its chat template.
        revision: commit of the hub snapshot; None for a plain folder.
    """

    name: str
    model_dir: Path
    tokenizer_dir: Path
    revision: str | None = None

    def text_config(self) -> PreTrainedConfig:
        """Return the configuration of the language model inside.

        Raises:
            CheckpointError: `config.json` cannot be read, or describes another family of models.
        """
        try:
            config = AutoConfig.from_pretrained(self.model_dir, trust_remote_code=False)
        except Exception as exc:  # transformers lets through whatever a broken file makes fail
            raise CheckpointError(f"{self.model_dir}: config.json cannot be used: {_reason(exc)}") from exc
        if config.model_type not in _MODEL_TYPES:
            raise CheckpointError(
                f"{self.model_dir} is no Mistral-3 checkpoint: config.json says model_type {config.model_type!r}, "
                f"not one of {', '.join(_MODEL_TYPES)}"
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
            CheckpointError: it cannot be read, or lacks a chat template or a pad token.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_dir, trust_remote_code=False)
        except Exception as exc:  # the same
            raise CheckpointError(f"{self.tokenizer_dir}: no tokenizer can be loaded: {_reason(exc)}") from exc
        if tokenizer.chat_template is None:
            raise CheckpointError(f"{self.tokenizer_dir}: the tokenizer has no chat template (chat_template.jinja)")
        if tokenizer.pad_token_id is None:
            raise CheckpointError(f"{self.tokenizer_dir}: the tokenizer has no pad token (tokenizer_config.json)")
        return tokenizer

    def weight_files(self) -> dict[str, Path]:
        """Map every tensor's name to the safetensors file that holds it.

        Raises:
            CheckpointError: there are no safetensors files, or the index cannot be read.
        """
        index = self.model_dir / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                return {key: self.model_dir / file for key, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as exc:
                raise CheckpointError(f"{index} is damaged: {_reason(exc)}") from exc
        single = self.model_dir / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(f"{self.model_dir}: no model.safetensors and no {index.name}")
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except SafetensorError as exc:
            raise CheckpointError(f"{single} is damaged: {exc}") from exc

    def digest(self) -> str:
        """Hash the weights, the configuration and the tokenizer; equal for a folder and a hub snapshot of the same.

        Files of the Hugging Face cache are named by their SHA-256, so they are not read again.
        """
        weights = sorted({path for path in self.weight_files().values() if path.is_file()})
        texts = [self.model_dir / "config.json", *sorted(self.tokenizer_dir.glob("tokenizer*.json"))]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_sha256, [*texts, *weights]))
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def locate(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Find the files of a local folder or a hub id, downloading what a hub id needs and the cache lacks.

    Raises:
        CheckpointError: the folder does not exist, is in neither layout, or the hub does not have it.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return _in_folder(str(model), folder)
    if not _HUB_ID.fullmatch(str(model)):
        raise CheckpointError(f"{model}: no such folder, and not a hub id of the form 'owner/name'")
    try:
        snapshot = Path(snapshot_download(str(model), revision=revision, allow_patterns=_FLUX2_FILES))
        if not (snapshot / "text_encoder").is_dir():
            snapshot = Path(snapshot_download(str(model), revision=revision, allow_patterns=_PLAIN_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(f"{model}: no such folder, and the hub does not give it: {exc}") from exc
    return _in_folder(str(model), snapshot, revision=snapshot.name)


def load_trunk(
    checkpoint: Checkpoint, num_layers: int, *, device: torch.device, dtype: torch.dtype, attention: str
) -> nn.Module:
    """Build the embedding and the first `num_layers` decoder layers on `device`, reading nothing else.

    The final norm is left out on purpose: `hidden_states[k]` of an inner layer is that layer's raw output.

    Raises:
        CheckpointError: the model has too few layers, or tensors are missing, quantized or of the wrong shape.
        EncoderConfigError: `attention` is not available.
    """
    config = checkpoint.text_config()
    if config.num_hidden_layers <= num_layers:
        # transformers puts the final norm on its last hidden state, so that one is no layer's raw output.
        raise CheckpointError(
            f"{checkpoint.model_dir}: layer {num_layers} is asked for; the model has {config.num_hidden_layers}, "
            "of which the last cannot be taken"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    try:
        with init_empty_weights(include_buffers=False):
            trunk = _AUTO_MODEL.from_config(config, attn_implementation=attention, dtype=dtype)
    except (ImportError, ValueError) as exc:
        raise EncoderConfigError(f"attention {attention!r} cannot be used: {_reason(exc)}") from exc
    trunk.norm = nn.Identity()
    _read_parameters(trunk, checkpoint, device, dtype)
    loaded: nn.Module = trunk.to(device).eval().requires_grad_(requires_grad=False)
    return loaded


def _read_parameters(trunk: nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Read each parameter of `trunk` from its file, straight to `device`."""
    files = checkpoint.weight_files()
    # Published: language_model.model.*, saved again: model.language_model.*, text only: model.*
    prefixes = [key.removesuffix(_EMBEDDING) for key in files if key.endswith(_EMBEDDING)]
    if len(prefixes) != 1:
        raise CheckpointError(f"{checkpoint.model_dir}: no single tensor '...{_EMBEDDING}' among {len(files)} tensors")
    names = {name: prefixes[0] + name for name, _ in trunk.named_parameters()}
    if absent := sorted(key for key in names.values() if key not in files):
        raise CheckpointError(f"{checkpoint.model_dir}: {len(absent)} tensors are missing, among them {absent[:3]}")
    if absent := sorted({files[key].name for key in names.values() if not files[key].is_file()}):
        raise CheckpointError(f"{checkpoint.model_dir}: the index names files that are missing: {absent}")
    with ExitStack() as stack:
        opened = {
            path: stack.enter_context(safe_open(path, framework="pt", device=str(device)))
            for path in {files[key] for key in names.values()}
        }
        for name, key in names.items():
            try:
                tensor = opened[files[key]].get_tensor(key)
                if tensor.dtype not in _WEIGHT_DTYPES:
                    raise CheckpointError(f"{files[key]}: tensor {key!r} is {tensor.dtype}: quantized, not supported")
                set_module_tensor_to_device(trunk, name, device, tensor, dtype=dtype)
            except (SafetensorError, ValueError) as exc:
                raise CheckpointError(f"{files[key]}: tensor {key!r} cannot be used: {exc}") from exc


def _in_folder(name: str, folder: Path, revision: str | None = None) -> Checkpoint:
    """Recognise the layout of `folder`."""
    if (folder / "text_encoder").is_dir():
        found = Checkpoint(name, folder / "text_encoder", folder / "tokenizer", revision)
    elif (folder.parent / "tokenizer").is_dir() and not any(folder.glob("tokenizer*.json")):
        found = Checkpoint(name, folder, folder.parent / "tokenizer", revision)
    else:
        found = Checkpoint(name, folder, folder, revision)
    if not (found.model_dir / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no Mistral-3 checkpoint: neither text_encoder/config.json nor config.json is there"
        )
    if not any(found.tokenizer_dir.glob("tokenizer*.json")):
        raise CheckpointError(f"{found.tokenizer_dir}: no tokenizer.json and no tokenizer_config.json")
    return found


def _reason(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


def _sha256(path: Path) -> str:
    blob = path.resolve()
    if _SHA256.fullmatch(blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
