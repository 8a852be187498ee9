import gzip
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock

import layerstack
from jobs.records import JobOptions
from jobs.settings import Settings
from jobs.store import JobStore
from layerstack.errors import OfflineError, OtherResultsError, PromptFileError
from layerstack.jobfolder import JobFolder
from layerstack.offline import LocalEncoder, encode_file, read_prompts
from tests.sample_jobs import make_job
from tests.support import files_up_to

TEXTS = [f"prompt number {n}" for n in range(10)]


class Watched:
    """Hears of progress, and does something when prompts are encoded."""

    def __init__(self, on_encoding=lambda _done: None):
        self.loaded, self.encoded, self.checked = [], [], []
        self._on_encoding = on_encoding

    def loading(self, model):
        self.loaded.append(model)

    def encoding(self, done, total):
        self.encoded.append((done, total))
        self._on_encoding(done)

    def checking(self, done, total):
        self.checked.append((done, total))


@pytest.fixture
def loaded(monkeypatch, encoder):
    """Take the encoder of the tests for the one that is loaded -> the settings that asked for it."""
    asked = []
    monkeypatch.setattr("worker.model.load_encoder", lambda settings: asked.append(settings) or encoder)
    return asked


@pytest.fixture
def prompt_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


@pytest.fixture
def encode(prompt_file, tiny, tmp_path):
    def call(*, file=prompt_file, folder=tmp_path / "out", watcher=None, settings=None, **options):
        given = {"model": str(tiny), "device": "cpu", "chunk_rows": 4} | (settings or {})
        return encode_file(
            file,
            folder,
            settings=Settings(**given),
            options=JobOptions(**options),
            watcher=watcher or Watched(),
        )

    return call


def traces(folder):
    """What would tell that a file has been written anew."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def parts_of(folder):
    return {path: trace for path, trace in traces(folder).items() if path.parts[0] == "parts"}


def assert_right(folder, encoder, texts=TEXTS):
    rows = layerstack.read(folder)
    want, _ = encoder.dense(encoder.encode(texts))
    assert [row["prompt"] for row in rows] == texts
    for row, dense in zip(rows, want, strict=True):
        np.testing.assert_allclose(row["prompt_embeds"], dense, rtol=1e-4, atol=1e-4)


def test_the_folder_holds_the_files_of_a_job_and_is_read_as_such(encode, encoder, tiny, tmp_path):
    watcher = Watched()
    outcome = encode(watcher=watcher)
    out = tmp_path / "out"
    assert outcome.folder == out
    names = ["chunks.json", "job.json", "manifest.json", "started"]
    numbered = [f"{n:05d}" for n in range(3)]
    names += [f"parts/{n}.{kind}" for n in numbered for kind in ("json", "parquet")]
    names += [f"prompts/{n}.parquet" for n in numbered]
    assert list(map(str, traces(out))) == sorted(names)
    assert (outcome.manifest.rows, outcome.manifest.failed, outcome.parts_written) == (10, 0, 3)
    assert outcome.manifest.fingerprint == encoder.fingerprint
    assert watcher.loaded == [str(tiny)]
    assert (watcher.encoded[0], watcher.encoded[-1]) == ((0, 10), (10, 10))
    assert_right(out, encoder)


@pytest.mark.usefixtures("loaded")
def test_rows_are_stored_as_asked(encode, tmp_path):
    encode(dtype="bfloat16", layout="dense", compression="zstd", chunk_rows=10)
    (part,) = (tmp_path / "out" / "parts").glob("*.parquet")
    table = pq.read_table(part)
    assert [len(content) for content in table["prompt_embeds"].to_pylist()] == [512 * 96 * 2] * 10
    assert layerstack.read(tmp_path / "out")[3]["prompt_embeds"].dtype is torch.bfloat16


def test_what_is_finished_is_not_touched_and_the_model_not_loaded(encode, loaded, tmp_path):
    encode()
    before = traces(tmp_path / "out")
    assert len(loaded) == 1
    outcome = encode()
    assert (outcome.parts_written, outcome.manifest.rows) == (0, 10)
    assert len(loaded) == 1
    assert traces(tmp_path / "out") == before


def test_the_same_model_under_another_name_is_told_by_its_fingerprint(encode, loaded, tmp_path):
    encode()
    before = traces(tmp_path / "out")
    assert encode(settings={"model": "its/hub-id"}).parts_written == 0
    assert len(loaded) == 2
    assert traces(tmp_path / "out") == before


@pytest.mark.usefixtures("loaded")
def test_ctrl_c_stops_it_and_the_same_call_goes_on_without_doing_a_part_anew(encode, encoder, tmp_path):
    def press(done):
        if done >= 4:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        encode(watcher=Watched(press), settings={"bulk_threads": 1})
    before = parts_of(tmp_path / "out")
    assert 2 <= len(before) < 6
    watcher = Watched()
    outcome = encode(watcher=watcher)
    assert outcome.parts_written == 3 - len(before) // 2
    assert watcher.encoded[0] == (4 * (len(before) // 2), 10)
    assert before.items() <= parts_of(tmp_path / "out").items()
    assert_right(tmp_path / "out", encoder)


@pytest.mark.usefixtures("loaded")
def test_a_full_disk_is_told_and_the_same_call_goes_on_when_there_is_room(encode, encoder, tmp_path):
    with (
        files_up_to(20_000),
        pytest.raises(OfflineError, match=r"\.parquet: .*; make room, and the same command goes on"),
    ):
        encode()
    assert not list((tmp_path / "out" / "parts").glob(".*"))
    encode()
    assert_right(tmp_path / "out", encoder)


@pytest.mark.usefixtures("loaded")
def test_a_device_that_fails_is_told_and_the_same_call_goes_on(encode, encoder, forwards, tmp_path):
    forwards.fault = lambda texts: (
        RuntimeError("the card is gone") if "prompt number 9" in texts or "" in texts else None
    )
    with pytest.raises(OfflineError, match="the card is gone; the same command goes on"):
        encode(settings={"bulk_threads": 1}, chunk_rows=1)
    before = parts_of(tmp_path / "out")
    forwards.fault = lambda _texts: None
    encode(chunk_rows=1)
    assert before.items() <= parts_of(tmp_path / "out").items()
    assert_right(tmp_path / "out", encoder)


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("on_error", ["continue", "fail"])
def test_a_prompt_that_fails_is_noted_or_ends_it_as_asked(encode, forwards, on_error):
    forwards.fault = lambda texts: ValueError("boom") if "prompt number 5" in texts else None
    if on_error == "fail":
        with pytest.raises(
            OfflineError, match=r"prompt 5 \(id '5'\) failed: ValueError: boom; with --on-error continue"
        ):
            encode(on_error=on_error)
    else:
        outcome = encode(on_error=on_error)
        assert [(each.index, each.error) for each in outcome.manifest.errors] == [(5, "ValueError: boom")]


@pytest.mark.usefixtures("loaded")
def test_a_part_that_was_cut_off_or_lost_is_done_anew_and_no_other(encode, encoder, tmp_path):
    encode()
    parts = tmp_path / "out" / "parts"
    before = parts_of(tmp_path / "out")
    (parts / "00001.parquet").write_bytes(b"rubbish")
    outcome = encode()
    assert (outcome.manifest.rows, outcome.parts_written) == (10, 1)
    after = parts_of(tmp_path / "out")
    assert {str(path) for path in after if after[path] != before[path]} == {"parts/00001.json", "parts/00001.parquet"}
    (parts / "00002.parquet").unlink()
    encode()
    assert_right(tmp_path / "out", encoder)


@pytest.mark.usefixtures("loaded")
def test_a_part_that_is_damaged_before_the_end_is_found_by_its_digest(encode, encoder, tmp_path):
    encode()
    out = tmp_path / "out"
    (out / "manifest.json").unlink()  # as if it had been stopped just before
    content = bytearray((out / "parts" / "00001.parquet").read_bytes())
    content[100] ^= 1
    (out / "parts" / "00001.parquet").write_bytes(content)
    encode()
    assert_right(out, encoder)


@pytest.mark.usefixtures("loaded")
def test_a_run_that_was_killed_while_it_wrote_prompts_starts_over(encode, encoder, tmp_path):
    out = tmp_path / "out"
    (out / "prompts").mkdir(parents=True)
    for name in (".encode.lock", "prompts/00000.parquet", "prompts/00007.parquet", "chunks.json", ".job.json.a.tmp"):
        (out / name).write_text("half of it")
    encode()
    assert not (out / "prompts" / "00007.parquet").exists()
    assert not (out / ".job.json.a.tmp").exists()
    assert_right(out, encoder)


@pytest.mark.usefixtures("loaded")
def test_of_a_run_that_could_not_begin_nothing_stays(encode, tmp_path):
    (tmp_path / "bad.jsonl").write_text('"fine"\n' * 20 + "{")
    with pytest.raises(PromptFileError, match=r"bad.jsonl: line 21: .*; got '\{'"):
        encode(file=tmp_path / "bad.jsonl")
    assert traces(tmp_path / "out") == {}
    encode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "dense"}, "layout is own_rows there, dense is asked for"),
        ({"dtype": "float16"}, "dtype is float32 there, float16 is asked for"),
        ({"settings": {"chunk_rows": 5}}, "chunk_rows is 4 there, 5 is asked for"),
        ({"on_error": "fail", "compression": "zstd"}, "compression is none there, zstd is asked for; on_error is "),
        ({"settings": {"dtype": "bfloat16"}}, "holds rows of another encoder: fingerprint "),
        ({"settings": {"preset": "flux2-dev-modular"}}, "flux2-dev-modular, float32\\) now"),
    ],
)
def test_other_options_or_another_encoder_are_told_and_nothing_is_touched(encode, tmp_path, change, message):
    encode()
    (tmp_path / "out" / "manifest.json").unlink()
    before = traces(tmp_path / "out")
    with pytest.raises(OtherResultsError, match=message) as told:
        encode(**change)
    assert "choose another -o" in str(told.value)
    assert traces(tmp_path / "out") == before


@pytest.mark.usefixtures("loaded")
def test_other_prompts_are_told_and_the_same_under_another_name_are_not(encode, prompt_file, tmp_path):
    encode()
    before = traces(tmp_path / "out")
    same, other, as_csv = (tmp_path / name for name in ("same.txt", "other.txt", "same.csv"))
    for path in (same, as_csv):
        path.write_bytes(prompt_file.read_bytes())
    other.write_text("something else\n")
    assert encode(file=same).parts_written == 0
    for path in (other, as_csv):
        with pytest.raises(OtherResultsError, match=r"results of other prompts: of prompts\.txt .*choose another -o"):
            encode(file=path)
    assert traces(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["notes.txt", "prompts/00000.parquet", "manifest.json"])
def test_somebody_elses_folder_is_left_as_it_is(encode, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(OtherResultsError, match=f"has other files in it \\({Path(name).parts[0]}\\)"):
        encode()
    assert [each for each in (tmp_path / "out").rglob("*") if each.is_file()] == [path]


def test_a_job_of_a_server_is_left_as_it_is(encode, tmp_path):
    folder = JobFolder(tmp_path / "out")
    record = make_job(JobStore(folder))
    before = traces(tmp_path / "out")
    with pytest.raises(OtherResultsError, match=f"holds the job {record.id}, which"):
        encode()
    (tmp_path / "out" / "job.json").write_text("{")
    with pytest.raises(OtherResultsError, match=r"job\.json is damaged"):
        encode()
    assert traces(tmp_path / "out").keys() == before.keys()


def test_a_file_is_no_folder(encode, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OtherResultsError, match="is no folder"):
        encode()


def test_two_at_a_time_do_not_get_in_each_others_way(encode, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".encode.lock"), pytest.raises(OfflineError, match="another `layerstack encode`"):
        encode()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "/nowhere"}, "the encoder cannot be loaded: /nowhere: no such folder"),
        ({"preset": "flux9"}, "no preset 'flux9'"),
    ],
)
def test_what_cannot_be_loaded_is_told(encode, settings, message):
    with pytest.raises(OfflineError, match=message):
        encode(settings=settings)


def test_prompt_files_of_all_kinds_are_read_as_the_api_reads_them(tmp_path):
    contents = {
        "a.txt": b"a fox\na hen\n",
        "a.jsonl": b'"a fox"\n{"prompt": "a hen"}\n',
        "a.csv": b"prompt\na fox\na hen\n",
        "a.txt.gz": gzip.compress(b"a fox\na hen\n"),
        "a.csv.zst": pa.compress(b"prompt\na fox\na hen\n", "zstd", asbytes=True),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"prompt": ["a fox", "a hen"]}), tmp_path / "a.parquet")
    for name in [*contents, "a.parquet"]:
        assert [each.prompt for each in read_prompts(tmp_path / name, Settings())] == ["a fox", "a hen"], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "fine\n" + 30 * "x",
            r"line 2: a prompt has at most 20 characters; got 30 \(LAYERSTACK_PROMPT_MAX_CHARS",
        ),
        ("a.csv", "text\na fox\n", "line 1: the header needs one column 'prompt'"),
        ("a.pdf", "", "not a prompt file, by its name: .txt"),
        ("a.parquet", "nonsense", "not a Parquet file"),
        ("a.txt.gz", "nonsense", "damaged or cut off gzip"),
    ],
)
def test_a_bad_prompt_file_is_told_with_line_value_and_limit(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptFileError, match=message) as told:
        list(read_prompts(tmp_path / name, Settings(prompt_max_chars=20)))
    assert str(told.value).startswith(f"{tmp_path / name}: ")


@pytest.mark.usefixtures("loaded")
def test_a_file_without_a_prompt_is_told(encode, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PromptFileError, match=r"empty\.txt: there is no prompt in it"):
        encode(file=tmp_path / "empty.txt")


@pytest.mark.usefixtures("loaded")
def test_a_few_prompts_are_encoded_as_dense_tensors(encoder):
    local = LocalEncoder(Settings())
    prompt_embeds, ids = local.dense(TEXTS[:2])
    want, want_ids = encoder.dense(encoder.encode(TEXTS[:2]))
    np.testing.assert_array_equal(prompt_embeds, want.numpy())
    np.testing.assert_array_equal(ids, want_ids.numpy())
    assert local.info.fingerprint == encoder.fingerprint
    prompt, length = "a fox", 512
    own = length - len(encoder.tokenizer([prompt])[0].own_ids)
    assert [local.token(prompt, row) for row in (0, own - 1, own, own + 1)] == [
        "padding",
        "prefix",
        "'a'",
        "' fox'",
    ]
    with pytest.raises(OfflineError, match="prompt 1: not valid Unicode"):
        local.dense(["a fox", "\ud800"])
