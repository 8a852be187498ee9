"""Made-up requests to a live stack: every answer is one that /openapi.json describes, and none is our fault."""

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import clean_environment, local_stack

REQUESTS = 5000
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
    "unsupported_method",
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory, tiny):
    with local_stack(tmp_path_factory.mktemp("fuzz"), "--model", str(tiny)) as found:
        yield found


@pytest.mark.timeout(600)
def test_made_up_requests_meet_no_fault_and_nothing_undocumented(stack, tmp_path):
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{stack.url}/openapi.json", "--no-color",
        "--checks", ",".join(CHECKS), "--phases", "examples,fuzzing,stateful", "--max-examples", "600",
        "--seed", "1", "--suppress-health-check", "all", "--request-timeout", "60",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:]
    generated = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert int(generated[1].replace(",", "")) >= REQUESTS, done.stdout[-2000:]
    assert httpx.get(f"{stack.url}/ready").status_code == 200
