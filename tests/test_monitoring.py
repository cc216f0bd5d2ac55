"""The alarms and the dashboard in config/: they load, and speak of metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from regd.metrics import AWAY_KINDS, FAMILIES
from regd.model import FileState, SessionState

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config"
ALERTS = CONFIG / "prometheus-alerts.yml"
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((CONFIG / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# of others: Prometheus itself, and its client library's for every process
OTHERS = {"up", "process_start_time_seconds", "process_resident_memory_bytes"}
OTHERS |= {"process_cpu_seconds_total"}
SAMPLES = OTHERS | {
    f"{name}{end}"
    for name, about in FAMILIES.items()
    for end in (("_bucket", "_sum", "_count") if about.kind == "histogram" else ("",))
}
LABELS = {"job", "instance", "le"} | {
    label for about in FAMILIES.values() for label in about.labels
}
VALUES = {
    "kind": {*AWAY_KINDS},
    "folder": {"data_root", "state_dir"},
    "state": {str(state) for states in (SessionState, FileState) for state in states},
}


def expressions() -> list[Any]:
    found = [pytest.param(rule["expr"], id=rule["alert"]) for rule in RULES]
    return found + [
        pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
        for panel in PANELS
        for target in panel["targets"]
    ]


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_names_only_what_there_is(expression: str) -> None:
    bare = re.sub(r'"[^"]*"', '""', expression)
    names = set(re.findall(r"\b(?:regd|process)_\w+|\bup\b", bare))
    assert names
    assert names <= SAMPLES
    # a rate is of what counts, and what counts is only looked at as a rate
    for name in names:
        kind = FAMILIES[name].kind if name in FAMILIES else ""
        rated = re.search(rf"(rate|increase)\({name}\b", bare)
        if kind == "counter" or name.endswith(("_bucket", "_sum", "_count")):
            assert rated
        elif kind == "gauge":
            assert not rated
    for label, _, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', expression):
        assert label in LABELS
        if label in VALUES:
            assert set(value.split("|")) <= VALUES[label]
    for grouped in re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expression):
        assert set(re.split(r",\s*", grouped)) <= LABELS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alarm_says_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Regd[A-Z]\w+", rule["alert"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "$labels.instance" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 50
    for label in re.findall(r"\$labels\.(\w+)", json.dumps(rule)):
        assert label in LABELS


def test_every_alarm_is_explained_and_tried() -> None:
    alerts = [rule["alert"] for rule in RULES]
    assert len(alerts) == len(set(alerts))
    page = (ROOT / "docs/metrics.md").read_text().split("## The alarms")[1]
    assert set(re.findall(r"`(Regd\w+)`", page)) == set(alerts)
    tests = (ROOT / "tests/alerts.yml").read_text()
    assert {alert for alert in alerts if re.search(rf"\b{alert}\b", tests)} == set(alerts)


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert "__inputs" not in DASHBOARD
    assert DASHBOARD["uid"] == "regd"
    variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert "regd_build_info" in variables["instance"]["query"]["query"]
    for found in re.findall(r'"uid": "([^"]*)"', json.dumps(DASHBOARD["panels"])):
        assert found == "${datasource}"


def test_every_panel_is_one_of_its_own_and_says_what_it_shows() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles))
    for panel in PANELS:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["type"] == "prometheus"
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))
        for target in panel["targets"]:
            assert "$instance" in target["expr"]
            assert target["legendFormat"]
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in LABELS


def test_no_panel_lies_on_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_the_units_are_those_of_the_metrics() -> None:
    """What a name ends in is what its panel shows: seconds as s, bytes as bytes, a rate as Bps."""
    for panel in PANELS:
        unit = panel["fieldConfig"]["defaults"]["unit"]
        text = " ".join(target["expr"] for target in panel["targets"])
        if "_bytes_total" in text:
            assert unit == "Bps", panel["title"]
        elif "_bytes" in text:
            assert unit == "bytes", panel["title"]
        elif "cpu_seconds" in text:
            assert unit == "percentunit", panel["title"]
        elif "_seconds" in text:
            assert unit == "s", panel["title"]


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (on Debian: apt install prometheus)")
    done = subprocess.run(
        [program, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_prometheus_takes_the_alarms_and_the_job() -> None:
    promtool("check", "config", "config/prometheus.yml")


def test_the_alarms_go_off_when_they_should_and_not_else() -> None:
    promtool("test", "rules", "tests/alerts.yml")
