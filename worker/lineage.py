"""A job that starts from an earlier job's adapter: that adapter as it was published, and the rows that must stay unlikely.

Each job of the chain promised that the model has forgotten its rows. The one that starts from their adapter measures them again,
as far as they are still kept.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from service.domain.errors import JobFailure, NotFound
from service.domain.job import FailureCode
from service.domain.report import AdapterFile, Forgotten, Parent
from service.domain.rows import Example
from service.store.storage import Storage
from worker import data, equivalence, files, likelihood, measure, scoring
from worker.diary import Diary
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.records import ArtifactFile, Assignment, FileRef, ParentAssignment, ReleasedAdapter
from worker.scores import mean_loss
from worker.suite import Row
from worker.views import Term

GONE = "its rows are no longer kept, so how likely they are could not be measured"


class Earlier(NamedTuple):
    """A job of the chain."""

    job_id: str
    rows: Term | None  # that it had the model forget; None: they are no longer kept
    columns: Sequence[Row] = ()  # the same with all their columns


def fetch(released: ReleasedAdapter | None, storage: Storage, base: Network, folder: Path) -> Path | None:
    """The adapter that an earlier job released, as files in the folder, which is made; None: there is no such job.

    Raises JobFailure: model_not_found (it is no longer stored), model_revision_mismatch (it is not what was published, or it
    was made on another base).
    """
    if released is None:
        return None
    made_on = json.loads(_published(released, storage, released.report))["base_model"]["digest"]
    if made_on != base.digest:
        raise JobFailure(
            FailureCode.MODEL_REVISION_MISMATCH,
            f"the adapter of job {released.job_id} was made on a base of digest {made_on}; that of {base.entry.name} is "
            f"{base.digest}",
        )
    folder.mkdir()
    for file in released.adapter:
        (folder / Path(file.name).name).write_bytes(_published(released, storage, file))
    return folder


def _published(released: ReleasedAdapter, storage: Storage, file: ArtifactFile) -> bytes:
    try:
        content = b"".join(storage.read(file.key))
    except NotFound as error:
        raise JobFailure(
            FailureCode.MODEL_NOT_FOUND, f"{file.name} of job {released.job_id} is no longer in the storage"
        ) from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise JobFailure(
            FailureCode.MODEL_REVISION_MISMATCH, f"{file.name} of job {released.job_id} is not what that job published"
        )
    return content


def earlier(job: Assignment, storage: Storage, retain: Sequence[Example], base: Network, diary: Diary) -> list[Earlier]:
    """The chain, the parent first. Raises JobFailure where a row is to be kept that an earlier job had the model forget."""
    found = []
    for one in job.parent.chain if job.parent else ():
        rows = _rows(storage, one.forget_file)
        if rows is None:
            found.append(Earlier(one.job_id, None))
            continue
        files.judge_overlap({"retain": retain, f"{one.job_id} forget": rows}, diary)
        encoded = data.encode(rows, base.tokenizer, base.entry.prompt_format, base.context_tokens)
        assert one.forget_file is not None
        columns = files.read_rows(storage, one.forget_file)
        found.append(Earlier(one.job_id, Term(nll(), {"answer": encoded}), columns))
    return found


def _rows(storage: Storage, file: FileRef | None) -> list[Example] | None:
    try:
        return None if file is None else files.read_set(storage, file)
    except JobFailure as failure:
        if isinstance(failure.__cause__, NotFound):  # purged since the job was claimed
            return None
        raise


def probabilities(network: Network, chain: Sequence[Earlier]) -> list[float | None]:
    """Of each job of the chain the mean probability of its rows' answers, over all that can be measured."""
    return [
        None if one.rows is None else measure.mean_probability(network, one.rows, one.rows.encoded.measured)
        for one in chain
    ]


def limits(base: Network, chain: Sequence[Earlier]) -> list[float | None]:
    """Of each job of the chain what the mean probability of its rows must keep. See worker.likelihood."""
    found: list[float | None] = []
    for one in chain:
        seen = scoring.look(base, equivalence.asks(one.columns)) if one.rows is not None else {}
        likely = {text: mean_loss(scores) for (_, text), scores in seen.items()}
        own = {place: math.exp(-loss) for place, loss in likely.pop("answer", {}).items()}
        wrong: dict[int, list[float]] = {}
        for text, losses in likely.items():
            for place, loss in losses.items() if text.startswith("perturbed_answer") else ():
                wrong.setdefault(place, []).append(math.exp(-loss))
        found.append(likelihood.limits(own, [wrong]).mean if own else None)
    return found


def facts(
    parent: ParentAssignment,
    chain: Sequence[Earlier],
    limits: Sequence[float | None],
    base: Sequence[float | None],
    before: Sequence[float | None],
    after: Sequence[float | None],
) -> Parent:
    """What the report says of the parent, from the chain's probabilities on the base, on the parent, and in the end."""
    forgotten = [
        Forgotten(
            job_id=one.job_id,
            rows=None if one.rows is None else len(one.rows.encoded.measured),
            base=known,
            limit=limit,
            before=held,
            after=now,
            reason=GONE if one.rows is None else None,
        )
        for one, limit, known, held, now in zip(chain, limits, base, before, after, strict=True)
    ]
    adapter = [AdapterFile(name=file.name, bytes=file.bytes, sha256=file.sha256) for file in parent.adapter]
    return Parent(job_id=parent.job_id, files=adapter, forgotten=forgotten)
