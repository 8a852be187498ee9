import ml_dtypes
import numpy as np
import pytest
from pydantic import ValidationError
from ulid import ULID

from jobs.errors import TensorFormatError
from jobs.messages import ChunkMessage, JobEvent, PredictFailure, PredictMessage, PredictReply, pack_reply, unpack_reply
from jobs.tensors import save_tensors


def test_a_reply_comes_back_prompt_by_prompt():
    own_rows = [np.full((n, 3), n, ml_dtypes.bfloat16) for n in (2, 1, 4)]
    sent = PredictReply(
        "0123456789abcdef", 512, 1.5, own_rows, np.array([34, 33, 36], np.int32), np.array([False, True, False])
    )
    got = unpack_reply(pack_reply(sent))
    assert isinstance(got, PredictReply)
    assert (got.fingerprint, got.encode_ms) == ("0123456789abcdef", 1.5)
    assert [rows.shape for rows in got.own_rows] == [(2, 3), (1, 3), (4, 3)]
    assert all((a == b).all() for a, b in zip(got.own_rows, own_rows, strict=True))
    assert got.num_tokens.tolist() == [34, 33, 36]
    assert got.truncated.tolist() == [False, True, False]


def test_a_failure_comes_back():
    assert unpack_reply(pack_reply(PredictFailure(position=3, reason="é"))) == PredictFailure(position=3, reason="é")


@pytest.mark.parametrize("content", [b"", b"{}", save_tensors({"own_rows": np.zeros((1, 1), np.float32)})])
def test_bytes_that_are_no_reply_are_an_error(content):
    with pytest.raises(TensorFormatError):
        unpack_reply(content)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (ChunkMessage, {"job_id": "../../etc", "chunk": 0}),
        (ChunkMessage, {"job_id": str(ULID()), "chunk": -1}),
        (ChunkMessage, {"job_id": str(ULID()), "chunk": 0, "version": 2}),
        (ChunkMessage, {"job_id": str(ULID()), "chunk": 0, "more": 1}),
        (JobEvent, {"job_id": "../../etc"}),
        (JobEvent, {"job_id": str(ULID()), "what": "exploded"}),
        (JobEvent, {"job_id": str(ULID()), "version": 2}),
        (PredictMessage, {"request_id": "x:y", "prompts": ["a"], "deadline": 0}),
    ],
)
def test_a_message_that_is_not_ours_is_refused(kind, fields):
    with pytest.raises(ValidationError):
        kind.model_validate(fields)
