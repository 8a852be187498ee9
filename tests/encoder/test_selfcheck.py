import pytest
import torch

from encoder import SelfCheckError
from encoder.selfcheck import RowRange, check, check_equal_bits, row_ranges

LENGTH, WIDTH, PREFIX = 12, 64, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Two prompts of 4 and 9 tokens, padded at the left.
RANGES = [
    row_ranges(prefix_length=PREFIX, num_tokens=num_tokens, max_length=LENGTH, padding_side="left")
    for num_tokens in (4, 9)
]


@pytest.fixture
def plain():
    """Rows as a model gives them: a few values hundreds of times larger than the rest."""
    rows = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    rows[..., 5] *= 500
    return rows


def run(fast, plain, attention="sdpa"):
    check(fast, plain, RANGES, model="some/model", attention=attention)


def test_left_padding_puts_pad_rows_in_front_of_the_prefix():
    assert row_ranges(prefix_length=3, num_tokens=8, max_length=20, padding_side="left") == [
        RowRange("pad", 0, 12),
        RowRange("prefix", 12, 15),
        RowRange("own", 15, 20),
    ]


def test_right_padding_puts_pad_rows_behind_the_own_rows():
    assert row_ranges(prefix_length=3, num_tokens=8, max_length=20, padding_side="right") == [
        RowRange("pad", 8, 20),
        RowRange("prefix", 0, 3),
        RowRange("own", 3, 8),
    ]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize(("prefix_length", "num_tokens"), [(0, 1), (3, 3), (3, 20), (0, 20)])
def test_every_row_is_of_one_kind(prefix_length, num_tokens, padding_side):
    ranges = row_ranges(prefix_length=prefix_length, num_tokens=num_tokens, max_length=20, padding_side=padding_side)
    assert sorted(row for part in ranges for row in range(part.start, part.stop)) == list(range(20))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_pass(plain, dtype):
    run(plain.to(dtype), plain.to(dtype))


def test_rows_that_are_all_zero_pass_if_both_are(plain):
    plain[:, :2] = 0
    run(plain, plain.clone())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_passes(plain, dtype):
    run((plain * (1 + 4 * torch.finfo(dtype).eps)).to(dtype), plain.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        (0, 0, r"1 of 8 pad rows of prompt 0 \(first: row 0\)"),
        (0, 9, r"1 of 3 prefix rows of prompt 0 \(first: row 9\)"),
        (0, 11, r"1 of 1 own rows of prompt 0 \(first: row 11\)"),
        (1, 2, r"1 of 3 pad rows of prompt 1 \(first: row 2\)"),
        (1, 6, r"1 of 6 own rows of prompt 1 \(first: row 6\)"),
    ],
)
def test_a_wrong_row_is_told_by_kind_prompt_and_place(plain, dtype, prompt, row, message):
    fast = plain.to(dtype, copy=True)
    fast[prompt, row] = fast[prompt, row].roll(1)
    with pytest.raises(SelfCheckError, match=message) as caught:
        run(fast, plain.to(dtype))
    assert ";" not in str(caught.value)


def test_the_message_says_model_attention_device_dtype_and_by_how_much(plain):
    fast = plain.clone()
    fast[0, 4] *= 1.5
    size = plain[0, 4].abs()
    error = (0.5 * size / (size + size.median())).mean().item()
    with pytest.raises(SelfCheckError) as caught:
        run(fast, plain, attention="varlen")
    for part in ("some/model", "varlen", "cpu", "torch.float32", "more than 0.0001", f"by up to {error:.3g}"):
        assert part in str(caught.value)


def test_several_wrong_rows_are_counted_for_each_kind_and_prompt_with_the_first_and_the_worst(plain):
    fast = plain.clone()
    fast[0, [3, 6]] += 1
    fast[1, 5] += 1
    fast[1, 5:] *= 1000
    with pytest.raises(SelfCheckError) as caught:
        run(fast, plain)
    parts = str(caught.value).split("; ")
    assert "2 of 8 pad rows of prompt 0 (first: row 3)" in parts[0]
    assert parts[1].startswith("1 of 3 prefix rows of prompt 1 (first: row 5)")
    assert parts[2].startswith("6 of 6 own rows of prompt 1 (first: row 6)")
    assert len(parts) == 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["fast", "plain"])
def test_one_value_that_is_no_number_is_refused(plain, side, value):
    rows = {"fast": plain.clone(), "plain": plain}
    rows[side][1, 8, 0] = value
    with pytest.raises(SelfCheckError, match=r"1 of 6 own rows of prompt 1 \(first: row 8\) by up to (inf|3\.4e\+38)"):
        run(rows["fast"], rows["plain"])


def test_nan_in_both_is_refused_too(plain):
    plain[0, 0] = torch.nan
    with pytest.raises(SelfCheckError, match=r"pad rows of prompt 0 \(first: row 0\)"):
        run(plain.clone(), plain)


@pytest.mark.parametrize("outlier", [1e3, 1e6])
def test_an_outlier_in_a_row_does_not_excuse_errors_in_the_rest(plain, outlier):
    plain[1, 8, 5] = outlier
    fast = plain.clone()
    fast[1, 8, 6:] *= 1.01
    assert (fast - plain)[1, 8].norm() / plain[1, 8].norm() < 1e-3
    with pytest.raises(SelfCheckError, match=r"1 of 6 own rows of prompt 1 \(first: row 8\)"):
        run(fast, plain)


def test_a_row_of_small_values_is_held_to_its_own_size(plain):
    plain[1, 8] *= 1e-6
    fast = plain.clone()
    fast[1, 8] = fast[1, 8].roll(1)
    with pytest.raises(SelfCheckError, match=r"1 of 6 own rows of prompt 1 \(first: row 8\)"):
        run(fast, plain)


def test_equal_bits_pass(plain):
    check_equal_bits([plain[0], plain[1]], [plain[0].clone(), plain[1].clone()], model="some/model")


def test_one_different_bit_is_refused_with_the_probe_and_the_difference(plain):
    other = plain.clone()
    other[1, 3, 0] = torch.nextafter(other[1, 3, 0], other.new_tensor(torch.inf))
    difference = (other - plain).abs().max().item()
    with pytest.raises(SelfCheckError) as caught:
        check_equal_bits(list(plain), list(other), model="some/model")
    for part in ("some/model", "deterministic", "on cpu", f"those of probe 1 differ by {difference:.3g}"):
        assert part in str(caught.value)
