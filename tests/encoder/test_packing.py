import pytest
import torch

from encoder.packing import Packing

PAD = 99
SEQUENCES = [[1, 2, 3], [4], [], [5, 6]]


def build(sequences, prefix_length=10, padded_to=0):
    return Packing.build(sequences, prefix_length=prefix_length, pad_token_id=PAD, padded_to=padded_to)


def numbered_rows(packing):
    """Rows that say where they stand: row m is (m, m)."""
    return torch.arange(len(packing.ids), dtype=torch.float32)[:, None].expand(-1, 2).clone()


def test_sequences_lie_end_to_end_the_shortest_first():
    packing = build(SEQUENCES)
    assert packing.order == [2, 1, 3, 0]
    assert packing.own == [0, 1, 2, 3]
    assert packing.own_starts == [0, 0, 1, 3]
    assert packing.ids.tolist() == [4, 5, 6, 1, 2, 3]
    assert packing.ids.dtype == torch.int64


def test_sequences_of_one_length_keep_their_order():
    assert build([[1], [2], [3]]).order == [0, 1, 2]


def test_positions_count_on_from_the_prefix_in_every_sequence():
    assert build(SEQUENCES).positions.tolist() == [10, 10, 11, 10, 11, 12]
    assert build(SEQUENCES, prefix_length=0).positions.tolist() == [0, 0, 1, 0, 1, 2]


def test_without_a_length_to_pad_to_there_are_no_pad_rows():
    packing = build(SEQUENCES)
    assert packing.pads == [0, 0, 0, 0]
    assert PAD not in packing.ids


def test_pad_rows_stand_behind_all_own_rows_and_count_on_from_their_own_sequence():
    packing = build(SEQUENCES, padded_to=4)
    assert packing.pads == [4, 3, 2, 1]
    assert packing.pad_starts == [6, 10, 13, 15]
    assert packing.ids.tolist() == [4, 5, 6, 1, 2, 3, *[PAD] * 10]
    assert packing.positions[6:].tolist() == [10, 11, 12, 13, 11, 12, 13, 12, 13, 13]


def test_a_sequence_as_long_as_the_padding_or_longer_has_no_pad_rows():
    packing = build([[1, 2, 3, 4], [1, 2, 3]], padded_to=3)
    assert packing.pads == [0, 0]
    assert packing.ids.tolist() == [1, 2, 3, 1, 2, 3, 4]


def test_split_gives_the_rows_in_the_order_of_the_sequences():
    packing = build(SEQUENCES)
    parts = packing.split(numbered_rows(packing))
    assert [part[:, 0].tolist() for part in parts] == [[3, 4, 5], [0], [], [1, 2]]
    assert [packing.ids[part[:, 0].long()].tolist() for part in parts] == SEQUENCES


def test_split_puts_the_pad_rows_behind_the_own_rows_of_their_sequence():
    packing = build(SEQUENCES, padded_to=4)
    parts = packing.split(numbered_rows(packing))
    assert [part[:, 0].tolist() for part in parts] == [[3, 4, 5, 15], [0, 10, 11, 12], [6, 7, 8, 9], [1, 2, 13, 14]]


@pytest.mark.parametrize("padded_to", [0, 4])
def test_what_is_split_keeps_the_batch_neither_alive_nor_in_reach(padded_to):
    packing = build(SEQUENCES, padded_to=padded_to)
    rows = numbered_rows(packing)
    parts = packing.split(rows)
    want = [part.clone() for part in parts]
    rows.fill_(-1)
    assert all(torch.equal(part, kept) for part, kept in zip(parts, want, strict=True))
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in parts if len(part))


def test_one_sequence_alone_is_a_copy_too():
    packing = build([[1, 2]])
    rows = numbered_rows(packing)
    (part,) = packing.split(rows)
    assert torch.equal(part, rows)
    assert part.data_ptr() != rows.data_ptr()


def test_no_sequences_give_an_empty_packing():
    packing = build([], padded_to=4)
    assert (packing.order, packing.own, packing.pads) == ([], [], [])
    assert len(packing.ids) == len(packing.positions) == 0
    assert packing.split(torch.empty(0, 2)) == []


def test_empty_sequences_give_empty_parts():
    packing = build([[], []])
    assert len(packing.ids) == len(packing.positions) == 0
    assert [part.shape for part in packing.split(torch.empty(0, 2))] == [(0, 2), (0, 2)]
