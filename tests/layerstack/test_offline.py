import re
import signal
import threading
from pathlib import Path

import numpy as np
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
from layerstack.offline import encode_file
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
    def call(*, file=prompt_file, folder=tmp_path / "out", watcher=None, settings=None, read_again=False, **options):
        given = {"model": str(tiny), "device": "cpu", "chunk_rows": 4} | (settings or {})
        return encode_file(
            file,
            folder,
            settings=Settings(**given),
            options=JobOptions(**options),
            watcher=watcher or Watched(),
            read_again=read_again,
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


def test_a_damaged_part_of_what_is_finished_is_found_and_done_anew_if_all_are_read_again(
    encode, encoder, loaded, tmp_path
):
    encode()
    out, part = tmp_path / "out", tmp_path / "out" / "parts" / "00001.parquet"
    before = parts_of(out)
    outcome = encode(read_again=True)
    assert (outcome.parts_written, outcome.manifest.rows, len(loaded)) == (0, 10, 1)
    assert parts_of(out) == before
    content = bytearray(part.read_bytes())
    content[100] ^= 1
    part.write_bytes(content)
    before = parts_of(out)
    assert encode().parts_written == 0  # its size is right
    outcome = encode(read_again=True)
    assert (outcome.parts_written, outcome.manifest.rows) == (1, 10)
    after = parts_of(out)
    assert {str(path) for path in after if after[path] != before[path]} == {"parts/00001.json", "parts/00001.parquet"}
    assert_right(out, encoder)


@pytest.mark.usefixtures("loaded")
def test_a_part_that_was_written_but_not_counted_is_none_of_those_written_now(encode, tmp_path):
    encode()
    (tmp_path / "out" / "manifest.json").unlink()
    for name in ("00001.json", "00002.json", "00002.parquet"):
        (tmp_path / "out" / "parts" / name).unlink()
    assert encode().parts_written == 1


@pytest.mark.usefixtures("loaded")
def test_a_damaged_manifest_is_made_anew_from_the_parts(encode, encoder, tmp_path):
    encode()
    before = parts_of(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{")
    assert encode().parts_written == 0
    assert parts_of(tmp_path / "out") == before
    assert_right(tmp_path / "out", encoder)


@pytest.mark.parametrize("name", ["chunks.json", "prompts/00001.parquet"])
def test_damaged_bookkeeping_is_one_line_with_the_path_and_what_to_do(encode, loaded, tmp_path, name):
    encode()
    out = tmp_path / "out"
    (out / name).write_text("{")
    assert encode().parts_written == 0  # the results are whole
    (out / "parts" / "00001.parquet").unlink()
    with pytest.raises(OfflineError) as told:
        encode()
    message = str(told.value)
    assert message.startswith(f"{out}/{name} is damaged")
    assert message.endswith(f"what {out} holds cannot go on from here: delete it, or choose another -o")
    assert "\n" not in message
    assert len(loaded) == (1 if name == "chunks.json" else 2)


@pytest.mark.usefixtures("loaded")
def test_a_bug_of_ours_keeps_its_traceback(encode, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("layerstack.offline.finalise", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        encode()


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


@pytest.mark.parametrize("made_before", [True, False])
def test_of_a_run_that_could_not_begin_nothing_stays(encode, loaded, tmp_path, made_before):
    folder = tmp_path / "some" / "out"
    if made_before:
        folder.mkdir(parents=True)
    (tmp_path / "bad.jsonl").write_text('"fine"\n' * 20 + "{")
    with pytest.raises(PromptFileError, match=r"bad.jsonl: line 21: .*; got '\{'"):
        encode(file=tmp_path / "bad.jsonl", folder=folder)
    assert loaded == []  # which may take minutes
    with pytest.raises(OfflineError, match="have to stay free"):
        encode(folder=folder, settings={"storage_reserve_bytes": 2**62})
    assert list(tmp_path.rglob("some/**/*")) == ([folder] if made_before else [])
    encode(folder=folder)


@pytest.mark.usefixtures("loaded")
def test_too_little_room_is_told_with_the_folder_what_is_free_and_what_to_do(encode, tmp_path):
    with pytest.raises(OfflineError) as told:
        encode(settings={"storage_reserve_bytes": 2**62})
    assert re.fullmatch(
        rf"{tmp_path}/out: the results would take about \d+\.\d kB or more, \d+\.\d [GT]B are free there, and "
        r"4611\.7 PB have to stay free \(LAYERSTACK_STORAGE_RESERVE_BYTES\); make room, or choose an -o on "
        "another disk",
        str(told.value),
    )


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
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OtherResultsError, match=f"holds the job {record.id}, which"):
        encode()
    (tmp_path / "out" / "job.json").write_text("{")
    with pytest.raises(OtherResultsError, match=r"job\.json is damaged"):
        encode()
    assert sorted(tmp_path.rglob("*")) == before


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


@pytest.mark.usefixtures("loaded")
def test_a_file_without_a_prompt_is_told(encode, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(PromptFileError, match=r"empty\.txt: there is no prompt in it"):
        encode(file=tmp_path / "empty.txt")
