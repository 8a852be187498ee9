import concurrent.futures
import gc
import threading
import time
import weakref

import pytest
import torch

from encoder import DeadlineExceededError, Engine, EngineClosedError, Priority, PromptError
from encoder.errors import DeviceFailedError

S = 60  # after which a future that is still open is a failure
LETTERS = [chr(ord("a") + n) for n in range(25)]  # two rows each
NUMBERS = [f"{n:03d}" for n in range(270)]  # four rows each, 256 of them in a forward
WORDS = ["hello world", "", "word " * 200, "雪の中の赤い鳥居", "over-long " * 2000, "hold"]


@pytest.fixture(scope="module")
def want(encoder):
    texts = [*LETTERS, *NUMBERS, *WORDS]
    encodings = dict(zip(texts, encoder.encode(texts), strict=True))
    return lambda texts: [encodings[text] for text in texts]


def assert_same(got, want):
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.num_tokens, mine.truncated) == (theirs.num_tokens, theirs.truncated)
        torch.testing.assert_close(mine.own_rows, theirs.own_rows, rtol=1e-4, atol=1e-4)


def results(futures):
    return [result for future in futures for result in future.result(S)]


# Results.


def test_results_equal_those_of_the_encoder_in_order(encoder, want):
    prompts = [*WORDS, *LETTERS, *reversed(WORDS)]
    with Engine(encoder) as engine:
        assert_same(engine.submit(prompts).result(S), want(prompts))


def test_results_are_in_host_memory_and_keep_no_batch_alive(encoder):
    with Engine(encoder) as engine:
        for encoding in engine.submit(["a", "b " * 100, "c"]).result(S):
            assert encoding.own_rows.device.type == "cpu"
            assert not encoding.own_rows.requires_grad
            assert encoding.own_rows.untyped_storage().nbytes() == encoding.own_rows.nbytes


def test_an_idle_engine_holds_no_results(encoder):
    gone = threading.Event()
    with Engine(encoder) as engine:
        future = engine.submit(["a"])
        weakref.finalize(future.result(S)[0], gone.set)
        del future
        gc.collect()
        assert gone.wait(S)


@pytest.mark.parametrize("bad", [5, None, b"bytes", "\ud800"])
def test_a_bad_prompt_fails_alone_with_its_position(encoder, want, bad):
    with Engine(encoder) as engine:
        first, error, last = engine.submit(["a", bad, "b"]).result(S)
        failed = engine.stats().failed_prompts
    assert isinstance(error, PromptError)
    assert (error.position, failed) == (1, 1)
    assert_same([first, last], want(["a", "b"]))


def test_bad_prompts_alone_resolve_without_the_device(encoder, forwards):
    with Engine(encoder) as engine:
        errors = engine.submit([5, "\ud800"]).result(S)
    assert [error.position for error in errors] == [0, 1]
    assert forwards.texts == []


def test_no_prompts_resolve_to_no_results(encoder, forwards):
    with Engine(encoder) as engine:
        assert engine.submit([]).result(S) == []
    assert forwards.texts == []


def test_one_string_is_no_list_of_prompts(encoder):
    with Engine(encoder) as engine, pytest.raises(TypeError, match="expected a list of prompts"):
        engine.submit("hello")


def test_threads_that_submit_at_once_get_each_their_own_results(encoder, want):
    shares = [NUMBERS[n : n + 20] for n in range(0, 160, 20)]
    together = threading.Barrier(len(shares))

    def submit(share):
        together.wait(S)
        return [engine.submit(share[n : n + 2], Priority(n // 2 % 2)) for n in range(0, len(share), 2)]

    with Engine(encoder) as engine, concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
        submitted = list(pool.map(submit, shares, timeout=S))
        for share, futures in zip(shares, submitted, strict=True):
            assert_same(results(futures), want(share))


# Who goes first.


def test_an_interactive_prompt_is_in_the_very_next_forward(encoder, want, forwards):
    prompts = LETTERS * 8
    with Engine(encoder) as engine:
        with forwards.held(engine):
            bulk = [engine.submit(prompts) for _ in range(8)]
            urgent = engine.submit(["hello world"], Priority.INTERACTIVE)
        assert_same(urgent.result(S), want(["hello world"]))
        assert_same(results(bulk), want(prompts * 8))
        waited = engine.stats().batches_waited
    assert forwards.texts[1][0] == "hello world"
    assert waited[Priority.INTERACTIVE] == 0
    assert waited[Priority.BULK] == len(forwards.texts) - 2 > 0
    assert urgent.batches_waited == 0
    assert max(future.batches_waited for future in bulk) == waited[Priority.BULK]


def test_the_oldest_of_a_priority_go_first(encoder, forwards):
    interactive, bulk = NUMBERS[::2], NUMBERS[1::2]
    with Engine(encoder) as engine:
        with forwards.held(engine):
            futures = []
            for n in range(0, 135, 27):
                futures.append(engine.submit(bulk[n : n + 27], Priority.BULK))
                futures.append(engine.submit(interactive[n : n + 27], Priority.INTERACTIVE))
        results(futures)
    assert [len(texts) for texts in forwards.texts] == [1, 135, 135]
    assert [text for texts in forwards.texts[1:] for text in texts] == [*interactive, *bulk]


def test_bulk_joins_every_other_forward_of_interactive_prompts(encoder, forwards):
    with Engine(encoder) as engine:
        with forwards.held(engine):
            bulk = engine.submit(NUMBERS[:50])
            urgent = engine.submit(["a", "b"], Priority.INTERACTIVE)
        results([bulk, urgent])
        assert forwards.texts[1:] == [["a", "b"], NUMBERS[:50]]
        with forwards.held(engine, ("hold",), Priority.INTERACTIVE):
            bulk = engine.submit(NUMBERS[:50])
            urgent = engine.submit(["a", "b"], Priority.INTERACTIVE)
        results([bulk, urgent])
    assert forwards.texts[-1] == ["a", "b", *NUMBERS[:50]]


def test_the_oldest_prompt_is_never_passed_over_for_shorter_ones(encoder, forwards):
    prompts = ["a" + " a" * (n * 37 % 400) for n in range(10)]
    with Engine(encoder) as engine:
        with forwards.held(engine):
            future = engine.submit(prompts)
        future.result(S)
    waiting = list(prompts)
    for texts in forwards.texts[1:]:
        assert texts[0] == waiting[0]
        for text in texts:
            waiting.remove(text)
    assert waiting == []


# Faults.


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError(), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "python", "cpu"],
)
def test_running_out_of_memory_shrinks_the_forwards_and_loses_nothing(encoder, want, forwards, error):
    forwards.fault = lambda texts: error if len(texts) > 25 else None
    with Engine(encoder) as engine:
        with forwards.held(engine):
            futures = [engine.submit(NUMBERS[n : n + 20]) for n in range(0, 60, 20)]
        assert_same(results(futures), want(NUMBERS[:60]))
        stats = engine.stats()
    assert [len(texts) for texts in forwards.texts] == [1, 60, 30, 15, 15, 15, 15]
    assert [text for texts in forwards.texts[3:] for text in texts] == NUMBERS[:60]
    assert (stats.out_of_memory, stats.token_budget) == (2, 60)
    assert not engine.failed


def test_running_out_of_memory_in_a_full_forward_halves_the_budget(encoder, want, forwards):
    forwards.fault = lambda texts: torch.OutOfMemoryError() if len(texts) > 128 else None
    with Engine(encoder) as engine:
        assert_same(engine.submit(NUMBERS).result(S), want(NUMBERS))
        assert engine.token_budget == engine.stats().token_budget == encoder.token_budget // 2 == 512
    assert [len(texts) for texts in forwards.texts] == [256, 128, 128, 14]


def test_prompts_that_are_tried_again_after_running_out_of_memory_count_once(encoder, forwards):
    forwards.fault = lambda texts: torch.OutOfMemoryError() if len(texts) > 1 else None
    with Engine(encoder) as engine:
        engine.submit(["000", "001"]).result(S)
        stats = engine.stats()
    assert stats.out_of_memory == 1
    assert (stats.prompts, stats.rows) == (2, 8)


def test_a_prompt_that_no_memory_can_hold_fails_its_submission_alone(encoder, want, forwards):
    forwards.fault = lambda texts: torch.OutOfMemoryError("too large") if "large" in texts else None
    with Engine(encoder) as engine:
        with forwards.held(engine):
            before, large, after = engine.submit(["a"]), engine.submit(["large"]), engine.submit(["b"])
        with pytest.raises(torch.OutOfMemoryError, match="too large"):
            large.result(S)
        later = engine.submit(["c"])
        assert_same(results([before, after, later]), want(["a", "b", "c"]))
        assert not engine.failed


def test_a_prompt_that_breaks_its_forward_fails_alone(encoder, want, forwards):
    forwards.fault = lambda texts: RuntimeError("cannot") if {"007", "013"} & set(texts) else None
    with Engine(encoder) as engine:
        with forwards.held(engine):
            futures = [engine.submit(NUMBERS[n : n + 10]) for n in range(0, 30, 10)]
        got = dict(zip(NUMBERS[:30], results(futures), strict=True))
        assert engine.stats().failed_prompts == 2
        assert not engine.failed
    seventh, thirteenth = got.pop("007"), got.pop("013")
    assert isinstance(seventh, PromptError)
    assert isinstance(thirteenth, PromptError)
    assert (seventh.position, seventh.reason) == (7, "RuntimeError: cannot")
    assert (thirteenth.position, thirteenth.reason) == (3, "RuntimeError: cannot")
    assert_same(list(got.values()), want(got))


def test_a_fault_that_every_prompt_has_is_no_prompts_fault(encoder, forwards):
    forwards.fault = lambda _texts: RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED")
    with Engine(encoder) as engine:
        with pytest.raises(DeviceFailedError, match="CUBLAS_STATUS_EXECUTION_FAILED"):
            engine.submit(["a", "b", "c"]).result(S)
        assert engine.failed
        assert engine.stats().failed_prompts == 0


def test_the_budget_comes_back_after_forwards_that_succeed(encoder, forwards, monkeypatch):
    monkeypatch.setattr("encoder.engine._RECOVERY", 3)
    forwards.fault = lambda texts: torch.OutOfMemoryError() if len(texts) == 256 else None
    with Engine(encoder) as engine:
        engine.submit(NUMBERS).result(S)
        assert engine.token_budget == encoder.token_budget
        assert engine.stats().out_of_memory == 1


def test_a_failed_device_fails_what_runs_and_what_waits(encoder, forwards):
    forwards.fault = lambda _texts: torch.AcceleratorError("device-side assert")
    with Engine(encoder) as engine:
        with forwards.held(engine) as running:
            waiting = [engine.submit(["a"]), engine.submit(["b"], Priority.INTERACTIVE)]
            assert not engine.failed
        for future in [running, *waiting]:
            with pytest.raises(DeviceFailedError, match="device-side assert"):
                future.result(S)
        assert engine.failed
        with pytest.raises(DeviceFailedError, match="device-side assert"):
            engine.submit(["c"])
    assert forwards.texts == [["hold"]]


def test_a_device_that_fails_while_a_fault_is_narrowed_down_leaves_no_future_open(encoder, forwards):
    faults = {("a", "b", "c"): RuntimeError("cannot"), ("a",): torch.AcceleratorError("device-side assert")}
    forwards.fault = lambda texts: faults.get(tuple(texts))
    with Engine(encoder) as engine, forwards.held(engine):
        futures = [engine.submit(["a"]), engine.submit(["b"]), engine.submit(["c"])]
    assert forwards.texts == [["hold"], ["a", "b", "c"], ["a"]]
    assert engine.failed
    assert [future.done() for future in futures] == [True, True, True]


# Cancelled, late, closed.


def test_cancelled_prompts_never_reach_the_device(encoder, want, forwards):
    cancelled, others = [], []
    with Engine(encoder) as engine:
        with forwards.held(engine):
            for n in range(1000):
                cancelled.append(engine.submit(["cancelled"], Priority(n % 2)))
                if n % 40 == 0:
                    others.append(engine.submit([LETTERS[n // 40]], Priority(n // 40 % 2)))
            assert all(future.cancel() for future in cancelled)
        assert_same(results(others), want(LETTERS))
    assert sorted(text for texts in forwards.texts[1:] for text in texts) == LETTERS
    assert engine.stats().dropped_prompts == 1000
    assert engine.waiting_rows == 0


def test_waiting_for_a_cancelled_submission_ends_once_it_is_dropped(encoder, forwards):
    with Engine(encoder) as engine, forwards.held(engine):
        future = engine.submit(["cancelled"])
        future.cancel()
    assert concurrent.futures.wait([future], timeout=0).not_done == set()


def test_cancelling_drops_what_is_not_on_the_device_yet_and_touches_nobody_else(encoder, want, forwards):
    with Engine(encoder) as engine:
        with forwards.held(engine, NUMBERS) as running:
            other = engine.submit(["a"])
            assert running.cancel()
        assert_same(other.result(S), want(["a"]))
    assert forwards.texts == [NUMBERS[:256], ["a"]]
    assert engine.stats().dropped_prompts == 14


def test_a_submission_whose_deadline_has_passed_never_reaches_the_device(encoder, want, forwards):
    with Engine(encoder) as engine:
        late = engine.submit(["late", "late too"], deadline=time.monotonic() - 1)
        in_time = engine.submit(["a"], deadline=time.monotonic() + 3600)
        with pytest.raises(DeadlineExceededError):
            late.result(S)
        assert_same(in_time.result(S), want(["a"]))
    assert forwards.texts == [["a"]]
    assert engine.stats().dropped_prompts == 2


def test_closing_finishes_what_waits(encoder, want, forwards):
    with Engine(encoder) as engine, forwards.held(engine):
        futures = [engine.submit(NUMBERS[n : n + 90]) for n in range(0, 270, 90)]
    assert all(future.done() for future in futures)
    assert_same(results(futures), want(NUMBERS))


def test_closing_at_once_fails_what_waits_and_finishes_what_runs(encoder, want, forwards):
    with Engine(encoder) as engine:
        with forwards.held(engine) as running:
            waiting = engine.submit(["a", "b"])
            closing = threading.Thread(target=engine.close, kwargs={"finish": False})
            closing.start()
            with pytest.raises(EngineClosedError):
                waiting.result(S)
            assert not running.done()
        closing.join(S)
        assert not closing.is_alive()
        assert_same(running.result(S), want(["hold"]))
    assert forwards.texts == [["hold"]]
    assert engine.stats().dropped_prompts == 2
    assert not engine.failed


def test_a_closed_engine_takes_nothing_and_may_be_closed_again(encoder):
    engine = Engine(encoder)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(["a"])


# Counters.


def test_counters_say_what_waits_and_what_was_done(encoder, forwards):
    with Engine(encoder) as engine, forwards.held(engine, ("hold",), Priority.INTERACTIVE):  # two rows
        engine.submit(NUMBERS[:5])  # four rows each
        engine.submit(["", 5], Priority.INTERACTIVE)  # one row
        waiting = engine.stats()
        assert engine.waiting_rows == waiting.waiting_rows == 21
    done = engine.stats()
    assert waiting.waiting_prompts == {Priority.INTERACTIVE: 1, Priority.BULK: 5}
    assert (waiting.batches, waiting.prompts, waiting.rows) == (0, 0, 0)
    assert done.waiting_prompts == {Priority.INTERACTIVE: 0, Priority.BULK: 0}
    assert (done.batches, done.prompts, done.rows, done.waiting_rows) == (2, 7, 23, 0)
    assert done.fill == 23 / (2 * encoder.token_budget)
    assert (done.failed_prompts, done.dropped_prompts, done.out_of_memory) == (1, 0, 0)
    assert min(done.tokenize_seconds, done.queue_seconds, done.encode_seconds) > 0
