"""Every setting there is, read once at the entry point from `LAYERSTACK_*` variables, or from files named like them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from jobs.errors import SettingsError
from jobs.records import MAX_CHUNK_TOKENS
from jobs.storage import OBJECT_STORES

_PREFIX = "LAYERSTACK_"
_HOST = re.compile(r"[A-Za-z0-9_.-]+")
_KEY = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9a-f]{64})")


def _words(text: object) -> object:
    """Cut a list that a variable holds at its commas."""
    return [word.strip() for word in text.split(",") if word.strip()] if isinstance(text, str) else text


def _keys(text: object) -> object:
    """Read `name:sha256,...`; what is wrong with an entry is told by its position, since it may be a key itself."""
    words = _words(text)
    if not isinstance(words, list):
        return words
    found: dict[str, str] = {}
    for position, word in enumerate(words, start=1):
        parts = _KEY.fullmatch(str(word))
        if parts is None:
            raise ValueError(
                f"entry {position} is not name:sha256, with a name of up to 64 of A-Z a-z 0-9 . _ - and the SHA-256 of "
                "the key in lower-case hexadecimal; `layerstack keys new NAME` makes one"
            )
        if parts[1] in found:
            raise ValueError(f"entry {position}: the name {parts[1]} is there twice")
        found[parts[1]] = parts[2]
    return found or None


ApiKeys = Annotated[dict[str, str], BeforeValidator(_keys)]
"""Name of each key -> the key's SHA-256 in hexadecimal."""
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
"""A list that a variable holds, with commas between."""

DEMO_MODEL = "demo"
"""A model of this name is the demo checkpoint, which a worker makes in its local folder if it is not there."""


class Settings(BaseSettings):
    """The settings of api and worker. Each field `x` is set by the environment variable `LAYERSTACK_X`."""

    # pydantic-settings would decode lists as JSON.
    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, frozen=True, extra="ignore", env_ignore_empty=True, enable_decoding=False
    )

    secrets_dir: str | None = Field(None, description="folder of files that each hold a setting")
    broker_url: SecretStr = Field(
        SecretStr("redis://127.0.0.1:6379/0"), description="Redis or Valkey: redis://, rediss:// or unix://"
    )
    reply_url: SecretStr | None = Field(None, description="a second Redis for large replies; default the broker")
    storage: str = Field("layerstack-data", description="folder that holds the jobs, or s3://bucket/prefix, gs://…")
    storage_reserve_bytes: int = Field(2**28, ge=0, description="bytes of a local storage that jobs leave free")
    local_dir: str | None = Field(None, description="folder for what is no result; default a local storage")
    retention_hours: float | None = Field(None, gt=0, description="hours until a finished job's results are deleted")
    abandoned_after_s: float = Field(600, gt=0, description="seconds until an upload that was cut off is deleted")

    host: str = Field("127.0.0.1", description="address the API listens on")
    port: int = Field(7860, ge=1, le=65535, description="port the API listens on")
    published_on: str | None = Field(None, description="address that leads into a container's port; default the host")
    api_keys: ApiKeys | None = Field(None, description="who may call: name:sha256, of several with commas between")
    allow_without_keys: bool = Field(False, description="listen on more than loopback although there are no keys")
    rate_limit: str | None = Field(None, description="requests of one key, as 600/minute; of several with ; between")
    allowed_hosts: Words | None = Field(None, description="names of the API besides loopback's, without keys")
    cors_origins: Words | None = Field(None, description="web pages of these origins may call; commas between")
    predict_queue_max: int = Field(256, ge=1, description="/predict requests that wait for an answer, of all servers")
    predict_max_prompts: int = Field(16, ge=1, description="prompts in one POST /predict")
    predict_timeout_s: float = Field(120.0, gt=0, description="seconds until an unanswered /predict is given up")
    prompt_max_chars: int = Field(200_000, ge=1, description="characters in one prompt")
    body_max_bytes: int = Field(16 * 2**20, ge=1, description="bytes of a JSON body, expanded")
    upload_max_bytes: int = Field(16 * 2**30, ge=1, description="bytes of an uploaded prompt file, as it is sent")
    upload_max_expanded_bytes: int = Field(64 * 2**30, ge=1, description="bytes of a gzip or zstd upload, expanded")
    job_max_prompts: int = Field(100_000_000, ge=1, description="prompts in one job")
    presigned_url_s: int = Field(0, ge=0, description="seconds that links to an object store are good; 0 makes none")
    chunk_rows: int = Field(2048, ge=1, le=100_000, description="prompts in one chunk, and so in one part, at most")
    chunk_tokens: int = Field(
        8192, ge=1, le=MAX_CHUNK_TOKENS, description="token rows stored of one chunk, about, at most"
    )

    model: str | None = Field(None, description="folder or hub id of the model, or 'demo'; the worker needs it")
    model_revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    model_subfolder: str | None = Field(None, description="where in the folder or repository the model is")
    model_mount: str | None = Field(None, description="folder that `layerstack up` prefers if it holds a model")
    preset: str = Field("flux2-dev", description="encoder preset")
    device: str | None = Field(None, description="torch device; default CUDA if there is one")
    device_map: str | None = Field(None, description="'auto' spreads the layers over all devices")
    dtype: str | None = Field(None, description="dtype of the encoder; default bfloat16 on CUDA, float32 elsewhere")
    attention: str = Field("auto", description="auto, varlen or sdpa")
    token_budget: int | None = Field(None, ge=1, description="token rows in one forward; default by device")
    deterministic: bool = Field(False, description="the same bits for a prompt in any batch")
    interactive_threads: int = Field(64, ge=1, description="/predict requests that a worker encodes at a time")
    bulk_threads: int = Field(2, ge=1, description="slots that only jobs use")
    chunk_attempts: int = Field(3, ge=1, description="attempts at a chunk that end in an error, before it is given up")
    chunk_crashes: int = Field(5, ge=1, description="attempts at a chunk whose worker dies, before it is given up")
    lease_s: float = Field(30, ge=1, description="seconds without a sign of life until a chunk goes to another worker")
    reconcile_s: float = Field(5, gt=0, description="seconds between two looks for chunks that got lost")
    verify_parts: Literal["full", "footer"] = Field(
        "full", description="what is read of each part before a job succeeds: all of it, or its footer"
    )
    deduplicate_rows: int = Field(2**15, ge=0, description="token rows that a worker remembers, to encode none twice")
    visibility_timeout_s: int = Field(120, ge=1, description="seconds until a dead worker's messages come back")
    worker_metrics_host: str = Field("127.0.0.1", description="address of the worker's own /metrics")
    worker_metrics_port: int | None = Field(None, ge=1, le=65535, description="port of the worker's own /metrics")
    task_events: bool = Field(False, description="tell what becomes of each task, for Flower")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")
    log_format: Literal["console", "json"] = Field("console", description="of log lines")

    @field_validator("broker_url", "reply_url")
    @classmethod
    def _known_scheme(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("must begin with redis://, rediss:// or unix://")
        if url is not None and not _has_valid_port(url.get_secret_value()):
            raise ValueError("has no valid host and port; a password needs its special characters percent-encoded")
        return url

    @field_validator("allowed_hosts")
    @classmethod
    def _bare_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            if not _HOST.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a host, without scheme and port")
        return names

    @field_validator("model")
    @classmethod
    def _named(cls, model: str | None) -> str | None:
        return model or None

    @field_validator("storage")
    @classmethod
    def _known_storage(cls, storage: str) -> str:
        if "://" in storage and not storage.startswith(OBJECT_STORES):
            raise ValueError(f"must be a folder, or begin with {' or '.join(OBJECT_STORES)}")
        return storage

    @field_validator("log_level")
    @classmethod
    def _known_level(cls, level: str) -> str:
        if level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise ValueError("must be DEBUG, INFO, WARNING or ERROR")
        return level.upper()

    @property
    def local_folder(self) -> Path:
        """Where this machine keeps what is no result: the demo checkpoint, the local broker's file."""
        if self.local_dir is None and "://" in self.storage:
            return Path("~/.cache/layerstack").expanduser()
        return Path(self.local_dir or self.storage).expanduser().resolve()

    @property
    def reachable_on(self) -> str:
        """Address at which others find the API."""
        return self.published_on or self.host

    @property
    def effective_reply_url(self) -> str:
        """Where replies to /predict travel."""
        return (self.reply_url or self.broker_url).get_secret_value()


def load_settings(**overrides: Any) -> Settings:  # noqa: ANN401 - values are what pydantic validates
    """Read the environment, and files for what it does not set; `overrides` win over both.

    Raises:
        SettingsError: a value is bad; the message names the variable and, unless it may hold a password, the value.
    """
    folder = os.environ.get(f"{_PREFIX}SECRETS_DIR")
    try:
        return Settings(**(_read_files(Path(folder)) if folder else {}) | overrides)
    except ValidationError as exc:
        raise SettingsError("; ".join(_describe(error) for error in exc.errors())) from None


def _read_files(folder: Path) -> dict[str, str]:
    """Return the settings that files hold, without those that the environment sets.

    pydantic-settings can read them, too; but of what cannot be read it only warns, or takes nothing of it.
    """
    if not folder.is_dir():
        raise SettingsError(f"{_PREFIX}SECRETS_DIR={str(folder)!r}: there is no such folder")
    found = {}
    for name in Settings.model_fields:
        path = folder / f"{_PREFIX}{name}".lower()
        if os.environ.get(f"{_PREFIX}{name.upper()}") or not os.path.lexists(path):
            continue
        try:
            text = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
            raise SettingsError(f"{_PREFIX}SECRETS_DIR={str(folder)!r}: {path.name} cannot be read: {reason}") from exc
        if text:  # as with variables, one that is empty is not set
            found[name] = text
    return found


def _has_valid_port(url: str) -> bool:
    try:
        urlsplit(url).port  # noqa: B018 - reading it is the check
    except ValueError:
        return False
    return True


def _describe(error: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    field = str(error["loc"][0])
    shown = "(hidden)" if field.endswith(("_url", "_keys")) else repr(error["input"])
    return f"{_PREFIX}{field.upper()}={shown}: {error['msg'].removeprefix('Value error, ')}"
