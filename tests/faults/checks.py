"""What must hold after any fault: every row once, in order, and right; nothing left over."""

import hashlib
import io
import re

import numpy as np
import pyarrow.parquet as pq

from jobs.layout import JOBS, is_job_id, job_names
from jobs.parts import PartHeader
from jobs.records import JobStatus, Manifest
from jobs.tensors import text_ids
from tests.faults.cluster import Cluster
from tests.faults.workload import Job, Row

_EXPECTED_FILE = re.compile(
    r"(job|chunks|manifest)\.json|started|prompts/\d{5}\.parquet|(parts|failures)/\d{5}\.(parquet|json)"
)
MAX_LENGTH = 512


def succeeded(cluster: Cluster, job: Job) -> bool:
    view = view_of(cluster, job)
    assert view["status"] != JobStatus.FAILED, f"{view['error']}\n{cluster.tails()}"
    return view["status"] == JobStatus.SUCCEEDED


def view_of(cluster: Cluster, job: Job) -> dict:
    answer = cluster.http.get(f"/jobs/{job.id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def finished_rows(cluster: Cluster, job: Job) -> dict[str, Row]:
    """Wait for a job, and return what came out for each prompt."""
    cluster.until(lambda: succeeded(cluster, job), f"job {job.id} has succeeded")
    rows = {}
    for table, embed_dim in _parts(cluster, job):
        for row in table.to_pylist():
            own_rows = np.frombuffer(row["prompt_embeds"], np.float32).reshape(-1, embed_dim)
            rows[row["prompt"]] = Row(own_rows, row["num_tokens"], row["truncated"])
    return rows


def check_results(cluster: Cluster, job: Job, known: dict[str, Row]) -> None:
    """Check a job that must succeed, by what the API hands out."""
    cluster.until(lambda: succeeded(cluster, job), f"job {job.id} has succeeded")
    view = view_of(cluster, job)
    count = len(job.prompts)
    assert (view["num_prompts"], view["num_done"], view["num_failed"]) == (count, count, 0)
    got = []
    for table, _ in _parts(cluster, job):
        columns = {name: table[name].to_pylist() for name in table.column_names}
        assert columns["error"] == [None] * len(table)
        wanted = [known[prompt] for prompt in columns["prompt"]]
        assert columns["num_tokens"] == [row.num_tokens for row in wanted]
        assert columns["truncated"] == [row.truncated for row in wanted]
        for row, embeds, ids in zip(wanted, columns["prompt_embeds"], columns["text_ids"], strict=True):
            own_rows = np.frombuffer(embeds, np.float32).reshape(row.own_rows.shape)
            np.testing.assert_allclose(own_rows, row.own_rows, rtol=1e-4, atol=1e-4)
            assert np.array_equal(ids, text_ids(MAX_LENGTH - len(own_rows), MAX_LENGTH))
        got += zip(columns["index"], columns["id"], columns["prompt"], strict=True)
    assert got == [(n, entry["id"], entry["prompt"]) for n, entry in enumerate(job.prompts)]


def check_tidy(cluster: Cluster) -> None:
    """Check that nothing is left of writers that died, once the reconciler had time to look."""
    cluster.until(lambda: not leftovers(cluster), "no leftovers")


def leftovers(cluster: Cluster) -> list[str]:
    """Names of files that belong to no job, or are no file of a job."""
    found = []
    for job_id in cluster.store.storage.folders(JOBS):
        names = job_names(job_id)
        if not is_job_id(job_id) or cluster.store.storage.size(names.record) is None:
            found.append(names.folder)
        elif (folder := cluster.store.storage.local_path(names.folder)) is not None:
            files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            found += [f"{names.folder}/{name}" for name in files if not _EXPECTED_FILE.fullmatch(name)]
    return found


def _parts(cluster: Cluster, job: Job):
    """Fetch every part, compare it with the manifest and with the storage, and yield it as a table."""
    manifest = Manifest.model_validate(cluster.http.get(f"/jobs/{job.id}/results").json())
    assert [part.index for part in manifest.parts] == list(range(job.num_chunks))
    assert (manifest.rows, manifest.succeeded, manifest.failed) == (len(job.prompts), len(job.prompts), 0)
    assert manifest.bytes == sum(part.bytes for part in manifest.parts)
    for part in manifest.parts:
        content = cluster.http.get(f"/jobs/{job.id}/parts/{part.index}").content
        assert content == cluster.store.storage.read(job_names(job.id).part(part.index))
        assert (len(content), hashlib.sha256(content).hexdigest()) == (part.bytes, part.sha256)
        table = pq.read_table(io.BytesIO(content))
        assert part.rows == len(table)
        header = pq.read_metadata(io.BytesIO(content)).metadata[b"layerstack"]
        yield table, PartHeader.model_validate_json(header).embed_dim
