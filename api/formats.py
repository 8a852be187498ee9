"""The bodies that POST /predict can answer with."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np

from api.accept import best_media_type
from api.body import Body
from api.jsonformat import write_base64, write_lists
from api.pieces import Pieces
from api.prediction import Prediction
from api.rows import ConstantsCache, Padding, RowTensor, prompt_rows, raw, row_tensors
from api.torchfile import write_tensors
from jobs.tensors import DtypeName, dtype_name, safetensors_header


class Format(StrEnum):
    """What a client can ask for, by `?format=` or by `Accept`."""

    JSON = "json"
    """Nested lists of floats."""
    BASE64 = "base64"
    """The same document, with the bytes of the tensors in base64."""
    SAFETENSORS = "safetensors"
    """`prompt_embeds`, `text_ids`, `num_tokens` and `truncated`."""
    PT = "pt"
    """`prompt_embeds` alone, as `torch.save` writes it: what diffusers' `Flux2RemoteTextEncoderStep` reads."""

    @property
    def is_text(self) -> bool:
        """Whether compressing it makes it much smaller."""
        return self in {Format.JSON, Format.BASE64}


MEDIA_TYPES = {
    Format.JSON: "application/json",
    Format.BASE64: "application/vnd.layerstack.base64+json",
    Format.SAFETENSORS: "application/vnd.safetensors",
    Format.PT: "application/vnd.pytorch",
}


def negotiate(asked: Format | None, accept: str | None) -> Format | None:
    """Choose the format: `asked` if it is given, else the one that suits the header `accept` best.

    Returns:
        None if the client accepts none of ours.
    """
    if asked is not None:
        return asked
    chosen = best_media_type(accept, list(MEDIA_TYPES.values()))
    return next((each for each, media_type in MEDIA_TYPES.items() if media_type == chosen), None)


def is_quick(prediction: Prediction, answer_format: Format, dtype: DtypeName | None) -> bool:
    """Tell whether the rows are rendered without being read, which needs no thread."""
    return answer_format is Format.SAFETENSORS and dtype in {None, dtype_name(prediction.constants.pad_row)}


def headers(prediction: Prediction) -> dict[str, str]:
    """Return what is told beside the tensors in every format."""
    return {
        "Layerstack-Fingerprint": prediction.fingerprint,
        "Layerstack-Num-Tokens": ",".join(map(str, prediction.num_tokens.tolist())),
        "Layerstack-Truncated": ",".join("true" if cut else "false" for cut in prediction.truncated.tolist()),
        "Layerstack-Encode-Ms": f"{prediction.encode_ms:.3f}",
        "Layerstack-Queue-Ms": f"{prediction.queue_ms:.3f}",
        "Vary": "Accept",
    }


class Renderer:
    """Makes bodies. What is the same in all answers of an encoder is made once and kept; threads may share it."""

    def __init__(self) -> None:
        self._constants = ConstantsCache()

    def render(
        self,
        prediction: Prediction,
        answer_format: Format,
        *,
        dtype: DtypeName | None,
        padding: Padding,
        time_ms: float,
    ) -> Body:
        """Return the body of an answer.

        The own rows are written as text here, or have their checksum taken, so this is for a thread, unless `is_quick`.
        In the binary formats they are not copied, unless `dtype` is another than theirs.

        Args:
            prediction: the rows.
            answer_format: how they are written.
            dtype: of `prompt_embeds`; None leaves the encoder's.
            padding: which rows.
            time_ms: told in the JSON documents.
        """
        chosen = dtype or dtype_name(prediction.constants.pad_row)
        constants = self._constants.get(prediction.constants, prediction.fingerprint, chosen)
        prompts = prompt_rows(prediction, constants, chosen, padding)
        tensors = row_tensors(prompts, padding)
        pieces = Pieces()
        match answer_format:
            case Format.JSON:
                write_lists(prompts, _rest(prediction, tensors, time_ms), pieces)
            case Format.BASE64:
                write_base64(tensors, _rest(prediction, tensors, time_ms), pieces)
            case Format.SAFETENSORS:
                _write_safetensors(prediction, tensors, pieces)
            case Format.PT:
                write_tensors(tensors, pieces)
        return Body(pieces.finish(), pieces.size, MEDIA_TYPES[answer_format])


def _rest(prediction: Prediction, tensors: Sequence[RowTensor], time_ms: float) -> dict[str, object]:
    """Return the fields of a document beside the tensors."""
    embeds = [tensor.shape for tensor in tensors]
    ids = [[*shape[:-1], 4] for shape in embeds]
    return {
        "shapes": {
            "prompt_embeds": embeds[0] if tensors[0].stacked else embeds,
            "text_ids": ids[0] if tensors[0].stacked else ids,
        },
        "num_tokens": prediction.num_tokens.tolist(),
        "truncated": prediction.truncated.tolist(),
        "dtype": tensors[0].dtype,
        "fingerprint": prediction.fingerprint,
        "encode_ms": round(prediction.encode_ms, 3),
        "queue_ms": round(prediction.queue_ms, 3),
        "time_ms": round(time_ms, 3),
    }


def _write_safetensors(prediction: Prediction, tensors: Sequence[RowTensor], pieces: Pieces) -> None:
    """Write the file with the widest values first, so that each tensor lies at a multiple of their width.

    Without padding it has the pad row, so that whoever reads it can put dense rows together.
    """
    stacked, pad_block = tensors[0].stacked, tensors[0].prompts[0].constants.pad_block
    endings = [""] if stacked else [f".{position}" for position in range(len(tensors))]
    ids = [tensor.text_ids for tensor in tensors]
    num_tokens, truncated = prediction.num_tokens.astype(np.int32), prediction.truncated.astype(np.bool_)
    pieces.write(
        safetensors_header(
            [(f"text_ids{ending}", each.dtype.name, each.shape) for ending, each in zip(endings, ids, strict=True)]
            + [("num_tokens", num_tokens.dtype.name, num_tokens.shape)]
            + [
                (f"prompt_embeds{ending}", each.dtype, each.shape)
                for ending, each in zip(endings, tensors, strict=True)
            ]
            + ([] if stacked else [("pad_row", tensors[0].dtype, [tensors[0].shape[-1]])])
            + [("truncated", truncated.dtype.name, truncated.shape)],
            {
                "fingerprint": prediction.fingerprint,
                "max_length": str(prediction.max_length),
                "num_prefix_tokens": str(len(prediction.constants.prefix_rows)),
            },
        )
    )
    for array in (*ids, num_tokens):
        pieces.write(raw(array))
    for tensor in tensors:
        for run in tensor.runs():
            pieces.write(run)
    if not stacked:
        pieces.write(pad_block.first(1))
    pieces.write(raw(truncated))
