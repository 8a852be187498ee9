"""What the docs say of settings, options, commands, names and messages is what the code has; and they become a site."""

import ast
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import typer

import layerstack
from api.jobrequest import MAX_JSON_PROMPTS, MAX_METADATA
from api.jsonbody import MAX_JSON_DEPTH
from api.parquetfile import MAX_PAGE_BYTES
from api.routes.jobs import MAX_KEY_CHARS
from jobs.records import JobOptions
from jobs.settings import Settings, load_settings
from layerstack import errors
from layerstack.cli import app
from layerstack.cli.console import ExitCode
from layerstack.client import Job, Jobs
from layerstack.supervision import describe_end

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def text_of(page):
    return (DOCS / page).read_text(encoding="utf-8")


def rows(page, pattern):
    """The rows of all tables whose first cell matches -> name: the other cells."""
    lines = text_of(page).splitlines()
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
    assert row in text_of("api.md")


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


def commands(group, *path):
    """Every command of the command line, by its name with spaces."""
    for name, command in group.commands.items():
        yield from (
            commands(command, *path, name) if hasattr(command, "commands") else [(" ".join([*path, name]), command)]
        )


COMMANDS = dict(commands(typer.main.get_command(app)))
SECTIONS = dict(
    re.findall(r"^## `layerstack (.*?)`\n(.*?)(?=^## |\Z)", text_of("command-line.md"), re.MULTILINE | re.DOTALL)
)


def test_every_command_is_on_its_page_and_no_other():
    assert set(SECTIONS) == set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() & SECTIONS.keys()))
def test_every_option_of_a_command_is_on_its_page_and_no_other(name):
    options = {max(each.opts, key=len) for each in COMMANDS[name].params if each.param_type_name == "option"}
    assert set(re.findall(r"`(--[a-z-]+)`", SECTIONS[name])) == options


def test_the_exit_codes_are_on_their_page():
    assert set(map(int, rows("command-line.md", r"`(\d+)`"))) == {0, *ExitCode}


@pytest.mark.parametrize("name", layerstack.__all__)
def test_what_can_be_imported_is_on_its_page(name):
    assert f"`layerstack.{name}`" in text_of("client.md")


@pytest.mark.parametrize("owner", [layerstack.Client, Jobs, Job, layerstack.PromptEmbeddings, layerstack.Embeddings])
def test_every_method_of_what_can_be_imported_is_on_its_page(owner):
    shown = " ".join(re.findall(r"`[^`\n]+`", text_of("client.md")))
    assert [name for name in dir(owner) if name[0] != "_" and not re.search(rf"\b{name}\b", shown)] == []


def test_the_tree_of_errors_on_its_page_is_that_of_the_code():
    def tree(text):
        return re.findall(r"^[│├└─ ]*\w+Error\b", text, re.MULTILINE)

    assert tree(text_of("client.md")) == tree(errors.__doc__)


def messages(folder):
    """The texts in the code of a package; values in them become `…`, but for constants of the module."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            each.targets[0].id: each.value
            for each in tree.body
            if isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (named.get(getattr(getattr(part, "value", None), "id", None), part) for part in node.values)
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


MESSAGES = {
    text.replace("`", "") for folder in ("api", "encoder", "jobs", "layerstack", "worker") for text in messages(folder)
}
# The one message with another in it: "the {child} {how it ended}; {where it says why}".
MESSAGES.add(f"the … {describe_end(0).replace('0', '…')}")


def is_said(quoted):
    """Whether one message has all that is between the `…` of a quotation, in order; or one each of what `; ` parts."""
    pattern = re.compile(".*".join(map(re.escape, quoted.split("…"))), re.DOTALL)
    if any(pattern.search(message) for message in MESSAGES):
        return True
    halves = [quoted.split("; ", count) for count in range(1, quoted.count("; ") + 1)]
    return any(is_said("; ".join(parts[:-1])) and is_said(parts[-1]) for parts in halves)


def test_a_message_with_pieces_of_others_is_none():
    assert is_said("… do not belong together")
    assert is_said("… cannot be read in a forked process")
    assert not is_said("… do not belong together … in a forked process")
    assert not is_said("together … do not belong")
    assert not is_said("… do not belong together; nobody says this")


@pytest.mark.parametrize("quoted", re.findall(r"^\| `([^`]* [^`]*)`", text_of("troubleshooting.md"), re.MULTILINE))
def test_a_message_that_is_explained_is_one_of_the_code(quoted):
    assert is_said(quoted)


def shell_lines(page):
    """The lines of a page that are to be typed: of blocks marked `sh`, and those that are indented."""
    text = page.read_text(encoding="utf-8")
    fenced = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    indented = re.findall(r"^ {4}(.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return [*fenced.splitlines(), *indented]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_on_a_page_is_one_with_options_that_it_has(page):
    for line in shell_lines(page):
        if re.match(r"(\.venv/bin/)?layerstack [a-z]", line):
            words = shlex.split(line.partition(" | ")[0], comments=True)
            name = words[1] if words[1] in COMMANDS else " ".join(words[1:3])
            assert name in COMMANDS, line
            known = {option for each in COMMANDS[name].params for option in each.opts}
            assert {word for word in words if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_on_a_page_is_python(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        ast.parse(block)


class Loaded(HTMLParser):
    """The addresses that a browser loads with a page, or goes to when something in it is followed."""

    def __init__(self):
        super().__init__()
        self.fetched, self.followed = [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "a":
            self.followed.append(found.get("href", ""))
        elif found.get("rel") not in {"canonical", "next", "prev"}:
            self.fetched += [found[name] for name in ("src", "href") if name in found]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation as a site; a warning of mkdocs is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_of_the_docs_is_a_page_of_the_site(site):
    assert {path.stem for path in site.glob("*.html")} == {path.stem for path in DOCS.glob("*.md")} | {"404"}


def test_the_site_loads_nothing_from_other_servers(site):
    for path in site.rglob("*.html"):
        page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        assert [address for address in page.fetched if urlsplit(address).netloc] == [], path.name


def test_a_link_within_the_site_leads_somewhere(site):
    for path in set(site.rglob("*.html")) - {site / "404.html"}:  # that is shown at any address
        page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        here = [address for address in page.followed if not urlsplit(address).scheme and urlsplit(address).path]
        assert [address for address in here if not (path.parent / urlsplit(address).path).exists()] == [], path.name
