"""One key makes one job: whatever comes at the same time, and wherever a server dies."""

import threading

import pytest

from jobs import publishing
from jobs.errors import StorageError
from jobs.layout import idempotency_digest, idempotency_marker, job_names
from jobs.records import IdempotencyMarker, Prompt
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import do_chunk, make_job

KEY = "the same"
MARKER = idempotency_marker(idempotency_digest("ann", KEY))


class Died(BaseException):
    """A server that dies: nothing of it runs any more."""


def create(store, key=KEY, owner="ann", **options):
    return make_job(store, owner=owner, idempotency_key=key, **options)


def ids(store):
    return sorted(store.newest())


def dying(storage_url, name_ends, *, before):
    """A storage whose server dies when it writes a file whose name ends so; nothing more happens to it then."""
    storage = open_storage(storage_url)
    write, new_file, delete, delete_folder = storage.write, storage.new_file, storage.delete, storage.delete_folder
    dead = []

    def once(call):
        def called(name, *args):
            if dead:
                raise Died
            if name.endswith(name_ends) and before:
                dead.append(name)
                raise Died
            return call(name, *args)

        return called

    def written(name, content):
        once(write)(name, content)
        if name.endswith(name_ends):
            dead.append(name)
            raise Died

    storage.write = written
    storage.new_file, storage.delete, storage.delete_folder = map(once, (new_file, delete, delete_folder))
    return storage


def test_the_same_key_makes_one_job(store):
    first = create(store)
    assert store.created_before("ann", KEY) == first.id
    assert create(store, count=99) == first
    assert ids(store) == [first.id]
    assert store.storage.folders("jobs") == [first.id]


def test_other_keys_and_other_owners_make_other_jobs(store):
    made = [create(store), create(store, key="another"), create(store, owner="bob"), create(store, owner=None)]
    made += [make_job(store), make_job(store)]
    assert len({record.id for record in made}) == 6
    assert store.created_before("bob", "another") is None
    assert store.created_before(None, KEY) == made[3].id


@pytest.mark.parametrize("key", ["", "../../x", "a\0b", "ü" * 300, '","'])
def test_any_text_is_a_key(store, key):
    record = create(store, key=key)
    assert store.created_before("ann", key) == record.id == create(store, key=key).id


def test_owner_and_key_are_not_run_together():
    assert idempotency_digest("a", "b,c") != idempotency_digest("a,b", "c")
    assert idempotency_digest(None, "x") != idempotency_digest("null", "x")


def test_a_deleted_job_is_forgotten_with_its_key(store):
    first = create(store)
    store.delete(first.id)
    assert store.storage.size(MARKER) is None
    assert store.created_before("ann", KEY) is None
    second = create(store)
    assert ids(store) == [second.id]


def test_deleting_a_job_leaves_the_marker_of_another(store):
    first = create(store)
    store.storage.delete(MARKER)
    second = create(store)
    store.delete(first.id)
    assert store.created_before("ann", KEY) == second.id


def test_a_job_without_results_left_still_answers_for_its_key(store):
    first = create(store)
    store.expire(first.id)
    assert create(store) == first


def test_a_job_whose_prompts_are_refused_claims_nothing(store):
    def prompts():
        yield Prompt(id="a", prompt="a")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - what the prompts raise
        create(store, prompts=prompts())
    assert store.storage.files("idempotency") == []
    assert store.storage.folders("jobs") == []


def test_of_many_at_the_same_time_one_makes_the_job_and_all_get_it(storage_url):
    barrier, found = threading.Barrier(6), []

    def ask():
        store = JobStore(open_storage(storage_url))

        def prompts():
            yield Prompt(id="a", prompt="a")
            barrier.wait(60)

        found.append(create(store, prompts=prompts()))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store = JobStore(open_storage(storage_url))
    assert len(found) == 6
    assert {record.id for record in found} == set(ids(store)) == set(store.storage.folders("jobs"))
    assert len(ids(store)) == 1


def test_who_comes_between_marker_and_record_of_another_gets_its_job(store, storage_url):
    between, go_on, found = threading.Event(), threading.Event(), []
    slow = open_storage(storage_url)
    write = slow.write

    def held(name, content):
        if name.endswith("/job.json"):
            between.set()
            assert go_on.wait(60)
        write(name, content)

    slow.write = held
    thread = threading.Thread(target=lambda: found.append(create(JobStore(slow))))
    thread.start()
    assert between.wait(60)
    second = create(store)
    assert [second.id] == ids(store) == store.storage.folders("jobs")
    go_on.set()
    thread.join(60)
    assert found == [second]
    assert ids(store) == [second.id]


def test_who_is_slow_while_its_job_is_made_and_deleted_does_not_bring_it_back(store, storage_url):
    slow, found = open_storage(storage_url), []
    write = slow.write

    def held(name, content):
        if name.endswith("/job.json"):
            store.delete(create(store).id)
        write(name, content)

    slow.write = held
    with pytest.raises(StorageError, match="deleted"):
        create(JobStore(slow))
    assert found == ids(store) == []
    assert store.created_before("ann", KEY) is None


# A server dies, and the client asks once more.


def test_before_its_marker_nothing_is_left_but_prompts(store, storage_url):
    with pytest.raises(Died):
        create(JobStore(dying(storage_url, MARKER, before=True)))
    assert store.created_before("ann", KEY) is None
    second = create(store)
    assert ids(store) == [second.id]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("asks", ["created_before", "create"])
def test_once_the_marker_is_there_the_job_is_found_with_all_it_needs(store, storage_url, before, asks):
    with pytest.raises(Died):
        create(JobStore(dying(storage_url, "/job.json", before=before)))
    (first,) = store.storage.folders("jobs")
    assert ids(store) == ([] if before else [first])
    found = store.created_before("ann", KEY) if asks == "created_before" else create(store).id
    assert found == first
    assert ids(store) == [first]
    assert [index for chunk in range(3) for index, _ in store.prompts(first, chunk)] == list(range(10))
    do_chunk(store, store.load(first), 0)


@pytest.mark.parametrize("left", ["nothing", "chunks.json", "some prompts"])
def test_a_marker_whose_job_can_never_be_is_replaced(store, storage_url, left):
    with pytest.raises(Died):
        create(JobStore(dying(storage_url, "/job.json", before=True)))
    (first,) = store.storage.folders("jobs")
    names = job_names(first)
    if left == "nothing":
        store.storage.delete_folder(names.folder)
    elif left == "chunks.json":
        store.storage.delete_folder(names.prompts_folder)
    else:
        store.storage.delete(names.prompts(1))
    assert store.created_before("ann", KEY) is None
    assert ids(store) == []
    second = create(store)
    assert second.id != first
    assert store.created_before("ann", KEY) == second.id
    assert ids(store) == [second.id]


@pytest.mark.parametrize("at", ["/job.json", ".json"])
def test_a_delete_that_is_cut_off_never_brings_its_job_back(store, storage_url, at):
    first = create(store)
    storage = dying(storage_url, at, before=True)
    with pytest.raises(Died):
        JobStore(storage).delete(first.id)
    if at == "/job.json":  # its marker has gone: the job is there as before, and another may be made
        assert store.created_before("ann", KEY) is None
        store.delete(first.id)
        assert ids(store) == []
    else:
        assert store.created_before("ann", KEY) == first.id


def test_the_failing_storage_of_one_does_not_take_the_job_from_another(store, storage_url):
    failing, others = open_storage(storage_url), []
    write = failing.write

    def fail(name, content):
        if name.endswith("/job.json"):
            others.append(create(store).id)
            raise StorageError("no room")
        write(name, content)

    failing.write = fail
    with pytest.raises(StorageError, match="no room"):
        create(JobStore(failing))
    assert ids(store) == others == [store.created_before("ann", KEY)]


def test_a_job_whose_deletion_is_under_way_is_not_brought_back(store, storage_url):
    first = create(store)
    reading = open_storage(storage_url)
    size = reading.size

    def meanwhile(name):
        if name.endswith("/job.json"):
            store.storage.delete(MARKER)  # as far as `delete` has got
            store.storage.delete(job_names(first.id).record)
        return size(name)

    reading.size = meanwhile
    assert JobStore(reading).created_before("ann", KEY) is None
    assert ids(store) == []


def test_a_marker_that_cannot_be_read_is_replaced(store):
    store.storage.write(MARKER, b"rubbish")
    assert store.created_before("ann", KEY) is None
    record = create(store)
    assert store.created_before("ann", KEY) == record.id


def test_a_damaged_job_can_be_deleted_and_its_marker_does_not_bring_it_back(store):
    first = create(store)
    store.storage.write(job_names(first.id).record, b"rubbish")
    store.delete(first.id)
    assert ids(store) == []
    assert store.created_before("ann", KEY) is None


def test_the_marker_of_a_damaged_job_does_not_bring_it_back_if_its_deletion_is_cut_off(store, storage_url):
    first = create(store)
    store.storage.write(job_names(first.id).record, b"rubbish")
    deleting = open_storage(storage_url)

    def die(_folder):
        raise Died

    deleting.delete_folder = die
    with pytest.raises(Died):
        JobStore(deleting).delete(first.id)
    assert store.created_before("ann", KEY) is None
    assert ids(store) == []


def test_a_marker_that_changes_all_the_time_is_an_error(store, monkeypatch):
    foreign = create(store)
    monkeypatch.setattr(publishing, "_is_there", lambda *_: False)
    monkeypatch.setattr(publishing, "_read", lambda *_: foreign)
    monkeypatch.setattr(store.storage, "delete", lambda _name: None)
    with pytest.raises(StorageError, match="given up all the time"):
        create(store)


def test_the_marker_tells_the_whole_record(store):
    record = create(store)
    assert IdempotencyMarker.model_validate_json(store.storage.read(MARKER)).record == record
