"""Sequences of one forward, end to end: their token ids and positions, and where each one's rows are.

No row is padding: P prefix tokens are in a cache, and a left-padded model's pad tokens in a constant. A right-padded
model's pad tokens see the prompt, so they are rows here, behind the own rows of all sequences:

    rows   [own rows of sequence 0 | of sequence 1 | ... | pad rows of sequence 0 | of sequence 1 | ...]

Own rows see the prefix and what is before them in their sequence. Pad rows see the prefix and all own rows of their
sequence, and no pad row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch


@dataclass(frozen=True, eq=False)
class Packing:
    """B sequences in M rows, shortest first.

    Attributes:
        ids: `[M]` token ids.
        positions: `[M]`, counted from the first token of the prefix.
        order: `order[i]` is where sequence i stands in the list that was given.
        own: length of each sequence.
        pads: number of pad rows of each sequence.
        prefix_length: P, tokens in front of each sequence that are in the cache.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    order: list[int]
    own: list[int]
    pads: list[int]
    prefix_length: int

    @classmethod
    def build(
        cls, sequences: Sequence[Sequence[int]], *, prefix_length: int, pad_token_id: int, padded_to: int = 0
    ) -> Packing:
        """Pack `sequences`.

        Args:
            sequences: token ids behind the prefix.
            prefix_length: P.
            pad_token_id: token id of the pad rows.
            padded_to: rows of a sequence with its pad rows; 0 for no pad rows.
        """
        order = sorted(range(len(sequences)), key=lambda position: len(sequences[position]))
        own = [len(sequences[position]) for position in order]
        pads = [max(0, padded_to - length) for length in own]
        ids = [token for position in order for token in sequences[position]] + [pad_token_id] * sum(pads)
        starts = [prefix_length] * len(own) + [prefix_length + length for length in own]
        ranges = [torch.arange(start, start + n) for start, n in zip(starts, own + pads, strict=True)]
        positions = torch.cat(ranges) if ranges else torch.arange(0)
        return cls(torch.tensor(ids, dtype=torch.int64), positions, order, own, pads, prefix_length)

    @property
    def own_starts(self) -> list[int]:
        """First own row of each sequence."""
        return _starts(self.own, 0)

    @property
    def pad_starts(self) -> list[int]:
        """First pad row of each sequence."""
        return _starts(self.pads, sum(self.own))

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return each sequence's own rows with its pad rows behind, in the order given, as copies of `rows [M, D]`."""
        parts: list[torch.Tensor] = [rows[:0]] * len(self.order)
        blocks = zip(self.order, self.own_starts, self.own, self.pad_starts, self.pads, strict=True)
        for position, start, length, pad_start, num_pads in blocks:
            # Copies, or every result would keep the rows of its whole batch alive.
            parts[position] = torch.cat([rows[start : start + length], rows[pad_start : pad_start + num_pads]])
        return parts


def _starts(lengths: list[int], first: int) -> list[int]:
    return list(accumulate(lengths, initial=first))[:-1]
