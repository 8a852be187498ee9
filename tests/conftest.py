"""Real parts for the tests: a small checkpoint, an encoder, a broker, and the whole local stack."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from redis import Redis
from ulid import ULID

from jobs.settings import Settings
from jobs.storage import Storage, open_storage
from jobs.store import JobStore
from layerstack.broker import broker_command
from tests.forwards import Forwards
from tests.support import KEY, Stack, can_connect, clean_environment, free_port, local_stack, status_of, wait_for


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Mistral-3 checkpoint with random weights, in the layout of FLUX.2-dev."""
    from encoder import tiny

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    tiny.write(folder, hidden=32)
    return folder


@pytest.fixture(scope="session")
def encoder(tiny):
    from encoder import Encoder

    return Encoder.load(tiny, device="cpu", dtype="float32", token_budget=1024)


@pytest.fixture(scope="session")
def engine(encoder):
    from encoder import Engine

    with Engine(encoder) as running:
        yield running


@pytest.fixture
def forwards(encoder, monkeypatch) -> Forwards:
    watched = Forwards(encoder)
    monkeypatch.setattr(encoder, "forward", watched)
    return watched


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory):
    """A Qwen3 checkpoint with random weights, in the layout of FLUX.2-klein."""
    from encoder import tiny

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-qwen3"
    tiny.write(folder, hidden=32, family="qwen3")
    return folder


@pytest.fixture(scope="session")
def reference(tiny):
    """diffusers' own function on the same checkpoint: prompts -> [B, 512, D]."""
    import torch
    from diffusers import Flux2Pipeline
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration.from_pretrained(tiny / "text_encoder", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")

    @torch.no_grad()
    def encode(prompts, **options):
        return Flux2Pipeline._get_mistral_3_small_prompt_embeds(model, tokenizer, prompts, **options)

    return encode


@dataclass(frozen=True)
class Broker:
    """A broker of our own on a unix socket."""

    url: str
    process: subprocess.Popen

    def client(self) -> Redis:
        return Redis.from_url(self.url, socket_timeout=None)  # BLPOP waits longer than the default


@pytest.fixture
def broker(tmp_path_factory) -> Iterator[Broker]:
    # The path of a unix socket must be short, which pytest's folders are not always.
    folder = tmp_path_factory.mktemp("b")
    path = folder / "s"
    with subprocess.Popen(broker_command(folder, path)) as process:
        wait_for(lambda: can_connect(path))
        yield Broker(f"unix://{path}", process)
        process.terminate()


@pytest.fixture
def redis(broker) -> Iterator[Redis]:
    with broker.client() as client:
        yield client


@pytest.fixture(scope="session")
def bucket(tmp_path_factory) -> Iterator[str]:
    """The URL of a bucket in an S3 server, which processes that a test starts find in their environment as well."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    host, port = endpoint.removeprefix("http://").split(":")
    variables = {
        "AWS_ACCESS_KEY_ID": "anybody",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", host, "-p", port]
    # Listings come in pages of five, so that a test sees whether anybody stops after the first.
    environment = clean_environment() | {"MOTO_S3_DEFAULT_MAX_KEYS": "5"}
    log = tmp_path_factory.mktemp("s3") / "log"
    with (
        pytest.MonkeyPatch.context() as patch,
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            wait_for(lambda: status_of(endpoint) == 200, process, log)
            httpx.put(f"{endpoint}/bucket").raise_for_status()
            yield "s3://bucket"
        finally:
            process.terminate()


@pytest.fixture(params=["folder", "s3"])
def storage_url(request, tmp_path) -> str:
    """An empty storage, of each kind there is."""
    if request.param == "folder":
        return str(tmp_path / "storage")
    return f"{request.getfixturevalue('bucket')}/{ULID()}"


@pytest.fixture
def storage(storage_url) -> Storage:
    found = open_storage(storage_url)
    found.check()
    return found


@pytest.fixture
def store(storage) -> JobStore:
    return JobStore(storage)


@pytest.fixture
def settings(tmp_path, broker, tiny) -> Settings:
    return Settings(broker_url=broker.url, storage=str(tmp_path / "storage"), model=str(tiny), device="cpu")


@pytest.fixture(scope="session")
def stack(tmp_path_factory, tiny) -> Iterator[Stack]:
    """The whole local stack, ready."""
    with local_stack(tmp_path_factory.mktemp("stack"), "--model", str(tiny)) as found:
        yield found


@pytest.fixture
def spawn(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start processes of ours with settings; those still running at the end are stopped."""
    started = []

    def start(module: str, **variables: object) -> subprocess.Popen:
        environment = clean_environment() | {f"LAYERSTACK_{name.upper()}": str(v) for name, v in variables.items()}
        log = (tmp_path / f"{module}-{len(started)}.log").open("wb")
        process = subprocess.Popen([sys.executable, "-m", module], env=environment, stdout=log, stderr=log)
        process.log = Path(log.name)
        started.append((process, log))
        return process

    yield start
    for process, log in started:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture
def keyed_url(spawn, broker, tmp_path):
    """A server without a worker that asks for `KEY`."""
    port = free_port()
    entry = f"ann:{hashlib.sha256(KEY.encode()).hexdigest()}"
    process = spawn("api", port=port, broker_url=broker.url, storage=tmp_path / "storage", api_keys=entry)
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: status_of(f"{url}/health") == 200, process, process.log)
    return url
