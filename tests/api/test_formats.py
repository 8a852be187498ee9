import base64
import io

import numpy as np
import orjson
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as load_safetensors

from api.formats import MEDIA_TYPES, Format, Renderer, headers, is_quick, negotiate
from api.pieces import MAX_PIECE_BYTES
from api.rows import Padding
from jobs.tensors import DTYPES
from tests.api.predictions import MAX_LENGTH, sample

# The last of three is truncated; what is right-padded has pad rows of its own.
BATCHES = {
    "one": {"num_tokens": [11]},
    "three": {"num_tokens": [6, 17, MAX_LENGTH]},
    "right padded": {"num_tokens": [7, 20, MAX_LENGTH], "right_padded": True},
    # In base64, no tensor ends where three bytes do.
    "odd": {"num_tokens": [7, 8, 9], "embed_dim": 5},
    # Rows come in several blocks, which are cut, and pieces are not joined.
    "wide": {"num_tokens": [9, 23], "embed_dim": 15360},
}


def rendered(prediction, answer_format, dtype=None, padding=Padding.MAX_LENGTH):
    body = Renderer().render(prediction, answer_format, dtype=dtype, padding=padding, time_ms=20.0004)
    assert all(0 < len(piece) <= MAX_PIECE_BYTES for piece in body.pieces)
    content = b"".join(body.pieces)
    assert len(content) == body.size
    assert body.media_type == MEDIA_TYPES[answer_format]
    return content


def from_numpy(array):
    """The tensor with the bits of `array`, also in bfloat16."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def from_base64(document):
    dtype = getattr(torch, document["dtype"])
    flat = torch.frombuffer(bytearray(base64.b64decode(document["base64"], validate=True)), dtype=dtype)
    return flat.reshape(document["shape"])


def decoded(content, answer_format, dtype):
    """`prompt_embeds` and `text_ids` of a body, as a tensor each or as lists of them; None where there are none."""
    if answer_format is Format.PT:
        return torch.load(io.BytesIO(content), weights_only=True), None
    if answer_format is Format.SAFETENSORS:
        tensors = load_safetensors(content)
        if "prompt_embeds" in tensors:
            return tensors["prompt_embeds"], tensors["text_ids"]
        count = len(tensors["num_tokens"])
        return tuple([tensors[f"{name}.{i}"] for i in range(count)] for name in ("prompt_embeds", "text_ids"))
    document = orjson.loads(content)
    if answer_format is Format.BASE64:
        return tuple(
            [from_base64(each) for each in document[name]]
            if isinstance(document[name], list)
            else from_base64(document[name])
            for name in ("prompt_embeds", "text_ids")
        )
    embeds = [torch.tensor(rows, dtype=getattr(torch, dtype)) for rows in document["prompt_embeds"]]
    ids = [torch.tensor(rows) for rows in document["text_ids"]]
    ragged = isinstance(document["shapes"]["text_ids"][0], list)
    return (embeds, ids) if ragged else (torch.stack(embeds), torch.stack(ids))


def assert_same(found, expected):
    """All bits, dtypes and shapes are the same."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("own_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("answer_format", Format)
def test_padded_prompts_are_one_tensor(answer_format, dtype, own_dtype, batch):
    given = sample(**BATCHES[batch], dtype=own_dtype)
    content = rendered(given.prediction, answer_format, dtype)
    embeds, ids = decoded(content, answer_format, dtype or own_dtype)
    assert_same(embeds, from_numpy(given.dense.astype(DTYPES[dtype or own_dtype])))
    if answer_format is not Format.PT:
        expected = torch.zeros(len(given.real), MAX_LENGTH, 4, dtype=torch.int64)
        expected[:, :, 3] = torch.arange(MAX_LENGTH)
        assert_same(ids, expected)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("own_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("answer_format", Format)
def test_without_padding_each_prompt_has_the_rows_of_its_tokens(answer_format, dtype, own_dtype, batch):
    given = sample(**BATCHES[batch], dtype=own_dtype)
    content = rendered(given.prediction, answer_format, dtype, Padding.NONE)
    embeds, ids = decoded(content, answer_format, dtype or own_dtype)
    assert_same(embeds, [from_numpy(rows.astype(DTYPES[dtype or own_dtype])) for rows in given.real])
    if answer_format is not Format.PT:
        for found, start, rows in zip(ids, given.starts, given.real, strict=True):
            assert found.tolist() == [[0, 0, 0, position] for position in range(start, start + len(rows))]


@pytest.mark.parametrize("answer_format", [Format.JSON, Format.BASE64])
def test_documents_tell_the_rest(answer_format):
    given = sample([6, 17, MAX_LENGTH])
    document = orjson.loads(rendered(given.prediction, answer_format, "bfloat16"))
    assert {name: value for name, value in document.items() if name not in {"prompt_embeds", "text_ids"}} == {
        "shapes": {"prompt_embeds": [3, MAX_LENGTH, 9], "text_ids": [3, MAX_LENGTH, 4]},
        "num_tokens": [6, 17, MAX_LENGTH],
        "truncated": [False, False, True],
        "dtype": "bfloat16",
        "fingerprint": "0123456789abcdef",
        "encode_ms": 12.346,
        "queue_ms": 0.5,
        "time_ms": 20.0,
    }


@pytest.mark.parametrize("answer_format", [Format.JSON, Format.BASE64])
def test_without_padding_there_is_a_shape_for_each_prompt(answer_format):
    given = sample([6, 17])
    document = orjson.loads(rendered(given.prediction, answer_format, padding=Padding.NONE))
    assert document["shapes"] == {"prompt_embeds": [[6, 9], [17, 9]], "text_ids": [[6, 4], [17, 4]]}


def test_what_float16_cannot_hold_is_infinite_and_null_in_json():
    given = sample([6])
    given.prediction.own_rows[0][0, :2] = [1e5, -1e5]
    binary = torch.load(io.BytesIO(rendered(given.prediction, Format.PT, "float16")), weights_only=True)
    assert binary[0, -1, :2].tolist() == [float("inf"), float("-inf")]
    document = orjson.loads(rendered(given.prediction, Format.JSON, "float16"))
    assert document["prompt_embeds"][0][-1][:2] == [None, None]


@pytest.mark.parametrize("padding", Padding)
def test_safetensors_tell_the_rest(tmp_path, padding):
    given = sample([6, 17, MAX_LENGTH])
    path = tmp_path / "answer.safetensors"
    path.write_bytes(rendered(given.prediction, Format.SAFETENSORS, padding=padding))
    with safe_open(path, "pt") as file:
        told = {"fingerprint": "0123456789abcdef", "max_length": str(MAX_LENGTH), "num_prefix_tokens": "5"}
        assert file.metadata() == told
        assert_same(file.get_tensor("num_tokens"), torch.tensor([6, 17, MAX_LENGTH], dtype=torch.int32))
        assert file.get_tensor("truncated").tolist() == [False, False, True]
        if padding is Padding.NONE:
            assert_same(file.get_tensor("pad_row"), torch.from_numpy(given.prediction.constants.pad_row))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", Padding)
def test_tensors_in_safetensors_lie_at_a_multiple_of_their_width(padding, dtype):
    content = rendered(sample([7, 8, 10], embed_dim=5).prediction, Format.SAFETENSORS, dtype, padding)
    start = 8 + int.from_bytes(content[:8], "little")
    widths = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
    header = orjson.loads(content[8:start])
    del header["__metadata__"]
    assert all((start + each["data_offsets"][0]) % widths[each["dtype"]] == 0 for each in header.values())


@pytest.mark.parametrize("answer_format", Format)
def test_an_encoder_without_constant_rows_has_answers(answer_format):
    given = sample([7, 20], right_padded=True)
    constants = type(given.prediction.constants)(
        given.prediction.constants.prefix_rows[:0], given.prediction.constants.pad_row
    )
    own = list(given.dense)
    bare = type(given.prediction)(**{**vars(given.prediction), "own_rows": own, "constants": constants})
    embeds, _ = decoded(rendered(bare, answer_format), answer_format, "float32")
    assert_same(embeds, from_numpy(given.dense))


@pytest.mark.parametrize("answer_format", [Format.SAFETENSORS, Format.PT])
def test_own_rows_and_constant_rows_are_sent_from_where_they_are(answer_format):
    renderer = Renderer()
    first, second = (sample([9], embed_dim=30_000) for _ in range(2))
    bodies = [
        renderer.render(each.prediction, answer_format, dtype=None, padding=Padding.MAX_LENGTH, time_ms=1)
        for each in (first, second)
    ]

    def addresses(body):
        return {np.frombuffer(piece, dtype=np.uint8).ctypes.data for piece in body.pieces}

    for each, body in zip((first, second), bodies, strict=True):
        assert each.prediction.own_rows[0].ctypes.data in addresses(body)
    # The block of pad rows, and the prefix.
    assert len(addresses(bodies[0]) & addresses(bodies[1])) >= 2


@pytest.mark.parametrize(
    ("answer_format", "dtype", "quick"),
    [
        (Format.SAFETENSORS, None, True),
        (Format.SAFETENSORS, "bfloat16", True),
        (Format.SAFETENSORS, "float32", False),
        (Format.PT, None, False),
        (Format.JSON, None, False),
        (Format.BASE64, "bfloat16", False),
    ],
)
def test_only_rows_that_need_not_be_read_are_rendered_at_once(answer_format, dtype, quick):
    assert is_quick(sample([6], dtype="bfloat16").prediction, answer_format, dtype) is quick


def test_constants_of_two_encoders_are_not_mixed_up():
    renderer = Renderer()
    first, second = sample([6]), sample([6], dtype="bfloat16")
    second = type(second.prediction)(**{**vars(second.prediction), "fingerprint": "another"})
    for prediction in (first.prediction, second):
        body = renderer.render(prediction, Format.PT, dtype="float32", padding=Padding.MAX_LENGTH, time_ms=1)
        loaded = torch.load(io.BytesIO(b"".join(body.pieces)), weights_only=True)
        assert_same(loaded[0, 0], from_numpy(prediction.constants.pad_row.astype(np.float32)))


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, Format.JSON),
        ("*/*", Format.JSON),
        ("application/*", Format.JSON),
        ("application/json", Format.JSON),
        ("application/vnd.layerstack.base64+json", Format.BASE64),
        ("image/png, application/vnd.safetensors, */*", Format.SAFETENSORS),
        ("application/json;q=0.3, application/vnd.pytorch;q=0.4", Format.PT),
        ("image/png", None),
    ],
)
def test_the_format_follows_from_accept(accept, chosen):
    assert negotiate(None, accept) == chosen


def test_the_query_wins_over_the_header():
    assert negotiate(Format.PT, "application/json") == Format.PT


def test_headers_tell_what_binary_formats_cannot():
    assert headers(sample([6, MAX_LENGTH]).prediction) == {
        "Layerstack-Fingerprint": "0123456789abcdef",
        "Layerstack-Num-Tokens": f"6,{MAX_LENGTH}",
        "Layerstack-Truncated": "false,true",
        "Layerstack-Encode-Ms": "12.346",
        "Layerstack-Queue-Ms": "0.500",
        "Vary": "Accept",
    }
