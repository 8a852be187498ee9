"""How a job's prompts are cut into chunks: by what they will take, as far as their lengths tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

from jobs.records import EncoderInfo, Layout, Prompt
from jobs.tensors import DTYPES, DtypeName

# The Tekken vocabulary on PartiPrompts (3.9 bytes of UTF-8 a token) and DPG-bench (4.7); the rest closes the prompt.
_BYTES_PER_TOKEN = 4.6
_CLOSING_TOKENS = 2
_TEXT_IDS_BYTES = 32


@dataclass(frozen=True)
class ChunkLimits:
    """What a chunk holds at most: prompts, and token rows that are stored of them."""

    prompts: int
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """Estimates what a prompt becomes, without a tokenizer.

    Attributes:
        max_own_rows: rows that a prompt can have of its own.
        stored_rows: rows that are stored of each prompt, or None if that depends on its length.
        row_bytes: of one stored row.
        constant_bytes: of the rows that all prompts share, which each part stores in its header.
    """

    max_own_rows: int
    stored_rows: int | None
    row_bytes: int
    constant_bytes: int

    @classmethod
    def of(cls, encoder: EncoderInfo, layout: Layout, dtype: DtypeName) -> Self:
        """Return the sizes for an encoder and the options of a job."""
        max_own_rows = encoder.max_length - encoder.num_prefix_tokens
        always = encoder.max_length if layout == "dense" else max_own_rows if encoder.padding_side == "right" else None
        embedding_bytes = encoder.embed_dim * DTYPES[dtype].itemsize
        return cls(
            max_own_rows=max_own_rows,
            stored_rows=always,
            row_bytes=embedding_bytes + _TEXT_IDS_BYTES,
            constant_bytes=(encoder.num_prefix_tokens + 1) * embedding_bytes * 4 // 3,  # prefix and pad row, in base64
        )

    def stored_bytes(self, num_rows: int, num_parts: int) -> int:
        """Return about how many bytes `num_rows` stored rows take in `num_parts` parts."""
        return num_rows * self.row_bytes + num_parts * self.constant_bytes

    def rows(self, prompt: str) -> int:
        """Return about how many rows are stored of a prompt."""
        if self.stored_rows is not None:
            return self.stored_rows
        tokens = _CLOSING_TOKENS + len(prompt.encode("utf-8", "surrogatepass")) / _BYTES_PER_TOKEN
        return min(self.max_own_rows, int(tokens))


@dataclass(frozen=True)
class Chunk:
    """Prompts that are encoded together, the first of which stands at `start` in the job, and their stored rows."""

    index: int
    start: int
    prompts: list[Prompt]
    rows: int


def cut(prompts: Iterable[Prompt], sizes: Sizes, limits: ChunkLimits) -> Iterator[Chunk]:
    """Cut `prompts` into chunks within `limits`, but of at least one prompt."""
    waiting: list[Prompt] = []
    index = start = rows = 0
    for prompt in prompts:
        more = sizes.rows(prompt.prompt)
        if waiting and (len(waiting) == limits.prompts or rows + more > limits.tokens):
            yield Chunk(index, start, waiting, rows)
            index, start = index + 1, start + len(waiting)
            waiting, rows = [], 0
        waiting.append(prompt)
        rows += more
    if waiting:
        yield Chunk(index, start, waiting, rows)
