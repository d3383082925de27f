"""What a job needs of its machine's memory at most, told from the sizes of the model and the lengths of its rows.

Counted in bytes, of the worst of its phases, beside what is held all the time:

    held        the base's weights; the adapter's values, gradients, two moments and the best iterate (float32); adapters of
                earlier jobs; on a CPU also what the reference model says of the rows
    training    one micro-batch of the longest rows, or of usual ones if that is larger: what a decoder layer with adapters on
                frozen weights keeps for its gradient, for all layers, and what one layer's backward pass needs at once; the
                head at the counted tokens. Or, if that is more, the optimiser's step
    measuring   what one layer needs of a batch without gradients, and the head
    generating  keys and values of a batch of answers as long as they may be, one layer's work on its prompts, and the head at
                one token of each, in float64 for those that are sampled, a part of them at a time where that is much
    rounded     measuring and generating on the forget rows alone, beside a copy of the linear layers with rounded weights

The layer counted is a Llama's: two norms, attention that keeps no [T, T] (PyTorch's fused kernels), a gated feed-forward part.
Not counted: the interpreter with its libraries, about 0.6 GiB, or the accelerator's context; attacks that train, which have
copies of their own; a retrained reference, and rows of benchmarks longer than the sets' own.

Measured on a CPU in float32 (tests/benchmarks/memory.py --passes, one thread, TOFU's forget01 and 400 retain rows, answers as
long as they may be), in MiB, against what is counted here, for Llamas of 135 million and of 260 thousand parameters:

                                135M measured  counted      260K measured  counted
    step of the longest rows            1,468    1,340          237 to 274      306
    check                                 225      311            39 to 51       45
    answers for figures                     -    1,783                 100       74
    disclosure                              -    2,072                 303      362
    neighbours                            485    1,273                  49       96
    rounded: likelihoods           492 to 936    1,016            22 to 33       47
    rounded: answers           1,232 to 1,278    1,281                  61       46

What a step of the two keeps for its gradient is counted within 1 %, as torch's hooks see it, and is the peak of the resident
memory where each tensor has pages of its own (MALLOC_MMAP_THRESHOLD_=65536). As glibc allocates by default the peak is 1.8 to
2.2 times as high on both, for what is kept lies between holes that temporaries of other sizes left: hence HOLES, for training,
measuring and rounding. An accelerator's own allocator, which was not measured, is taken to leave none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from service.domain import answers
from service.domain.answers import Answers, SetLengths
from service.domain.job import MICRO_BATCH_TOKENS, Lora
from service.domain.microbatches import microbatches, overhead_tokens
from service.domain.modelsizes import Linear, Sizes

FLOAT = 4
MEASURED_TOKENS = 4_096  # padded positions at once, in the worker's passes without gradients
GENERATED_TOKENS = 32_768  # the same of answers, each with all its room
GENERATED_BYTES = 256 * 2**20  # or more positions, as far as their keys and values take no more than this
PREFILLED_TOKENS = 4_096  # the same of prompts that are read at once
# By name, as the catalogue has them: solvers that ask for differences of gradients in float32, and losses that read whole
# distributions, a large chunk at a time.
FULL_PRECISION = frozenset({"alternating", "gradient_surgery", "penalty_bilevel"})
WHOLE_DISTRIBUTIONS = frozenset({"ceu", "entropy", "kl", "undial"})
HOLES = 2  # on a CPU, see above
LOGITS_BYTES = 256 * 2**20  # of answers' next tokens at once, with what drawing one needs
SAMPLED = 16 + 4  # bytes per logit where a token is sampled, beside the logit: a copy of it, and two in float64
CHUNK_BYTES = 64 * 2**20  # of logits at once
CACHED_CHUNK_BYTES = 4 * 2**20  # the same of the fused losses on a CPU
HEAD_CHUNKS = 3  # logits, their exponentials, and what is made of them
HEAD_STATES = (
    4  # float32 vectors per counted token: the state, its gradient, the pull of the vocabulary, the target's row
)
ADAPTER_HELD = 5  # values, gradient, two moments, best iterate
STEP_COPIES = (
    7  # the gradient as one vector and shortened, both moments anew, the direction, its square root, its scale
)


class Machine(NamedTuple):
    device: str
    weight_bytes: int  # of a number of the base


CPU = Machine("cpu", 4)
ACCELERATOR = Machine("cuda", 2)


PhaseName = Literal["training", "optimiser", "measuring", "generating", "measuring_rounded", "generating_rounded"]
Pick = Callable[[SetLengths, int], list[int]]  # the lengths of a step's rows


class Phase(NamedTuple):
    """In bytes."""

    activations: int
    head: int
    rounded: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.head + self.rounded


class Load(NamedTuple):
    """What of a job decides on its memory."""

    forget: SetLengths
    retain: SetLengths
    forget_rows: int  # per step
    retain_rows: int
    texts: int  # of a forget row: 2 where it has a refusal beside its answer
    lora: Lora
    earlier_rank: int  # of the adapters that it starts from, summed
    losses: frozenset[str]
    solver: str
    reference: Mapping[str, frozenset[str]]  # set -> what of the reference its loss needs
    rounded: bool  # whether copies with rounded weights are judged


class Memory(BaseModel):
    """In bytes; the parts make up the total."""

    weights: int = Field(description="of the base; twice, once in float32, where the solver asks for that")
    adapter: int = Field(
        description="with its gradient, the optimiser's moments and the best iterate; earlier adapters"
    )
    reference: int = Field(description="what the reference model says of the rows, where a loss needs it; on a CPU")
    activations: int = Field(description="of the phase that needs the most")
    head: int = Field(description="the same, of the language-model head")
    rounded: int = Field(description="the same, of a copy of the linear layers with rounded weights")
    total: int
    phase: PhaseName = Field(description="the one that needs the most")


def estimate(sizes: Sizes, load: Load, on: Machine) -> Memory:
    """The peak; of mixtures of experts, whose layers are not those that are counted, there is none."""
    assert not sizes.mixture
    trained = _adapter(sizes, load.lora.r, load.lora.target_modules)
    earlier = _adapter(sizes, load.earlier_rank, None)
    name, phase = max(phases(sizes, load, on).items(), key=lambda one: one[1].total)
    parts = {
        "weights": sizes.parameters * (on.weight_bytes + (FLOAT if _widened(load, on) else 0)),
        "adapter": ADAPTER_HELD * trained + earlier,
        "reference": _reference(sizes, load, on) if on.device == "cpu" else 0,
        "activations": phase.activations,
        "head": phase.head,
        "rounded": phase.rounded,
    }
    return Memory(**parts, total=sum(parts.values()), phase=name)


def phases(sizes: Sizes, load: Load, on: Machine) -> dict[PhaseName, Phase]:
    """What each takes beside what is held."""
    trained = _adapter(sizes, load.lora.r, load.lora.target_modules)
    numbers = sum(linear.inputs * linear.outputs // linear.modules for linear in sizes.linear.values())
    copy = _holes(on) * on.weight_bytes * numbers  # each layer's weights are kept between the temporaries of two
    sets = [load.forget, load.retain]
    calls = [answers.figures(sets), answers.disclosure(load.forget), answers.plain(load.retain, answers.NEIGHBOURS)]
    found: dict[PhaseName, Phase] = {
        "training": _with_holes(
            _training(sizes, load, on._replace(weight_bytes=FLOAT) if _widened(load, on) else on), on
        ),
        "optimiser": Phase(STEP_COPIES * trained, 0),
        "measuring": _with_holes(_measuring(sizes, load, sets, on), on),
        "generating": max((generating(sizes, one, on) for one in calls), key=lambda one: one.total),
    }
    if load.rounded:
        found["measuring_rounded"] = _with_holes(_measuring(sizes, load, [load.forget], on), on)._replace(rounded=copy)
        found["generating_rounded"] = generating(sizes, answers.plain(load.forget), on)._replace(rounded=copy)
    return found


def _with_holes(activations_and_head: tuple[float, float], on: Machine) -> Phase:
    activations, head = activations_and_head
    return Phase(round(_holes(on) * activations), round(head))


def _holes(on: Machine) -> int:
    return HOLES if on.device == "cpu" else 1


def _widened(load: Load, on: Machine) -> bool:
    """Whether both copies of the base are in memory, in its own type and in float32."""
    return on.weight_bytes < FLOAT and load.solver in FULL_PRECISION


def _adapted(sizes: Sizes, targets: Sequence[str] | None) -> list[Linear]:
    names = None if targets is None else {target.rpartition(".")[2] for target in targets}
    return [linear for name, linear in sizes.linear.items() if names is None or name in names]


def _adapter(sizes: Sizes, rank: int, targets: Sequence[str] | None) -> int:
    return FLOAT * rank * sum(linear.inputs + linear.outputs for linear in _adapted(sizes, targets))


def kept_per_token(sizes: Sizes, lora: Lora, on: Machine) -> float:
    """Bytes that all layers keep of one position for the gradient.

    Of each layer two norms keep their input in float32; attention keeps queries, keys, values and its output; the
    feed-forward part its gate, what becomes of that, and its partner. Each adapter keeps its r numbers and its input: in
    float32 that of several is one tensor, from bfloat16 each makes a float32 copy of its own.
    """
    adapted = _adapted(sizes, lora.target_modules)
    own = sizes.layers * (2 * sizes.attention + 2 * sizes.keys + 3 * sizes.inner)
    norms = sizes.layers * 2 * sizes.width
    inputs = sizes.layers * (2 * sizes.width + sizes.inner)
    if on.weight_bytes < FLOAT:
        inputs = sum(linear.inputs for linear in adapted)
    rank = lora.r * sum(linear.modules for linear in adapted)
    return FLOAT * (norms + inputs + rank) + on.weight_bytes * own


def _transient_per_token(sizes: Sizes) -> float:
    """Bytes that one layer needs of a position at once: the widest moment is in the feed-forward part, in float32."""
    return FLOAT * (2.0 * sizes.width + 5 * sizes.inner)


def _training(sizes: Sizes, load: Load, on: Machine) -> tuple[float, float]:
    overhead = overhead_tokens(on.device, sizes.layers, sizes.parameters)
    positions = max(largest(load, pick, overhead) for pick in (longest, usual))
    share = max(one.counted / max(1, sum(one.lengths)) for one in (load.forget, load.retain))
    activations = positions * (kept_per_token(sizes, load.lora, on) + _transient_per_token(sizes))
    return activations, _head(sizes, load, on, positions * share)


def largest(load: Load, pick: Pick, overhead: float) -> int:
    """Padded positions of the largest micro-batch of a step."""
    forget, retain = pick(load.forget, load.forget_rows), pick(load.retain, load.retain_rows)
    groups = [(forget + retain, 1)] if load.texts == 1 else [(forget, load.texts), (retain, 1)]
    return max(
        texts * len(part) * max(lengths[i] for i in part)
        for lengths, texts in groups
        for part in microbatches(lengths, overhead, MICRO_BATCH_TOKENS // texts)
    )


def longest(given: SetLengths, rows: int) -> list[int]:
    """Of a step that happens to have the longest rows."""
    return sorted(given.lengths, reverse=True)[: min(rows, given.rows)]


def usual(given: SetLengths, rows: int) -> list[int]:
    """Of a step whose rows are as those of the set: as many short and long ones."""
    ordered, count = sorted(given.lengths), min(rows, given.rows)
    return [ordered[(2 * k + 1) * len(ordered) // (2 * count)] for k in range(count)]


def _measuring(sizes: Sizes, load: Load, sets: Sequence[SetLengths], on: Machine) -> tuple[float, float]:
    positions, counted = 0.0, 0.0
    for one in sets:
        mean = sum(one.lengths) / len(one.lengths)
        here = max(max(one.lengths), min(MEASURED_TOKENS, mean * one.rows))
        positions, counted = max(positions, here), max(counted, here * one.counted / sum(one.lengths))
    return positions * _transient_per_token(sizes), _head(sizes, load, on, counted)


def generating(sizes: Sizes, together: Answers, on: Machine) -> Phase:
    """Of answers that are generated in one call: as many at once as fit, others when half of these have ended.

    Room for the keys and values of the longest prompt with the longest answer is taken for each row of a batch; beside it the
    prompts are read, or one layer repeats keys and values for all heads.
    """
    kept = 2 * sizes.layers * sizes.keys * on.weight_bytes
    at_once = max(GENERATED_TOKENS, GENERATED_BYTES // kept)
    upto = sampled_upto = 0.0
    prompt = room = 0
    batches = [Phase(0, 0)]
    for answer, count in sorted(together.items(), key=lambda one: one[0].prompt + one[0].room):
        upto, sampled_upto = upto + count, sampled_upto + count * answer.sampled
        prompt, room = max(prompt, answer.prompt), max(room, answer.room)
        rows = min(upto, max(1, at_once // (prompt + room)))
        storage = rows * (prompt + room) * kept
        reading = min(rows * prompt, max(prompt, PREFILLED_TOKENS)) * (kept + _transient_per_token(sizes))
        answering = rows * (prompt + room) * 2 * sizes.attention * on.weight_bytes
        head = sizes.vocabulary * (rows * on.weight_bytes + min(rows, sampled_upto) * SAMPLED)
        one = sizes.vocabulary * (on.weight_bytes + SAMPLED)
        batches.append(Phase(round(storage + max(reading, answering)), round(min(head, max(LOGITS_BYTES, one)))))
    return max(batches, key=lambda one: one.total)


def _head(sizes: Sizes, load: Load, on: Machine, counted: float) -> float:
    fused = on.device == "cpu" and not load.losses & WHOLE_DISTRIBUTIONS
    chunk = min(CACHED_CHUNK_BYTES if fused else CHUNK_BYTES, FLOAT * counted * sizes.vocabulary)
    return FLOAT * HEAD_STATES * counted * sizes.width + HEAD_CHUNKS * chunk


def _reference(sizes: Sizes, load: Load, on: Machine) -> int:
    total = 0.0
    for name, one in (("forget", load.forget), ("retain", load.retain)):
        numbers = {"reference": FLOAT, "reference_states": sizes.width * on.weight_bytes}
        each = sum(numbers.get(need, 0) for need in load.reference.get(name, ()))
        total += each * one.counted / len(one.lengths) * one.rows * (load.texts if name == "forget" else 1)
    return round(total)
