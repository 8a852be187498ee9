import hashlib

import pytest

from tests.support import free_port, status_of, wait_for

KEY = "ls_of-ann"


@pytest.fixture
def keyed_url(spawn, broker, tmp_path):
    """A server without a worker that asks for `KEY`."""
    port = free_port()
    entry = f"ann:{hashlib.sha256(KEY.encode()).hexdigest()}"
    process = spawn("api", port=port, broker_url=broker.url, storage=tmp_path / "storage", api_keys=entry)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
    return url
