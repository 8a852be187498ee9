"""Whether the fast path gives this model's own numbers, on this device and in this dtype.

Which rows are constant follows from the tokenizer's padding side and from what the attention kernel does with a pad
token that may see nothing, so it is checked at every load rather than believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from encoder.errors import SelfCheckError

# Two prompts of different length: what the constants must not depend on.
PROBES = ("", "Two foxes, one asleep and one awake, under a lamp that somebody left burning.")
# Mean difference of a row's values, each relative to it and to the row's median: a few values of a row are hundreds of
# times larger than the rest, and must not excuse errors in those. Rounding is far below these bounds, rows that are
# wrong are far above.
_TOLERANCE = {torch.bfloat16: 0.2, torch.float16: 0.05, torch.float32: 1e-4}


@dataclass(frozen=True)
class RowRange:
    """Rows `start` to `stop` of a padded prompt, and what they are: pad, prefix or own."""

    kind: str
    start: int
    stop: int


def row_ranges(*, prefix_length: int, num_tokens: int, max_length: int, padding_side: str) -> list[RowRange]:
    """Return what the rows of a padded prompt are."""
    start = max_length - num_tokens if padding_side == "left" else 0
    prefix_end, end = start + prefix_length, start + num_tokens
    pads = RowRange("pad", 0, start) if padding_side == "left" else RowRange("pad", end, max_length)
    return [pads, RowRange("prefix", start, prefix_end), RowRange("own", prefix_end, end)]


def check(
    fast: torch.Tensor, plain: torch.Tensor, ranges: Sequence[Sequence[RowRange]], *, model: str, attention: str
) -> None:
    """Compare two computations of B prompts, `[B, L, D]` each.

    Args:
        fast: rows put together from constants and packed rows.
        plain: rows of the padded forward.
        ranges: what the rows of each prompt are.
        model: named in the error.
        attention: named in the error.

    Raises:
        SelfCheckError: rows differ by more than rounding; the message says which, and by how much.
    """
    errors = _relative_errors(fast, plain)  # (B, L)
    allowed = _TOLERANCE[plain.dtype]
    found = []
    for prompt, kinds in enumerate(ranges):
        for rows in kinds:
            part = errors[prompt, rows.start : rows.stop]
            wrong = (~(part <= allowed)).nonzero()[:, 0]  # also those that are NaN
            if len(wrong):
                worst = part.nan_to_num(nan=torch.inf).max().item()
                found.append(
                    f"{len(wrong)} of {len(part)} {rows.kind} rows of prompt {prompt} "
                    f"(first: row {rows.start + int(wrong[0])}) by up to {worst:.3g}"
                )
    if found:
        raise SelfCheckError(
            f"{model}: the fast path ({attention} attention, {plain.device}, {plain.dtype}) differs from the plain "
            f"forward, relative to the size of a row's values, by more than {allowed:g}: {'; '.join(found)}"
        )


def check_equal_bits(alone: Sequence[torch.Tensor], together: Sequence[torch.Tensor], *, model: str) -> None:
    """Compare prompts encoded alone and in company.

    Raises:
        SelfCheckError: they are not the same bits.
    """
    for prompt, (one, other) in enumerate(zip(alone, together, strict=True)):
        if not torch.equal(one, other):
            difference = (one.float() - other.float()).abs().max().item()
            raise SelfCheckError(
                f"{model}: deterministic was asked for, but on {one.device} rows depend on what else is in the batch: "
                f"those of probe {prompt} differ by {difference:.3g}"
            )


def _relative_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    want = want.float()
    size = want.abs() + want.abs().median(dim=-1, keepdim=True).values
    difference = (got.float() - want).abs()
    # A pad token may be embedded as zeros, and then its rows are zeros in every layer.
    return torch.where(difference == 0, 0.0, difference / size).mean(dim=-1)
