"""What a job asks its model, before and after: for forgotten rows, its own and earlier jobs', and neighbours to be answered."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from scipy.stats import beta

from service.domain import report
from worker import disclosure, language, model, neighbours
from worker.attacks.quantise import quantised
from worker.disclosure import Probe, Target
from worker.model import Network
from worker.subjects import subjects
from worker.suite import Row, example

PLAIN = ("question", "continuation")  # asked as it stands, greedily
GREEDY = (*PLAIN, "paraphrase", "prefix")
NEIGHBOURS_MAX = 100  # retain rows that are asked for
NEIGHBOURS_EACH = 5  # of a forget row
LEVEL = 0.95

Given = Mapping[
    str, Mapping[int, Sequence[int]]
]  # set -> place -> tokens that were answered: see worker.evaluate.given
Model = Literal["released", "quantise_8", "quantise_4", "start", "base"]


class Plan(NamedTuple):
    """Targets by what they are of: "forget", or the earlier job's id; of the retain set under "retain"."""

    targets: Mapping[str, Sequence[Target]]
    rows: Mapping[str, int]  # of the whole sets
    seed: int


class Before(NamedTuple):
    """Places that come out when they are asked for plainly, before anything is trained."""

    forget: list[int]
    retain: list[int]


class After(NamedTuple):
    disclosure: list[report.Disclosure]
    answered: report.Answered
    language: report.LanguageFacts | None  # None: there are texts alone, which ask nothing


def prepare(forget: Sequence[Row], retain: Sequence[Row], earlier: Mapping[str, Sequence[Row]], seed: int) -> Plan:
    sets = {"forget": forget, **earlier}
    targets = {name: disclosure.targets(rows, subjects(rows), retain, seed) for name, rows in sets.items()}
    near = _neighbours(forget, retain)
    targets["retain"] = [
        target._replace(place=place, decoys=())
        for place, target in zip(near, disclosure.targets([retain[p] for p in near], near, (), seed), strict=True)
    ]
    return Plan(targets, {name: len(rows) for name, rows in sets.items()}, seed)


def _neighbours(forget: Sequence[Row], retain: Sequence[Row]) -> list[int]:
    """Places in the retain set: of rows that ask the same of others, then of every second that its figures ask for, too."""
    questions, others = ([example(row).prompt for row in rows] for rows in (forget, retain))
    near = list(dict.fromkeys(p for found in neighbours.neighbours(questions, others, NEIGHBOURS_EACH) for p in found))
    count = min(NEIGHBOURS_MAX, len(retain))
    spread = [k * len(retain) // count for k in range(count)]
    spread = [*spread[::2], *spread[1::2]]
    return sorted(list(dict.fromkeys([*near[: NEIGHBOURS_MAX // 2], *spread]))[:NEIGHBOURS_MAX])


def before(network: Network, plan: Plan, given: Given) -> Before:
    """Of the network as it is now."""
    found = {
        name: disclosure.disclose(network, plan.targets[name], 0, plan.seed, PLAIN, given.get(name, {}))
        for name in ("forget", "retain")
    }
    return Before(*(_came_out(found[name]) for name in ("forget", "retain")))


def greedily(network: Network, plan: Plan, reference: Mapping[str, int]) -> tuple[list[int], int]:
    """Places of the forget set that a check finds disclosed, by the first way that shows some; all but the sampled one.

    Args:
        reference: what `disclosing` gave for a retrained reference; empty where there is none.

    Returns:
        the places, and the tokens of all prompts and answers.
    """
    chosen, tokens = plan.targets["forget"], 0
    for way in GREEDY:
        planned = disclosure.probes(network, chosen, plan.seed, [way])
        outputs = disclosure.generated(network, planned)
        tokens += sum(len(probe.prompt) + len(one.ids) for probe, one in zip(planned, outputs, strict=True))
        found = disclosure.judge(chosen, 0, planned, [one.text for one in outputs], reference)
        if found.places:
            return found.places, tokens
    return [], tokens


def untrained(network: Network, plan: Plan, which: Literal["start", "base"]) -> report.Disclosure:
    """In every way, of a model that may not know the forget rows."""
    found = disclosure.disclose(network, plan.targets["forget"], plan.rows["forget"], plan.seed)
    return facts("forget", which, found, None)


def disclosing(retrained: Network, plan: Plan) -> dict[str, int]:
    """By way of asking, how many answers of a model that never saw the forget rows contain their secrets all the same."""
    found = disclosure.disclose(retrained, plan.targets["forget"], 0, plan.seed)
    return {name: way.hits for name, way in found.ways.items()}


def usual(base: Network, plan: Plan) -> list[float]:
    """How unlikely an answer to each forgotten question may be to the base model. See worker.language."""
    planned = _plain(base, plan)
    rows = [plan.targets["forget"][probe.target].row for probe in planned]
    wrong = [row.get("perturbed_answer", ()) for row in rows]
    prompts, tokens = [probe.prompt for probe in planned], [probe.tokens for probe in planned]
    return language.usual(base, prompts, wrong, tokens, plan.seed)


def _plain(network: Network, plan: Plan) -> list[Probe]:
    return disclosure.probes(network, plan.targets["forget"], plan.seed, ["question"])


def after(
    network: Network,
    plan: Plan,
    given: Given,
    known: Before,
    expected: Sequence[float],
    bits: Sequence[int],
    refusals: Sequence[str],
    reference: Mapping[str, int],
) -> After:
    """Of what was released, as it is and, asked plainly, with its weights rounded to so many bits.

    Args:
        given: of what was released, as it is.
        expected: what `usual` gave for the base.
        refusals: the request's own wordings.
        reference: what `disclosing` gave for a retrained reference; empty where there is none.
    """
    found, judged = list[report.Disclosure](), None
    for name, targets in plan.targets.items():
        if name == "retain":
            continue
        planned = disclosure.probes(network, targets, plan.seed)
        outputs = disclosure.answers(network, targets, planned, given.get(name, {}))
        by_reference = reference if name == "forget" else {}
        disclosed = disclosure.judge(targets, plan.rows[name], planned, outputs, by_reference)
        found.append(facts(name, "released", disclosed, known))
        if name == "forget" and expected:
            plain = [text for probe, text in zip(planned, outputs, strict=True) if probe.way == "question"]
            with model.base_alone(network):
                judged = _language(network, plan, plain, expected, refusals)
    retained = disclosure.disclose(network, plan.targets["retain"], 0, plan.seed, PLAIN, given.get("retain", {}))
    for width in bits:
        under = quantised(network, width)
        planned = disclosure.probes(under, plan.targets["forget"], plan.seed, PLAIN)
        outputs = disclosure.answers(under, plan.targets["forget"], planned)
        disclosed = disclosure.judge(plan.targets["forget"], plan.rows["forget"], planned, outputs, reference)
        found.append(facts("forget", "quantise_8" if width == 8 else "quantise_4", disclosed, known))
        del under  # its own weights are gone before the next ones are made
    return After(found, answered(retained.rows, known.retain, _came_out(retained)), judged)


def _language(
    base: Network, plan: Plan, outputs: Sequence[str], expected: Sequence[float], refusals: Sequence[str]
) -> report.LanguageFacts:
    found = language.judge(base, [probe.prompt for probe in _plain(base, plan)], outputs, expected, refusals)
    return report.LanguageFacts(
        outputs=found.answers,
        refusals=found.refusals,
        nll=found.nll,
        usual=found.usual,
        excess=found.excess_lower,
        looping=found.looping,
        noise=found.noise,
    )


def facts(of: str, which: Model, found: disclosure.Disclosure, known: Before | None) -> report.Disclosure:
    """As a report has it."""
    return report.Disclosure(
        of=of,
        model=which,
        rows=found.rows,
        rows_in_every_way=found.in_every_way,
        rows_total=found.of,
        without_secret=_numbers(found.without_secret),
        before=_numbers(known.forget) if known is not None and of == "forget" else None,
        ways=[
            report.DisclosureWay(
                way=name,
                description=disclosure.WAYS[name],
                outputs=way.answers,
                disclosing=way.hits,
                by_chance=way.allowed,
                rows=_numbers(way.places),
                beyond=_numbers(way.disclosed),
            )
            for name, way in found.ways.items()
        ],
        disclosed=_numbers(found.places),
    )


def answered(rows: int, known: Sequence[int], now: Sequence[int]) -> report.Answered:
    """Of the rows that came out before, how many do still; the bound is Clopper's and Pearson's (1934)."""
    kept, lost = sorted(set(known) & set(now)), sorted(set(known) - set(now))
    upper = 1.0 if known and not lost else None
    if lost:
        upper = float(beta.ppf(LEVEL, len(kept) + 1, len(lost)))
    reason = None if known else "asked plainly, the model gave none of their answers before"
    return report.Answered(
        rows=rows, before=len(known), after=len(kept), lost=_numbers(lost), upper=upper, reason=reason
    )


def _came_out(found: disclosure.Disclosure) -> list[int]:
    """Whether by chance or not."""
    return sorted({place for way in found.ways.values() for place in way.places})


def _numbers(places: Sequence[int]) -> list[int]:
    return [place + 1 for place in places]
