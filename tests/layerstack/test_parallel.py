import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from layerstack.parallel import EventLoopThread, in_parallel


async def returned(value):
    await anyio.lowlevel.checkpoint()
    return value


def test_results_come_in_order_whoever_is_first():
    async def slow_first(n):
        await anyio.sleep(0.02 if n == 0 else 0)
        return n

    assert anyio.run(in_parallel, [partial(slow_first, n) for n in range(9)], 3) == list(range(9))


def test_no_more_than_the_limit_run_at_a_time():
    running, most = 0, 0

    async def watched():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.sleep(0.001)
        running -= 1

    anyio.run(in_parallel, [watched] * 20, 4)
    assert most == 4


def test_the_first_error_ends_the_others_and_comes_as_it_is():
    ended = []

    async def fails():
        await anyio.sleep(0.01)
        raise ValueError("no")

    async def lasts():
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(ValueError, match="no"):
        anyio.run(in_parallel, [lasts, fails, lasts], 3)
    assert ended == [True, True]


@pytest.fixture
def loop():
    made = EventLoopThread()
    yield made
    made.close(partial(returned, None))


def test_a_loop_that_nobody_used_has_no_thread():
    before = threading.active_count()
    made = EventLoopThread()
    assert threading.active_count() == before
    made.close(partial(returned, None))


def test_ctrl_c_cancels_what_runs_before_it_is_raised(loop):
    ended = []

    async def lasts():
        await anyio.sleep(0.1)  # nothing tells that the caller waits by now
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        loop.run(lasts)
    assert loop.run(partial(returned, 1)) == 1
    assert ended == [True]


def test_a_stream_that_is_left_early_is_closed(loop):
    closed = []

    async def stream():
        try:
            for n in range(10):
                yield n
        finally:
            closed.append(True)

    numbers = loop.iterate(stream())
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()
    assert closed == [True]
    assert list(loop.iterate(stream())) == list(range(10))


def _use(loop, told):
    try:
        loop.run(partial(returned, 1))
    except RuntimeError as exc:
        told.send(str(exc))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # which is what it is about
def test_the_fork_of_a_process_is_told_to_make_its_own(loop):
    loop.run(partial(returned, 1))
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_use, args=(loop, there))
    child.start()
    assert here.poll(30)
    assert "make a new one there" in here.recv()
    child.join()


@pytest.mark.parametrize("line", ["client.encoder()", "events = client.jobs.events(job); next(events)"])
@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_a_script_that_never_closes_its_client_ends(stack, line, end):
    code = f"""
import layerstack
client = layerstack.Client({stack.url!r})
job = client.jobs.submit(["a"]).id
{line}
{end}
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert ended.returncode == {"": 0, "raise SystemExit(3)": 3}.get(end, 1), ended.stderr
    assert ("ZeroDivisionError" in ended.stderr) == (end == "1 / 0")
    assert ended.stderr.count("Traceback") == (end == "1 / 0")


def test_a_fork_ends_too_that_was_made_while_a_client_was_open(stack):
    code = f"""
import os, sys, layerstack
client = layerstack.Client({stack.url!r})
client.encoder()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
sys.exit(7)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, check=False, timeout=60, capture_output=True).returncode == 7
