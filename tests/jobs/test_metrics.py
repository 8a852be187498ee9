"""Metrics of workers, from what they announce."""

from datetime import UTC, datetime

from jobs.metrics import worker_families
from jobs.records import WorkerCounters, WorkerPresence
from tests.sample_jobs import COUNTERS, INFO


def presence(worker_id, counters=COUNTERS):
    return WorkerPresence(
        worker_id=worker_id, host="here", started_at=datetime.now(UTC), encoder=INFO, counters=counters
    )


def samples(*workers):
    found = [sample for family in worker_families(workers) for sample in family.samples]
    return {(sample.name, *sorted(sample.labels.items())): sample.value for sample in found}


def test_workers_are_told_apart_by_the_end_of_their_ids():
    found = samples(presence("A" * 18 + "AAAABBBB"), presence("A" * 18 + "AAAACCCC"))
    names = {labels for name, *labels in ((key[0], key[1]) for key in found if key[0] == "layerstack_worker_rows_total")
             for labels in labels}  # fmt: skip
    assert names == {("worker", "AAAABBBB"), ("worker", "AAAACCCC")}


def test_every_counter_is_told():
    found = samples(presence("A" * 26))
    values = set(found.values())
    for name, value in COUNTERS:
        told = value.values() if isinstance(value, dict) else [value]
        assert set(told) <= values, name


def test_a_worker_that_tells_no_counters_is_there_all_the_same():
    found = samples(presence("A" * 26, counters=None))
    assert {name for name, *_ in found} == {"layerstack_worker_info", "layerstack_worker_start_time_seconds"}


def test_no_forward_has_filled_nothing():
    empty = COUNTERS.model_copy(update={"rows": 0, "capacity": 0})
    assert samples(presence("A" * 26, empty))["layerstack_worker_fill_ratio", ("worker", "A" * 8)] == 0


def test_counters_survive_their_way_through_redis():
    assert WorkerCounters.model_validate_json(COUNTERS.model_dump_json()) == COUNTERS
