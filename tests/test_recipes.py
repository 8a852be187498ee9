"""Every block of docs/recipes.md runs on a fetched job, and makes what it says."""

import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import layerstack
from jobs.layout import job_names
from jobs.parts import EncodedRow, PartHeader, PartWriter
from jobs.records import Prompt
from jobs.results import DigestingFile, finalise
from jobs.storage import open_storage
from jobs.store import JobStore
from tests.sample_jobs import INFO, make_job

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
_BLOCK = re.compile(r"^### ([^\n]+)\n(?:(?!^#).)*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = dict(_BLOCK.findall(PAGE.read_text("utf-8")))
ROWS = {"dog": 1, "fox": 3, "owl": 5, "bat": None, "cat": 2}
"""Own rows of each id; the one without failed."""
JOINED = [("fox", "fox.png", 35), ("owl", "owl.png", 37)]
P, D, LENGTH = 32, INFO.embed_dim, 48
PREFIX = np.arange(P * D, dtype=np.float32).reshape(P, D)
PAD = np.full((1, D), -1, np.float32)


def own(name):
    return np.full((ROWS[name], D), len(name) + ord(name[0]), np.float32)


def dense(name):
    return np.concatenate([np.repeat(PAD, LENGTH - P - ROWS[name], axis=0), PREFIX, own(name)])


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A folder with `captions/`, a job of two parts as it looks when it has been fetched."""
    folder = tmp_path_factory.mktemp("recipes")
    store = JobStore(open_storage(str(folder / "storage")))
    prompts = [Prompt(id=name, prompt=f"a {name}") for name in ROWS]
    record = make_job(store, prompts=prompts, chunk_rows=3, dtype="bfloat16")
    header = PartHeader.build(
        layout="own_rows", dtype="bfloat16", max_length=LENGTH, layers=INFO.layers, fingerprint=record.fingerprint,
        prefix_rows=PREFIX, pad_row=PAD[0],
    )  # fmt: skip
    for chunk in range(record.num_chunks):
        with store.new_part(record.id, chunk) as file:
            digesting = DigestingFile(file)
            with PartWriter(digesting, header, "none") as part:
                for index, prompt in store.prompts(record.id, chunk):
                    if (n := ROWS[prompt.id]) is None:
                        part.write(EncodedRow(index, prompt.id, prompt.prompt, error="why"))
                    else:
                        rows = own(prompt.id)
                        part.write(EncodedRow(index, prompt.id, prompt.prompt, rows, P + n, truncated=False))
        store.count_part(record.id, part.counts.report(chunk, digesting.size, digesting.sha256))
    assert finalise(store, record.id, read_all=True) == []
    job = Path(store.storage.local_path(job_names(record.id).folder))
    shutil.copytree(job / "parts", folder / "captions" / "parts", ignore=shutil.ignore_patterns("*.json"))
    shutil.copy(job / "manifest.json", folder / "captions")
    return folder


@pytest.fixture
def run(captions, monkeypatch, tmp_path):
    """Run a block in a namespace of its own, and return that."""
    monkeypatch.chdir(captions)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def execute(name):
        namespace = {"__name__": "recipe"}
        exec(compile(BLOCKS[name], f"{PAGE.name}: {name}", "exec"), namespace)  # noqa: S102 - blocks of our own page
        return namespace

    return execute


def is_fox(found):
    assert found["own_rows"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["own_rows"].astype(np.float32), own("fox"))


def is_every_prompt(found):
    assert set(found["own_rows"]) == {"dog", "fox", "owl", "cat"}
    for name, rows in found["own_rows"].items():
        np.testing.assert_array_equal(rows.astype(np.float32), own(name))


def is_dense_fox(found):
    embeds = found["prompt_embeds"]
    np.testing.assert_array_equal(np.array(embeds.tolist()), dense("fox"))
    if "text_ids" in found:
        assert found["text_ids"].tolist() == [[0, 0, 0, place] for place in range(LENGTH)]


def is_all_batches(found):
    assert found["shapes"] == [(4, LENGTH, D)]


def is_the_long_ones(found):
    assert found["long"].to_pydict() == {"id": ["fox", "owl"], "num_tokens": [35, 37]}


def is_what_pandas_makes(found):
    assert found["errors"].to_dict() == {"why": 1}
    assert found["joined"][["id", "image", "num_tokens"]].values.tolist() == [list(row) for row in JOINED]


def is_what_polars_makes(found):
    assert found["long"]["id"].to_list() == ["fox", "owl"]
    assert found["errors"].rows() == [("why", 1)]
    assert found["joined"].select("id", "image", "num_tokens").rows() == JOINED


def is_what_duckdb_makes(found):
    assert found["longest"] == [("owl", 37), ("fox", 35)]
    assert found["errors"] == [("why", 1)]
    assert found["joined"] == JOINED


CHECKS = {
    "One prompt as tensors": is_dense_fox,
    "A DataLoader": is_all_batches,
    "A DataLoader that is faster": is_all_batches,
    "Own rows as numpy arrays": is_every_prompt,
    "One prompt with pyarrow": is_fox,
    "Filter with pyarrow": is_the_long_ones,
    "One prompt with pandas": is_fox,
    "Errors and a join with pandas": is_what_pandas_makes,
    "One prompt with Polars": is_fox,
    "Filter, errors and a join with Polars": is_what_polars_makes,
    "One prompt with DuckDB": is_fox,
    "Filter, errors and a join with DuckDB": is_what_duckdb_makes,
    "One prompt with datasets": is_fox,
    "Streaming with datasets": is_every_prompt,
    "One prompt made dense": is_dense_fox,
}


def test_every_block_of_the_page_is_run():
    assert set(BLOCKS) == set(CHECKS)
    assert PAGE.read_text("utf-8").count("```python") == len(BLOCKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_recipe_makes_what_it_says(run, name):
    CHECKS[name](run(name))


def test_the_job_of_the_recipes_is_what_layerstack_reads(captions):
    rows = layerstack.read(captions / "captions", skip_failed=True)
    rows.verify()
    assert [row["id"] for row in rows] == [name for name, n in ROWS.items() if n is not None]
