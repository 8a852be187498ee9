"""What the docs say of settings and options is what the models have."""

import re
from pathlib import Path

import pytest

from api.jobrequest import MAX_JSON_PROMPTS, MAX_METADATA
from api.jsonbody import MAX_JSON_DEPTH
from api.parquetfile import MAX_PAGE_BYTES
from api.routes.jobs import MAX_KEY_CHARS
from jobs.records import JobOptions
from jobs.settings import Settings, load_settings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def rows(page, pattern):
    """The rows of all tables whose first cell matches -> name: the other cells."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {found[1]: others for first, *others in cells if (found := re.fullmatch(pattern, first))}


def fields(model):
    """The fields of a model with their constraints, of the type that is not null."""
    found = model.model_json_schema()["properties"]
    return {name: field | field.get("anyOf", [{}])[0] for name, field in found.items()}


def limits(field):
    """The ways to write a field's limits."""
    least, most, above = (field.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    if most is not None:
        return [f"{least:g} to {most}"]
    if least is not None:
        return [f"at least {least:g}", f"{least:g} or more"]
    return [] if above is None else [f"more than {above:g}"]


SETTINGS = rows("settings.md", r"`LAYERSTACK_(\w+)`")


def test_every_setting_is_documented_and_no_other():
    assert {name.lower() for name in SETTINGS} - {"url", "api_key"} == set(
        Settings.model_fields
    )  # these two are the client's


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_has_the_default_and_the_limits_that_are_documented(name):
    shown, meaning = SETTINGS[name.upper()]
    default = Settings.model_fields[name].default
    if default is not None:
        assert getattr(load_settings(**{name: shown.strip("`")}), name) == default
    phrases = limits(fields(Settings)[name])
    assert not phrases or any(phrase in meaning for phrase in phrases), phrases


@pytest.mark.parametrize("name", JobOptions.model_fields)
def test_an_option_of_a_job_has_the_limits_that_are_documented(name):
    field = fields(JobOptions)[name]
    values = rows("api.md", r"`(\w+)`")[name][0]
    for value in field.get("enum", []):
        assert f"`{value}`" in values
    assert not limits(field) or values in limits(field)


@pytest.mark.parametrize(
    "row",
    [
        f"| prompts in a JSON body: {MAX_JSON_PROMPTS} |",
        f"| objects and lists in each other, in JSON: {MAX_JSON_DEPTH} |",
        f"| metadata: {MAX_METADATA} names,",
        f"| characters in an `Idempotency-Key`: {MAX_KEY_CHARS} |",
        f"| bytes in a page of a Parquet file, decompressed: {MAX_PAGE_BYTES >> 20} MiB |",
        f"| prompts in a part: {fields(JobOptions)['chunk_rows']['maximum']} |",
        f"| estimated rows in a part: {fields(JobOptions)['chunk_tokens']['maximum']} |",
    ],
)
def test_the_table_of_limits_has_those_of_the_code(row):
    assert row in (DOCS / "api.md").read_text(encoding="utf-8")


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target
