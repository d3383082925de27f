"""The alert rules, by Prometheus' own tool: each fires where it should, and is quiet where it should be."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker/prometheus"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
TESTS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]

METRIC = re.compile(r"\b(unlearn_\w+|up)\b")
LABEL = re.compile(r'(\w+)="')
ASKED = re.compile(r'ALERTS\{alertname="(\w+)",alertstate="firing"\}')


class Trial(NamedTuple):
    """What one test expects of one alert."""

    alert: str
    metrics: set[str]  # that the test has figures of
    fired: list[set[str]]  # the labels of each time that it fires; none: quiet throughout


def trials() -> Iterator[Trial]:
    for test in TESTS:
        metrics = {series["series"].partition("{")[0] for series in test["input_series"]}
        fired: dict[str, list[set[str]]] = {}
        for question in test["promql_expr_test"]:
            if asked := ASKED.fullmatch(question["expr"]):
                labels = [set(LABEL.findall(sample["labels"])) for sample in question.get("exp_samples", [])]
                fired.setdefault(asked[1], []).extend(labels)
        for alert, times in fired.items():
            yield Trial(alert, metrics, times)


TRIALS = list(trials())


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which(os.environ.get("PROMTOOL", "promtool"))
    if found is None:
        pytest.skip("no promtool on PATH or in PROMTOOL; it comes with Debian's package prometheus")
    return found


@pytest.mark.parametrize(
    "asked", ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_finds_no_fault(promtool: str, asked: str) -> None:
    done = subprocess.run([promtool, *asked.split()], cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_tried_both_ways(rule: dict[str, Any]) -> None:
    """Quiet for want of figures does not count; and a summary shows only labels that the alert has when it fires."""
    of_it = [trial for trial in TRIALS if trial.alert == rule["alert"]]
    fired = [labels for trial in of_it for labels in trial.fired]
    assert fired, "no test in which it fires"
    needed = set(METRIC.findall(rule["expr"]))
    assert any(not trial.fired and needed <= trial.metrics for trial in of_it), f"no test with {needed} leaves it quiet"
    shown = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert any(shown <= labels for labels in fired), f"its summary shows {shown}"


def test_what_is_asked_for_is_an_alert_that_exists() -> None:
    assert {trial.alert for trial in TRIALS} == {rule["alert"] for rule in RULES}
    questions = [question["expr"] for test in TESTS for question in test["promql_expr_test"]]
    assert [expr for expr in questions if not ASKED.fullmatch(expr)] == ["ALERTS"], "of the healthy service, all"


def test_the_healthy_service_has_figures_of_everything() -> None:
    [healthy] = [test for test in TESTS if test["promql_expr_test"][0]["expr"] == "ALERTS"]
    known = {series["series"].partition("{")[0] for series in healthy["input_series"]}
    assert known == {name for rule in RULES for name in METRIC.findall(rule["expr"])}


def test_prometheus_reads_the_rules_and_not_their_tests() -> None:
    assert yaml.safe_load((FOLDER / "prometheus.yml").read_text())["rule_files"] == ["alerts.yml"]
