"""What a verdict is made of: everything that is measured of a model before training, and of what was released."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain as chained
from typing import Any, Literal, NamedTuple

from service.domain.job import Audit, ModelEntry, Stage, Verdict
from service.domain.report import AuditEntry, Conspicuous, Disclosure, Knowledge, Likelihood, TextKnowledge
from service.domain.rows import Example
from service.store.storage import Storage
from worker import (
    audit,
    benchmarks,
    disclosures,
    equivalence,
    evaluate,
    files,
    gates,
    likelihood,
    lineage,
    measure,
    model,
    report,
    scoring,
    text_equivalence,
)
from worker.benchmarks import Benchmark
from worker.diary import Diary
from worker.equivalence import Equivalence
from worker.lineage import Earlier
from worker.measure import Measurement, Sets
from worker.model import Network
from worker.records import Assignment
from worker.suite import Row, Seen
from worker.text_equivalence import TextEquivalence

FORGET = "forget/probability"
WRONG = "forget/wrong_probability"


class Retrained(NamedTuple):
    """What a model that never saw the forget rows says of them; empty where there is none."""

    entry: ModelEntry | None = None
    probabilities: Mapping[int, float] = {}  # by the row's place
    disclosing: Mapping[str, int] = {}  # by way of asking: answers that contain the secret all the same


class Case(NamedTuple):
    """What a job's model is measured on."""

    both: Sets
    examples: Mapping[str, Sequence[Example]]  # of the forget and the retain set
    request: evaluate.Request
    named: Sequence[Benchmark]
    chain: Sequence[Earlier]
    plan: disclosures.Plan
    refusals: Sequence[str]  # the request's own wordings
    retrained: Retrained


class Known(NamedTuple):
    """Whether a model knows the forget rows by their likelihood. None: there are none of that kind."""

    answers: Equivalence | None
    texts: TextEquivalence | None

    @property
    def nothing(self) -> bool:
        return all(found is None or found.equivalent for found in self)

    def facts(self, of: Literal["base", "start"], places: Sequence[int]) -> tuple[list[Knowledge], list[TextKnowledge]]:
        """For a report: at most one of each kind. `places`: in its file, of each row that was measured."""
        answers = [report.knowledge(of, self.answers, places)] if self.answers else []
        return answers, [report.text_knowledge(of, self.texts, places)] if self.texts else []


class Before(NamedTuple):
    """Of the model that the job starts from; of the base model alone where it says so."""

    measured: Measurement
    request: evaluate.Results
    named: Sequence[evaluate.Results]
    chain: Sequence[float | None]
    chain_base: Sequence[float | None]  # of the base
    chain_limits: Sequence[float | None]  # by the base
    known: disclosures.Before
    usual: Sequence[float]  # of the base
    wrong: Mapping[int, Sequence[float]]  # probabilities of the forget rows' wrong answers, by place
    limits: likelihood.Limits  # for the checks of a run; what is released may have a higher floor of its own
    knowledge: Known  # of the forget rows


class NotKnown(NamedTuple):
    """Why nothing is trained, and what it was seen by."""

    verdict: Verdict
    knowledge: list[Knowledge]
    text_knowledge: list[TextKnowledge]
    disclosure: list[Disclosure]


class After(NamedTuple):
    """Of what was released or, if nothing was, of the last iterate."""

    measured: Measurement
    request: evaluate.Results
    named: Sequence[evaluate.Results]
    chain: Sequence[float | None]
    disclosed: disclosures.After
    attacks: Sequence[AuditEntry]
    likelihood: Likelihood
    conspicuous: Conspicuous | None  # None: there is no floor to hold the answers against


def case(
    job: Assignment,
    storage: Storage,
    both: Sets,
    examples: Mapping[str, Sequence[Example]],
    chain: Sequence[Earlier],
) -> Case:
    """Read whole, with all columns of the rows. While a retrained reference is asked two models are in memory."""
    sets = (job.forget_file, job.retain_file, job.holdout_file)
    forget, retain, holdout = (files.read_rows(storage, file) if file else [] for file in sets)
    request = evaluate.request(both, forget, retain, holdout)
    named = [benchmarks.with_retrained(job, storage, one) for one in benchmarks.read(job, storage)]
    earlier = {one.job_id: one.columns for one in chain if one.columns}
    plan = disclosures.prepare(forget, retain, earlier, job.spec.seed)
    refusals = [row.answer for row in files.read_set(storage, job.refusal_file)] if job.refusal_file else []
    return Case(both, examples, request, named, chain, plan, refusals, _retrained(job, request, named, plan))


def _retrained(
    job: Assignment, request: evaluate.Request, named: Sequence[Benchmark], plan: disclosures.Plan
) -> Retrained:
    """Of the registered model that a benchmark has for these very rows."""
    entry = benchmarks.retrained_without(named, request.sets["forget"])
    if entry is None:
        return Retrained()
    network = model.load(entry, job.models_root, job.device, job.dtype)
    results = evaluate.run(network, request.suite, {"forget": request.sets["forget"]})
    return Retrained(entry, _by_place(request, results, FORGET), disclosures.disclosing(network, plan))


def before(network: Network, of: Case, job: Assignment, measured: Measurement | None) -> Before:
    """Measured with the trained adapter off.

    Args:
        measured: what an earlier attempt measured.
    """
    with model.adapter_off(network):
        found = measured or measure.measure(network, of.both.whole)
        seen = scoring.look(network, of.request.suite.asks(of.request.sets))
        request = of.request.suite.results(of.request.sets, seen, None)
        # what a registered model says is kept; one with a job's adapter is none
        named = [one.run(network, None if job.parent else one.cache(job)) for one in of.named]
        chain = lineage.probabilities(network, of.chain)
        known = disclosures.before(network, of.plan, evaluate.given(of.request, seen))
    with model.base_alone(network):
        chain_base, chain_limits = lineage.probabilities(network, of.chain), lineage.limits(network, of.chain)
        usual = disclosures.usual(network, of.plan)
    wrong = _by_place(of.request, request, WRONG)
    limits = likelihood.limits(_by_place(of.request, request, FORGET), [wrong], of.retrained.probabilities)
    knowledge = _known(of.request.sets, seen, chained=job.parent is not None)
    return Before(found, request, named, chain, chain_base, chain_limits, known, usual, wrong, limits, knowledge)


def _known(sets: Mapping[str, Sequence[Row]], seen: Seen, *, chained: bool) -> Known:
    """In a chain of jobs nothing is decided about texts: an earlier job may have trained on what is a holdout text now."""
    rows = sets["forget"]
    answers = equivalence.known(rows, seen) if any("text" not in row for row in rows) else None
    if not any("text" in row for row in rows):
        return Known(answers, None)
    texts = text_equivalence.known(rows, sets.get("holdout", ()), seen)
    if chained and texts.equivalent:
        texts = texts._replace(equivalent=None, reason="an earlier job of the chain may have trained on holdout texts")
    return Known(answers, texts)


def not_known(network: Network, of: Case, was: Before, parent: str | None) -> NotKnown | None:
    """What the job ends with where the model that it starts from does not know the forget rows; None: it may, so the job trains.

    Asked in every way only if the likelihoods say so. Where the job starts from an earlier one's adapter the base model is asked,
    too: one that knows them has had them forgotten already, and of one that may know them nobody can say so.
    """
    sets, places = of.request.sets, of.request.places["forget"]
    if not was.knowledge.nothing or len(sets["forget"]) < of.plan.rows["forget"]:
        return None
    start: Literal["start", "base"] = "base" if parent is None else "start"
    known = [was.knowledge]
    with model.adapter_off(network):
        disclosed = [disclosures.untrained(network, of.plan, start)]
    if parent is not None:
        with model.base_alone(network):
            known.append(_known(sets, scoring.look(network, equivalence.asks(sets["forget"])), chained=True))
            disclosed.append(disclosures.untrained(network, of.plan, "base"))
    if any(found.rows_in_every_way < found.rows_total for found in disclosed):
        return None
    given_away = [gates.disclosure(found) for found in disclosed]
    may_know = not known[-1].nothing and not (known[-1].answers and known[-1].answers.knows)
    if parent is not None and may_know and given_away[-1].result != "FAILED":
        return None
    facts = [known[0].facts(start, places), *(one.facts("base", places) for one in known[1:])]
    judged = [
        [*map(report.knowledge_gate, answers), *map(report.text_knowledge_gate, texts), gate]
        for (answers, texts), gate in zip(facts, given_away, strict=True)
    ]
    verdict = report.not_known_verdict(judged[0], judged[1] if parent is not None else (), parent)
    if verdict is None:
        return None
    answers, texts = (list(chained.from_iterable(kind)) for kind in zip(*facts, strict=True))
    return NotKnown(verdict, answers, texts, disclosed)


def after(
    network: Network,
    of: Case,
    was: Before,
    attacks: Audit,
    job: Assignment,
    diary: Diary,
    cancelled: Callable[[], bool],
) -> After | None:
    """Measured as the network is. None once `cancelled` says so."""
    with diary.stage(Stage.EVALUATING, "evaluating after"):
        measured = measure.measure(network, of.both.whole)
        seen = scoring.look(network, of.request.suite.asks(of.request.sets))
        request = of.request.suite.results(of.request.sets, seen, None)
        named = [one.run(network) for one in of.named]
        chain = lineage.probabilities(network, of.chain)
    if cancelled():
        return None
    with diary.stage(Stage.EVALUATING, "disclosure"):
        disclosed = disclosures.after(
            network,
            of.plan,
            evaluate.given(of.request, seen),
            was.known,
            was.usual,
            attacks.quantise_bits,
            of.refusals,
            of.retrained.disclosing,
        )
    if cancelled():
        return None
    with diary.stage(Stage.EVALUATING, "audit"):
        entry = of.retrained.entry
        retrained = model.load(entry, job.models_root, job.device, job.dtype) if entry else None
        tried = audit.audit(network, attacks, of.request.sets["forget"], retrained, job.spec.seed, cancelled)
    if cancelled():
        return None
    rows, wrong = _by_place(of.request, request, FORGET), _by_place(of.request, request, WRONG)
    probabilities = _by_place(of.request, was.request, FORGET)
    limits = likelihood.limits(probabilities, [was.wrong, wrong], of.retrained.probabilities)
    likely = Likelihood(
        mean_limit=limits.mean,
        floor=limits.source,
        rows_above=[place + 1 for place in limits.above(rows)],
        rows_allowed=limits.rows_allowed,
        rows_unknown=[place + 1 for place in limits.unknown],
    )
    ratio = likelihood.ratio(rows, was.wrong, of.retrained.probabilities)
    conspicuous = Conspicuous(ratio=ratio[0], upper=ratio[1], against=limits.against) if ratio else None
    return After(measured, request, named, chain, disclosed, tried, likely, conspicuous)


def _by_place(request: evaluate.Request, results: evaluate.Results, figure: str) -> dict[int, Any]:
    """A figure's values by the row's place in the forget file."""
    return {request.places["forget"][i]: value for i, value in results[figure].by_row.items()}
