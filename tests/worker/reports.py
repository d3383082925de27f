"""Reports to test with, and a reader of pages."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

from service.domain.job import Budget, Constraint, Gate, Lora, PromptFormat
from service.domain.modelfiles import digest_files
from service.domain.report import (
    NOT_TRAINED,
    AdapterFile,
    Asked,
    AuditEntry,
    BaseModelFacts,
    BenchmarkFacts,
    BenchmarkFigure,
    BenchmarkSet,
    Composition,
    ConstraintFacts,
    DataFacts,
    Figure,
    Knowledge,
    Parent,
    Released,
    Report,
    RowPoint,
    StopFacts,
    TextKnowledge,
)
from worker import report
from worker.records import CheckRecord, StepRecord

NAN, INF = math.nan, math.inf
VOID = {"meta", "link", "br"}
DIGEST = "sha256:" + 64 * "a"


def step(number: int, **changes: Any) -> StepRecord:
    record: dict[str, Any] = {
        "step": number,
        "losses": {"forget": 200.0 / number, "retain": 0.7 + 0.3 / number},
        "dual": {"retain": 50.0 + number},
        "violation": {"retain": 0.3 / number - 0.05},
        "learning_rate": 1e-3,
        "gradient_norm": 3.0,
        "tokens": 600 * number,
        "tokens_per_second": 2000.0,
        "elapsed_seconds": 0.1 * number,
    }
    return StepRecord(**record | changes)


def check(number: int, retain: float = 0.72, *, best: bool = False) -> CheckRecord:
    return CheckRecord(
        step=number,
        forget_objective=2.0,
        forget_probability=0.04,
        retain_loss=retain,
        retain_upper=retain,
        epsilon=0.75,
        feasible=retain <= 0.75,
        best=best,
        rows=80,
        seconds=0.4,
    )


def constraint(upper: float = 0.72, *, tolerance: float = 1e-5, rows_measured: int = 760) -> ConstraintFacts:
    return ConstraintFacts(
        epsilon=0.75,
        source="relative",
        before=0.68,
        after=upper,
        upper=upper,
        slack=0.75 - upper,
        tolerance=tolerance,
        satisfied=upper <= 0.75,
        rows_measured=rows_measured,
        rows_total=760,
    )


STEPS = [step(k) for k in range(1, 41)]
CHECKS = [check(20, 0.8), check(30, best=True), check(40)]


def make(
    steps: Sequence[StepRecord] = STEPS,
    checks: Sequence[CheckRecord] = CHECKS,
    *,
    upper: float = 0.72,
    forget_after: float = 0.04,
    published: bool = True,
    gates: Sequence[Gate] = (),
    **changes: Any,
) -> Report:
    bound = constraint(upper)
    chosen = 30 if published else len(steps)
    files = [AdapterFile(name="adapter/adapter_model.safetensors", bytes=123_456, sha256=64 * "c")] if published else []
    facts = DataFacts(
        file_id="ufile_" + 32 * "0", digest="hmac-sha256:" + 64 * "b", rows=40, counted_tokens=1200, unmeasured_rows=0
    )
    parts: dict[str, Any] = {
        "job_id": "ujob_" + 32 * "1",
        "attempt": 1,
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "asked": Asked(
            model="support-bot",
            method="pdu",
            composition=Composition(forget_loss="margin_flattening", retain_loss="nll", solver="primal_dual"),
            hyperparameters={"dual_step": 50.0},
            constraint=Constraint(epsilon_relative=0.1),
            budget=Budget(),
            lora=Lora(),
            seed=7,
        ),
        "base_model": BaseModelFacts(
            name="support-bot",
            source="hub owner/name",
            revision=40 * "d",
            digest=DIGEST,
            tokenizer_digest=DIGEST,
            architecture="LlamaForCausalLM",
            parameters=260_032,
            trainable_parameters=61_440,
            vocabulary=512,
            context_tokens=512,
            dtype="float32",
            prompt_format=PromptFormat(),
            head="fused",
        ),
        "forget_set": facts,
        "retain_set": facts.model_copy(update={"rows": 760}),
        "constraint": bound,
        "figures": [
            figure("forget", "probability", 0.816, forget_after),
            figure("forget", "rouge_l_recall", None, None, reason="a text has no prompt to answer"),
            figure("retain", "nll", 0.68, upper),
        ],
        "stop": StopFacts(reason="max_steps", message="The budget of 40 steps is used.", step=len(steps)),
        "released": Released(published=published, step=chosen, files=files, message="As measured.", load=None),
        "trajectory": report.trajectory(steps, checks),
        "warnings": [],
        "timings_seconds": {"unlearning": 12.3},
        "environment": report.environment("cpu", 1),
        "caveats": report.caveats(changes.get("benchmarks", []), changes.get("audit", [])),
    }
    parts |= changes
    found = report.values(parts["figures"], parts.get("benchmarks", []), parts.get("audit", []))
    judged = report.verdict(bound, 0.816, forget_after, published=published, gates=gates, figures=found)
    return Report(**{"verdict": judged} | parts)


def figure(of: Any, metric: str, before: float | None, after: float | None, reason: str | None = None) -> Figure:
    return Figure(
        set=of, metric=metric, better="lower", definition="", before=before, after=after, rows=40, reason=reason
    )


ROWS = {
    "forget/probability": [RowPoint(row=k, before=0.9, after=0.02 * k) for k in range(1, 11)],
    "retain/probability": [RowPoint(row=k, before=0.8, after=0.8 - 0.01 * k) for k in range(1, 11)],
}


def benchmark(name: str = "forget01", **changes: Any) -> BenchmarkFacts:
    """With one figure of every part, one of ours, and one that could not be measured."""
    parts: dict[str, Any] = {
        "name": name,
        "suite": "tofu",
        "corpus": "TOFU forget01",
        "sets": [BenchmarkSet(name="forget", digest=64 * "e", rows=40, beyond_context=0, unmeasured_rows=0)],
        "retrained": "the registered model retrained",
        "figures": [
            measured("model_utility", 0.52, 0.5, 0.53),
            measured("forget_quality", 1e-5, 0.3, None),
            measured("forget_Q_A_Prob", 0.9, 0.02, 0.1),
            measured("retain_Q_A_Prob", 0.91, 0.9, 0.92),
            measured("ra_Truth_Ratio", 0.6, 0.59, 0.6),
            measured("wf_Truth_Ratio", 0.61, 0.58, 0.6),
            measured("extraction_strength_corrected", 0.8, 0.03, 0.04, benchmark=False),
            measured("mia_min_k", None, None, None, reason="needs the set holdout"),
            measured("mia_loss", None, None, None, reason="needs the set holdout"),
        ],
        "truth_ratios": {"before": [0.5, 0.6, 0.7], "after": [0.8, 0.9, 1.1], "retrained": [0.85, 0.9, 1.0]},
    }
    return BenchmarkFacts(**parts | changes)


def measured(name: str, before: Any, after: Any, retrained: Any, **changes: Any) -> BenchmarkFigure:
    ends = None if before is None else (0.9 * before, 1.1 * before)
    parts: dict[str, Any] = {
        "definition": f"what {name} is",
        "better": None,
        "benchmark": True,
        "before_interval": ends,
        "after_interval": None,
        "rows": 40,
    }
    return BenchmarkFigure(name=name, before=before, after=after, retrained=retrained, **parts | changes)


def attack(name: str, released: float | None, attacked: float | None, **changes: Any) -> list[AuditEntry]:
    """An entry for each metric."""
    parts: dict[str, Any] = {"setting": "as set", "base": 0.8, "retrained": None, "rows": 36}
    both = dict.fromkeys(("probability", "extraction_strength"))
    return [
        AuditEntry(attack=name, metric=metric, released=released, attacked=attacked, **parts | changes)
        for metric in both
    ]


AUDIT = [*attack("relearn_forget", 0.04, 0.2), *attack("quantise_4", 0.04, 0.05), *attack("prefix", 0.04, 0.06)]


def whole(**changes: Any) -> Report:
    """With everything that a report can have."""
    gates = [
        Gate(metric="forget/probability", op="<=", threshold=0.05),
        Gate(metric="forget01/model_utility", op=">=", threshold=0.4),
        Gate(metric="audit/relearn_forget/probability", op="<=", threshold=0.3, severity="warn"),
    ]
    parts: dict[str, Any] = {"rows": ROWS, "benchmarks": [benchmark()], "audit": AUDIT, "gates": gates}
    return make(**parts | changes).model_copy(deep=True)


MODEL = {"config.json": b"{}", "model.safetensors": bytes(range(32)), "tokenizer.json": b"[]"}  # files of a base model


def knowledge(model: Any = "base", upper: float | None = 0.1, **changes: Any) -> Knowledge:
    parts: dict[str, Any] = {"equivalent": upper is not None and upper < 0.25, "mean": 0.05, "rows": 40, "subjects": 2}
    if upper is None:
        parts |= {"equivalent": None, "mean": None, "reason": "2 rows are too few"}
    return Knowledge(**{"model": model, "upper": upper, "margin": 0.25} | parts | changes)


def text_knowledge(model: Any = "base", upper: float | None = 0.6, **changes: Any) -> TextKnowledge:
    parts: dict[str, Any] = {"equivalent": upper is not None and upper < 0.65, "auc": 0.52, "rows": 50}
    if upper is None:
        parts |= {"equivalent": None, "auc": None, "reason": "there is no holdout set"}
    common = {"model": model, "upper": upper, "threshold": 0.65, "holdout_rows": 60, "likeliest": 1, "likeliest_of": 2}
    return TextKnowledge(**common | parts | changes)


def untrained(*known: Knowledge, parent: Parent | None = None, **changes: Any) -> Report:
    """Of a job that was not trained: the model of these files does not know the rows."""
    asked = known or (knowledge(),)
    gates = [report.knowledge_gate(one) for one in asked]
    base, start = ([gate for gate in gates if gate.metric.startswith(model)] for model in ("base", "start"))
    judged = report.not_known_verdict(start or base, base if start else (), parent.job_id if parent else None)
    assert judged is not None
    files = {name: sha256(content).hexdigest() for name, content in MODEL.items()}
    digest, tokenizer_digest = digest_files(files)
    told = {"files": files, "digest": digest, "tokenizer_digest": tokenizer_digest}
    made = make()
    after = {"after": None, "upper": None, "slack": None, "satisfied": None, "reason": NOT_TRAINED}
    parts: dict[str, Any] = {
        "verdict": judged,
        "parent": parent,
        "base_model": made.base_model.model_copy(update=told),
        "constraint": made.constraint.model_copy(update=after),
        "figures": [
            figure("forget", "probability", 0.01, None, NOT_TRAINED),
            figure("retain", "nll", 0.68, None, NOT_TRAINED),
        ],
        "rows": {
            name: [RowPoint(row=one.row, before=one.before, after=None) for one in of] for name, of in ROWS.items()
        },
        "knowledge": list(asked),
        "stop": StopFacts(reason="not_known", message="No step was taken: the model does not know the rows.", step=0),
        "released": Released(published=False, step=0, files=[], message=report.untrained(judged), load=None),
        "caveats": report.untrained_caveats(chained=parent is not None),
    }
    return make([], [], **parts | changes)


class Page(HTMLParser):
    """Elements with their attributes, and the text; complains of what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
