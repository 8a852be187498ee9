"""The manifests of `deploy/kubernetes`, without a cluster."""

import math
import os
import re
import subprocess
import tomllib
from contextlib import contextmanager
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from pydantic import SecretStr
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry

from jobs.loopback import check_exposure
from jobs.queue import BULK
from jobs.settings import Settings, load_settings
from layerstack.broker import broker_command
from tests.support import can_connect, setting_of, wait_for
from worker.reconciler import _SMALLEST_WINDOW

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
PAGE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
# The oldest that docs/kubernetes.md names, and the newest whose schemas are there.
VERSIONS = ["1.30", kubernetes_validate.latest_version()]
# Kinds that are not Kubernetes' own.
OTHER_APIS = ("kustomize.config.k8s.io/", "keda.sh/")


def load(path):
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


FILES = sorted(FOLDER.rglob("*.yaml"))
DOCUMENTS = [(path.relative_to(FOLDER).as_posix(), document) for path in FILES for document in load(path)]
MANIFESTS = [
    pytest.param(document, id=f"{name}:{document['kind']}")
    for name, document in DOCUMENTS
    if not document["apiVersion"].startswith(OTHER_APIS)
]
WORKLOADS = {
    document["metadata"]["name"].removeprefix("layerstack-"): document
    for _, document in DOCUMENTS
    if document["kind"] in {"Deployment", "StatefulSet"}
}
TEMPLATES = {name: document["spec"]["template"]["spec"] for name, document in WORKLOADS.items()}
BASE = load(FOLDER / "kustomization.yaml")[0]
SCALED = next(document for _, document in DOCUMENTS if document["kind"] == "ScaledObject")
COMMON_SETTINGS = dict(line.split("=", 1) for line in BASE["configMapGenerator"][0]["literals"])


def container(name):
    (only,) = TEMPLATES[name]["containers"]
    return only


def plain_values(name):
    """The variables of a workload that are written in its manifest."""
    return {each["name"]: each["value"] for each in container(name).get("env", []) if "value" in each}


def secret_variables(name):
    """Variable: the key of the secret that it is taken from, and whether it may be missing."""
    found = [each for each in container(name).get("env", []) if "valueFrom" in each]
    keys = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in found}
    return {variable: (key["key"], key.get("optional", False)) for variable, key in keys.items()}


def secret_files(name):
    volumes = [volume["secret"] for volume in TEMPLATES[name].get("volumes", []) if "secret" in volume]
    return {item["path"]: item["key"] for volume in volumes for item in volume["items"]}


def listed(folder):
    return set(load(folder / "kustomization.yaml")[0]["resources"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS)
def test_every_manifest_fits_the_schema_of_its_kind(manifest, version):
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_does_not_exist_would_be_found():
    wrong = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}, "specs": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="specs"):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / "keda"], ids=["base", "keda"])
def test_a_kustomization_lists_every_file_that_is_there(folder):
    assert listed(folder) == {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}


def test_every_file_is_explained():
    for path in FILES:
        name = path.relative_to(FOLDER).parts[0]
        assert f"| `{name}" in PAGE


def test_everything_that_is_called_a_setting_is_one():
    text = PAGE + "".join(path.read_text(encoding="utf-8") for path in FILES)
    names = set(re.findall(r"\bLAYERSTACK_[A-Z_]+\b", text)) | {
        path.upper() for name in TEMPLATES for path in secret_files(name)
    }
    # The command line's own; and what Kubernetes would make up.
    others = {"LAYERSTACK_API_KEY", "LAYERSTACK_API_PORT"}
    assert {setting_of(name) for name in names - others} <= set(Settings.model_fields)


SECRETS = {
    "layerstack_broker_url": "redis://:a-password@layerstack-broker:6379/0",
    "layerstack_reply_url": "redis://:a-password@layerstack-replies:6379/0",
    "layerstack_api_keys": f"ann:{'0' * 64}",
}


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_settings_of_a_pod_are_accepted(name, monkeypatch, tmp_path):
    for variable in [variable for variable in os.environ if variable.startswith("LAYERSTACK_")]:
        monkeypatch.delenv(variable)
    for variable, value in (COMMON_SETTINGS | plain_values(name)).items():
        monkeypatch.setenv(variable, value)
    # As Kubernetes does it: the files are links, by way of another link.
    (tmp_path / "..now").mkdir()
    (tmp_path / "..data").symlink_to("..now")
    for path, key in secret_files(name).items():
        (tmp_path / "..now" / path).write_text(SECRETS[key])
        (tmp_path / path).symlink_to(f"..data/{path}")
    monkeypatch.setenv("LAYERSTACK_SECRETS_DIR", str(tmp_path))
    settings = load_settings()
    if name == "api":
        check_exposure(settings)
    assert settings.storage == COMMON_SETTINGS["LAYERSTACK_STORAGE"]
    assert settings.broker_url.get_secret_value() == SECRETS["layerstack_broker_url"]
    assert settings.effective_reply_url == SECRETS["layerstack_reply_url"]
    assert (settings.api_keys is not None) == (name == "api")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_may_do_no_more_than_it_needs(name):
    template, context = TEMPLATES[name], container(name)["securityContext"]
    assert template["automountServiceAccountToken"] is False
    assert template["securityContext"]["runAsNonRoot"] is True
    assert template["securityContext"]["runAsUser"] >= 999
    assert template["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pod_asks_for_what_it_needs_and_has_a_limit(name):
    resources = container(name)["resources"]
    for kind in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(resources[kind])
    assert resources["requests"].get("nvidia.com/gpu") == (1 if name == "worker" else None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_variables_that_kubernetes_makes_from_services_are_not_taken_for_settings(name):
    assert TEMPLATES[name]["enableServiceLinks"] is False


@pytest.mark.parametrize("name", ["api", "worker"])
def test_there_is_room_for_temporary_files(name):
    places = {mount["mountPath"]: mount["name"] for mount in container(name)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in TEMPLATES[name]["volumes"]}
    assert "emptyDir" in volumes[places["/tmp"]]  # noqa: S108 - it is the pod's own


def test_no_manifest_holds_a_secret():
    secret = {
        f"LAYERSTACK_{name.upper()}"
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ())) or name == "api_keys"
    }
    assert {"LAYERSTACK_BROKER_URL", "LAYERSTACK_REPLY_URL", "LAYERSTACK_API_KEYS"} <= secret
    assert not any(document["kind"] == "Secret" for _, document in DOCUMENTS)
    for name in TEMPLATES:
        written = plain_values(name) | COMMON_SETTINGS
        assert not secret & set(written)
        assert not [each for each in written if re.search("TOKEN|PASSWORD|SECRET(?!S_DIR)|KEY", each)]
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"://[^/\s]*@", text), "a URL with a password"
        assert not re.search(r"\b(ls|hf)_[A-Za-z0-9]{8,}|\b[0-9a-f]{32,}\b", text)


@pytest.mark.parametrize("name", ["api", "worker"])
def test_secret_settings_are_read_from_files_that_others_cannot_read(name):
    (volume,) = [volume for volume in TEMPLATES[name]["volumes"] if "secret" in volume]
    mounts = {mount["name"]: mount for mount in container(name)["volumeMounts"]}
    assert plain_values(name)["LAYERSTACK_SECRETS_DIR"] == mounts[volume["name"]]["mountPath"]
    assert mounts[volume["name"]]["readOnly"] is True
    assert volume["secret"]["defaultMode"] == 0o440
    assert TEMPLATES[name]["securityContext"]["fsGroup"] == TEMPLATES[name]["securityContext"]["runAsGroup"]
    assert not [variable for variable in secret_variables(name) if variable.startswith("LAYERSTACK_")]


def test_the_worker_is_not_given_the_keys_of_callers():
    assert set(secret_files("api")) - set(secret_files("worker")) == {"layerstack_api_keys"}


def test_the_secret_that_is_documented_has_the_keys_that_are_used():
    table = PAGE.split("## The secret")[1].split("```")[0]
    documented = {key for line in table.splitlines() if line.startswith("| `") for key in keys_of(line)}
    example = set(re.findall(r"^(\w+)=", PAGE.split("<<END")[1].split("END")[0], re.MULTILINE))
    used = {key for name in TEMPLATES for key, _ in secret_variables(name).values()}
    required = {key for name in TEMPLATES for key, optional in secret_variables(name).values() if not optional}
    files = {key for name in TEMPLATES for key in secret_files(name).values()}
    assert used | files == documented
    assert required | files <= example <= documented


def keys_of(row):
    return re.findall(r"`(\w+)`", row.split(" | ")[0])


def test_images_are_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert {container(name)["image"] for name in ("api", "worker")} == {
        f"layerstack-api:{version}",
        f"layerstack-worker:{version}",
    }


@pytest.mark.parametrize(
    ("name", "port", "setting", "ready"),
    [("api", "http", "PORT", "/health"), ("worker", "metrics", "WORKER_METRICS_PORT", "/ready")],
)
def test_probes_ask_where_the_process_listens(name, port, setting, ready):
    ports = {each["name"]: each["containerPort"] for each in container(name)["ports"]}
    assert ports == {port: int(plain_values(name)[f"LAYERSTACK_{setting}"])}
    probes = {kind: container(name)[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {port}
    # All pods of the API would fail /ready together, without a worker.
    assert (probes["readiness"]["path"], probes["liveness"]["path"]) == (ready, "/health")


def test_a_service_leads_to_the_pods_of_its_name():
    services = [document for _, document in DOCUMENTS if document["kind"] == "Service"]
    assert len(services) == 3
    for service in services:
        target = WORKLOADS[service["metadata"]["name"].removeprefix("layerstack-")]["spec"]["template"]
        assert target["metadata"]["labels"] == service["spec"]["selector"]
        (port,) = service["spec"]["ports"]
        assert port["targetPort"] in {each["name"] for each in target["spec"]["containers"][0]["ports"]}


def test_applying_again_does_not_change_how_many_workers_there_are():
    assert "replicas" not in WORKLOADS["worker"]["spec"]


def test_only_one_of_each_broker_runs_at_a_time():
    assert WORKLOADS["broker"]["spec"]["replicas"] == WORKLOADS["replies"]["spec"]["replicas"] == 1
    assert WORKLOADS["replies"]["spec"]["strategy"] == {"type": "Recreate"}


@contextmanager
def running_valkey(name, folder, password):
    """A Valkey or Redis with the arguments of a manifest, but on a socket instead of a port."""
    socket = folder / "s"
    (variable,) = secret_variables(name)
    arguments = [each.replace(f"$({variable})", password) for each in container(name)["args"]]
    binary = broker_command(folder, socket)[0]
    command = [binary, *arguments, "--port", "0", "--unixsocket", str(socket)]
    with (folder / "log").open("w") as log, subprocess.Popen(command, cwd=folder, stdout=log) as process:
        try:
            wait_for(lambda: can_connect(socket), process, folder / "log")
            yield socket
        finally:
            process.terminate()


@pytest.mark.parametrize(
    ("name", "persistent", "policy"), [("broker", "yes", "noeviction"), ("replies", "no", "volatile-ttl")]
)
def test_a_broker_starts_as_its_manifest_says_and_asks_for_the_password(name, persistent, policy, tmp_path):
    with running_valkey(name, tmp_path, "a-password") as socket:
        with (
            Redis(unix_socket_path=str(socket), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(AuthenticationError),
        ):
            stranger.llen(BULK)
        with Redis(unix_socket_path=str(socket), password="a-password") as redis:  # noqa: S106 - of this test
            found = redis.config_get("append*", "maxmemory*", "save")
            assert redis.llen(BULK) == 0
    assert (found["appendonly"], found["save"], found["maxmemory-policy"]) == (persistent, "", policy)
    assert found["appendfsync"] == "everysec"
    assert 0 < int(found["maxmemory"]) < limit_bytes(name)


def limit_bytes(name):
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", container(name)["resources"]["limits"]["memory"]).groups()
    return int(number) << {"Mi": 20, "Gi": 30}[unit]


def test_only_api_and_worker_reach_the_brokers():
    policy = next(d for file, d in DOCUMENTS if d["kind"] == "NetworkPolicy" and file == "networkpolicy.yaml")["spec"]
    assert components(policy["podSelector"]) == ["broker", "replies"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in policy
    ((source,),) = [rule["from"] for rule in policy["ingress"]]
    assert set(source) == {"podSelector"}
    assert components(source["podSelector"]) == ["api", "worker"]


def components(selector):
    (expression,) = selector["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("app.kubernetes.io/component", "In")
    return expression["values"]


class TestAutoscaling:
    """Of a queue that is full: jobs have more chunks than the window."""

    trigger = SCALED["spec"]["triggers"][0]["metadata"]

    @staticmethod
    def waiting(workers, threads):
        return max(_SMALLEST_WINDOW, 4 * workers * threads) - workers * threads

    def wanted(self, workers, threads, length):
        return math.ceil(self.waiting(workers, threads) / length)

    def test_it_looks_at_the_queue_of_chunks(self):
        host = self.trigger["address"].removesuffix(":6379").removesuffix(".layerstack.svc.cluster.local")
        assert f"layerstack_broker_url=redis://:$password@{host}:6379/{self.trigger['databaseIndex']}" in PAGE
        assert self.trigger["listName"] == BULK
        assert SCALED["spec"]["scaleTargetRef"]["name"] == WORKLOADS["worker"]["metadata"]["name"]

    def test_one_worker_always_stays_to_find_jobs(self):
        assert SCALED["spec"]["minReplicaCount"] >= 1

    @pytest.mark.parametrize("threads", [1, 2, 4, 8])
    def test_a_full_queue_wants_more_workers_however_many_there_are(self, threads):
        length = int(self.trigger["listLength"]) * threads // Settings.model_fields["bulk_threads"].default
        for workers in range(1, 100):
            # Kubernetes does nothing within 10%.
            assert self.waiting(workers, threads) / (length * workers) > 1.1
            assert self.wanted(workers, threads, length) > workers

    def test_the_numbers_that_are_documented_are_right(self):
        threads, length = Settings.model_fields["bulk_threads"].default, int(self.trigger["listLength"])
        rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.MULTILINE)
        assert rows
        for row in rows:
            workers, waiting, wanted = map(int, row)
            assert (self.waiting(workers, threads), self.wanted(workers, threads, length)) == (waiting, wanted)

    def test_the_documented_values_are_those_of_the_manifest(self):
        behavior = SCALED["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        for name, value in {
            "listLength": self.trigger["listLength"],
            "minReplicaCount": SCALED["spec"]["minReplicaCount"],
            "maxReplicaCount": SCALED["spec"]["maxReplicaCount"],
            "scaleUp.stabilizationWindowSeconds": behavior["scaleUp"]["stabilizationWindowSeconds"],
            "scaleDown.stabilizationWindowSeconds": behavior["scaleDown"]["stabilizationWindowSeconds"],
        }.items():
            assert f"| `{name}` | {value} |" in PAGE
