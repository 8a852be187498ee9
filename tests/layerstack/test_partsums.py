import json
import shutil

import pytest

from jobs.layout import job_names
from layerstack.errors import ReadError
from layerstack.jobfolder import Origin
from layerstack.partsums import check_sum, damaged_parts, parts_to_verify
from layerstack.sources import open_source
from tests.layerstack.jobs_on_disk import flip_byte, write_job

JOB_ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
RECORD = {
    "id": JOB_ID, "created_at": "2026-11-25T00:00:00Z", "num_prompts": 10, "num_chunks": 3, "chunk_rows": 4,
    "chunk_tokens": 1000, "deduplicate": True, "estimated_bytes": 1, "dtype": "float32", "layout": "own_rows",
    "compression": "none", "fingerprint": "f",
}  # fmt: skip
ORIGIN = Origin(
    prompt_file="a.txt", prompt_kind="txt", prompt_sha256="0", model="demo", revision="", subfolder="", preset="",
    encoder_dtype="", stored_dtype="",
)  # fmt: skip


@pytest.fixture
def job(tmp_path):
    return write_job(tmp_path / "job", bad=(0, 5), cut=(4, 9))


def damaged(path):
    return [(part.part, part.reason) for part in damaged_parts(parts_to_verify(str(path)))]


def test_parts_that_are_what_the_manifest_says_are_all_read(job):
    sizes = []
    assert damaged_parts(parts_to_verify(str(job)), sizes.append) == []
    there = sum(path.stat().st_size for path in (job / "parts").iterdir())
    assert sum(sizes) == there == parts_to_verify(str(job)).bytes


@pytest.mark.parametrize("path", [".", "parts", "parts/00001.parquet", "parts/../parts/00001.parquet"])
def test_a_flipped_byte_is_found_and_the_part_named(job, path):
    flip_byte(job / "parts" / "00001.parquet")
    assert damaged(job / path) == [("00001.parquet", "its SHA-256 is not the manifest's")]


def test_so_it_is_from_within_the_folder(job, monkeypatch):
    flip_byte(job / "parts" / "00001.parquet")
    for folder, path in ((job, "."), (job / "parts", "."), (job / "parts", "00001.parquet"), (job / "parts", "..")):
        monkeypatch.chdir(folder)
        assert [name for name, _ in damaged(path)] == ["00001.parquet"]


def test_a_part_that_is_short_or_missing_is_named_too(job):
    part = job / "parts" / "00000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    (job / "parts" / "00002.parquet").unlink()
    short, missing = damaged(job)
    assert (short[0], missing) == ("00000.parquet", ("00002.parquet", "it is missing"))
    assert "by the manifest" in short[1]


def test_without_a_manifest_there_is_nothing_to_compare_with(job):
    (job / "manifest.json").unlink()
    for path in (job, job / "parts", job / "parts" / "00000.parquet"):
        with pytest.raises(ReadError, match=r"no manifest\.json"):
            parts_to_verify(str(path))


def test_a_part_that_the_manifest_does_not_list_is_not_said_to_be_right(job):
    shutil.copy(job / "parts" / "00000.parquet", job / "parts" / "00099.parquet")
    with pytest.raises(ReadError, match=r"the manifest does not know 00099\.parquet"):
        parts_to_verify(str(job / "parts" / "00099.parquet"))
    for path in (job, job / "parts"):
        assert damaged(path) == [("00099.parquet", "the manifest does not know it")]


@pytest.mark.parametrize(
    "path", ["backup", "backup/00000.parquet", "parts/old", "parts/old/00000.parquet", "x.parquet"]
)
def test_what_only_lies_in_a_jobs_folder_is_not_compared_with_its_parts(job, path):
    target = job / path
    if target.suffix:
        target.parent.mkdir(exist_ok=True)
        shutil.copy(job / "parts" / "00000.parquet", target)
    else:
        target.mkdir()
    with pytest.raises(ReadError, match=r"no manifest\.json"):
        parts_to_verify(str(target))


def test_what_a_fetch_left_is_fetched_again(job):
    repair = parts_to_verify(str(job)).repair
    assert repair == f"`layerstack jobs fetch {JOB_ID} -o {job}` downloads them again"


def test_what_encode_made_it_does_anew(job):
    (job / "job.json").write_text(json.dumps(RECORD | {"metadata": ORIGIN.model_dump()}))
    for path in (job, job / "parts", job / "parts" / "00000.parquet"):
        assert parts_to_verify(str(path)).repair == f"`layerstack encode ... -o {job} --check` does them anew"


def test_what_lies_in_a_servers_own_storage_the_server_does_anew(job):
    (job / "job.json").write_text(json.dumps(RECORD | {"metadata": {"made_by": "me"}}))
    assert parts_to_verify(str(job)).repair == f"`layerstack jobs retry {JOB_ID}` has the server make them anew"


def test_so_it_does_what_is_read_from_there_by_a_url(job, tmp_path):
    folder = tmp_path / job_names(JOB_ID).folder
    shutil.copytree(job, folder)
    flip_byte(folder / "parts" / "00001.parquet")
    found = parts_to_verify(folder.as_uri())
    assert found.repair == f"`layerstack jobs retry {JOB_ID}` has the server make them anew"
    assert [part.reason for part in damaged_parts(found)] == ["its SHA-256 is not the manifest's"]


def test_what_was_exported_is_exported_again(job):
    (job / "export.json").write_text("{}")
    assert "the same `layerstack export`" in parts_to_verify(str(job)).repair


def test_a_damaged_record_of_the_job_does_not_keep_parts_from_being_verified(job):
    (job / "job.json").write_text("{")
    assert "layerstack jobs fetch" in parts_to_verify(str(job)).repair


def test_one_part_is_checked_by_itself(job):
    flip_byte(job / "parts" / "00001.parquet")
    source = open_source(job)
    check_sum(source, source.parts[0])
    with pytest.raises(ReadError, match=r"00001\.parquet is damaged: its SHA-256 is not the manifest's"):
        check_sum(source, source.parts[1])
    listed = open_source(job / "parts")  # without its manifest
    check_sum(listed, listed.parts[1])
