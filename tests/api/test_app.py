import subprocess
import sys

BLOCKED = """
import sys
for name in ("torch", "transformers", "accelerate", "diffusers", "encoder", "worker"):
    sys.modules[name] = None
import api.app, api.__main__, jobs, layerstack, layerstack.cli
from jobs.settings import Settings
from fastapi.testclient import TestClient
with TestClient(api.app.create_app(Settings(broker_url="unix:///nowhere")), base_url="http://127.0.0.1") as client:
    assert client.get("/health").json()["status"] == "ok"
"""


def test_it_starts_and_answers_with_torch_blocked():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True)


def test_importing_the_rooms_reads_no_settings(monkeypatch):
    monkeypatch.setenv("LAYERSTACK_PORT", "nonsense")
    subprocess.run([sys.executable, "-c", "import api.app, jobs.settings, worker.tasks, layerstack.cli"], check=True)


def test_a_client_that_reads_parquet_imports_no_celery():
    code = "import layerstack, jobs, sys; sys.exit(any(name in sys.modules for name in ('celery', 'fastapi', 'torch')))"
    subprocess.run([sys.executable, "-c", code], check=True)
