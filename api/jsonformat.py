"""The two JSON documents of POST /predict: rows as nested lists of floats, or in base64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import orjson

from api.pieces import Pieces, cut
from api.rows import Constant, PromptRows, RowTensor, base64, json_rows, raw, whole_triples
from jobs.tensors import Array

# Encoding keeps every other thread waiting; this is 1 ms, and its text is no longer than a piece.
_BASE64_BYTES = 3 * 2**18


def write_lists(prompts: Sequence[PromptRows], rest: Mapping[str, object], pieces: Pieces) -> None:
    """Write the document with `prompt_embeds` and `text_ids` as nested lists, and the fields of `rest`."""
    pieces.write(b'{"prompt_embeds":[')
    for position, prompt in enumerate(prompts):
        pieces.write(b"," if position else b"")
        _write_rows(prompt, pieces)
    pieces.write(b"]," + _dumps({"text_ids": [prompt.text_ids for prompt in prompts], **rest})[1:])


def write_base64(tensors: Sequence[RowTensor], rest: Mapping[str, object], pieces: Pieces) -> None:
    """Write the document with objects of `dtype`, `shape` and `base64` in place of nested lists.

    Args:
        tensors: one that is stacked is an object, others are a list of objects.
        rest: further fields.
        pieces: written to.
    """
    pieces.write(b'{"prompt_embeds":' + (b"" if tensors[0].stacked else b"["))
    for position, tensor in enumerate(tensors):
        opening = _dumps({"dtype": tensor.dtype, "shape": tensor.shape})[:-1] + b',"base64":"'
        pieces.write(b"," + opening if position else opening)
        text = Base64Text(pieces)
        for prompt in tensor.prompts:
            for constant, count in prompt.constant_runs():
                text.write_constant(constant, count)
            text.write(raw(prompt.own_rows))
        text.finish()
        pieces.write(b'"}')
    ids = [_base64_object(tensor.text_ids) for tensor in tensors]
    pieces.write(b"," if tensors[0].stacked else b"],")
    pieces.write(_dumps({"text_ids": ids[0] if tensors[0].stacked else ids, **rest})[1:])


class Base64Text:
    """Writes bytes that come one after the other as one text in base64."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._left = b""  # up to two bytes, for which the third has not come

    def write(self, content: memoryview) -> None:
        """Append bytes."""
        content = content[self._complete(content) :]
        triples = whole_triples(content)
        for slice_ in cut(triples, _BASE64_BYTES):
            self._pieces.write(base64(slice_))
        self._left += bytes(content[len(triples) :])

    def write_constant(self, constant: Constant, count: int) -> None:
        """Append the first `count` of rows whose text is kept."""
        content = constant.first(count)
        skip = self._complete(content)
        triples = whole_triples(content[skip:])
        text = constant.base64(skip)
        size = len(triples) // 3 * 4
        self._pieces.write(text if size == len(text) else text[:size])
        self._left += bytes(content[skip + len(triples) :])

    def finish(self) -> None:
        """Write what is left, padded."""
        self._pieces.write(base64(memoryview(self._left)))
        self._left = b""

    def _complete(self, content: memoryview) -> int:
        """Write the bytes that are left with what they lack; return how many bytes of `content` that took."""
        lacking = min(-len(self._left) % 3, len(content))
        self._left += bytes(content[:lacking])
        if len(self._left) == 3:  # noqa: PLR2004 - bytes that base64 writes together
            self._pieces.write(base64(memoryview(self._left)))
            self._left = b""
        return lacking


def _write_rows(prompt: PromptRows, pieces: Pieces) -> None:
    """Write the rows of one prompt, as a list of lists."""
    texts: list[memoryview] = []
    for constant, count in prompt.constant_runs():
        texts.append(constant.first_json(count))
    texts += map(memoryview, json_rows(prompt.own_rows))
    if texts:
        texts[-1] = texts[-1][:-1]  # no comma behind the last row
    pieces.write(b"[")
    for text in texts:
        pieces.write(text)
    pieces.write(b"]")


def _base64_object(array: Array) -> dict[str, object]:
    return {"dtype": array.dtype.name, "shape": array.shape, "base64": base64(raw(array)).decode()}


def _dumps(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
