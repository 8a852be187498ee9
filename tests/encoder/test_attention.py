import random
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from encoder import Encoder
from encoder.attention import IMPLEMENTATION, RecordingAttention, packed_attention, supports_varlen
from encoder.packing import Packing

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
SCALE = 0.3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
LENGTHS = [
    [1],
    [5],
    [1, 1, 1],
    [3, 1, 7, 1, 3, 12],
    [20, 21, 22, 23, 24, 25, 26],
    [2, 0, 5, 0],
    [0],
    random.Random(0).choices(range(1, 41), k=9),
    random.Random(1).choices(range(1, 41), k=9),
    random.Random(2).choices(range(1, 11), k=30),
]


@pytest.fixture
def eager_varlen(monkeypatch):
    """What torch documents of `varlen_attn`, without its kernel, which needs CUDA; returns the options of each call."""
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
        calls.append(dict(options))
        scale, enable_gqa = options.pop("scale"), options.pop("enable_gqa")
        window_size = options.pop("window_size", (-1, -1))
        assert options.pop("num_splits", None) in {None, 1}
        assert not options
        assert window_size in {(-1, -1), (-1, 0)}
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert query.is_contiguous()
        assert key.is_contiguous()
        assert value.is_contiguous()
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert cu_seq_q[0] == cu_seq_k[0] == 0
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key)) == (len(query), len(value))
        assert max_q == max(2, cu_seq_q.diff().max())  # the kernel takes 1 to mean one query in every sequence
        assert max_k >= cu_seq_k.diff().max()
        out = torch.empty_like(query)
        for n in range(len(cu_seq_q) - 1):
            queries, keys = slice(*cu_seq_q[n : n + 2]), slice(*cu_seq_k[n : n + 2])
            num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
            seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
            if window_size == (-1, 0):
                seen = seen.tril(num_keys - num_queries)
            out[queries] = plain_attention(query[queries], key[keys], value[keys], seen, scale)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return calls


def plain_attention(query, key, value, seen, scale):
    """Softmax by hand: `query [n, h, d]`, `key` and `value [t, g, d]`, `seen [n, t]` -> `[n, h, d]`."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("nhd,thd->hnt", query, key) * scale
    weights = scores.masked_fill(~seen, -torch.inf).exp()
    return torch.einsum("hnt,thd->nhd", weights / weights.sum(-1, keepdim=True), value)


def forward(lengths, *, prefix_length=4, padded_to=0, kv_heads=KV_HEADS):
    """A packing, and random queries, keys, values and cache for it."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, heads):
        return torch.randn(rows, heads, HEAD_DIM, generator=generator)

    sequences = [[7] * length for length in lengths]
    packing = Packing.build(sequences, prefix_length=prefix_length, pad_token_id=0, padded_to=padded_to)
    rows = len(packing.ids)
    cache = {3: (draw(prefix_length, kv_heads), draw(prefix_length, kv_heads))} if prefix_length else {}
    return packing, cache, (draw(rows, HEADS), draw(rows, kv_heads), draw(rows, kv_heads))


def one_by_one(packing, cache, tensors):
    """Every sequence by itself behind the prefix, its pad rows seeing the prefix and all own rows."""
    query, key, value = tensors
    prefix_key, prefix_value = cache.get(3, (key[:0], value[:0]))
    out = torch.full_like(query, torch.nan)
    blocks = zip(packing.own_starts, packing.own, packing.pad_starts, packing.pads, strict=True)
    for start, own, pad_start, num_pads in blocks:
        own_rows, pad_rows = slice(start, start + own), slice(pad_start, pad_start + num_pads)
        keys = torch.cat([prefix_key, key[own_rows]])
        values = torch.cat([prefix_value, value[own_rows]])
        causal = torch.ones(own, len(keys), dtype=torch.bool).tril(len(prefix_key))
        out[own_rows] = plain_attention(query[own_rows], keys, values, causal, SCALE)
        out[pad_rows] = plain_attention(query[pad_rows], keys, values, causal.new_ones(num_pads, len(keys)), SCALE)
    return out


def attend(case, kernel, **options):
    packing, cache, tensors = case
    return packed_attention(packing, cache, kernel, **options)(3, *tensors, SCALE)


@pytest.mark.parametrize("exact", [False, True], ids=["bucketed", "exact"])
@pytest.mark.parametrize("padded_to", [0, 40], ids=["without pads", "with pads"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_sequence_is_attended_to_as_if_alone_behind_the_prefix(lengths, padded_to, exact):
    case = forward(lengths, padded_to=padded_to)
    torch.testing.assert_close(attend(case, "sdpa", exact=exact), one_by_one(*case), **TOLERANCE)


@pytest.mark.parametrize("exact", [False, True], ids=["bucketed", "exact"])
@pytest.mark.parametrize("padded_to", [0, 40], ids=["without pads", "with pads"])
@pytest.mark.parametrize("lengths", [lengths for lengths in LENGTHS if 0 not in lengths], ids=str)
def test_without_a_prefix_every_sequence_is_attended_to_as_if_alone(lengths, padded_to, exact):
    case = forward(lengths, prefix_length=0, padded_to=padded_to)
    torch.testing.assert_close(attend(case, "sdpa", exact=exact), one_by_one(*case), **TOLERANCE)


def test_pad_rows_of_some_sequences_and_not_of_others_are_attended_to_as_if_alone():
    case = forward([4, 9, 12, 9, 2], padded_to=9)
    assert case[0].pads == [7, 5, 0, 0, 0]
    torch.testing.assert_close(attend(case, "sdpa"), one_by_one(*case), **TOLERANCE)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, HEADS])
@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_any_number_of_key_heads_gives_each_group_of_query_heads_its_own(kernel, kv_heads, eager_varlen):
    case = forward([3, 1, 6, 2], padded_to=8, kv_heads=kv_heads)
    torch.testing.assert_close(attend(case, kernel), one_by_one(*case), **TOLERANCE)
    assert all(call["enable_gqa"] == (kv_heads != HEADS) for call in eager_varlen)


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_a_layer_uses_its_own_part_of_the_cache(kernel, eager_varlen):  # noqa: ARG001 - the kernel itself
    packing, cache, tensors = forward([3, 1])
    attention = packed_attention(packing, {3: cache[3], 4: tuple(t + 1 for t in cache[3])}, kernel)
    torch.testing.assert_close(attention(3, *tensors, SCALE), one_by_one(packing, cache, tensors), **TOLERANCE)
    moved = {3: tuple(t + 1 for t in cache[3])}
    torch.testing.assert_close(attention(4, *tensors, SCALE), one_by_one(packing, moved, tensors), **TOLERANCE)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("prefix_length", [0, 4])
@pytest.mark.parametrize("padded_to", [0, 40], ids=["without pads", "with pads"])
@pytest.mark.parametrize("lengths", [lengths for lengths in LENGTHS if 0 not in lengths], ids=str)
def test_the_varying_length_kernel_is_told_the_same_rows_as_sdpa(
    lengths, padded_to, prefix_length, exact, eager_varlen
):
    case = forward(lengths, prefix_length=prefix_length, padded_to=padded_to)
    torch.testing.assert_close(attend(case, "varlen", exact=exact), attend(case, "sdpa"), **TOLERANCE)
    assert len(eager_varlen) == (2 if padded_to else 1)
    assert all(call["scale"] == SCALE for call in eager_varlen)


@pytest.mark.parametrize("padded_to", [0, 40], ids=["without pads", "with pads"])
@pytest.mark.parametrize("lengths", [[2, 0, 5, 0], [0, 0, 1]], ids=str)
def test_empty_sequences_are_no_trouble_to_the_varying_length_kernel(lengths, padded_to, eager_varlen):  # noqa: ARG001
    case = forward(lengths, padded_to=padded_to)
    torch.testing.assert_close(attend(case, "varlen"), attend(case, "sdpa"), **TOLERANCE)


def test_pad_rows_of_some_sequences_and_not_of_others_are_told_to_the_varying_length_kernel(eager_varlen):
    case = forward([4, 9, 12, 9, 2], padded_to=9)
    torch.testing.assert_close(attend(case, "varlen"), attend(case, "sdpa"), **TOLERANCE)
    assert len(eager_varlen) == 2


@pytest.mark.parametrize(("exact", "splits"), [(False, None), (True, 1)])
def test_only_exact_attention_forbids_the_kernel_to_split(exact, splits, eager_varlen):
    attend(forward([3, 1], padded_to=4), "varlen", exact=exact)
    assert [call.get("num_splits") for call in eager_varlen] == [splits, splits]


def test_exact_attention_gives_a_sequence_the_same_bits_in_any_company():
    packing, cache, tensors = forward([3, 17, 17, 18, 40], padded_to=41)
    together = packing.split(attend((packing, cache, tensors), "sdpa", exact=True))
    parts = zip(*(packing.split(tensor) for tensor in tensors), strict=True)
    for length, part, got in zip([3, 17, 17, 18, 40], parts, together, strict=True):
        alone = forward([length], padded_to=41)[0]
        assert torch.equal(attend((alone, cache, part), "sdpa", exact=True), got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recording_attends_causally_and_keeps_copies_of_keys_and_values_in_the_dtype_asked_for(dtype):
    _, _, (query, key, value) = forward([9])
    recording = RecordingAttention(dtype)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    want = plain_attention(query, key, value, causal, SCALE)
    torch.testing.assert_close(recording(3, query, key, value, SCALE), want, **TOLERANCE)
    kept = key.to(dtype, copy=True), value.to(dtype, copy=True)
    key.fill_(0)
    value.fill_(0)
    assert list(recording.cache) == [3]
    assert all(torch.equal(got, tensor) for got, tensor in zip(recording.cache[3], kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cpu_has_no_varying_length_kernel(dtype):
    assert not supports_varlen(torch.device("cpu"), dtype, 128)


def test_an_old_torch_has_no_varying_length_kernel(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.delattr(torch.nn.attention, "varlen")
    assert not supports_varlen(torch.device("cuda"), torch.bfloat16, 128)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "supported"),
    [
        ((9, 0), torch.bfloat16, 128, True),
        ((8, 0), torch.float16, 256, True),
        ((7, 5), torch.float16, 128, False),
        ((9, 0), torch.float32, 128, False),
        ((9, 0), torch.bfloat16, 264, False),
        ((9, 0), torch.bfloat16, 100, False),
    ],
)
def test_the_varying_length_kernel_needs_a_recent_card_16_bit_and_heads_it_knows(
    capability, dtype, head_dim, supported, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert supports_varlen(torch.device("cuda"), dtype, head_dim) == supported


@pytest.mark.parametrize("fixture", ["tiny", "tiny_qwen3"])
def test_an_encoder_with_the_varying_length_kernel_gives_the_same_rows(fixture, request, monkeypatch, eager_varlen):
    preset = {"tiny": "flux2-dev", "tiny_qwen3": "flux2-klein-4b"}[fixture]
    prompts = ["a fox in the snow", ""]
    plain = Encoder.load(request.getfixturevalue(fixture), preset, device="cpu", dtype="float32")
    monkeypatch.setattr("encoder.encoder.supports_varlen", lambda *_: True)
    mine = Encoder.load(request.getfixturevalue(fixture), preset, device="cpu", dtype="float32", attention="varlen")
    assert (plain.attention, mine.attention) == ("sdpa", "varlen")
    got, _ = mine.dense(mine.encode(prompts))
    want, _ = plain.dense(plain.encode(prompts))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert eager_varlen


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}], ids=lambda o: str([*o]))
def test_attention_that_is_not_covered_is_refused_rather_than_done_wrong(options):
    packing, cache, tensors = forward([3])
    if options:
        options = options | {"packed": packed_attention(packing, cache, "sdpa")}
    with pytest.raises(ValueError, match="without soft cap and sinks only"):
        ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](
            SimpleNamespace(layer_idx=3), *(tensor.transpose(0, 1)[None] for tensor in tensors), None, **options
        )


def test_the_interface_passes_on_layer_and_scale_and_has_a_default_scale():
    packing, cache, tensors = forward([3, 1])
    packed = packed_attention(packing, cache, "sdpa")
    batch = [tensor.transpose(0, 1)[None] for tensor in tensors]  # (1, h, M, d)
    attention = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]
    got, weights = attention(SimpleNamespace(layer_idx=3), *batch, None, scaling=SCALE, packed=packed)
    assert weights is None
    assert torch.equal(got, packed(3, *tensors, SCALE)[None])
    default, _ = attention(SimpleNamespace(layer_idx=3), *batch, None, packed=packed)
    assert torch.equal(default, packed(3, *tensors, HEAD_DIM**-0.5)[None])
