import pytest

from layerstack import encodingprogress
from layerstack.encodingprogress import Progress


class Watched:
    def __init__(self):
        self.told = []

    def encoding(self, done, total):
        self.told.append((done, total))


@pytest.fixture
def now(monkeypatch):
    """The time, which a test moves on."""
    time = [1000.0]
    monkeypatch.setattr(encodingprogress.time, "monotonic", lambda: time[0])
    return time


def test_what_an_earlier_run_did_is_told_at_the_beginning():
    watcher = Watched()
    Progress({0: 4, 2: 3}, 10, watcher)
    assert watcher.told == [(7, 10)]


def test_rows_of_a_chunk_are_added_up_and_not_counted_twice(now):
    watcher = Watched()
    progress = Progress({0: 4}, 10, watcher)
    for chunk, rows in ((1, 1), (2, 2), (1, 3), (2, 0)):  # the last begins anew
        now[0] += 1
        progress.note(chunk, rows)
    assert watcher.told[1:] == [(5, 10), (7, 10), (9, 10), (7, 10)]


def test_it_is_told_now_and_then_and_at_once_when_asked(now):
    watcher = Watched()
    progress = Progress({}, 10, watcher)
    progress.note(0, 1)
    progress.note(0, 2)
    assert watcher.told == [(0, 10), (1, 10)]
    progress.note(0, 4, at_once=True)
    now[0] += encodingprogress.TELL_EVERY_S
    progress.note(1, 1)
    assert watcher.told[2:] == [(4, 10), (5, 10)]
