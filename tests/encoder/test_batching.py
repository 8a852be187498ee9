from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder.batching import buckets, fill, plan

LENGTHS = st.lists(st.integers(0, 600), max_size=80)
BUDGETS = st.integers(1, 5000)
PATIENCE = st.integers(1, 80)
PROPERTY = settings(deadline=None)  # a busy machine is no failure


def fill_until_empty(lengths, budget, patience):
    waiting, forwards = list(range(len(lengths))), []
    while waiting:
        chosen = list(fill([lengths[n] for n in waiting], budget, patience))
        assert chosen[0] == 0
        forwards.append([waiting[n] for n in chosen])
        waiting = [n for position, n in enumerate(waiting) if position not in chosen]
    return forwards


def test_a_plan_puts_prompts_of_like_length_together():
    assert plan([1, 9, 2, 8], 10) == [[1], [3, 2], [0]]


def test_a_plan_keeps_the_order_of_prompts_of_one_length():
    assert plan([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]


def test_a_prompt_longer_than_the_budget_is_planned_alone():
    assert plan([3, 50, 3], 10) == [[1], [0, 2]]


def test_no_prompts_make_no_forward():
    assert plan([], 10) == []
    assert list(fill([], 10, 1)) == []
    assert buckets([], 2.0) == []


@PROPERTY
@given(LENGTHS, BUDGETS)
def test_a_plan_has_every_position_exactly_once(lengths, budget):
    positions = [position for batch in plan(lengths, budget) for position in batch]
    assert sorted(positions) == list(range(len(lengths)))


@PROPERTY
@given(LENGTHS, BUDGETS)
def test_a_planned_batch_is_within_the_budget_unless_it_is_one_long_prompt(lengths, budget):
    for batch in plan(lengths, budget):
        assert batch
        assert len(batch) == 1 or sum(lengths[position] for position in batch) <= budget


@PROPERTY
@given(LENGTHS, BUDGETS)
def test_a_plan_goes_from_the_longest_to_the_shortest(lengths, budget):
    planned = [lengths[position] for batch in plan(lengths, budget) for position in batch]
    assert planned == sorted(lengths, reverse=True)


@PROPERTY
@given(LENGTHS, BUDGETS)
def test_a_plan_opens_a_batch_only_for_a_prompt_that_the_one_before_cannot_hold(lengths, budget):
    batches = plan(lengths, budget)
    for before, after in pairwise(batches):
        assert sum(lengths[position] for position in before) + lengths[after[0]] > budget


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([4, 4, 4], [0, 1]),
        ([4, 7, 5, 1], [0, 2, 3]),
        ([50, 1], [0]),
        ([10, 0], [0]),
        ([4, 7, 7, 1], [0]),
    ],
    ids=["all that fit", "a shorter one behind", "the first is too long", "nothing is left", "patience ends"],
)
def test_a_forward_is_filled_with_what_fits(lengths, chosen):
    assert list(fill(lengths, 10, patience=2)) == chosen


def test_fill_reads_no_further_than_a_full_forward():
    lengths = iter([5, 5, 1, 1])
    assert list(fill(lengths, 10, patience=64)) == [0, 1]
    assert list(lengths) == [1, 1]


def test_fill_reads_no_further_than_its_patience():
    lengths = iter([5, 6, 6, 6, 1])
    assert list(fill(lengths, 10, patience=3)) == [0]
    assert list(lengths) == [1]


@PROPERTY
@given(LENGTHS, BUDGETS, PATIENCE)
def test_fill_takes_the_first_prompt_whatever_its_length(lengths, budget, patience):
    assert list(fill(lengths, budget, patience))[:1] == [0][: len(lengths)]


@PROPERTY
@given(LENGTHS, BUDGETS, PATIENCE)
def test_filled_positions_ascend_and_stay_within_the_budget(lengths, budget, patience):
    chosen = list(fill(lengths, budget, patience))
    assert chosen == sorted(set(chosen))
    assert chosen == [0] or sum(lengths[position] for position in chosen) <= budget


@PROPERTY
@given(LENGTHS, BUDGETS, PATIENCE)
def test_fill_passes_over_no_more_prompts_than_its_patience(lengths, budget, patience):
    read = []
    chosen = list(fill((read.append(length) or length for length in lengths), budget, patience))
    assert len(read) - len(chosen) <= patience
    assert chosen == list(fill(read, budget, patience))


@PROPERTY
@given(LENGTHS, BUDGETS, PATIENCE)
def test_filling_until_nothing_waits_takes_every_prompt_once_and_the_head_first(lengths, budget, patience):
    forwards = fill_until_empty(lengths, budget, patience)
    assert sorted(position for forward in forwards for position in forward) == list(range(len(lengths)))
    heads = [forward[0] for forward in forwards]
    assert heads == sorted(heads)


@PROPERTY
@given(st.lists(st.just(7), max_size=80), BUDGETS, PATIENCE)
def test_prompts_of_one_length_are_taken_in_order(lengths, budget, patience):
    forwards = fill_until_empty(lengths, budget, patience)
    assert [position for forward in forwards for position in forward] == list(range(len(lengths)))


def test_buckets_part_where_a_length_outgrows_the_first_of_its_run():
    assert buckets([10, 15, 20, 21, 42, 43], 2.0) == [(0, 3), (3, 5), (5, 6)]


@PROPERTY
@given(LENGTHS.map(sorted), st.floats(1, 10))
def test_buckets_cover_all_lengths_in_order(lengths, growth):
    covered = [position for start, stop in buckets(lengths, growth) for position in range(start, stop)]
    assert covered == list(range(len(lengths)))


@PROPERTY
@given(LENGTHS.map(sorted), st.floats(1, 10))
def test_a_bucket_holds_exactly_what_is_within_the_growth_of_its_shortest(lengths, growth):
    for start, stop in buckets(lengths, growth):
        assert start < stop
        assert lengths[stop - 1] <= lengths[start] * growth
        assert stop == len(lengths) or lengths[stop] > lengths[start] * growth
