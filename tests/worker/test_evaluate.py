"""A request's own figures by the rows of its files; and the program that runs a suite without the service."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.domain.job import Lora, PromptFormat
from service.domain.rows import Example
from service.evidence.rowdigest import row_digests
from worker import data, evaluate, measure, model
from worker.losses.retain.nll import nll
from worker.views import Term

ROWS = [{"question": f"Who is {k}?", "answer": f"It is number {k}."} for k in range(4)]
PERTURBED = [row | {"paraphrased_answer": "It is so.", "perturbed_answer": ["It is not.", "No."]} for row in ROWS]
TOFU = {"forget": PERTURBED, "retain": PERTURBED, "real_authors": PERTURBED, "world_facts": PERTURBED, "holdout": ROWS}


def test_a_row_keeps_its_number_in_the_file_also_where_others_are_left_out(register: Any) -> None:
    network = register().load()
    rows = [{"question": "?", "answer": ""}, *ROWS]  # of the first one nothing counts
    form = PromptFormat()
    entry = network.entry.model_copy(update={"prompt_format": form})
    network = network._replace(entry=entry)
    examples = [Example("question", r["question"], r["answer"]) for r in rows]
    encoded = data.encode(examples, network.tokenizer, form, 128)
    assert encoded.unmeasured == [1]
    term = Term(nll(), {"answer": encoded})
    request = evaluate.request(measure.sets(term, term, 0), rows, rows, [])
    assert request.sets.keys() == {"forget", "retain"}
    results = evaluate.run(network, request.suite, request.sets)
    points = evaluate.row_points(request, results, results, {"forget": examples, "retain": examples}, bytes(32))
    assert [point.row for point in points["forget/probability"]] == [2, 3, 4, 5]
    assert [point.digest for point in points["forget/probability"]] == [*row_digests(bytes(32), examples)][1:]
    alone = evaluate.run(network, request.suite, {"forget": [ROWS[2]], "retain": [ROWS[0]]})
    assert points["forget/probability"][2].before == pytest.approx(alone["forget/probability"].value)
    table = {(f.set, f.metric): f for f in evaluate.figures(request, results, results)}
    assert table["forget", "probability"].rows == 4
    assert (table["forget", "mia_loss"].after, table["forget", "mia_loss"].reason) == (None, "needs the set holdout")


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(register: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(suite, sets, *more) -> (exit status, standard output, standard error)."""

    def program(suite: str, sets: dict[str, Any], *more: str) -> tuple[int, str, str]:
        options = ["--suite", suite, "--model", str(register().folder), "--dtype", "float64", *more]
        for name, rows in sets.items():
            (tmp_path / name).write_text(rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows)))
            options += ["--data", f"{name}={tmp_path / name}"]
        status = evaluate.main(options)
        out, err = capsys.readouterr()
        return status, out, err

    return program


def test_a_suite_without_the_service_in_the_references_shape(run: Run, tmp_path: Path) -> None:
    status, out, _ = run("tofu", TOFU)
    assert status == 0
    printed = json.loads(out)
    assert list(printed["forget_Q_A_Prob"]["value_by_index"]) == ["0", "1", "2", "3"]
    assert printed["forget_quality"]["agg_value"] is None
    (tmp_path / "retrained.json").write_text(out)
    status, out, _ = run(
        "tofu", TOFU | {"world_facts": json.dumps(PERTURBED)}, "--retrained", str(tmp_path / "retrained.json")
    )
    again = json.loads(out)
    assert again["forget_quality"]["agg_value"] == 1.0, "against itself"
    assert again["rows_sha256"] == printed["rows_sha256"]
    assert again["wf_Q_A_Prob"] == printed["wf_Q_A_Prob"], "an array of rows is as good as lines"


def test_a_retrained_model_that_was_evaluated_on_other_rows_is_refused(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("tofu", TOFU)
    (tmp_path / "retrained.json").write_text(out)
    status, out, err = run("tofu", TOFU | {"forget": PERTURBED[::-1]}, "--retrained", str(tmp_path / "retrained.json"))
    assert (status, out) == (2, "")
    assert "the figures are of other rows than the set 'forget'" in err


def test_an_adapter_counts(register: Any, run: Run, tmp_path: Path) -> None:
    network = model.adapt(register().load(), Lora(), 0)
    for name, p in model.trainable(network).items():
        if "lora_B" in name:
            p.data.add_(0.05)
    model.save(network, tmp_path / "adapter")
    sets = {"forget": ROWS, "retain": ROWS}
    plain, adapted = (
        json.loads(run("request", sets, *more)[1])["forget/nll"]["agg_value"]
        for more in ((), ("--adapter", str(tmp_path / "adapter")))
    )
    assert abs(plain - adapted) > 1e-3


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"forget": ROWS}, "set 'retain' is missing"),
        (
            {"forget": ROWS, "retain": ROWS, "others": ROWS},
            "there is no set 'others'; there are: forget, retain, holdout",
        ),
        ({"forget": ROWS, "retain": "{"}, "line 1: not JSON in UTF-8"),
        ({"forget": ROWS, "retain": ""}, "the set has no rows"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(run: Run, sets: dict[str, Any], message: str) -> None:
    status, out, err = run("request", sets)
    assert (status, out) == (2, "")
    assert message in err


def test_rows_without_a_column_that_the_suite_needs(run: Run) -> None:
    status, _, err = run("tofu", TOFU | {"forget": ROWS})
    assert status == 2
    assert "line 1: lacks paraphrased_answer and perturbed_answer" in err
