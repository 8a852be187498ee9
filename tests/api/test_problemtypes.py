import re
from http import HTTPStatus
from pathlib import Path

import pytest

import api
from api.problemtypes import STATUS_OF

SOURCES = [path.read_text(encoding="utf-8") for path in Path(api.__file__).parent.rglob("*.py")]
DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_docs_list_every_kind_with_its_status_and_no_other():
    listed = re.findall(r"^\| `([a-z-]+)` \| (\d{3}) \|", DOCS, re.MULTILINE)
    assert dict(listed) == {kind: str(status) for kind, status in STATUS_OF.items()}
    assert len(listed) == len(STATUS_OF)


@pytest.mark.parametrize("kind", STATUS_OF)
def test_a_kind_is_an_error_that_somebody_makes(kind):
    assert HTTPStatus(STATUS_OF[kind]) >= 400
    assert sum(source.count(f'"{kind}"') for source in SOURCES) > 1  # once in the table itself
