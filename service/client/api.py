"""Client: jobs, and the way to all else."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from service.client import stream
from service.client.benchmarks import Benchmarks
from service.client.compliance import Keys, Plans, Requests
from service.client.deployment import Audit, Deployment
from service.client.sets import Files, Given
from service.client.shapes import Artifact, Attempt, Checkpoint, Event, Job, Json, Step
from service.client.webhooks import Webhooks
from service.client.wire import Wire, at, if_match, once
from service.domain.errors import UnlearnError

JOBS = "/v1/unlearning/jobs"
TIMEOUT_S = 60.0
STEPS_PAGE = 1000


class Steps(NamedTuple):
    """Of one attempt; another begins at the first step again, or where the one before had a checkpoint."""

    attempt: int
    data: list[Step]


class Evidence(NamedTuple):
    """Where it lies; `unlearn verify` takes these paths."""

    certificate: Path
    adapter: Path | None  # a folder; null: the model did not know the rows, and the certificate is about its own files
    report: Path
    keys: Path
    audit: Path


class Client:
    """One connection pool; use it as a context manager, from one thread at a time.

    Methods raise ApiError for what the service refuses, UnlearnError (its base) for what cannot be read, and
    httpx.TransportError where nobody answers. GET, PUT and DELETE, and POST with an Idempotency-Key, are tried up to three
    times where a connection breaks or the service asks for it (429, 503, Retry-After of a minute at most).
    """

    def __init__(
        self,
        url: str,
        api_key: str,
        timeout: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """
        Args:
            timeout: seconds for which the service may be silent.
            transport: for certificates or a proxy of one's own; None: as the environment says.
        """
        headers = {"Authorization": f"Bearer {api_key}", "User-Agent": "unlearn-client"}
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=headers, transport=transport)
        self._wire = Wire(self._http)
        self.files = Files(self._wire)
        self.requests = Requests(self._wire, self.files)
        self.plans = Plans(self._wire, self.files)
        self.keys = Keys(self._wire)
        self.webhooks = Webhooks(self._wire)
        self.benchmarks = Benchmarks(self._wire, self.files)
        self.deployment = Deployment(self._wire)
        self.audit = Audit(self._wire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- make a job

    def submit(
        self,
        *,
        model: str,
        forget_set: Given,
        retain_set: Given,
        refusal_set: Given | None = None,
        holdout_set: Given | None = None,
        method: str = "pdu",
        hyperparameters: Mapping[str, Any] | None = None,
        epsilon: float | None = None,
        epsilon_relative: float | None = None,
        budget: Mapping[str, float] | None = None,
        seed: int = 0,
        parent: str | None = None,
        deletion_requests: Sequence[str] = (),
        benchmarks: Sequence[str] = (),
        audit: Mapping[str, Any] | None = None,
        gates: Sequence[Mapping[str, Any]] = (),
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Upload the sets that are not there yet, and make the job. Where it is refused, their files are purged again.

        Args:
            epsilon, epsilon_relative: exactly one: the bound on the retain loss, nats per token, or relative to that of
                the model that the job starts from.
            idempotency_key: who sends the same again within a day gets the same job; with sets that are uploaded here the
                request is another each time. Default: a new one, so that this call can be tried again safely.
        """
        sets = {
            "forget_set": forget_set,
            "retain_set": retain_set,
            "refusal_set": refusal_set,
            "holdout_set": holdout_set,
        }
        given = {name: (name, rows) for name, rows in sets.items() if rows is not None}
        with self.files.uploaded(given) as ids:
            body = {
                "model": model,
                "method": {"type": method, "hyperparameters": dict(hyperparameters or {})},
                "constraint": _given(epsilon=epsilon, epsilon_relative=epsilon_relative),
                "budget": dict(budget or {}),
                "seed": seed,
                "parent": parent,
                "deletion_requests": list(deletion_requests),
                "benchmarks": list(benchmarks),
                "audit": audit,
                "gates": list(gates),
                "metadata": dict(metadata or {}),
            }
            return self.create_job(body | ids, idempotency_key)

    def create_job(self, body: Json, idempotency_key: str | None = None) -> Job:
        """`body`: that of POST /v1/unlearning/jobs."""
        return Job.of(self._wire.json("POST", JOBS, body, headers=once(idempotency_key)))

    def dry_run(self, body: Json) -> Json:
        """What the job would be, judged as it would be; nothing is kept."""
        return self._wire.json("POST", JOBS, body, params={"dry_run": True})

    # --- look at it

    def job(self, job_id: str) -> Job:
        return Job.of(self._wire.json("GET", at(JOBS, job_id)))

    def jobs(self, *, status: str | None = None, model: str | None = None) -> Iterator[Job]:
        """The latest first, page after page as they are wanted."""
        return map(Job.of, self._wire.pages(JOBS, {"status": status, "model": model}))

    def steps(self, job_id: str, after: int = 0) -> Steps:
        """The series of solver steps behind `after`, of the present attempt or the last."""
        found = list[Step]()
        while True:
            asked = {"after": found[-1].step if found else after, "limit": STEPS_PAGE}
            page = self._wire.json("GET", at(JOBS, job_id, "steps"), params=asked)
            found += map(Step.of, page["data"])
            if not page["has_more"]:
                return Steps(page["attempt"], found)

    def watch(self, job_id: str, every_s: float = 1.0) -> Iterator[tuple[Job, list[Step]]]:
        """Each look at the job, until it has ended, with the steps that were taken since the look before."""
        attempt, seen = 0, 0
        while True:
            job = self.job(job_id)
            steps = self.steps(job_id, seen)
            if steps.attempt != attempt and seen:
                steps = self.steps(job_id)
            attempt, seen = steps.attempt, steps.data[-1].step if steps.data else seen
            yield job, steps.data
            if job.ended:
                return
            sleep(every_s)

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """What happens, as it happens, until the job has ended; `after`: the `seq` of the last that is known."""
        return stream.follow(self._wire, at(JOBS, job_id, "events"), after)

    def attempts(self, job_id: str) -> list[Attempt]:
        """Who ran it, and how that ended, in order."""
        return [Attempt.of(one) for one in self._wire.json("GET", at(JOBS, job_id, "attempts"))["data"]]

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        """What it can go on from, the newest first."""
        return [Checkpoint.of(one) for one in self._wire.json("GET", at(JOBS, job_id, "checkpoints"))["data"]]

    # --- move it

    def cancel(self, job_id: str, version: int | None = None) -> Job:
        """One that waits ends; one that runs stops at its next step. `version`, of all moves: only if it still has it."""
        return self._moved(job_id, "cancel", version)

    def pause(self, job_id: str, version: int | None = None) -> Job:
        """Until it is resumed. One that runs saves a checkpoint and stops: it is `pausing` until then."""
        return self._moved(job_id, "pause", version)

    def resume(self, job_id: str, version: int | None = None) -> Job:
        """One that is paused, from its last checkpoint."""
        return self._moved(job_id, "resume", version)

    def retry(self, job_id: str, version: int | None = None) -> Job:
        """One that failed, from its last checkpoint where it has one."""
        return self._moved(job_id, "retry", version)

    def reverify(self, job_id: str, idempotency_key: str | None = None) -> Job:
        """A new job that evaluates the adapter that this one released under the current verdict rules; nothing is trained.

        Args:
            idempotency_key: as in `submit`.
        """
        return Job.of(self._wire.json("POST", at(JOBS, job_id, "reverify"), headers=once(idempotency_key)))

    def _moved(self, job_id: str, verb: str, version: int | None) -> Job:
        return Job.of(self._wire.json("POST", at(JOBS, job_id, verb), headers=if_match(version)))

    # --- take along what it made

    def artifacts(self, job_id: str) -> list[Artifact]:
        return [Artifact.of(one) for one in self._wire.json("GET", at(JOBS, job_id, "artifacts"))["data"]]

    def download(self, artifact: Artifact, out: Path) -> None:
        """Raises UnlearnError, and leaves no file, where the bytes are not those of its digest."""
        path = at(JOBS, artifact.job_id, "artifacts", artifact.id, "content")
        self._wire.save(path, out, sha256=artifact.sha256)

    def adapter(self, job_id: str, folder: Path) -> None:
        """The PEFT adapter's files, into a folder that is made. Raises UnlearnError, and makes none, where there are none."""
        found = [one for one in self.artifacts(job_id) if one.name.rpartition("/")[0] == "adapter"]
        if not found:
            raise UnlearnError(f"{job_id} has no adapter: none was released, or not yet")
        folder.mkdir(parents=True, exist_ok=True)
        for artifact in found:
            self.download(artifact, folder / Path(artifact.name).name)

    def report(self, job_id: str) -> Json:
        return self._wire.json("GET", at(JOBS, job_id, "report"), headers={"Accept": "application/json"})

    def save_report(self, job_id: str, out: Path) -> None:
        """The page if `out` ends in .html, else JSON, byte for byte as the certificate's digest has it."""
        accept = "text/html" if out.suffix == ".html" else "application/json"
        self._wire.save(at(JOBS, job_id, "report"), out, accept)

    def certificate(self, job_id: str, out: Path) -> None:
        self._wire.save(at(JOBS, job_id, "certificate"), out, "application/vnd.dsse.envelope.v1+json")

    def test_result(self, job_id: str, out: Path) -> None:
        """What the certificate says, as in-toto's test-result v0.1, for policy engines."""
        self._wire.save(at(JOBS, job_id, "test-result"), out, "application/vnd.dsse.envelope.v1+json")

    def audit_log(self, out: Path) -> None:
        """The whole log of the tenant, JSON Lines."""
        self._wire.save("/v1/audit-events", out, "application/jsonl")

    def published_keys(self, out: Path) -> None:
        """JWKS of the keys that certificates are signed with."""
        self._wire.save("/.well-known/unlearning-keys", out)

    def evidence(self, job_id: str, folder: Path) -> Evidence:
        """All that a job proves anything with, into a folder that is made."""
        names = ("certificate.json", "adapter", "report.json", "keys.json", "audit.jsonl")
        found = Evidence(*(folder / name for name in names))
        job = self.job(job_id)
        verdict = job.verdict
        if verdict is not None and verdict.result == "NOT_KNOWN" and verdict.forgotten_by is None:
            folder.mkdir(parents=True, exist_ok=True)
            found = found._replace(adapter=None)
        else:
            self.adapter((verdict and verdict.forgotten_by) or job.reverifies or job_id, folder / "adapter")
        self.certificate(job_id, found.certificate)
        self.save_report(job_id, found.report)
        self.published_keys(found.keys)
        self.audit_log(found.audit)
        return found


def _given(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
