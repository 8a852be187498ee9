"""What Prometheus, its alerts and the dashboard ask for is what a running stack tells."""

import json
import re
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobs.records import JobStatus
from tests.support import free_port, local_stack, wait_for

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")


def parsed(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


CONFIG = parsed("deploy/prometheus/prometheus.yml")
SCRAPED = {scrape["job_name"]: scrape for scrape in CONFIG["scrape_configs"]}
ALERTS = [rule for group in parsed("deploy/prometheus/alerts.yml")["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/layerstack.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = {f"{panel['title']} {target['refId']}": target for panel in PANELS for target in panel["targets"]}
IN_DOCS = re.findall(r"^(?:rate|sum|max)\b.*\blayerstack_.*$", PAGE, re.MULTILINE)
ASKED = (
    {f"dashboard: {name}": target["expr"] for name, target in TARGETS.items()}
    | {f"alert: {rule['alert']}": rule["expr"] for rule in ALERTS}
    | {f"docs: {line}": line for line in IN_DOCS}
)
OF_PROMETHEUS = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
OF_TARGETS = {"job", "instance"}
OF_THE_BROKER = ("layerstack_broker_up", "layerstack_predict_waiting", "layerstack_queue_messages", "layerstack_jobs")
SELECTOR = re.compile(r"\b(layerstack_\w+|process_\w+|up|ALERTS)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right) \(([^)]*)\)")


def samples(url):
    """All samples that a target tells: name -> the labels of each."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(url).text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory, tiny):
    """What API and worker tell once there has been a bit of everything: job of Prometheus -> name -> labels."""
    port = free_port()
    folder = tmp_path_factory.mktemp("stack")
    with local_stack(folder, "--model", str(tiny), worker_metrics_port=port) as stack, stack.http() as http:
        assert http.post("/predict", json={"prompt": "a fox"}).status_code == 200
        job = http.post("/jobs", json={"prompts": ["a fox", "a barn"]}).json()
        wait_for(lambda: http.get(f"/jobs/{job['id']}").json()["status"] == "succeeded")
        api, worker = f"{stack.url}/metrics", f"http://127.0.0.1:{port}/metrics"
        wait_for(lambda: "layerstack_jobs" in samples(api))
        yield {"layerstack-api": samples(api), "layerstack-worker": samples(worker)}


@pytest.fixture(scope="module")
def kept(told):
    """What Prometheus keeps of that: name -> the labels of each."""
    found = {}
    for job, names in told.items():
        (dropped,) = [rule["regex"] for rule in SCRAPED[job].get("metric_relabel_configs", [])] or ["^$"]
        for name, labels in names.items():
            if not re.fullmatch(dropped, name):
                found.setdefault(name, []).extend(each | {"job": job, "instance": job} for each in labels)
    return found


def selectors(expression):
    """Each metric that an expression names, with its matchers: label, operator, value."""
    bare = GROUPING.sub("", expression)
    return [(name, MATCHER.findall(matchers)) for name, matchers in SELECTOR.findall(bare)]


@pytest.mark.parametrize("asked", ASKED)
def test_every_metric_and_label_that_is_asked_for_is_told(asked, kept):
    found = selectors(ASKED[asked])
    assert found
    labels = set()
    for name, matchers in found:
        if name not in OF_PROMETHEUS:
            assert name in kept
        has = OF_PROMETHEUS.get(name) or set().union(*kept.get(name, []))
        assert {label for label, _, _ in matchers} <= has | OF_TARGETS
        labels |= has
    named = {label.strip() for group in GROUPING.findall(ASKED[asked]) for label in group.split(",")} - {""}
    assert named <= labels | OF_TARGETS


@pytest.mark.parametrize("asked", ASKED)
def test_every_value_that_is_asked_for_occurs(asked, kept):
    for name, matchers in selectors(ASKED[asked]):
        for label, operator, text in matchers:
            if name in OF_PROMETHEUS or operator not in {"=", "=~"} or text in {"$worker", "5.."}:
                continue
            values = {labels.get(label) for labels in kept[name]}
            if name == "layerstack_jobs":
                assert values == set(JobStatus)
            assert set(text.split("|")) <= values


@pytest.mark.parametrize("name", TARGETS)
def test_the_labels_of_a_legend_are_in_its_series(name):
    target = TARGETS[name]
    shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    groups = [set(re.split(r",\s*", group)) for group in GROUPING.findall(target["expr"])]
    assert shown <= set().union(*groups, {"instance", "worker"})


def test_no_number_of_ours_comes_from_both_api_and_worker(told):
    dropped = SCRAPED["layerstack-api"]["metric_relabel_configs"][0]
    assert (dropped["action"], dropped["source_labels"]) == ("drop", ["__name__"])
    api = {name for name in told["layerstack-api"] if not re.fullmatch(dropped["regex"], name)}
    both = {name for name in api & set(told["layerstack-worker"]) if name.startswith("layerstack_")}
    assert both == {"layerstack_build_info"}


@pytest.mark.parametrize("name", TARGETS)
def test_what_all_api_processes_tell_alike_is_not_added_up(name):
    expression = TARGETS[name]["expr"]
    for shared in OF_THE_BROKER:
        count = len(re.findall(rf"\b{shared}\b", expression))
        assert len(re.findall(rf"\b(?:max|min)(?: by \(\w+\) )?\({shared}\b", expression)) == count


def test_the_numbers_of_the_broker_are_all_that_is_left_of_what_comes_twice(kept):
    own = ("layerstack_http_", "layerstack_predict_", "layerstack_jobs_accepted_", "layerstack_build_")
    api = {name for name, labels in kept.items() if any(each["job"] == "layerstack-api" for each in labels)}
    shared = {name for name in api if name.startswith("layerstack_") and not name.startswith(own)}
    assert shared | {"layerstack_predict_waiting"} == set(OF_THE_BROKER)


def test_prometheus_reads_the_services_of_compose_at_their_ports():
    services = parsed("docker-compose.yml")["services"]
    (api,) = SCRAPED["layerstack-api"]["static_configs"]
    assert api["targets"] == [f"api:{services['api']['environment']['LAYERSTACK_PORT']}"]
    (workers,) = SCRAPED["layerstack-worker"]["dns_sd_configs"]
    assert workers["names"] == ["worker"]
    assert workers["port"] == services["worker"]["environment"]["LAYERSTACK_WORKER_METRICS_PORT"]
    assert SCRAPED["layerstack-api"]["authorization"] == {"credentials_file": "/run/layerstack/metrics_key"}
    assert CONFIG["rule_files"] == ["alerts.yml"]


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_an_alert_says_what_is_wrong_and_what_to_do(rule):
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["description"].endswith(".")
    assert rule["labels"]["severity"] in {"critical", "warning"}
    named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    assert named <= {"instance", "worker"}


def test_the_docs_list_every_alert():
    assert re.findall(r"^\| `(Layerstack\w+)` \|", PAGE, re.MULTILINE) == [rule["alert"] for rule in ALERTS]


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_has_a_unit_or_says_why_not(panel):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    assert unit not in {"", "none"} or "No unit:" in panel["description"]


def test_the_dashboard_works_with_whatever_datasource_there_is():
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r'"uid": "([^"]*)"', text)) == {"layerstack", "${datasource}"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", text)) == set(variables)
    assert variables["worker"]["query"]["query"] == "label_values(layerstack_worker_info, worker)"


def test_panels_do_not_cover_each_other():
    taken, places = set(), [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for place in places:
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)


def test_grafana_finds_datasource_and_dashboards():
    (datasource,) = parsed("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert (datasource["type"], datasource["url"]) == ("prometheus", "http://prometheus:9090")
    assert datasource["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]
    (provider,) = parsed("deploy/grafana/provisioning/dashboards/layerstack.yml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def test_the_docs_name_the_labels_of_every_metric(told):
    rows = re.findall(r"^\| (`layerstack_.*?) \| (.*?) \| .* \|$", PAGE, re.MULTILINE)
    assert rows
    for names, labels in rows:
        for name in re.findall(r"`(\w+)`", names):
            found = [each for suffix in ("", "_bucket") for each in told["layerstack-api"].get(name + suffix, [])]
            assert set().union(*found) - {"le"} == set(re.findall(r"`(\w+)`", labels)), name
