import pytest
from filelock import FileLock

from jobs.errors import NotEnoughSpaceError, RecordFormatError
from jobs.layout import job_names
from jobs.results import finalise
from jobs.store import JobStore
from layerstack.errors import OfflineError, OtherResultsError
from layerstack.jobfolder import JobFolder, Origin, differences
from tests.sample_jobs import do_chunk, make_job

ORIGIN = Origin(
    prompt_file="a.txt",
    prompt_kind="txt",
    prompt_sha256="ab" * 32,
    model="m",
    revision="",
    subfolder="",
    preset="flux2-dev",
    encoder_dtype="",
    stored_dtype="",
)


@pytest.fixture
def folder(tmp_path):
    return JobFolder(tmp_path / "out")


@pytest.fixture
def record(folder):
    """Of a finished job in the folder."""
    store = JobStore(folder)
    record = make_job(store)
    for chunk in range(record.num_chunks):
        do_chunk(store, record, chunk)
    finalise(store, record.id, read_all=True)
    return record


def test_a_job_of_any_id_is_in_the_folder_itself(folder, record):
    assert folder.record() == record
    assert (folder.root / "parts" / "00000.parquet").is_file()
    other = job_names("01M8259KQ6ZM43ZW7F9E4YQJWV").part(0)
    assert folder.local_path(other) == folder.root / "parts" / "00000.parquet"


def test_a_manifest_whose_parts_are_all_there_is_whole(folder, record):
    assert folder.whole_manifest().job_id == record.id
    (folder.root / "parts" / "00001.parquet").write_bytes(b"short")
    assert folder.whole_manifest() is None


def test_a_manifest_that_is_damaged_or_missing_is_none(folder, record):
    (folder.root / "manifest.json").write_text("{")
    assert folder.whole_manifest() is None
    folder.remove_manifest()
    assert folder.whole_manifest() is None
    assert folder.record() == record


def fail_in(folder, files=()):
    """Begin work in a folder, which ends in an error."""
    with folder.locked():
        assert (folder.root / ".encode.lock").is_file()
        for name in files:
            (folder.root / name).touch()
        raise ZeroDivisionError


def test_a_folder_that_stays_empty_goes_again_with_those_that_were_made_for_it(tmp_path):
    (tmp_path / "kept").mkdir()
    for name in ("kept", "a/b/c"):
        with pytest.raises(ZeroDivisionError):
            fail_in(JobFolder(tmp_path / name))
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_a_folder_with_something_in_it_stays(tmp_path):
    with pytest.raises(ZeroDivisionError):
        fail_in(JobFolder(tmp_path / "a"), ["chunks.json"])
    assert {path.name for path in (tmp_path / "a").iterdir()} == {".encode.lock", "chunks.json"}


def test_a_lock_that_somebody_has_is_told_and_stays(folder):
    folder.root.mkdir()
    lock = folder.root / ".encode.lock"
    with FileLock(lock), pytest.raises(OfflineError, match="another `layerstack encode`"), folder.locked():
        pass
    assert lock.exists()


def test_a_servers_job_is_refused_before_anything_is_made(folder, record):
    before = sorted(folder.root.rglob("*"))
    with pytest.raises(OtherResultsError, match=f"holds the job {record.id}"), folder.locked():
        pass
    assert sorted(folder.root.rglob("*")) == before


def test_faults_are_told_with_real_paths_and_what_to_do(folder):
    damaged = folder.told(RecordFormatError("jobs/01ABC/chunks.json is damaged: jobs/01ABC/x, and /data/jobs/b/c"))
    root = folder.root
    assert str(damaged).startswith(f"{root}/chunks.json is damaged: {root}/x, and /data/jobs/b/c; ")
    assert "choose another -o" in str(damaged)
    full = folder.told(NotEnoughSpaceError(2_500_000, 300, 1000))
    assert "about 2.5 MB or more, 300 bytes are free there, and 1.0 kB have to stay free" in str(full)


def test_an_origin_knows_its_prompts_and_what_else_is_the_same():
    renamed = ORIGIN.model_copy(update={"prompt_file": "b.txt"})
    assert ORIGIN.is_as(renamed)
    other_model = ORIGIN.model_copy(update={"model": "n"})
    assert not ORIGIN.is_as(other_model)
    assert ORIGIN.has_prompts_of(other_model)
    assert not ORIGIN.has_prompts_of(ORIGIN.model_copy(update={"prompt_kind": "csv"}))


def test_options_that_differ_are_named(record):
    assert differences(record, {"layout": "dense", "on_error": "continue", "dtype": "float16"}) == [
        "layout is own_rows there, dense is asked for",
        "dtype is float32 there, float16 is asked for",
    ]
