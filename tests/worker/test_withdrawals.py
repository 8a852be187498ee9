from ulid import ULID

from jobs import keys
from tests.support import wait_for
from worker.withdrawals import Withdrawals


def test_a_request_that_is_delivered_twice_at_a_time_ends_twice(redis):
    request_id = str(ULID())
    with (
        Withdrawals(redis) as withdrawals,
        withdrawals.watched(request_id),
        withdrawals.watched(request_id) as second,
    ):
        wait_for(lambda: redis.publish(keys.WITHDRAWN, request_id) and second.withdrawn)
