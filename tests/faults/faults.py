"""Every kind of fault that is injected."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

from jobs.layout import JOBS, job_names
from jobs.records import JobStatus
from tests.faults.scene import Fault, Scene, api_answers
from tests.faults.workload import Job, entries, random_options

_UPLOAD_ROWS = 600


def worker_killed(scene: Scene) -> None:
    """SIGKILL, at a random moment; started again at once, as by a supervisor."""
    worker = scene.a_worker()
    scene.look()
    worker.kill()
    scene.measure()
    worker.start()


def worker_terminated(scene: Scene) -> None:
    """SIGTERM, and a new one as soon as it has ended; for two workers, one after the other."""
    for worker in scene.rng.sample(scene.cluster.ready_workers(), 2 if scene.patient else 1):
        scene.cluster.until(lambda: len(scene.cluster.ready_workers()) > 1, "two workers are ready")
        scene.look()
        assert worker.terminate() == 0, worker.tail()
        scene.measure()
        worker.start()


def worker_frozen(scene: Scene) -> None:
    """SIGSTOP, until others have done all that it was at; then SIGCONT."""
    worker = scene.a_worker()
    scene.look()
    worker.freeze()
    scene.measure()
    try:
        scene.cluster.until(
            lambda: scene.hit <= scene.cluster.counted(scene.job.id), "others have done what a frozen worker was at"
        )
    finally:
        worker.thaw()


def api_killed(scene: Scene) -> None:
    """SIGKILL, started again at once."""
    scene.cluster.api.kill()
    scene.measure()
    scene.cluster.api.start()


def api_killed_during_upload(scene: Scene) -> None:
    """SIGKILL while a job is being stored: there is no such job then, and its client sends it again."""
    cluster, rng = scene.cluster, scene.rng
    known = [entry["prompt"] for entry in scene.job.prompts]
    prompts, options = entries(rng, known, _UPLOAD_ROWS), random_options(rng) | {"chunk_rows": 2}
    before = set(cluster.store.storage.folders(JOBS))
    stored = rng.randint(0, len(prompts) // 4)

    def upload() -> None:
        with suppress(httpx.TransportError):
            answers.append(cluster.http.post("/jobs", json={"prompts": prompts, "options": options}))

    def far_enough() -> bool:
        made = set(cluster.store.storage.folders(JOBS)) - before
        return any(len(cluster.store.storage.files(job_names(each).prompts_folder)) >= stored for each in made)

    answers: list[httpx.Response] = []
    thread = threading.Thread(target=upload)
    thread.start()
    cluster.until(far_enough, f"{stored} chunks of an upload are stored")
    scene.look()
    cluster.api.kill()
    scene.measure()
    thread.join()
    cluster.api.start()
    assert not answers, answers[0].text
    (made,) = set(cluster.store.storage.folders(JOBS)) - before
    if cluster.store.exists(made):
        scene.more_jobs.append(Job(made, prompts, options))
    fewer, options = prompts[:20], options | {"chunk_rows": 10}
    scene.more_jobs.append(Job(cluster.submit(fewer, options), fewer, options))


def broker_killed(scene: Scene) -> None:
    """SIGKILL, started again at once on what it had written."""
    scene.cluster.broker.kill()
    scene.measure()
    scene.cluster.broker.start()
    _until_broker_answers(scene)


def broker_emptied(scene: Scene) -> None:
    """FLUSHALL."""
    scene.cluster.redis.flushall()
    scene.measure()


def broker_down(scene: Scene) -> None:
    """SIGTERM, and nobody there for some seconds."""
    scene.cluster.broker.terminate()
    scene.while_it_lasts(3, 20)
    scene.cluster.broker.start()
    _until_broker_answers(scene)
    scene.measure()


def broker_frozen(scene: Scene) -> None:
    """SIGSTOP: connections stay open, and nobody answers for some seconds."""
    scene.cluster.broker.freeze()
    try:
        scene.while_it_lasts(3, 20)
    finally:
        scene.cluster.broker.thaw()
    scene.measure()


def broker_full(scene: Scene) -> None:
    """Its disk is full: it refuses each write for some seconds."""
    scene.cluster.broker.limit_files(0)
    try:
        scene.while_it_lasts(3, 10)
    finally:
        scene.cluster.broker.limit_files(None)
    scene.measure()


def broker_down_and_worker_killed(scene: Scene) -> None:
    """A worker dies while there is no broker."""
    worker = scene.a_worker()
    scene.cluster.broker.kill()
    scene.while_it_lasts(1, 5)
    worker.kill()
    worker.start()
    scene.while_it_lasts(1, 5)
    scene.cluster.broker.start()
    _until_broker_answers(scene)
    scene.measure()


def everything_killed(scene: Scene) -> None:
    """SIGKILL for all of it at once, started again at once: a power cut, but for what a disk would lose."""
    for child in scene.cluster.children:
        child.kill()
    scene.measure()
    for child in scene.cluster.children:
        child.start()
    _until_broker_answers(scene)


def storage_full(scene: Scene) -> None:
    """No file can grow for some seconds: what is written of it is cut off."""
    cluster = scene.cluster
    before = set(cluster.store.storage.folders(JOBS))
    limited = [cluster.api, *cluster.ready_workers()]
    size = scene.rng.choice([0, 100, 4096])
    for child in limited:
        child.limit_files(size)
    try:
        scene.paused_because("File too large")
        answer = cluster.http.post("/jobs", json={"prompts": [scene.rng.randbytes(20_000).hex()]})
        assert answer.status_code == 507, answer.text
        scene.while_it_lasts(0, 5)
    finally:
        for child in limited:
            child.limit_files(None)
    scene.measure()
    assert set(cluster.store.storage.folders(JOBS)) == before


def storage_failing(scene: Scene) -> None:
    """Writing fails for some seconds; at times reading too."""
    flag = scene.cluster.folder / "failing"
    both = scene.rng.random() < 0.5
    flag.write_text("reads and writes" if both else "writes")
    try:
        if both:
            scene.cluster.until(lambda: not api_answers(scene), "the API cannot read the job")
            scene.while_it_lasts(1, 8)
        else:
            scene.paused_because("Input/output error")
            scene.while_it_lasts(0, 8)
    finally:
        flag.unlink()
    scene.measure()


def bucket_refusing(scene: Scene) -> None:
    """The object store answers 503, for longer than its client tries again."""
    with _bucket(scene, "refuse"):
        scene.cluster.until(lambda: not api_answers(scene), "the API cannot read the job")
        scene.while_it_lasts(10, 20)


def bucket_forgetting(scene: Scene) -> None:
    """The object store does what is asked, and answers 500 for some seconds: nobody knows what has been done."""
    with _bucket(scene, "forget"):
        scene.while_it_lasts(3, 12)


def part_corrupted(scene: Scene) -> None:
    """A byte of a part that counts is another one, or its end is missing."""
    storage, names = scene.cluster.store.storage, job_names(scene.job.id)
    part = names.part(scene.rng.choice(sorted(scene.cluster.counted(scene.job.id))))
    content = bytearray(storage.read(part))
    position = scene.rng.randrange(len(content))
    if scene.rng.random() < 0.5:
        content[position] ^= 1 << scene.rng.randrange(8)
    else:
        del content[position:]
    storage.write(part, bytes(content))
    scene.measure()


def part_deleted(scene: Scene) -> None:
    """A part that counts is not there any more."""
    storage, names = scene.cluster.store.storage, job_names(scene.job.id)
    storage.delete(names.part(scene.rng.choice(sorted(scene.cluster.counted(scene.job.id)))))
    scene.measure()


@contextmanager
def _bucket(scene: Scene, fault: str) -> Iterator[None]:
    flag = scene.cluster.folder / "bucket"
    flag.write_text(fault)
    try:
        yield
    finally:
        flag.unlink()
    scene.measure()


def _until_broker_answers(scene: Scene) -> None:
    scene.cluster.until(scene.cluster.broker_answers, "the broker answers")


def _has_succeeded(scene: Scene) -> bool:
    return scene.cluster.store.files(scene.job.id).status() == JobStatus.SUCCEEDED


FAULTS = [
    Fault(worker_killed, workers=2),
    Fault(worker_terminated, workers=2),
    Fault(worker_frozen, workers=2),
    Fault(api_killed, mended=api_answers),
    Fault(api_killed_during_upload, mended=api_answers),
    Fault(broker_killed),
    Fault(broker_emptied),
    Fault(broker_down),
    Fault(broker_frozen),
    Fault(broker_full),
    Fault(part_corrupted, late=True, mended=_has_succeeded),
    Fault(part_deleted, late=True, mended=_has_succeeded),
]
"""Faults that strike whatever the storage is."""

COMBINED_FAULTS = [Fault(broker_down_and_worker_killed, workers=2), Fault(everything_killed, mended=api_answers)]
FOLDER_FAULTS = [Fault(storage_full, mended=api_answers), Fault(storage_failing, mended=api_answers)]
BUCKET_FAULTS = [Fault(bucket_refusing, mended=api_answers), Fault(bucket_forgetting, mended=api_answers)]
