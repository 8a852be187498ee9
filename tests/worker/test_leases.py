from contextlib import suppress

import pytest
from redis import Redis, RedisError

from tests.support import wait_for
from worker.leases import Leases

KEY = "layerstack:lease:test"


@pytest.fixture
def leases(redis):
    with Leases(redis, 2.0) as found:
        yield found


@pytest.fixture
def others(broker):
    """Those of another worker."""
    with broker.client() as redis, Leases(redis, 1.0) as found:
        yield found


def test_a_lease_has_one_holder_until_it_is_given_up(leases, others):
    lease = leases.acquire(KEY)
    assert not lease.lost
    assert leases.acquire(KEY) is None
    assert others.acquire(KEY) is None
    leases.release(lease)
    assert others.acquire(KEY) is not None


def test_a_lease_is_held_for_a_block_however_that_ends(leases, others):
    def fail():
        assert others.acquire(KEY) is None
        raise ZeroDivisionError

    with suppress(ZeroDivisionError), leases.held(KEY) as lease:
        assert not lease.lost
        fail()
    assert others.acquire(KEY) is not None


def test_who_does_not_get_a_lease_for_a_block_does_not_give_it_up_either(leases, others):
    lease = others.acquire(KEY)
    with leases.held(KEY) as none:
        assert none is None
    assert leases.acquire(KEY) is None
    others.release(lease)


def test_leases_of_different_keys_do_not_know_each_other(leases, others):
    assert leases.acquire(KEY) is not None
    assert others.acquire(KEY + "2") is not None


def test_a_lease_is_renewed_for_as_long_as_its_holder_lives(leases, redis):
    leases.acquire(KEY)
    seen = []

    def renewed():
        seen.append(redis.pttl(KEY))
        return seen[-1] > min(seen) + 100

    wait_for(renewed)
    assert min(seen) > 0


def test_a_lease_is_free_once_its_holder_has_died(redis, others):
    with Leases(redis, 1.0) as leases:
        leases.acquire(KEY)  # and never gives it up
    assert others.acquire(KEY) is None
    wait_for(lambda: others.acquire(KEY) is not None)


def test_the_holder_takes_it_again_after_redis_was_emptied(leases, others, redis):
    lease = leases.acquire(KEY)
    redis.flushall()
    wait_for(lambda: redis.exists(KEY))
    assert not lease.lost
    assert others.acquire(KEY) is None


def test_the_holder_can_take_it_again_at_once(redis, others):
    with Leases(redis, 600.0) as leases:  # renews by itself only after minutes
        lease = leases.acquire(KEY)
        redis.flushall()
        leases.renew(lease)
        assert not lease.lost
        assert others.acquire(KEY) is None


def test_a_lease_that_somebody_else_took_is_lost_and_stays_theirs(leases, redis):
    lease = leases.acquire(KEY)
    redis.set(KEY, "somebody else")
    wait_for(lambda: lease.lost)
    leases.release(lease)
    assert redis.get(KEY) == b"somebody else"


def test_a_lease_that_has_expired_is_given_up_without_touching_its_next_holder(redis, others):
    with Leases(redis, 600.0) as leases:
        lease = leases.acquire(KEY)
        redis.delete(KEY)
        theirs = others.acquire(KEY)
        leases.release(lease)
        assert others.acquire(KEY) is None
        assert not theirs.lost


def test_a_lease_that_was_given_up_is_not_renewed(redis):
    with Leases(redis, 0.05) as leases:
        for _ in range(200):
            leases.release(leases.acquire(KEY))
            assert not redis.exists(KEY)


def test_without_redis_none_can_be_had_and_those_held_end_no_thread(broker, caplog):
    with Redis.from_url(broker.url) as redis, Leases(redis, 0.2) as leases:
        lease = leases.acquire(KEY)
        broker.process.terminate()
        broker.process.wait()
        wait_for(lambda: "cannot renew a lease, will try again" in caplog.text)
        with pytest.raises(RedisError):
            leases.acquire(KEY)
        leases.release(lease)
        assert not lease.lost
