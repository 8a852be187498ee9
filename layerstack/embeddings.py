"""The answer to a few prompts: own rows, and how they become what diffusers' pipelines take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from jobs.errors import TensorFormatError
from jobs.tensors import Array, dense_rows, load_tensors, text_ids
from layerstack.errors import UnexpectedAnswerError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The embeddings of B prompts. A dense prompt is pad rows, prefix rows and own rows; only those of one are its own.

    Attributes:
        own_rows: one `[n, D]` a prompt, numpy arrays in the dtype of the answer (bfloat16 by ml_dtypes), read-only.
        prefix_rows: `[P, D]`, the rows of the system message.
        pad_row: `[D]`; zeros if the encoder pads at the right, where pad rows are among the own rows.
        num_tokens: tokens of each prompt, the system message included.
        truncated: whether each prompt was cut.
        max_length: L, rows of a dense prompt.
        fingerprint: of the encoder.
    """

    own_rows: list[Array]
    prefix_rows: Array
    pad_row: Array
    num_tokens: list[int]
    truncated: list[bool]
    max_length: int
    fingerprint: str

    def __len__(self) -> int:
        return len(self.own_rows)

    @cached_property
    def prompt_embeds(self) -> Array:
        """`[B, L, D]`, put together when it is first asked for."""
        dense = np.empty((len(self), self.max_length, self.pad_row.size), self.pad_row.dtype)
        for own, rows in zip(self.own_rows, dense, strict=True):
            dense_rows(own, prefix_rows=self.prefix_rows, pad_row=self.pad_row, max_length=self.max_length, out=rows)
        return dense

    @cached_property
    def text_ids(self) -> Array:
        """`[B, L, 4]`, int64: row l is (0, 0, 0, l)."""
        return np.broadcast_to(text_ids(0, self.max_length), (len(self), self.max_length, 4)).copy()

    def torch(self, device: str | torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `prompt_embeds [B, L, D]` and `text_ids [B, L, 4]` as torch tensors, without a copy on the CPU.

        Args:
            device: where they go; default the CPU.

        Raises:
            ImportError: torch is not installed.
        """
        return to_torch(self.prompt_embeds).to(device), to_torch(self.text_ids).to(device)


def to_torch(array: Array) -> torch.Tensor:
    """Hand an array to torch without a copy; numpy's bfloat16 travels as 16-bit integers."""
    import torch  # noqa: PLC0415 - a client must not need torch, which takes seconds to import

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def parse(content: bytes) -> Embeddings | None:
    """Read the safetensors of a `/predict`: without padding, or dense from an encoder that pads at the right.

    Returns:
        None if the rows of the tokens alone do not tell the dense rows: the encoder pads at the right.

    Raises:
        UnexpectedAnswerError: the bytes are no such answer.
    """
    try:
        tensors, metadata = load_tensors(content)
        num_prefix, max_length = int(metadata["num_prefix_tokens"]), int(metadata["max_length"])
        num_tokens = [int(count) for count in tensors["num_tokens"]]
        is_dense = "prompt_embeds" in tensors
        rows = _rows(tensors, is_dense=is_dense, count=len(num_tokens))
        if not is_dense and _is_padded_right(tensors, rows, max_length):
            return None
        return Embeddings(
            own_rows=[each[num_prefix:] for each in rows],
            prefix_rows=rows[0][:num_prefix],
            # Dense rows are asked for only of an encoder that pads at the right, whose pad rows are among its own.
            pad_row=np.zeros_like(rows[0][0]) if is_dense else tensors["pad_row"],
            num_tokens=num_tokens,
            truncated=tensors["truncated"].tolist(),
            max_length=max_length,
            fingerprint=metadata["fingerprint"],
        )
    except (TensorFormatError, KeyError, ValueError, IndexError) as exc:
        raise UnexpectedAnswerError(f"not the tensors that a layerstack server of this version sends: {exc!r}") from exc


def joined(answers: Iterable[Embeddings]) -> Embeddings:
    """Put the answers to pieces of a list together.

    Raises:
        UnexpectedAnswerError: they come from different encoders.
    """
    first, *others = parts = list(answers)
    if not others:
        return first
    if len(fingerprints := {part.fingerprint for part in parts}) > 1:
        raise UnexpectedAnswerError(
            f"the server's encoder changed between two answers: fingerprints {', '.join(sorted(fingerprints))}"
        )
    return Embeddings(
        own_rows=[rows for part in parts for rows in part.own_rows],
        prefix_rows=first.prefix_rows,
        pad_row=first.pad_row,
        num_tokens=[count for part in parts for count in part.num_tokens],
        truncated=[cut for part in parts for cut in part.truncated],
        max_length=first.max_length,
        fingerprint=first.fingerprint,
    )


def _rows(tensors: dict[str, Array], *, is_dense: bool, count: int) -> list[Array]:
    return list(tensors["prompt_embeds"]) if is_dense else [tensors[f"prompt_embeds.{n}"] for n in range(count)]


def _is_padded_right(tensors: dict[str, Array], rows: list[Array], max_length: int) -> bool:
    """Whether rows that are fewer than L stand first among the L, with pads behind them."""
    return any(
        len(each) < max_length and tensors[f"text_ids.{n}"][0, 3] == 0 for n, each in enumerate(rows) if len(each)
    )
