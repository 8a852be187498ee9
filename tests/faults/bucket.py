"""A bucket that the processes of a stack use as their storage, and that can be made to fail."""

import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faults.processes import Child
from tests.support import clean_environment, free_port, status_of, wait_for

URL = "s3://bucket/jobs-of-tests"


@contextmanager
def running_bucket(folder: Path):
    """Run the server -> the environment of processes that use it. This process itself reaches it without faults."""
    port, good_port = free_port(), free_port()
    command = [sys.executable, "-m", "tests.faults.bucket_server", str(folder), str(port), str(good_port)]
    server = Child("bucket", command, clean_environment(), folder / "bucket.log")
    variables = {
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (variables | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{good_port}"}).items():
            patch.setenv(name, value)
        server.start()
        try:
            wait_for(lambda: status_of(variables["AWS_ENDPOINT_URL"]) == 200)
            httpx.put(f"{variables['AWS_ENDPOINT_URL']}/bucket", trust_env=False).raise_for_status()
            yield variables
        finally:
            server.kill()
