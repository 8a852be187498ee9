"""From a checkpoint to the layers that are needed, on the device.

Of a checkpoint of 40 layers, only the embedding and the layers up to the last one asked for are read: 17.3B of
Mistral-Small-3's 24B parameters for layer 30.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_balanced_memory, set_module_tensor_to_device
from torch import nn
from transformers import AutoModel
from transformers.activations import SiLUActivation

from encoder.attention import IMPLEMENTATION
from encoder.checkpoint import Checkpoint
from encoder.config import EncoderConfig
from encoder.errors import CheckpointError, EncoderConfigError
from encoder.weights import StoredTensor, read_tensors, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DeviceMap = dict[str, int | str | torch.device]
_EMBEDDING = "embed_tokens.weight"
_READ_LAYERS = ("MistralDecoderLayer", "Qwen3DecoderLayer")
_AUTO_MODEL: Any = AutoModel  # its methods carry no annotations


def load_layers(
    checkpoint: Checkpoint,
    config: EncoderConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    device_map: str | DeviceMap | None = None,
) -> tuple[nn.Module, str]:
    """Build the embedding and the first layers of the decoder, reading nothing else.

    The final norm is left out on purpose: `hidden_states[k]` of an inner layer is that layer's raw output.

    Args:
        checkpoint: where the files are.
        config: which layers are needed.
        device: where to, unless `device_map` says.
        dtype: the weights become this.
        device_map: "auto" to spread the layers over the devices there are, or which module goes where.

    Returns:
        The decoder, and the SHA-256 of what was read.

    Raises:
        CheckpointError: the model has too few layers, or tensors are missing, quantized or of the wrong shape.
        EncoderConfigError: `device_map` cannot be used.
    """
    module: Any = empty_decoder(checkpoint, config, dtype)
    stored = _find_tensors(checkpoint, module)
    placed = _device_map(module, device_map, dtype) or {"": device}
    targets = {}
    for name, parameter in module.named_parameters():
        targets[name] = torch.empty(parameter.shape, dtype=dtype, device=_place(name, placed))
    digest = read_tensors(stored, targets)
    for name, target in targets.items():
        set_module_tensor_to_device(module, name, target.device, target)
    module.eval().requires_grad_(requires_grad=False)
    if device_map is None:
        return module.to(device), digest
    dispatched: Any = dispatch_model(module, placed, force_hooks=True)
    if dispatched.embed_tokens.weight.is_meta:
        raise EncoderConfigError(
            f"device_map puts embed_tokens on {_place(_EMBEDDING, placed)}, from where accelerate offloads it; "
            "it must be on a device that computes"
        )
    return dispatched, digest


def empty_decoder(checkpoint: Checkpoint, config: EncoderConfig, dtype: torch.dtype) -> nn.Module:
    """Build the decoder without memory for its weights, cut behind the last layer that is needed."""
    text_config = checkpoint.text_config(config.model_types)
    num_layers = config.layers[-1]
    if text_config.num_hidden_layers <= num_layers:
        # transformers puts the final norm on its last hidden state, so that one is no layer's raw output.
        raise CheckpointError(
            f"{checkpoint.model_dir}: layer {num_layers} is asked for; the model has {text_config.num_hidden_layers}, "
            "of which the last cannot be taken"
        )
    _check_window(checkpoint, text_config, config)
    text_config.num_hidden_layers = num_layers
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = text_config.layer_types[:num_layers]
    with init_empty_weights(include_buffers=False):
        module: Any = _AUTO_MODEL.from_config(text_config, attn_implementation=IMPLEMENTATION, dtype=dtype)
    absent = [name for name in ("embed_tokens", "layers", "norm") if not hasattr(module, name)]
    if absent:
        raise CheckpointError(
            f"{checkpoint.model_dir}: {type(module).__name__} is no decoder that can be cut: it has no {absent[0]!r}"
        )
    module.norm = nn.Identity()
    for layer in module.layers:
        # Nobody else reads what goes in, and at the size of the inner layer memory traffic counts.
        if type(layer).__name__ in _READ_LAYERS and isinstance(layer.mlp.act_fn, SiLUActivation):
            layer.mlp.act_fn = nn.SiLU(inplace=True)
    cut: nn.Module = module
    return cut


def _check_window(checkpoint: Checkpoint, text_config: PreTrainedConfig, config: EncoderConfig) -> None:
    window = getattr(text_config, "sliding_window", None)
    if window is not None and getattr(text_config, "use_sliding_window", True) and window < config.max_length:
        raise CheckpointError(
            f"{checkpoint.model_dir}: attention in a sliding window of {window} tokens, shorter than max_length "
            f"{config.max_length}, is not supported"
        )


def _find_tensors(checkpoint: Checkpoint, module: nn.Module) -> dict[str, StoredTensor]:
    """Find each parameter of `module` in the checkpoint's files."""
    files = checkpoint.weight_files()
    # Published: language_model.model.*, saved again: model.language_model.*, text only: model.*
    prefixes = [key.removesuffix(_EMBEDDING) for key in files if key.endswith(_EMBEDDING)]
    if len(prefixes) != 1:
        raise CheckpointError(f"{checkpoint.model_dir}: no single tensor '...{_EMBEDDING}' among {len(files)} tensors")
    names = {prefixes[0] + name: name for name, _ in module.named_parameters()}
    if absent := sorted(names.keys() - files.keys()):
        raise CheckpointError(f"{checkpoint.model_dir}: {len(absent)} tensors are missing, among them {absent[:3]}")
    needed: dict[Path, set[str]] = {}
    for key in names:
        needed.setdefault(files[key], set()).add(key)
    checkpoint.fetch(needed.keys())
    if lost := sorted(path.name for path in needed if not path.is_file()):
        raise CheckpointError(f"{checkpoint.model_dir}: the index names files that are missing: {lost}")
    found: dict[str, StoredTensor] = {}
    for path, keys in needed.items():
        found |= {names[key]: tensor for key, tensor in stored_tensors(path, keys).items()}
    return found


def _device_map(module: nn.Module, device_map: str | DeviceMap | None, dtype: torch.dtype) -> DeviceMap | None:
    if device_map is None or isinstance(device_map, dict):
        return device_map
    if device_map != "auto":
        raise EncoderConfigError(f"device_map must be 'auto' or a mapping of modules to devices, not {device_map!r}")
    split = list(getattr(module, "_no_split_modules", None) or [])
    # Balanced, or the last cards would have no room for what the layers keep in between.
    memory = get_balanced_memory(module, no_split_module_classes=split, dtype=dtype)
    placed: DeviceMap = infer_auto_device_map(module, max_memory=memory, no_split_module_classes=split, dtype=dtype)
    if "disk" in placed.values():
        raise EncoderConfigError("device_map 'auto' finds too little memory on this machine's devices for the layers")
    return placed


def _place(name: str, placed: DeviceMap) -> torch.device:
    """Return the device of the longest entry that covers the parameter `name`."""
    covering = [module for module in placed if not module or name == module or name.startswith(module + ".")]
    if not covering:
        raise EncoderConfigError(f"device_map names no device for {name!r}")
    device = placed[max(covering, key=len)]
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as exc:  # torch asserts that it was built with CUDA
        raise EncoderConfigError(f"device_map names the device {device!r}, which cannot be used: {exc}") from exc
