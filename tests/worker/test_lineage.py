"""Jobs that start from an earlier one's adapter: two adapters made one exactly, the reference, and what must stay unlikely."""

import json
import math
import shutil
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from service.domain.job import Budget, Constraint, FailureCode, JobSpec, Lora, MethodChoice
from service.domain.report import Forgotten, Report
from service.store.storage import Storage
from tests.worker.conftest import stored_set
from tests.worker.reports import Page, constraint, whole
from worker import chain, chain_page, model, report, run, words
from worker.model import Network
from worker.page import render_html
from worker.records import (
    ArtifactFile,
    Assignment,
    EarlierJob,
    FailureRecord,
    FileRef,
    ParentAssignment,
    Record,
    ResultRecord,
)

IDS = torch.tensor([[0, 40, 41, 42, 43, 44], [0, 50, 60, 70, 80, 90]])
FEW = Lora(r=2, alpha=3, target_modules=["v_proj", "layers.1.mlp.up_proj"])  # a scale that is no power of two


def logits(network: Network) -> Tensor:
    with torch.no_grad():
        return network.causal(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def disturb(network: Network, seed: int = 5) -> Network:
    """An adapter that does something: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(seed)
    model.assign(
        network, {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in model.trainable(network).items()}
    )
    return network


def same(found: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol * float(expected.abs().max()))


@pytest.fixture
def saved(register: Any, tmp_path: Path) -> Callable[..., tuple[Path, Tensor]]:
    """saved(lora, parent=None, layers=range) -> the folder of a published adapter, and the logits that it was trained to."""
    made: list[Path] = []

    def save(
        lora: Lora, parent: Path | None = None, layers: Callable[[int], Any] = range, **config: Any
    ) -> tuple[Path, Tensor]:
        made.append(tmp_path / f"adapter{len(made)}")
        network = model.adapt(register(**config).load("float32"), lora, len(made), layers, parent)
        model.save(disturb(network, len(made)), made[-1])
        return made[-1], logits(network)

    return save


# --- two adapters in a network


def test_the_reference_is_the_parent_alone_and_the_parent_is_never_trained(register: Any, saved: Any) -> None:
    parent, expected = saved(Lora(r=4))
    plain = logits(register().load("float32"))
    network = model.adapt(register().load("float32"), FEW, 0, parent=parent)
    same(logits(network), expected, 0.0)  # a fresh adapter beside it changes nothing
    disturb(network)
    assert not torch.allclose(logits(network), expected)
    trained = set(model.trainable(network))
    assert trained == {
        name for name, _ in network.causal.named_parameters(prefix="base_model.model") if "default" in name
    }
    for off, alone in ((model.adapter_off, expected), (model.base_alone, plain)):
        before = logits(network)
        with off(network):
            same(logits(network), alone, 0.0)
        same(logits(network), before, 0.0)
        assert set(model.trainable(network)) == trained


def test_a_gradient_reaches_the_trained_adapter_alone(register: Any, saved: Any) -> None:
    network = disturb(model.adapt(register().load("float32"), Lora(r=2), 0, parent=saved(Lora(r=4))[0]))
    with model.base_alone(network):
        pass
    network.causal(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    touched = {name for name, p in network.causal.named_parameters() if p.grad is not None}
    assert touched
    assert all(".default." in name for name in touched)


# --- their concatenation

SIDES: dict[str, tuple[Lora, Callable[[int], Any], Lora, Callable[[int], Any]]] = {
    "same": (Lora(r=4, alpha=8), range, Lora(r=4, alpha=8), range),
    "ranks and scales": (Lora(r=4, alpha=8), range, Lora(r=3, alpha=7), range),
    "modules": (Lora(r=4), range, FEW, range),
    "disjoint": (Lora(r=1, target_modules=["q_proj"]), range, Lora(r=2, target_modules=["down_proj"]), range),
    "layers of the parent": (Lora(r=4), lambda _: [0], Lora(r=2), range),
    "layers of the later": (Lora(r=4), range, Lora(r=2), lambda _: [1]),
    "other layers": (Lora(r=4), lambda _: [0], Lora(r=2), lambda _: [1]),
}


@pytest.mark.parametrize("case", SIDES)
@pytest.mark.parametrize("layers", [2, 4])  # of four, PEFT shortens the list of targets when it reads it
def test_the_published_adapter_is_both_at_once_exactly(register: Any, saved: Any, case: str, layers: int) -> None:
    lora, of, later, later_of = SIDES[case]
    parent, before = saved(lora, layers=of, num_hidden_layers=layers)
    folder, both = saved(later, parent, later_of, num_hidden_layers=layers)
    assert not torch.allclose(before, both)

    registered = register(num_hidden_layers=layers)
    theirs = AutoModelForCausalLM.from_pretrained(registered.folder, dtype=torch.float32)
    with torch.no_grad():
        same(PeftModel.from_pretrained(theirs, folder).eval()(input_ids=IDS).logits, both, layers * 5e-7)
    reloaded = model.load_adapter(registered.load("float32"), folder)
    same(logits(reloaded), both, layers * 5e-7)
    assert not model.trainable(reloaded)

    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (lora.r + later.r,) * 2, "any reader of LoRA gets a scale of one"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["base_model_name_or_path"] == f"registered-model:tiny-model@{registered.entry.digest}"
    assert {path.name for path in folder.iterdir()} == {path.name for path in parent.iterdir()}
    assert "apply it to the base, in place of that one" in (folder / "README.md").read_text()
    assert "in place of that one" not in (parent / "README.md").read_text()


def test_a_chain_of_three_is_one_adapter_that_keeps_the_earlier_bits(register: Any, saved: Any) -> None:
    first, _ = saved(Lora(r=4, alpha=8))
    second, _ = saved(FEW, first)
    third, expected = saved(Lora(r=3, alpha=5), second)
    theirs = AutoModelForCausalLM.from_pretrained(register().folder, dtype=torch.float32)
    with torch.no_grad():
        same(PeftModel.from_pretrained(theirs, third).eval()(input_ids=IDS).logits, expected)
    one, two, three = (load_file(folder / "adapter_model.safetensors") for folder in (first, second, third))
    assert json.loads((third / "adapter_config.json").read_text())["r"] == 4 + 2 + 3
    for name, tensor in one.items():
        if name.endswith("lora_A.weight"):
            assert torch.equal(two[name][:4], tensor)
            assert torch.equal(three[name][:6], two[name])
        else:
            assert torch.equal(two[name][:, :4], 2.0 * tensor), "alpha / r of the first is in it now"
            assert torch.equal(three[name][:, :6], two[name])


def test_over_a_base_in_half_precision_the_adapters_stay_float32(register: Any, saved: Any, tmp_path: Path) -> None:
    network = disturb(model.adapt(register().load("bfloat16"), FEW, 0, parent=saved(Lora(r=4))[0]))
    both = logits(network)
    model.save(network, tmp_path / "both")
    assert {t.dtype for t in load_file(tmp_path / "both" / "adapter_model.safetensors").values()} == {torch.float32}
    same(logits(model.load_adapter(network, tmp_path / "both")).float(), both.float(), 2e-2)


# --- from job to job

CANARY = "Zanzibar"
RETAIN = [{"question": f"What is {CANARY} x{k}?", "answer": f"It is {CANARY} {k}{k}."} for k in range(4)]


def rows(job: int) -> list[dict[str, str]]:
    return [{"question": f"Where is {CANARY} {job}.{k}?", "answer": f"In {CANARY} {job}{k * 7}."} for k in range(3)]


class Jobs(NamedTuple):
    """A folder of jobs."""

    root: Path
    registered: Any

    @property
    def storage(self) -> Storage:
        storage = Storage(str(self.root / "storage"))
        storage.create()
        return storage

    def stored(self, name: str, given: Sequence[Mapping[str, str]]) -> FileRef:
        return stored_set(self.storage, name, given)

    def assign(
        self,
        number: int,
        parent: ParentAssignment | None = None,
        method: str = "grad_diff",
        learning_rate: float = 1e-3,
        retain: list[Any] = RETAIN,
        **spec: Any,
    ) -> Assignment:
        """The job as the supervisor hands it over."""
        scratch = self.root / f"scratch{number}"
        scratch.mkdir()
        asked: dict[str, Any] = {
            "constraint": Constraint(epsilon=100.0),
            "budget": Budget(max_steps=2),
            "forget_set": "ufile_" + 32 * "0",
            "retain_set": "ufile_" + 32 * "1",
            "parent": None if parent is None else parent.job_id,
        }
        choice = MethodChoice(type=method, hyperparameters={"learning_rate": learning_rate})
        return Assignment(
            job_id=job_id(number),
            attempt=1,
            fence=1,
            spec=JobSpec(model="tiny-model", method=choice, **asked | spec),
            model=self.registered.entry,
            parent=parent,
            forget_file=self.stored(f"forget{number}", rows(number)),
            retain_file=self.stored(f"retain{number}", retain),
            row_key=b64encode(bytes(32)),
            storage_url=str(self.root / "storage"),
            prefix=f"jobs/{job_id(number)}/attempts/1",
            models_root=self.registered.root,
            scratch_dir=scratch,
            device="cpu",
            dtype="float32",
        )


class Ended(NamedTuple):
    job: Assignment
    artifacts: list[ArtifactFile]
    report: Report

    def as_parent(self) -> ParentAssignment:
        earlier = self.job.parent.chain if self.job.parent else []
        return ParentAssignment(
            job_id=self.job.job_id,
            adapter=[file for file in self.artifacts if file.name.startswith("adapter/")],
            report=next(file for file in self.artifacts if file.name == "report.json"),
            chain=[EarlierJob(job_id=self.job.job_id, forget_file=self.job.forget_file), *earlier],
        )


@pytest.fixture(scope="module")
def began(register: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The first job of the chains here, which forgets; and the folder that it lies in."""
    here = Jobs(tmp_path_factory.mktemp("jobs"), register())
    return here.root, published(here.assign(1, method="grad_ascent", learning_rate=0.05, budget=Budget(max_steps=8)))


@pytest.fixture
def first(began: tuple[Path, Ended]) -> Ended:
    return began[1]


@pytest.fixture
def jobs(began: tuple[Path, Ended], register: Any, tmp_path: Path) -> Jobs:
    """With the first one in the storage."""
    shutil.copytree(began[0] / "storage", tmp_path / "storage")
    return Jobs(tmp_path, register())


def job_id(number: int) -> str:
    return f"ujob_{number:032x}"


def done(job: Assignment) -> Record:
    told: list[Record] = []
    last = run.last_record(job, told.append, lambda: False)
    assert CANARY not in "".join(record.model_dump_json() for record in [last, *told]), "a row's text"
    return last


def published(job: Assignment) -> Ended:
    last = done(job)
    assert isinstance(last, ResultRecord), last
    content = b"".join(Storage(job.storage_url).read(f"{job.prefix}/report.json"))
    assert CANARY.encode() not in content
    return Ended(job, last.artifacts, Report.model_validate_json(content))


def test_each_job_starts_where_the_last_one_ended_and_measures_what_was_forgotten_again(
    jobs: Jobs, first: Ended
) -> None:
    second = published(jobs.assign(2, first.as_parent()))
    third = published(jobs.assign(3, second.as_parent(), constraint=Constraint(epsilon_relative=1.0)))
    one, two, three = first.report, second.report, third.report
    assert one.parent is None
    assert two.parent is not None
    assert three.parent is not None
    assert [file.sha256 for file in two.parent.files] == [file.sha256 for file in one.released.files]
    assert [earlier.job_id for earlier in three.parent.forgotten] == [job_id(2), job_id(1)]
    assert two.constraint.before == pytest.approx(one.constraint.after, rel=1e-5), "the same rows, the parent's adapter"
    assert three.constraint.before == pytest.approx(two.constraint.after, rel=1e-5)
    assert three.constraint.epsilon == pytest.approx(2 * three.constraint.before), "relative to where it started"

    own = next(figure for figure in one.figures if (figure.set, figure.metric) == ("forget", "probability"))
    (again,), oldest = two.parent.forgotten, three.parent.forgotten[1]
    assert [again.base, again.before] == pytest.approx([own.before, own.after], rel=1e-5)
    assert [oldest.base, oldest.before] == pytest.approx([own.before, again.after], rel=1e-5)
    gate = next(gate for gate in three.verdict.gates if gate.metric == f"forgotten/{job_id(1)}")
    assert own.before is not None
    assert (gate.result, gate.severity, gate.value) == ("PASSED", "fail", oldest.after)
    assert gate.threshold == pytest.approx(0.1 * own.before, rel=1e-5)
    assert any("Of the earlier jobs the forget sets alone" in caveat for caveat in three.caveats)
    assert f"the adapter of {job_id(2)} , which started from that of {job_id(1)}" in Page(render_html(three)).text
    config = next(file for file in third.artifacts if file.name.endswith("adapter_config.json"))
    assert json.loads(b"".join(jobs.storage.read(config.key)))["r"] == 3 * 8

    made = chain.chain([one, two, three])
    assert [job.parent for job in made.jobs] == [None, job_id(1), job_id(2)]
    assert "(sustainability)" in made.comparable[0]
    assert "does not show" not in made.comparable[0]
    assert not any("different models" in sentence or "gates differ" in sentence for sentence in made.not_comparable)
    page = Page(chain_page.render_html(made)).text
    assert f"from the adapter of {job_id(2)}" in page
    assert "Over the size of the request" not in page


def test_what_a_job_brings_back_fails_and_what_is_gone_warns(jobs: Jobs, first: Ended) -> None:
    gone = EarlierJob(job_id=job_id(8), forget_file=None)
    purged = EarlierJob(job_id=job_id(7), forget_file=jobs.stored("purged", [{"text": "since the job was claimed"}]))
    jobs.storage.delete("files/purged")
    parent = first.as_parent()
    made = published(
        jobs.assign(
            2,
            parent.model_copy(update={"chain": [*parent.chain, gone, purged]}),
            learning_rate=0.02,
            budget=Budget(max_steps=10),
            retain=[row | {"answer": row["answer"] + "!"} for row in rows(1)],  # all but the same
        )
    ).report
    back, *absent = (gate for gate in made.verdict.gates if gate.metric.startswith("forgotten/"))
    assert (back.metric, back.result, back.severity) == (f"forgotten/{job_id(1)}", "FAILED", "fail")
    assert made.parent is not None
    forgotten = made.parent.forgotten[0]
    assert forgotten.base is not None
    assert forgotten.before is not None
    assert forgotten.after is not None
    assert forgotten.before < 0.1 * forgotten.base < forgotten.after
    assert [gate.metric for gate in absent] == [f"forgotten/{job_id(8)}", f"forgotten/{job_id(7)}"]
    for gate in absent:
        assert (gate.result, gate.severity, gate.value, gate.threshold) == ("WARNED", "warn", None, None)
        assert "its rows are no longer kept" in gate.message
    assert made.verdict.result == "FAILED"


def test_what_a_loss_compares_with_is_the_parent(jobs: Jobs, first: Ended) -> None:
    made = published(jobs.assign(2, first.as_parent(), method="npo")).report
    beta = made.asked.hyperparameters.get("beta", 0.03)
    step = made.trajectory.steps[0]
    assert step.forget_loss == pytest.approx(2 / beta * math.log(2), rel=1e-4), (
        "a fresh adapter beside it: no ratio yet"
    )


def test_a_row_to_keep_that_an_earlier_job_had_forgotten_is_refused(jobs: Jobs, first: Ended) -> None:
    last = done(jobs.assign(2, first.as_parent(), retain=[*RETAIN, rows(1)[2]]))
    assert isinstance(last, FailureRecord)
    assert last.code is FailureCode.FORGET_RETAIN_OVERLAP
    assert last.message == f"1 rows of the retain set are also in the {job_id(1)} forget set: 5 = 3"


def test_a_row_to_keep_that_is_much_like_one_that_an_earlier_job_had_forgotten_is_warned_of(
    jobs: Jobs, first: Ended
) -> None:
    alike = {name: value.upper() for name, value in rows(1)[2].items()}
    made = published(jobs.assign(2, first.as_parent(), retain=[*RETAIN, alike]))
    (warning,) = [one for one in made.report.warnings if one.code == "rows_alike"]
    assert warning.message.endswith(f"(retain = {job_id(1)} forget): 5 = 3")


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (
            "bytes",
            FailureCode.MODEL_REVISION_MISMATCH,
            "adapter_model.safetensors of job {} is not what that job published",
        ),
        ("gone", FailureCode.MODEL_NOT_FOUND, "adapter_model.safetensors of job {} is no longer in the storage"),
        (
            "base",
            FailureCode.MODEL_REVISION_MISMATCH,
            "the adapter of job {} was made on a base of digest sha256:another",
        ),
    ],
)
def test_an_adapter_that_is_not_the_parents_is_refused(
    jobs: Jobs, first: Ended, change: str, code: FailureCode, words: str
) -> None:
    parent = first.as_parent()
    weights = next(file for file in parent.adapter if file.name.endswith(".safetensors"))
    if change == "bytes":
        content = bytearray(b"".join(jobs.storage.read(weights.key)))
        content[-1] ^= 1
        jobs.storage.write(weights.key, [bytes(content)])
    elif change == "gone":
        jobs.storage.delete(weights.key)
    else:
        told = json.loads(b"".join(jobs.storage.read(parent.report.key)))
        told["base_model"]["digest"] = "sha256:another"
        stored = jobs.storage.write(parent.report.key, [json.dumps(told).encode()])
        parent = parent.model_copy(update={"report": parent.report.model_copy(update={"sha256": stored.sha256})})
    last = done(jobs.assign(2, parent))
    assert isinstance(last, FailureRecord)
    assert last.code is code
    assert words.format(job_id(1)) in last.message


# --- the verdict

HELD = Forgotten(job_id=job_id(1), rows=3, base=0.8, before=0.02, after=0.07)
BACK = Forgotten(job_id=job_id(2), rows=3, base=0.8, before=0.02, after=0.09)
BLOWN = Forgotten(job_id=job_id(3), rows=3, base=0.8, before=0.02, after=float("nan"))
GONE = Forgotten(job_id=job_id(4), rows=None, base=None, before=None, after=None, reason="its rows are no longer kept")


@pytest.mark.parametrize(
    ("earlier", "results", "said", "summary"),
    [
        (
            [HELD],
            "PASSED",
            "is 7%, after 2% before this job; at most 8%, a tenth of the base",
            "What an earlier job had it forget is still as unlikely, word for word, as required.",
        ),
        (
            [HELD, BACK],
            "FAILED",
            "is 9%, after 2%",
            "what an earlier job had it forget is likelier than allowed",
        ),
        (
            [BLOWN],
            "FAILED",
            "the value was not finite",
            "how likely what an earlier job had it forget is could not be measured",
        ),
        ([GONE], "WARNED", "no longer kept", "how likely what an earlier job had it forget is could not be"),
        ([GONE, BACK], "FAILED", "is 9%, after 2%", "could not be measured, and the adapter must not be relied on"),
    ],
)
def test_the_verdict_on_what_earlier_jobs_had_it_forget(
    earlier: list[Forgotten], results: str, said: str, summary: str
) -> None:
    judged = report.verdict(constraint(), 0.816, 0.04, published=True, earlier=earlier)
    assert judged.result == results
    assert said in judged.gates[-1].message
    made = whole()
    made.verdict = judged
    assert summary in words.summary(made)
    assert f"mean probability of what {earlier[-1].job_id} had it forget" in Page(render_html(made)).text
