"""The result for one prompt, and how it becomes the dense tensors that FLUX.2 takes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from encoder.errors import PromptError


@dataclass(frozen=True, eq=False)
class Encoding:
    """What one prompt adds to the encoder's two constants.

    Attributes:
        own_rows: `[n, D]`, the stacked hidden states behind the constant prefix: of the prompt's own tokens and, with
            right padding, of its pad tokens.
        num_tokens: tokens of the templated prompt within `max_length`, prefix included.
        truncated: whether the prompt was cut to `max_length`.
    """

    own_rows: torch.Tensor
    num_tokens: int
    truncated: bool


class FutureEncodings(Future[list[Encoding | PromptError]]):
    """The results for prompts that were submitted together.

    Attributes:
        batches_waited: forwards that began between the submission and the forward that the last of the prompts got into
            so far.
    """

    batches_waited = 0


def dense_rows(
    encodings: Sequence[Encoding], *, pad_row: torch.Tensor, prefix_rows: torch.Tensor, max_length: int
) -> torch.Tensor:
    """Put pad, prefix and own rows together.

    Args:
        encodings: B encodings of one encoder.
        pad_row: `[D]`.
        prefix_rows: `[P, D]`.
        max_length: rows of a prompt in the result.

    Returns:
        `prompt_embeds [B, max_length, D]`, on the device and in the dtype of `prefix_rows`.
    """
    rows = pad_row.expand(len(encodings), max_length, -1).clone()  # (B, L, D)
    prefix_length = len(prefix_rows)
    for row, encoding in zip(rows, encodings, strict=True):
        start = max_length - len(encoding.own_rows)
        row[start:] = encoding.own_rows
        row[start - prefix_length : start] = prefix_rows
    return rows


def text_ids(batch_size: int, max_length: int) -> torch.Tensor:
    """Return the positions `[B, max_length, 4]`, int64: row l is (0, 0, 0, l), as `Flux2Pipeline._prepare_text_ids`."""
    ids = torch.zeros(batch_size, max_length, 4, dtype=torch.int64)
    ids[:, :, 3] = torch.arange(max_length)
    return ids
