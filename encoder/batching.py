"""Which prompts share a forward. Plain Python: the plan is tested without a model.

A forward has a token budget: the rows that it runs through the linear layers at once. A prompt that is longer than the
budget gets a forward of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide prompts of these `lengths` into forwards, longest first, so that a forward's prompts are of like length.

    Args:
        lengths: rows of each prompt.
        budget: rows of a forward, at least 1.

    Returns:
        Positions in `lengths`, a list for each forward; every position stands in exactly one.
    """
    batches: list[list[int]] = []
    free = 0
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        if not batches or lengths[position] > free:
            batches.append([])
            free = budget
        batches[-1].append(position)
        free -= lengths[position]
    return batches


def fill(lengths: Iterable[int], budget: int, patience: int) -> Iterator[int]:
    """Choose from prompts that wait, in order, what the next forward takes: all that fit, and the first in any case.

    The first is never passed over, so among prompts of one urgency every one has its turn. Less urgent ones have theirs
    in the room that is left, or once nothing more urgent waits.

    Args:
        lengths: rows of each waiting prompt, the most urgent first; read no further than needed.
        budget: rows of a forward.
        patience: prompts that do not fit before the search for a smaller one ends.

    Yields:
        Positions in `lengths`, ascending.
    """
    free = budget
    for position, length in enumerate(lengths):
        if length <= free or position == 0:
            yield position
            free -= length
        else:
            patience -= 1
        if free <= 0 or patience <= 0:
            return


def buckets(lengths: Sequence[int], growth: float) -> list[tuple[int, int]]:
    """Divide ascending `lengths` into runs in which the longest is at most `growth` times the shortest.

    Returns:
        (start, stop) of each run.
    """
    runs: list[tuple[int, int]] = []
    start = 0
    for position in range(1, len(lengths) + 1):
        if position == len(lengths) or lengths[position] > lengths[start] * growth:
            runs.append((start, position))
            start = position
    return runs
