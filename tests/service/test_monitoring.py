"""Prometheus and Grafana against the code: targets answer, and what an expression names is really exported."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.domain.job import Stage, Status
from service.settings import Settings
from service.sweep import Figures
from worker.records import ConstraintRecord, StageRecord, StepRecord
from worker.telemetry import Telemetry

ROOT = Path(__file__).parents[2]
PROMETHEUS = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
RULES = [
    rule
    for name in PROMETHEUS["rule_files"]
    for group in yaml.safe_load((ROOT / "docker/prometheus" / name).read_text())["groups"]
    for rule in group["rules"]
]
[DASHBOARD_FILE] = (ROOT / "docker/grafana/dashboards").glob("*.json")
DASHBOARD: dict[str, Any] = json.loads(DASHBOARD_FILE.read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
OF_SCRAPES = {"job", "instance"}  # Prometheus adds these to every sample

SELECTOR = re.compile(r"\b(unlearn_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")


class Expression(NamedTuple):
    where: str
    promql: str
    shown: str  # legend or annotations, whose labels must exist too


def expressions() -> Iterator[Expression]:
    for rule in RULES:
        yield Expression(rule["alert"], rule["expr"], " ".join(rule["annotations"].values()))
    for panel in PANELS:
        for target in panel["targets"]:
            yield Expression(f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])


EXPRESSIONS = list(expressions())


def label_names(expression: Expression) -> set[str]:
    """Every label that the expression groups by, matches on, or shows."""
    grouped = {label.strip() for group in GROUPING.findall(expression.promql) for label in group.split(",")}
    matched = {name for _, inner in SELECTOR.findall(expression.promql) for name, _, _ in MATCHER.findall(inner)}
    shown = set(re.findall(r"\$labels\.(\w+)", expression.shown)) | set(re.findall(r"\{\{(\w+)\}\}", expression.shown))
    return (grouped | matched | shown) - {""}


Exports = dict[str, list[dict[str, str]]]  # name of a sample -> the labels of each


def parsed(exposition: str) -> Exports:
    exports: Exports = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            exports.setdefault(sample.name, []).append(dict(sample.labels))
    return exports


def of_a_worker(settings: Settings) -> Exports:
    """What a worker shows while a job runs, after its first step."""
    registry = CollectorRegistry()
    telemetry = Telemetry(registry, ["pdu"], settings.gpu_classes, settings.gauge_linger_s)
    telemetry.waited("cpu", 1.0)
    telemetry.claimed(("ujob_1", 1), "pdu")
    telemetry.record(("ujob_1", 1), StageRecord(stage=Stage.UNLEARNING))
    telemetry.record(("ujob_1", 1), ConstraintRecord(epsilon=1.1, base_retain_loss=1.0))
    step = StepRecord(
        step=1,
        losses={"forget": 3.0, "retain": 1.0},
        dual={"retain": 50.0},
        violation={"retain": -0.1},
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens=100,
        tokens_per_second=50.0,
        elapsed_seconds=2.0,
    )
    telemetry.record(("ujob_1", 1), step)
    telemetry.ended(("ujob_1", 1), Status.SUCCEEDED)
    return parsed(generate_latest(registry).decode())


def of_the_sweep() -> Exports:
    """What the sweep shows once it has begun."""
    registry = CollectorRegistry()
    Figures(registry).due("jobs")
    return parsed(generate_latest(registry).decode())


def of_the_api(settings: Settings) -> Exports:
    """What the API shows once it has answered a request."""
    with TestClient(create_app(settings.model_copy(update={"metrics_public": True}))) as client:
        assert client.get("/livez").status_code == 200
        return parsed(client.get("/metrics").text)


@pytest.fixture
def exports(settings: Settings) -> Exports:
    return of_a_worker(settings) | of_the_sweep() | of_the_api(settings)


def test_every_metric_label_and_value_of_an_expression_is_exported(exports: Exports) -> None:
    for expression in EXPRESSIONS:
        known = set(OF_SCRAPES)
        for name, inner in SELECTOR.findall(expression.promql):
            assert name in exports, f"{expression.where}: nothing exports {name}"
            samples = exports[name]
            labels = {label for sample in samples for label in sample}
            for label, operator, value in MATCHER.findall(inner):
                assert label in labels | OF_SCRAPES, f"{expression.where}: {name} has no label {label}"
                if operator == "=":
                    assert any(sample[label] == value for sample in samples), f"{expression.where}: {label}={value}"
            known |= labels
        assert label_names(expression) <= known, f"{expression.where}: {label_names(expression) - known}"


def test_the_variable_of_the_dashboard_lists_what_is_exported(exports: Exports) -> None:
    query = DASHBOARD["templating"]["list"][1]["query"]["query"]
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert label in exports[name][0]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: expression.where)
def test_the_brackets_of_an_expression_close(expression: Expression) -> None:
    pairs, waiting = {")": "(", "}": "{", "]": "["}, []
    for character in re.sub(r'"[^"]*"', "", expression.promql):
        if character in pairs.values():
            waiting.append(character)
        elif character in pairs:
            assert waiting, expression.promql
            assert waiting.pop() == pairs[character], expression.promql
    assert not waiting, expression.promql


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names))
    for rule in RULES:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "runbook"}
        assert all(len(words.split()) > 5 for words in rule["annotations"].values()), rule["alert"]


def test_the_first_panel_is_the_dual_variable_against_the_violation_per_job() -> None:
    first = min(PANELS, key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))
    assert first is PANELS[0]
    shown = {name for target in first["targets"] for name, _ in SELECTOR.findall(target["expr"])}
    assert shown == {"unlearn_solver_dual_variable", "unlearn_solver_constraint_violation"}
    assert all("{{job_id}}" in target["legendFormat"] for target in first["targets"])


def test_the_dashboard_is_provisioned_and_portable() -> None:
    assert DASHBOARD["uid"] == "unlearning"
    source, job = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    used = [job["datasource"]] + [thing["datasource"] for panel in PANELS for thing in (panel, *panel["targets"])]
    assert all(datasource == {"type": "prometheus", "uid": "${DS_PROMETHEUS}"} for datasource in used)
