import hashlib

import pytest

from layerstack import cli
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


@pytest.fixture
def run(capsys, monkeypatch, stack):
    """Run a command against the stack; returns exit code, standard output and standard error."""

    def call(*words, url=stack.url):
        monkeypatch.setenv("LAYERSTACK_URL", url)
        monkeypatch.setattr("sys.argv", ["layerstack", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call
