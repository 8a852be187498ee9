"""Prompts in, own rows out."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from encoder import selfcheck
from encoder.attention import Kernel, supports_varlen
from encoder.batching import plan
from encoder.checkpoint import Checkpoint, locate
from encoder.config import EncoderConfig
from encoder.encoding import Encoding, dense_rows, text_ids
from encoder.errors import EncoderConfigError
from encoder.loading import DeviceMap, load_layers
from encoder.packing import Packing
from encoder.prompts import PromptTokenizer, TokenizedPrompt
from encoder.trunk import Trunk

if TYPE_CHECKING:
    from torch import nn

Attention = Literal["auto", "varlen", "sdpa"]
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Rows of a forward. On CPU the matrix products are at full speed from some hundred rows on, and what the layers keep
# in between should stay near the caches. On CUDA they must fill the card, and a batch is what a request waits for.
_TOKEN_BUDGET = {"cpu": 512, "cuda": 4096}
# Part of the fingerprint: a change of this line is a change of the numbers.
_ATTENTION_SEMANTICS = "causal; pad rows attend to nothing; prefix in float32"
_SCHEMA_VERSION = 1


class Encoder:
    """The first layers of a decoder, with a tokenizer in front and the layers asked for stacked behind.

    Only the rows that a prompt adds are computed: those of the prefix, which all prompts share, and of left padding,
    which sees nothing, are constants. `Encoder.load` checks that against the plain padded forward.

    Thread-safe: one forward runs at a time. Make one with `Encoder.load`.

    Attributes:
        config: layers, maximal length, template.
        model: the folder or hub id it was loaded from.
        revision: the hub snapshot's commit, or None.
        fingerprint: 16 hexadecimal digits that change whenever the numbers may by more than rounding: not with the
            attention kernel, the token budget or the device.
        random_weights: True for the demo checkpoint.
        tokenizer: turns prompts into what `forward` takes.
        dtype: of every row.
        device: where rows are computed.
        embed_dim: D, values in a row: the number of layers times the hidden size.
        attention: "varlen" or "sdpa".
        deterministic: whether a prompt's rows are the same bits in any batch.
        token_budget: rows of a forward.
        prefix_rows: `[P, D]`, the rows of the system message, the same for every prompt.
        pad_row: `[D]`, the row of every pad token with left padding; zeros with right padding, where a prompt's pad
            rows are its own.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: PromptTokenizer,
        config: EncoderConfig,
        *,
        checkpoint: Checkpoint,
        fingerprint: str,
        attention: Kernel,
        token_budget: int,
        deterministic: bool,
    ) -> None:
        self.config = config
        self.model = checkpoint.name
        self.revision = checkpoint.revision
        self.random_weights = checkpoint.has_random_weights()
        self.fingerprint = fingerprint
        self.tokenizer = tokenizer
        self.attention = attention
        self.deterministic = deterministic
        # The same kernels with the same shapes every time are what makes equal bits: one prompt, with right padding.
        self.token_budget = (self._padded_to or config.max_length) if deterministic else token_budget
        self._trunk = Trunk(module, config.layers, attention, exact=deterministic)
        self.dtype = self._trunk.dtype
        self.device = self._trunk.device
        self.embed_dim = self._trunk.embed_dim
        self._lock = threading.Lock()
        self.prefix_rows, self._cache = self._trunk.record_prefix(tokenizer.prefix_ids)
        self.pad_row = torch.zeros(self.embed_dim, dtype=self.dtype, device=self.device)
        self._check()

    @classmethod
    def load(
        cls,
        model: str | Path,
        config: EncoderConfig | str = "flux2-dev",
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device | None = None,
        device_map: str | DeviceMap | None = None,
        dtype: str | torch.dtype | None = None,
        attention: str = "auto",
        token_budget: int | None = None,
        deterministic: bool = False,
    ) -> Encoder:
        """Load the layers that `config` needs.

        Args:
            model: a folder in the layout of FLUX.2 or of a plain checkpoint, or a hub id.
            config: an `EncoderConfig`, or a preset's name.
            revision: branch, tag or commit of a hub id.
            subfolder: where in the folder or repository the model is, if not where FLUX.2 has it.
            device: default CUDA if there is one, else CPU.
            device_map: instead of `device`: "auto" spreads the layers over all devices, for a model that one card
                cannot hold; or which module goes to which device. See accelerate's `dispatch_model`.
            dtype: default bfloat16 on CUDA, float32 elsewhere.
            attention: "varlen", "sdpa", or "auto" for the fastest that the device has.
            token_budget: rows of a forward; default 4096 on CUDA, 512 elsewhere.
            deterministic: give a prompt the same bits in any batch, by forwards of one fixed size.

        Raises:
            CheckpointError: the folder or hub id holds nothing that can be used.
            EncoderConfigError: an argument has a value that makes no sense.
            SelfCheckError: the fast path does not give this model's own numbers.
        """
        config = EncoderConfig.preset(config) if isinstance(config, str) else config
        if device is not None and device_map is not None:
            raise EncoderConfigError(f"device {device!r} and device_map {device_map!r} are both given; only one can be")
        found = _device(device if device_map is None or isinstance(device_map, str) else _first_device(device_map))
        if token_budget is None:
            token_budget = _TOKEN_BUDGET.get(found.type, _TOKEN_BUDGET["cpu"])
        if token_budget < 1:
            raise EncoderConfigError(f"token_budget must be at least 1, not {token_budget}")
        weight_dtype = _dtype(dtype, found)
        checkpoint = locate(model, revision, subfolder)
        # The cheap checks come first: a wrong folder is told before gigabytes are read.
        text_config = checkpoint.text_config(config.model_types)
        head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        kernel = _kernel(attention, found, weight_dtype, head_dim)
        tokenizer = PromptTokenizer(checkpoint.tokenizer(), config)
        try:
            module, digest = load_layers(checkpoint, config, device=found, dtype=weight_dtype, device_map=device_map)
            return cls(
                module,
                tokenizer,
                config,
                checkpoint=checkpoint,
                fingerprint=_fingerprint(digest, checkpoint, config, tokenizer.chat_template, weight_dtype),
                attention=kernel,
                token_budget=token_budget,
                deterministic=deterministic,
            )
        except torch.OutOfMemoryError as exc:
            raise EncoderConfigError(
                f"{model} does not fit on {found} in {weight_dtype}; device_map 'auto' spreads it over several: {exc}"
            ) from exc

    def num_rows(self, prompt: TokenizedPrompt) -> int:
        """Rows that `prompt` adds to a forward, and to its result: its own, and its pad rows with right padding."""
        return max(len(prompt.own_ids), self._padded_to)

    def encode(self, prompts: Sequence[str]) -> list[Encoding]:
        """Encode `prompts`, in order.

        Returns:
            One `Encoding` a prompt; own rows are on `device`, in `dtype`.

        Raises:
            TypeError: `prompts` is one string.
            PromptError: one of the prompts cannot be encoded; nothing has been computed.
        """
        tokenized = self.tokenizer(prompts)
        encodings: dict[int, Encoding] = {}
        for batch in plan([self.num_rows(prompt) for prompt in tokenized], self.token_budget):
            members = [tokenized[position] for position in batch]
            packing, rows = self.forward(members)
            encodings.update(zip(batch, self.encodings(members, packing.split(rows)), strict=True))
        return [encodings[position] for position in range(len(tokenized))]

    def forward(self, prompts: Sequence[TokenizedPrompt]) -> tuple[Packing, torch.Tensor]:
        """Run one forward over all of `prompts`, whatever the budget.

        Returns:
            Where their rows are, and the rows `[M, D]` on `device`; on CUDA they may still be being computed.
        """
        sequences = [prompt.own_ids for prompt in prompts]
        if self.deterministic and not self._padded_to:
            # A sequence that nobody asked for makes the forward's size always the same.
            rest = self.token_budget - sum(map(len, sequences))
            sequences = [*sequences, [self.tokenizer.pad_token_id] * max(0, rest)]
        packing = Packing.build(
            sequences,
            prefix_length=len(self.tokenizer.prefix_ids),
            pad_token_id=self.tokenizer.pad_token_id,
            padded_to=self._padded_to,
        )
        with self._lock:
            return packing, self._trunk.packed(packing, self._cache)

    def encodings(self, prompts: Sequence[TokenizedPrompt], own_rows: Sequence[torch.Tensor]) -> list[Encoding]:
        """Put `prompts` and their rows together; rows of a sequence that nobody asked for are left over."""
        return [
            Encoding(rows, prompt.num_tokens, prompt.truncated) for prompt, rows in zip(prompts, own_rows, strict=False)
        ]

    def dense(self, encodings: Sequence[Encoding]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `prompt_embeds [B, max_length, D]` and `text_ids [B, max_length, 4]` for diffusers' pipelines."""
        prompt_embeds = dense_rows(
            encodings, pad_row=self.pad_row, prefix_rows=self.prefix_rows, max_length=self.config.max_length
        )
        return prompt_embeds, text_ids(len(encodings), self.config.max_length)

    @property
    def _padded_to(self) -> int:
        """Rows of a sequence with its pad rows behind the prefix; 0 if pad rows are a constant."""
        return self.config.max_length - len(self.tokenizer.prefix_ids) if self.config.padding_side == "right" else 0

    def _check(self) -> None:
        """Take the pad row from the plain padded forward, and compare the rest of it with the fast path."""
        config = self.config
        prefix_length = len(self.tokenizer.prefix_ids)
        probes = self.tokenizer(selfcheck.PROBES)
        plain = self._padded([self.tokenizer.prefix_ids + probe.own_ids for probe in probes])  # (2, L, D)
        if config.padding_side == "left" and probes[0].num_tokens < config.max_length:
            self.pad_row = plain[0, 0].clone()
        alone = [self.encode([probe])[0] for probe in selfcheck.PROBES]
        ranges = [
            selfcheck.row_ranges(
                prefix_length=prefix_length,
                num_tokens=probe.num_tokens,
                max_length=config.max_length,
                padding_side=config.padding_side,
            )
            for probe in probes
        ]
        together = self.encode([*reversed(selfcheck.PROBES), "a", *selfcheck.PROBES])[-len(alone) :]
        for encodings in (alone, together):
            selfcheck.check(self.dense(encodings)[0], plain, ranges, model=self.model, attention=self.attention)
        if self.deterministic:
            rows = ([encoding.own_rows for encoding in encodings] for encodings in (alone, together))
            selfcheck.check_equal_bits(*rows, model=self.model)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run sequences of at most L tokens as transformers would: padded, all of them in one batch -> `[B, L, D]`."""
        length = self.config.max_length
        input_ids = torch.full((len(sequences), length), self.tokenizer.pad_token_id)  # (B, L)
        attention_mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            tokens = slice(length - len(ids), length) if self.config.padding_side == "left" else slice(0, len(ids))
            input_ids[row, tokens] = torch.tensor(ids)
            attention_mask[row, tokens] = 1
        with self._lock:
            return self._trunk.padded(input_ids, attention_mask)


def _device(device: int | str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as exc:
        raise EncoderConfigError(f"device {device!r} is none that torch knows") from exc
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EncoderConfigError(f"device {device!r} is asked for, but torch finds {count or 'no'} CUDA device")
    return found


def _first_device(device_map: DeviceMap) -> int | str | torch.device:
    """Return where the embedding goes, which decides dtype, kernel and token budget."""
    return device_map.get("embed_tokens", device_map.get("", "cpu"))


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise EncoderConfigError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return found


def _kernel(attention: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    if attention not in get_args(Attention):
        raise EncoderConfigError(f"attention {attention!r} is not one of {', '.join(get_args(Attention))}")
    available = supports_varlen(device, dtype, head_dim)
    if attention == "varlen" and not available:
        raise EncoderConfigError(
            f"attention 'varlen' needs a CUDA device of compute capability 8.0 and a 16-bit dtype, not {device} and "
            f"{dtype}; 'auto' takes what there is"
        )
    return "varlen" if available and attention != "sdpa" else "sdpa"


def _fingerprint(
    digest: str, checkpoint: Checkpoint, config: EncoderConfig, chat_template: str, dtype: torch.dtype
) -> str:
    """Hash what changes the numbers."""
    parts = {
        "schema_version": _SCHEMA_VERSION,
        "weights": digest,
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoint.text_files()],
        "layers": config.layers,
        "max_length": config.max_length,
        "system_message": config.system_message,
        "chat_template": chat_template,
        "template_options": config.template_options,
        "content": config.content,
        "removed_text": config.removed_text,
        "dtype": str(dtype),
        "padding_side": config.padding_side,
        "attention": _ATTENTION_SEMANTICS,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
