import asyncio
import signal
import time

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from api.encoders import LiveEncoders
from tests.sample_jobs import announce


def test_a_broker_that_hangs_makes_nobody_wait_for_more_than_one_timeout(broker, redis):
    announce(redis)

    async def ask():
        async with Redis.from_url(broker.url, socket_timeout=0.5, retry=Retry(NoBackoff(), 0)) as client:
            encoders = LiveEncoders(client)
            broker.process.send_signal(signal.SIGSTOP)
            try:
                began = time.monotonic()
                found = await asyncio.gather(*(encoders.workers() for _ in range(20)), return_exceptions=True)
                took_s = time.monotonic() - began
            finally:
                broker.process.send_signal(signal.SIGCONT)
            assert [type(each) for each in found if not isinstance(each, RedisError)] == []
            assert took_s < 2
            assert len(await encoders.workers()) == 1

    asyncio.run(ask())
