"""The rows of an answer: own rows, and constant rows in the bytes and texts that they are sent as."""

from __future__ import annotations

import binascii
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import numpy as np
import orjson

from api.prediction import ConstantRows, Prediction
from jobs.tensors import DTYPES, Array, DtypeName, text_ids

# Values in a block of rows. As text they have at most 15 bytes each, so a block is no longer than a piece; and orjson,
# which keeps every other thread waiting, takes a millisecond or two for one.
_BLOCK_VALUES = 2**16
# Two encoders in each dtype; 11 MB each for the real model in float32.
_KEPT_CONSTANTS = 6


class Padding(StrEnum):
    """Which rows of a prompt are answered."""

    MAX_LENGTH = "max_length"
    """All L of them, pad rows included."""
    NONE = "none"
    """Those of its tokens: the prefix rows and the prompt's own."""


class Constant:
    """Rows that are sent in every answer, `[m, D]`. Each text of them is made when it is first asked for.

    Attributes:
        raw: their bytes, the view of a `bytes` object.
    """

    def __init__(self, rows: Array) -> None:
        content = rows.tobytes()
        self.raw = memoryview(content)
        self._rows: Array = np.frombuffer(content, rows.dtype).reshape(rows.shape)
        self._base64: dict[int, memoryview] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def json(self) -> memoryview:
        """The rows as JSON, with a comma behind each."""
        return memoryview(b"".join(json_rows(self._rows)))

    def first(self, count: int) -> memoryview:
        """Return the bytes of the first `count` rows; of all of them, the same object each time."""
        return self.raw if count == len(self) else self.raw[: len(self.raw) // len(self) * count]

    def first_json(self, count: int) -> memoryview:
        """Return the JSON of the first `count` rows. Unless that is all, the texts of all rows must be equally long."""
        return self.json if count == len(self) else self.json[: len(self.json) // len(self) * count]

    def base64(self, skip: int) -> memoryview:
        """Return the bytes from `skip` on, as many as three go into, in base64; `skip` is less than three."""
        if skip not in self._base64:
            self._base64[skip] = memoryview(base64(whole_triples(self.raw[skip:])))
        return self._base64[skip]


class Constants:
    """The constant rows of an encoder in one dtype."""

    def __init__(self, rows: ConstantRows, dtype: DtypeName) -> None:
        count = rows_in_block(rows.pad_row.size)
        pad_row = converted(rows.pad_row, dtype)
        self.pad_block = Constant(np.broadcast_to(pad_row, (count, pad_row.size)))
        self.prefix = Constant(converted(rows.prefix_rows, dtype))


class ConstantsCache:
    """Keeps the constants that were used last. Threads may share it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, DtypeName], Constants] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, rows: ConstantRows, fingerprint: str, dtype: DtypeName) -> Constants:
        """Return the constants of the encoder `fingerprint` in `dtype`, made from `rows` if they are not kept."""
        with self._lock:
            if (fingerprint, dtype) not in self._kept:
                self._kept[fingerprint, dtype] = Constants(rows, dtype)
            self._kept.move_to_end((fingerprint, dtype))
            if len(self._kept) > _KEPT_CONSTANTS:
                self._kept.popitem(last=False)
            return self._kept[fingerprint, dtype]


@dataclass(frozen=True, eq=False)
class PromptRows:
    """The rows of one prompt in an answer: pad rows, prefix rows, own rows.

    Attributes:
        num_pads: pad rows.
        own_rows: `[n, D]` in the answer's dtype, C-contiguous.
        start: position of the first row among the L of the padded prompt.
        constants: of the encoder.
    """

    num_pads: int
    own_rows: Array
    start: int
    constants: Constants

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and D."""
        return self.num_pads + len(self.constants.prefix) + len(self.own_rows), self.own_rows.shape[1]

    @property
    def text_ids(self) -> Array:
        """The positions of the rows, `[num_pads + P + n, 4]` int64."""
        return text_ids(self.start, self.start + self.shape[0])

    def constant_runs(self) -> Iterator[tuple[Constant, int]]:
        """Yield the constants that come before the own rows, and how many rows of each; a block of pads repeats."""
        block, prefix = self.constants.pad_block, self.constants.prefix
        for start in range(0, self.num_pads, len(block)):
            yield block, min(len(block), self.num_pads - start)
        if len(prefix):
            yield prefix, len(prefix)


@dataclass(frozen=True, eq=False)
class RowTensor:
    """One `prompt_embeds` of an answer.

    Attributes:
        prompts: whose rows it has, one after the other; at least one, in one dtype.
        stacked: whether it is `[B, L, D]` of B prompts; else it is `[n, D]` of one.
    """

    prompts: Sequence[PromptRows]
    stacked: bool

    @property
    def dtype(self) -> str:
        """The name of its dtype."""
        return self.prompts[0].own_rows.dtype.name

    @property
    def shape(self) -> list[int]:
        """Its shape."""
        return [*self._lead, *self.prompts[0].shape]

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.prompts[0].own_rows.itemsize

    @property
    def text_ids(self) -> Array:
        """The positions of its rows, `[B, L, 4]` or `[n, 4]` int64."""
        ids = np.concatenate([prompt.text_ids for prompt in self.prompts])
        return ids.reshape(*self._lead, -1, 4)

    def runs(self) -> Iterator[memoryview]:
        """Yield its bytes."""
        for prompt in self.prompts:
            for constant, count in prompt.constant_runs():
                yield constant.first(count)
            yield raw(prompt.own_rows)

    @property
    def _lead(self) -> list[int]:
        return [len(self.prompts)] if self.stacked else []


def row_tensors(prompts: Sequence[PromptRows], padding: Padding) -> list[RowTensor]:
    """Return the tensors of an answer: one of all prompts if they are padded, else one of each."""
    if padding is Padding.MAX_LENGTH:
        return [RowTensor(prompts, stacked=True)]
    return [RowTensor([prompt], stacked=False) for prompt in prompts]


def prompt_rows(prediction: Prediction, constants: Constants, dtype: DtypeName, padding: Padding) -> list[PromptRows]:
    """Return the rows of each prompt as they are answered."""
    prefix_length = len(constants.prefix)
    prompts = []
    for own_rows, num_tokens in zip(prediction.own_rows, prediction.num_tokens.tolist(), strict=True):
        start = prediction.max_length - len(own_rows) - prefix_length
        if padding is Padding.MAX_LENGTH:
            num_pads, first, answered = start, 0, own_rows
        else:
            # With padding on the right, the rows behind the tokens are the prompt's own pad rows.
            num_pads, first, answered = 0, start, own_rows[: num_tokens - prefix_length]
        prompts.append(PromptRows(num_pads, np.ascontiguousarray(converted(answered, dtype)), first, constants))
    return prompts


def converted(rows: Array, dtype: DtypeName) -> Array:
    """Return `rows` in `dtype`, themselves if they have it; what float16 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return rows.astype(DTYPES[dtype], copy=False)


def rows_in_block(embed_dim: int) -> int:
    """Return how many rows are taken at once."""
    return max(1, _BLOCK_VALUES // embed_dim)


def raw(array: Array) -> memoryview:
    """Return the bytes of a C-contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def json_rows(rows: Array) -> Iterator[bytes]:
    """Yield the JSON of `rows` `[n, D]`, a block of them at a time, with a comma behind each row."""
    for block in np.split(rows, range(step := rows_in_block(rows.shape[1]), len(rows), step)):
        if len(block):
            values = np.ascontiguousarray(block, dtype=np.float32)
            yield orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] + b","


def base64(content: memoryview) -> bytes:
    """Return `content` in base64."""
    return binascii.b2a_base64(content, newline=False)


def whole_triples(content: memoryview) -> memoryview:
    """Return the beginning of `content` that base64 needs no padding for."""
    return content[: len(content) // 3 * 3]
