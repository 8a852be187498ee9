"""The bodies that POST /predict can answer with."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import orjson

from api.media_types import essence
from api.predictor import Prediction
from api.torchfile import save_tensor
from jobs.tensors import save_tensors


class Format(StrEnum):
    """What a client can ask for, by `?format=` or by `Accept`."""

    JSON = "json"
    """Nested lists of floats."""
    SAFETENSORS = "safetensors"
    """`prompt_embeds`, `text_ids`, `num_tokens` and `truncated` in the encoder's dtype."""
    PT = "pt"
    """`prompt_embeds` alone, as `torch.save` writes it: what diffusers' `Flux2RemoteTextEncoderStep` reads."""


MEDIA_TYPES = {
    Format.JSON: "application/json",
    Format.SAFETENSORS: "application/vnd.safetensors",
    Format.PT: "application/vnd.pytorch",
}


def negotiate(asked: Format | None, accept: str | None) -> Format | None:
    """Choose the format: `asked` if it is given, else the first media type of `accept` that we have.

    Returns:
        None if the client accepts none of ours.
    """
    if asked is not None:
        return asked
    accepted = [essence(part) for part in (accept or "*/*").split(",")]
    by_media_type = {media_type: each for each, media_type in MEDIA_TYPES.items()}
    by_media_type |= {"*/*": Format.JSON, "application/*": Format.JSON}
    return next((by_media_type[media_type] for media_type in accepted if media_type in by_media_type), None)


def render(prediction: Prediction, answer_format: Format, time_ms: float) -> bytes:
    """Return the body of an answer."""
    if answer_format is Format.PT:
        return save_tensor(prediction.prompt_embeds)
    if answer_format is Format.SAFETENSORS:
        return save_tensors(
            {
                "prompt_embeds": prediction.prompt_embeds,
                "text_ids": prediction.text_ids,
                "num_tokens": prediction.num_tokens,
                "truncated": prediction.truncated,
            },
            {"fingerprint": prediction.fingerprint},
        )
    return _json(prediction, time_ms)


def headers(prediction: Prediction) -> dict[str, str]:
    """Return what is told beside the tensors in every format."""
    return {
        "Layerstack-Fingerprint": prediction.fingerprint,
        "Layerstack-Num-Tokens": ",".join(map(str, prediction.num_tokens.tolist())),
        "Layerstack-Truncated": ",".join("true" if cut else "false" for cut in prediction.truncated.tolist()),
        "Vary": "Accept",
    }


def _json(prediction: Prediction, time_ms: float) -> bytes:
    # Prompt by prompt: orjson keeps every other thread waiting while it writes.
    embeds = b",".join(_dumps(np.ascontiguousarray(rows, dtype=np.float32)) for rows in prediction.prompt_embeds)
    rest = {
        "text_ids": np.ascontiguousarray(prediction.text_ids),
        "shapes": {
            "prompt_embeds": list(prediction.prompt_embeds.shape),
            "text_ids": list(prediction.text_ids.shape),
        },
        "num_tokens": prediction.num_tokens.tolist(),
        "truncated": prediction.truncated.tolist(),
        "dtype": prediction.prompt_embeds.dtype.name,
        "fingerprint": prediction.fingerprint,
        "encode_ms": round(prediction.encode_ms, 3),
        "time_ms": round(time_ms, 3),
    }
    return b'{"prompt_embeds":[' + embeds + b"]," + _dumps(rest)[1:]


def _dumps(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
