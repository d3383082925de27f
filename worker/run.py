"""One job, top to bottom, in a process of its own: python -m worker.run ASSIGNMENT.json

prepare -> load -> measure before -> solve -> publish the adapter -> measure the published bytes -> report. A reverification
takes the adapter that an earlier job published in place of solving.

It has no database credentials. What it has to say goes as JSON lines to a pipe (worker.records); its standard input
tells it to cancel or to pause, and that its parent is gone. An attempt that follows another does again what is quickly
done, and goes on with the solve where the last checkpoint was.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import structlog
import torch
from structlog.contextvars import bind_contextvars
from transformers.utils import logging as transformers_logging

from service import logs
from service.domain.errors import JobFailure
from service.domain.job import LOOSE, FailureCode, JobSpec, MethodChoice, Stage
from service.domain.report import Report
from service.domain.rows import Example
from service.store.sealed import SealedStorage
from service.store.storage import Storage
from worker import (
    appraisal,
    checkpoint,
    data,
    disclosures,
    files,
    lineage,
    measure,
    model,
    page,
    reference,
    registry,
    report,
    words,
)
from worker.assemble import assemble, assemble_untrained, reverified, trained
from worker.diary import Diary, Emit
from worker.failures import failure
from worker.oracle import make_oracle
from worker.pipe import die_with_parent, listen, open_pipe
from worker.problem import Method, Params, Problem
from worker.records import (
    ArtifactFile,
    Assignment,
    CancelledRecord,
    ConstraintRecord,
    FailureRecord,
    PausedRecord,
    Record,
    ResultRecord,
    Word,
)
from worker.refusals import REFUSALS
from worker.solve import Batch, Limits, Run, StopReason, solve
from worker.views import Term

log = structlog.get_logger(__name__)

BOUNDED_LOSS = "nll"  # what the request's bound is on, whatever a method trains the retain set with
STOPS: Mapping[Word | None, StopReason] = {"cancel": StopReason.CANCELLED, "pause": StopReason.PAUSED}
ASKED_TO_STOP = {StopReason.CANCELLED: CancelledRecord(), StopReason.PAUSED: PausedRecord()}


def run(job: Assignment, emit: Emit, asked: Callable[[], Word | None]) -> Record:
    """The main flow. Returns the job's last record; raises JobFailure where it cannot go on."""
    spec, storage = job.spec, Storage(job.storage_url)
    sealed = files.sealed_with(job.storage_url, [job.forget_file, job.retain_file])
    diary = Diary(emit)

    def cancelled() -> bool:
        return asked() == "cancel"

    with diary.stage(Stage.PREPARING):
        examples = {
            "forget": files.read_set(storage, job.forget_file),
            "retain": files.read_set(storage, job.retain_file),
        }
        holdout_rows = files.read_set(storage, job.holdout_file) if job.holdout_file else []
        files.judge_overlap({"holdout": holdout_rows, **examples}, diary)
        method = build_method(spec.method)

    with diary.stage(Stage.LOADING_MODEL):
        base = model.load(job.model, job.models_root, job.device, job.dtype)
        forget = Term(method.forget, forget_texts(job, storage, method, examples["forget"], base))
        retain = retain_term(method, examples["retain"], base)
        chain = lineage.earlier(job, storage, examples["retain"], base, diary)
        parent = lineage.fetch(job.parent, storage, base, job.scratch_dir / "parent")
        released = lineage.fetch(job.reverified, storage, base, job.scratch_dir / "reverified")
        network = model.adapt(base, spec.lora, spec.seed, method.layers, parent)
        network, kept = earlier(job, sealed, network, diary)
        holdout = encode("holdout", holdout_rows, base) if holdout_rows else None
        warn_about_rows(forget.encoded, retain.encoded, diary)

    with diary.stage(Stage.EVALUATING, "evaluating before"):
        both = measure.sets(*with_reference(job, sealed, network, method, forget, retain), spec.seed)
        case = appraisal.case(job, storage, both, examples, chain)
        before = appraisal.before(network, case, job, kept.before if kept else None)
        epsilon = spec.constraint.bound(before.measured.retain_loss)
        emit(ConstraintRecord(epsilon=epsilon, base_retain_loss=before.measured.retain_loss))
        warn_about_bound(epsilon, before.measured.retain_loss, diary)
        unknown = None
        if released is None:
            unknown = appraisal.not_known(network, case, before, job.parent.job_id if job.parent else None)

    if unknown is not None:
        with diary.stage(Stage.UPLOADING, "uploading report"):
            facts = assemble_untrained(job, method, network, case, before, epsilon, unknown, holdout, diary)
            return result(facts, published(storage, job, facts))

    if released is not None:
        with diary.stage(Stage.LOADING_MODEL, "loading released adapter"):
            network = model.load_adapter(network, released)
        after = appraisal.after(network, case, before, spec.attacks, job, diary, cancelled)
        if after is None:
            return CancelledRecord()
        with diary.stage(Stage.UPLOADING, "uploading report"):
            facts = assemble(job, method, network, case, before, after, epsilon, reverified(job), holdout, diary)
            return result(facts, published(storage, job, facts))

    with diary.stage(Stage.UNLEARNING):
        params = model.trainable(network)
        keeper = checkpoint.Keeper(job, sealed, diary, params, before.measured, network, kept)
        resumed = checkpoint.restore(kept, params, diary, job.threads) if kept else None
        check = partial(checked, network, case, before, epsilon, spec.budget.forget_target)
        solution = unlearn(job, method, network, params, both, epsilon, check, diary, asked, keeper.keep, resumed)
    diary.seconds["unlearning"] = round(solution.elapsed_s, 3)  # of all attempts
    assert solution.stop is not None
    if solution.stop.reason in ASKED_TO_STOP:
        return ASKED_TO_STOP[solution.stop.reason]
    if solution.last is None:
        raise JobFailure(FailureCode.NON_FINITE_LOSS, solution.stop.message)

    adapter: list[ArtifactFile] = []
    if solution.best_params is not None:
        with diary.stage(Stage.PACKAGING):
            model.assign(network, solution.best_params)
            folder = job.scratch_dir / "adapter"
            model.save(network, folder)
        with diary.stage(Stage.UPLOADING, "uploading adapter"):
            adapter = files.publish(storage, job.prefix, folder, "adapter")
        with diary.stage(Stage.LOADING_MODEL, "loading published adapter"):
            network = model.load_adapter(network, files.fetch(storage, adapter, job.scratch_dir / "published"))
    after = appraisal.after(network, case, before, spec.attacks, job, diary, cancelled)
    if after is None:
        return CancelledRecord()

    with diary.stage(Stage.UPLOADING, "uploading report"):
        candidate = trained(job, solution, adapter)
        facts = assemble(job, method, network, case, before, after, epsilon, candidate, holdout, diary)
        return result(facts, [*adapter, *published(storage, job, facts)])


def result(facts: Report, artifacts: list[ArtifactFile]) -> ResultRecord:
    return ResultRecord(
        verdict=facts.verdict,
        stop_reason=facts.stop.reason,
        stop_message=facts.stop.message,
        figures={f"{f.set}_{f.metric}": {"before": f.before, "after": f.after} for f in facts.figures},
        artifacts=artifacts,
    )


def published(storage: Storage, job: Assignment, facts: Report) -> list[ArtifactFile]:
    """The report as JSON and as a page."""
    return [
        files.store_bytes(storage, job.prefix, "report.json", report.render_json(facts), "application/json"),
        files.store_bytes(storage, job.prefix, "report.html", page.render_html(facts).encode(), "text/html"),
    ]


def unlearn(
    job: Assignment,
    method: Method,
    network: model.Network,
    params: Params,
    both: measure.Sets,
    epsilon: float,
    check: Callable[[], measure.Measurement],
    diary: Diary,
    asked: Callable[[], Word | None],
    keep: Callable[[Run], None],
    resumed: Run | None,
) -> Run:
    """Solve min forget(theta) s.t. retain(theta) <= epsilon, telling of each step and check."""
    budget, seed = job.spec.budget, job.spec.seed
    terms = {"forget": both.forget, "retain": both.retain}

    def batch(step: int) -> Batch:
        return make_oracle(network, params, terms, places(method, terms, seed, step))

    return solve(
        Problem("forget", {"retain": epsilon}),
        method.solver,
        params,
        batch,
        check=check,
        check_tokens=both.tokens,
        limits=Limits(budget.max_steps, budget.max_seconds),
        on_step=lambda progress: diary.step(progress, epsilon),
        on_check=lambda checked, best, seconds: diary.check(checked, best, seconds, epsilon, both.rows),
        asked=lambda: STOPS.get(asked()),
        keep=keep,
        resumed=resumed,
    )


def checked(
    network: model.Network,
    case: appraisal.Case,
    before: appraisal.Before,
    epsilon: float,
    target: float | Literal["verdict"] | None,
) -> measure.Measurement:
    """What a check finds, and whether it may end the run. The model is asked last, once all else holds: that costs the most."""
    found, rows = measure.measure_rows(network, case.both)
    mean = before.limits.mean if target == "verdict" else target
    holds = (
        mean is not None
        and found.retain_upper <= epsilon
        and found.forget_probability <= mean
        and len(before.limits.above(rows)) <= before.limits.rows_allowed_of(len(rows))
    )
    if not holds:
        return found
    disclosed, tokens = disclosures.greedily(network, case.plan, case.retrained.disclosing)
    return found._replace(forgotten=not disclosed, generation_tokens=tokens)


# --- what was asked, made ready


def build_method(choice: MethodChoice) -> Method:
    try:
        return registry.build_method(choice.type, choice.hyperparameters)
    except registry.RegistryError as error:  # the API checked it against its catalogue: this worker is another version
        raise JobFailure(FailureCode.NO_CAPABLE_WORKER, f"this worker does not know the method: {error}") from error


def forget_texts(
    job: Assignment, storage: Storage, method: Method, rows: Sequence[Example], base: model.Network
) -> dict[str, data.Encoded]:
    """The forget set and, for a method that teaches them, refusals of its questions."""
    texts = {"answer": encode("forget", rows, base)}
    if "refusal" in method.forget.needs:
        own = job.refusal_file
        refusals = REFUSALS if own is None else [row.answer for row in files.read_set(storage, own)]
        with about("forget", "with the refusals for answers, "):
            texts["refusal"] = data.encode_refusals(
                rows, refusals, job.spec.seed, base.tokenizer, base.entry.prompt_format, base.context_tokens
            )
    return texts


def earlier(
    job: Assignment, sealed: SealedStorage, network: model.Network, diary: Diary
) -> tuple[model.Network, checkpoint.Kept | None]:
    """What an earlier attempt left to go on from; with it, its micro-batches, unless memory has had no room for them."""
    kept = checkpoint.last_readable(sealed, job.checkpoints, job.scratch_dir, model.trainable(network), network, diary)
    at_once = min(job.micro_batch_tokens, kept.micro_batch_tokens) if kept else job.micro_batch_tokens
    return network._replace(tokens_at_once=at_once), kept


def retain_term(method: Method, rows: Sequence[Example], base: model.Network) -> Term:
    proxy = registry.composition(method)["retain_loss"] != BOUNDED_LOSS
    return Term(method.retain, {"answer": encode("retain", rows, base)}, proxy=proxy)


def with_reference(
    job: Assignment, sealed: SealedStorage, network: model.Network, method: Method, forget: Term, retain: Term
) -> tuple[Term, Term]:
    """Both terms with what the reference says of their rows: of the whole forget set, and of what a run trains on to retain."""
    trained = trained_on(retain, method.retain_rows, job.spec) if reference.needed(retain) else []
    return (
        reference.recall(sealed, job.folder, job.scratch_dir, network, forget, forget.encoded.measured),
        reference.recall(sealed, job.folder, job.scratch_dir, network, retain, trained),
    )


def trained_on(retain: Term, rows: int, spec: JobSpec) -> list[int]:
    """The places that a run of all its steps asks for."""
    measured = retain.encoded.measured
    if spec.budget.max_steps * rows >= len(measured) + rows:  # an epoch, in which every row has its turn
        return measured
    steps = range(spec.budget.max_steps)
    return sorted({place for step in steps for place in data.batch(measured, rows, spec.seed, "retain", step)})


def places(method: Method, terms: Mapping[str, Term], seed: int, step: int) -> dict[str, list[int]]:
    """The rows of a step's batch."""
    sizes = {"forget": method.forget_rows, "retain": method.retain_rows}
    return {name: data.batch(term.encoded.measured, sizes[name], seed, name, step) for name, term in terms.items()}


def encode(which: str, rows: Sequence[Example], base: model.Network) -> data.Encoded:
    with about(which):
        return data.encode(rows, base.tokenizer, base.entry.prompt_format, base.context_tokens)


@contextmanager
def about(which: str, how: str = "") -> Iterator[None]:
    """What fails here names the set; and the rows to blame, for those who asked for them, where it is the forget set."""
    try:
        yield
    except JobFailure as failure:
        blamed = failure.rows if which == "forget" and isinstance(failure, data.RowsUnfit) else ()
        raise JobFailure(failure.code, f"{which} set: {how}{failure}", blamed) from failure


# --- what a user is warned of


def warn_about_rows(forget: data.Encoded, retain: data.Encoded, diary: Diary) -> None:
    for name, encoded in {"forget": forget, "retain": retain}.items():
        if encoded.unmeasured:
            numbers = ", ".join(str(n) for n in encoded.unmeasured[:20])
            diary.warn(
                "unmeasured_rows",
                f"{len(encoded.unmeasured)} rows of the {name} set have no token that counts, because nothing of their "
                f"answer is left as the prompt format writes it: rows {numbers}. They are neither trained on nor measured.",
            )


def warn_about_bound(epsilon: float, base_loss: float, diary: Diary) -> None:
    bound, loss = words.pair(epsilon, base_loss)
    if epsilon < base_loss:
        diary.warn(
            "epsilon_below_base",
            f"epsilon is {bound}, below the retain loss of {loss} nats per token before: the adapter would have to make the "
            "retain set better than it was.",
        )
    elif epsilon > LOOSE * base_loss:
        diary.warn(
            "epsilon_loose",
            f"epsilon is {bound}, more than {LOOSE:g} times the retain loss of {loss} nats per token before: it hardly "
            "constrains anything.",
        )


# --- the process


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 whenever a last record was written, also for a failure."""
    die_with_parent()
    logs.configure()
    emit, asked = open_pipe(), listen()
    path = Path(arguments[0])
    job = Assignment.model_validate_json(path.read_bytes())
    path.unlink()  # it has the keys of the job's files
    logs.configure(job.log_level)
    bind_contextvars(job_id=job.job_id, attempt=job.attempt)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    emit(last_record(job, emit, asked))
    return 0


def last_record(job: Assignment, emit: Emit, asked: Callable[[], Word | None]) -> Record:
    """How the job ends, with every error as a failure. Messages never quote the data; the traceback goes to the log."""
    try:
        return run(job, emit, asked)
    except Exception as error:
        known = failure(error)
        if known is not None:
            return FailureRecord(code=known.code, message=str(known), forget_rows=known.forget_rows)
        log.error("the run failed", exc_info=error)
        return FailureRecord(
            code=FailureCode.INTERNAL_ERROR, message=f"{type(error).__name__}; the worker's log has the details"
        )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # to take torch apart, as sys.exit does, takes a second, for which the worker would wait
