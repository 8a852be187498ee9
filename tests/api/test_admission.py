import asyncio
import signal
import time

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from api.admission import Admission
from api.problems import Problem
from jobs import keys


@pytest.fixture
def run(broker):
    """Run a coroutine function with the admission of one API process, or of several."""

    def start(body, *, servers=1, limit=2, timeout_s=60.0):
        async def connected():
            options = {"socket_timeout": 0.5, "retry": Retry(NoBackoff(), 0)}
            clients = [Redis.from_url(broker.url, **options) for _ in range(servers)]
            try:
                return await body(*(Admission(client, limit, timeout_s) for client in clients))
            finally:
                for client in clients:
                    await client.aclose()

        return asyncio.run(connected())

    return start


async def refusal(admission):
    with pytest.raises(Problem) as refused:
        async with admission.place("one too many"):
            pass
    assert refused.value.status_code == 429
    return refused.value


def test_as_many_requests_wait_as_the_limit_says_and_one_more_is_429(run):
    async def body(admission):
        async with admission.place("a"), admission.place("b"):
            problem = await refusal(admission)
        assert (problem.kind, problem.members["limit"], problem.members["see"]) == ("queue-full", 2, "/jobs")
        async with admission.place("c"):
            pass

    run(body)


def test_all_servers_of_a_broker_count_together(run):
    async def body(one, other):
        async with one.place("a"), other.place("b"):
            await refusal(one)
            await refusal(other)

    run(body, servers=2)


def test_a_place_is_free_again_after_an_error(run):
    async def body(admission):
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with admission.place("a"):
                    raise ZeroDivisionError

    run(body, limit=1)


def test_the_place_of_a_server_that_died_expires(run, redis):
    redis.zadd(keys.PREDICT_WAITING, {"dead": time.time() + 60, "long dead": time.time() - 1})

    async def body(admission):
        async with admission.place("a"):
            await refusal(admission)

    run(body)


@pytest.mark.parametrize(
    ("num_answered", "seconds_ago", "expected"),
    [(0, 0, 1), (10, 10, 2), (64, 64, 2), (5, 50, 20), (1, 0.001, 1), (1, 500, 60)],
)
def test_retry_after_follows_from_how_fast_the_last_requests_were_answered(
    run, redis, num_answered, seconds_ago, expected
):
    async def body(admission):
        async with admission.place("a"), admission.place("b"):
            for n in range(num_answered, 0, -1):
                redis.lpush(keys.PREDICT_ANSWERED, time.time() - seconds_ago * n / num_answered)
            problem = await refusal(admission)
        assert int(problem.headers["Retry-After"]) in {expected, expected + 1}  # the clock goes on

    run(body)


def test_a_time_in_which_nobody_waited_does_not_count_as_a_slow_one(run, redis):
    redis.lpush(keys.PREDICT_ANSWERED, time.time() - 500)

    async def body(admission):
        async with admission.place("a"), admission.place("b"):
            problem = await refusal(admission)
        assert problem.headers["Retry-After"] == "1"

    run(body)


def test_a_place_that_a_hanging_broker_gave_too_late_is_free_again(run, redis, broker):
    async def body(admission):
        async with admission.place("so that a connection is there"):
            pass
        broker.process.send_signal(signal.SIGSTOP)
        try:
            cancelled = asyncio.create_task(admission.place("cancelled").__aenter__())
            with pytest.raises(RedisError):
                await admission.place("timed out").__aenter__()
            cancelled.cancel()
            await asyncio.wait([cancelled])
        finally:
            broker.process.send_signal(signal.SIGCONT)
        async with admission.place("a"):
            assert redis.zrange(keys.PREDICT_WAITING, 0, -1) == [b"a"]

    run(body)


def test_only_answers_count_for_the_rate_and_only_the_last_64(run, redis):
    async def body(admission):
        async with admission.place("unanswered"):
            pass
        assert redis.llen(keys.PREDICT_ANSWERED) == 0
        async with admission.place("one that waits"):
            for n in range(70):
                async with admission.place(str(n)) as place:
                    place.answered = True
        assert redis.llen(keys.PREDICT_ANSWERED) == 64

    run(body)


def test_nothing_stays_in_redis_for_ever(run, redis):
    async def body(admission):
        async with admission.place("a") as place:
            place.answered = True
            assert 0 < redis.ttl(keys.PREDICT_WAITING) <= 61
        assert 0 < redis.ttl(keys.PREDICT_ANSWERED) <= 600

    run(body)
