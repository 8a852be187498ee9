import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from worker.recall import EncodedPrompt, PendingPrompt, Recall

S = 60  # after which a future that is still open is a failure
JOB, OTHER = "01M8259KQ6ZM43ZW7F9E4YQJWV", "01M8259KQ6ZM43ZW7F9E4YQJWW"


@pytest.fixture
def recall(engine):
    return Recall(engine, max_rows=1000)


def finished(recall, prompts, job_id=JOB):
    """Have prompts encoded and remembered, as a chunk does -> what came out."""
    entries, _ = recall.submit(job_id, prompts)
    results = []
    for prompt, entry in zip(prompts, entries, strict=True):
        if isinstance(entry, PendingPrompt):
            entry.future.result(S)
            entry = entry.result()  # noqa: PLW2901 - what it has become
            recall.remember(job_id, prompt, entry)
        results.append(entry)
    return results


def on_the_device(forwards):
    return sorted(text for texts in forwards.texts for text in texts)


def test_the_rows_are_those_of_the_encoder(recall, encoder):
    prompts = ["a fox", "a hen", "a fox"]
    for _ in range(2):
        for encoded, want in zip(finished(recall, prompts), encoder.encode(prompts), strict=True):
            np.testing.assert_allclose(encoded.own_rows, want.own_rows, rtol=1e-4, atol=1e-4)
            assert (encoded.num_tokens, encoded.truncated, encoded.error) == (want.num_tokens, want.truncated, None)


def test_a_prompt_that_comes_twice_reaches_the_encoder_once(recall, forwards):
    finished(recall, ["a", "b", "a"])
    finished(recall, ["b", "c", "a"])
    assert on_the_device(forwards) == ["a", "b", "c"]


def test_a_prompt_that_is_under_way_is_not_submitted_again(recall, engine, forwards):
    with forwards.held(engine):
        first, first_future = recall.submit(JOB, ["a", "b"])
        second, second_future = recall.submit(JOB, ["b", "c"])
        assert second[0].future is first_future
        assert second[1].future is second_future
    assert first[1].future.result(S)[1] is second[0].future.result(S)[1]
    assert second[0].result().num_tokens == first[1].result().num_tokens
    second_future.result(S)
    assert on_the_device(forwards) == ["a", "b", "c", "hold"]


def test_the_prompts_of_another_job_are_its_own(recall, engine, forwards):
    finished(recall, ["a"])
    finished(recall, ["a"], OTHER)
    with forwards.held(engine):
        (mine,), _ = recall.submit(JOB, ["b"])
        (theirs,), _ = recall.submit(OTHER, ["b"])
        assert mine.future is not theirs.future
    theirs.future.result(S)
    assert on_the_device(forwards).count("a") == on_the_device(forwards).count("b") == 2


def test_many_threads_with_the_same_prompts_have_each_encoded_once(recall, forwards):
    prompts = [f"{n:02d}" for n in range(20)]
    together, outcomes = threading.Barrier(6), []

    def encode(turn):
        together.wait()
        outcomes.append(finished(recall, prompts[turn:] + prompts[:turn]))

    threads = [threading.Thread(target=encode, args=(3 * turn,)) for turn in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert on_the_device(forwards) == prompts
    assert [len(outcome) for outcome in outcomes] == [20] * 6


def test_what_was_used_longest_ago_is_forgotten_first(engine, forwards):
    (encoded,) = finished(Recall(engine, 1000), ["a"])
    forwards.texts.clear()
    recall = Recall(engine, max_rows=3 * encoded.num_rows)  # each letter has as many rows
    for prompt in ("a", "b", "c", "a", "d"):
        finished(recall, [prompt])
    assert on_the_device(forwards) == ["a", "b", "c", "d"]
    finished(recall, ["a", "c", "d"])
    assert on_the_device(forwards) == ["a", "b", "c", "d"]
    finished(recall, ["b"])
    assert on_the_device(forwards) == ["a", "b", "b", "c", "d"]


def test_without_memory_only_what_is_under_way_is_shared(engine, forwards):
    recall = Recall(engine, max_rows=0)
    finished(recall, ["a", "a"])
    finished(recall, ["a"])
    assert on_the_device(forwards) == ["a", "a"]


def test_remembered_rows_keep_no_batch_alive(recall):
    finished(recall, ["a", "b " * 200])
    (entry,), _ = recall.submit(JOB, ["a"])
    assert isinstance(entry, EncodedPrompt)
    assert entry.own_rows.base is None


def test_what_was_cancelled_is_submitted_anew_by_the_next_who_needs_it(recall, engine, forwards):
    with forwards.held(engine):
        (mine,), future = recall.submit(JOB, ["a"])
        (theirs,), _ = recall.submit(JOB, ["a"])
        future.cancel()
        with pytest.raises(CancelledError):
            theirs.result()
        (again,), new = recall.submit(JOB, ["a"])
        assert again.future is new
        recall.forget(JOB, ["a"], mine.future)  # too late: "a" is the other's by now
        (shared,), _ = recall.submit(JOB, ["a"])
        assert shared.future is new
    new.result(S)
    assert on_the_device(forwards) == ["a", "hold"]


def test_what_was_forgotten_is_submitted_anew(recall, engine, forwards):
    with forwards.held(engine):
        _, future = recall.submit(JOB, ["a", "b"])
        recall.forget(JOB, ["a"], future)
        (a, b), new = recall.submit(JOB, ["a", "b"])
        assert (a.future, b.future) == (new, future)


def test_the_reason_why_a_prompt_has_no_rows_is_remembered_too(recall, forwards):
    forwards.fault = lambda texts: RuntimeError("no way") if "bad" in texts else None
    good, bad = finished(recall, ["good", "bad"])
    assert (good.error, bad.error, bad.own_rows) == (None, "RuntimeError: no way", None)
    forwards.fault = lambda _texts: None
    assert finished(recall, ["bad"])[0].error == "RuntimeError: no way"


def test_prompts_that_are_all_known_give_a_future_that_is_done(recall):
    finished(recall, ["a"])
    entries, future = recall.submit(JOB, ["a"])
    assert isinstance(entries[0], EncodedPrompt)
    assert future.result(S) == []
