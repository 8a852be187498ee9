"""Prompts in, own rows out."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encoder.checkpoint import Checkpoint, load_trunk, locate
from encoder.config import EncoderConfig
from encoder.encoding import Encoding, dense_rows, text_ids
from encoder.errors import ConstantRowsError, EncoderConfigError
from encoder.prompts import PromptTokenizer, TokenizedPrompt

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Mean difference between two computations of a constant row, each value's relative to it and to the row's median: a
# few values of a row are hundreds of times larger than the rest, and must not excuse errors in those. Rounding is far
# below these bounds, rows that depend on the prompt are far above.
_TOLERANCE = {torch.bfloat16: 0.2, torch.float16: 0.05, torch.float32: 1e-4}
# Part of the fingerprint: a change of this line is a change of the numbers.
_ATTENTION_SEMANTICS = "causal; pad rows attend to nothing"
_SCHEMA_VERSION = 1


class Encoder:
    """The first layers of a Mistral-Small-3, with a tokenizer in front and the layers asked for stacked behind.

    Thread-safe: one forward runs at a time. Make one with `Encoder.load`.

    Attributes:
        config: layers, maximal length, system message.
        model: the folder or hub id it was loaded from.
        revision: the hub snapshot's commit, or None.
        fingerprint: 16 hexadecimal digits that change whenever the numbers may.
        random_weights: True for the demo checkpoint.
        dtype: of every row.
        device: where rows are computed.
        prefix_rows: `[P, D]`, the rows of the system message, the same for every prompt.
        pad_row: `[D]`, the row of every pad token.
        batch_size: prompts in one forward.
    """

    def __init__(
        self,
        trunk: nn.Module,
        tokenizer: PromptTokenizer,
        config: EncoderConfig,
        *,
        checkpoint: Checkpoint,
        fingerprint: str,
        batch_size: int,
    ) -> None:
        self.config = config
        self.model = checkpoint.name
        self.revision = checkpoint.revision
        self.random_weights = checkpoint.has_random_weights()
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        embedding = next(trunk.parameters())
        self.dtype = embedding.dtype
        self.device = embedding.device
        self._trunk = trunk
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self.pad_row, self.prefix_rows = self._constant_rows()

    @classmethod
    def load(
        cls,
        model: str | Path,
        config: EncoderConfig | str = "flux2-dev",
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attention: str = "sdpa",
        batch_size: int = 8,
    ) -> Encoder:
        """Load the layers that `config` needs.

        Args:
            model: a folder in the layout of FLUX.2-dev or of a plain Mistral-3 checkpoint, or a hub id.
            config: an `EncoderConfig`, or a preset's name.
            revision: branch, tag or commit of a hub id.
            device: default CUDA if there is one, else CPU.
            dtype: default bfloat16 on CUDA, float32 elsewhere.
            attention: transformers' name of the attention implementation.
            batch_size: prompts in one forward.

        Raises:
            CheckpointError: the folder or hub id holds nothing that can be used.
            EncoderConfigError: an argument has a value that makes no sense.
            ConstantRowsError: this model's pad or prefix rows depend on the prompt.
        """
        config = EncoderConfig.preset(config) if isinstance(config, str) else config
        if batch_size < 1:
            raise EncoderConfigError(f"batch_size must be at least 1, not {batch_size}")
        device = _device(device)
        dtype = _dtype(dtype, device)
        checkpoint = locate(model, revision)
        # The cheap checks come first: a wrong folder is told before gigabytes are read.
        checkpoint.text_config()
        tokenizer = PromptTokenizer(checkpoint.tokenizer(), config)
        trunk = load_trunk(checkpoint, max(config.layers), device=device, dtype=dtype, attention=attention)
        fingerprint = _fingerprint(checkpoint, config, tokenizer.chat_template, dtype)
        return cls(trunk, tokenizer, config, checkpoint=checkpoint, fingerprint=fingerprint, batch_size=batch_size)

    @property
    def embed_dim(self) -> int:
        """D: values in a row, the number of layers times the hidden size."""
        return len(self.pad_row)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Encoding]:
        """Encode `prompts`, in order.

        Returns:
            One `Encoding` a prompt; own rows are on `device`, in `dtype`.

        Raises:
            PromptError: one of the prompts cannot be encoded; nothing has been computed.
        """
        tokenized = iter(self._tokenizer(prompts))
        encodings: list[Encoding] = []
        while batch := list(islice(tokenized, self.batch_size)):
            encodings += self._encode_batch(batch)
        return encodings

    def dense(self, encodings: Sequence[Encoding]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `prompt_embeds [B, max_length, D]` and `text_ids [B, max_length, 4]` for `Flux2Pipeline`."""
        prompt_embeds = dense_rows(
            encodings, pad_row=self.pad_row, prefix_rows=self.prefix_rows, max_length=self.config.max_length
        )
        return prompt_embeds, text_ids(len(encodings), self.config.max_length)

    def _encode_batch(self, batch: Sequence[TokenizedPrompt]) -> list[Encoding]:
        rows = self._padded_forward([prompt.ids for prompt in batch])  # (B, L, D)
        prefix_length = len(self._tokenizer.prefix_ids)
        return [
            Encoding(
                # A copy, or every encoding would keep the rows of its whole batch alive.
                own_rows=row[len(row) - (len(prompt.ids) - prefix_length) :].clone(),
                num_tokens=len(prompt.ids),
                truncated=prompt.truncated,
            )
            for row, prompt in zip(rows, batch, strict=True)
        ]

    def _padded_forward(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run left-padded sequences of at most L tokens through all layers asked for -> `[B, L, D]`."""
        length = self.config.max_length
        input_ids = torch.full((len(sequences), length), self._tokenizer.pad_token_id)  # (B, L)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            input_ids[row, length - len(ids) :] = torch.tensor(ids)
            attention_mask[row, length - len(ids) :] = 1
        hidden_states: list[torch.Tensor] = []  # K of (B, L, H)

        def keep(_layer: nn.Module, _inputs: Any, output: torch.Tensor) -> None:  # noqa: ANN401 - torch's hook signature
            hidden_states.append(output)

        with self._lock:
            layers = [self._trunk.get_submodule(f"layers.{k - 1}") for k in self.config.layers]
            hooks = [layer.register_forward_hook(keep) for layer in layers]
            try:
                self._trunk(
                    input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
                )
            finally:
                for hook in hooks:
                    hook.remove()
        return torch.cat(hidden_states, dim=-1)

    @torch.no_grad()
    def _constant_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the pad row `[D]` and the prefix rows `[P, D]`, and check on two prompts that they are constant."""
        prefix_length = len(self._tokenizer.prefix_ids)
        probes = self._tokenizer(["", "Two foxes, one asleep and one awake, under a lamp that somebody left burning."])
        dense = self._padded_forward([probe.ids for probe in probes])  # (2, L, D)
        starts = [dense.shape[1] - len(probe.ids) for probe in probes]
        pads = torch.cat([row[:start] for row, start in zip(dense, starts, strict=True)])
        prefixes = torch.stack([row[start : start + prefix_length] for row, start in zip(dense, starts, strict=True)])
        self._check_constant("pad", pads)
        self._check_constant("prefix", prefixes)
        return pads[0].clone(), prefixes[0].clone()

    def _check_constant(self, what: str, rows: torch.Tensor) -> None:
        """Compare `rows [N, ..., D]` with the first of them."""
        values = rows.float()
        first = values[0]
        size = first.abs() + first.abs().median(dim=-1, keepdim=True).values
        error = ((values - first).abs() / size).mean(dim=-1).max().item()
        if not error <= _TOLERANCE[self.dtype]:  # also true for NaN
            raise ConstantRowsError(
                f"{self.model}: the {what} rows of two prompts differ by {error:.3g} of their size (allowed: "
                f"{_TOLERANCE[self.dtype]:g}), so storing a prompt's own rows alone would not be exact"
            )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as exc:
        raise EncoderConfigError(f"device {device!r} is none that torch knows") from exc
    if found.type == "cuda" and not torch.cuda.is_available():
        raise EncoderConfigError(f"device {device!r} is asked for, but torch finds no CUDA device")
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise EncoderConfigError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return found


def _fingerprint(checkpoint: Checkpoint, config: EncoderConfig, chat_template: str, dtype: torch.dtype) -> str:
    """Hash what changes the numbers."""
    parts = {
        "schema_version": _SCHEMA_VERSION,
        "weights": checkpoint.digest(),
        "layers": config.layers,
        "max_length": config.max_length,
        "system_message": config.system_message,
        "chat_template": chat_template,
        "dtype": str(dtype),
        "padding_side": config.padding_side,
        "attention": _ATTENTION_SEMANTICS,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
