import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from jobs.settings import Settings
from tests.sample_jobs import announce
from tests.support import free_port, status_of, wait_for


@pytest.fixture
def http(stack):
    """A client of the running stack."""
    with stack.http() as client:
        yield client


@pytest.fixture
def api(storage, storage_url, broker, redis):  # noqa: ARG001 - the storage has to be there
    """The API in this process, without a worker: jobs stay as the test leaves them. Some encoder seems to be loaded."""
    announce(redis)
    settings = Settings(broker_url=broker.url, storage=storage_url)
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def lone_api(spawn, tmp_path):
    """Start the API without a worker; the broker is what the test says."""

    def start(broker_url, **variables):
        port = free_port()
        process = spawn("api", port=port, broker_url=broker_url, storage=tmp_path / "storage", **variables)
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
        return url

    return start
