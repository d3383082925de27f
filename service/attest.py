"""What the sweep does for evidence: certificates of jobs that have succeeded, and a look at whether the audit logs hold."""

from datetime import timedelta

import structlog

from service.domain.errors import UnlearnError
from service.store import audit, evidence
from service.store.secrets import Secrets
from service.store.session import Sessions
from service.store.storage import Storage

CHECK_EVERY = timedelta(minutes=1)  # only what is new, but for once a day (see audit.check)

log = structlog.get_logger(__name__)


def issue_due(sessions: Sessions, storage: Storage, secrets: Secrets, limit: int = 100) -> int:
    """Decides on succeeded jobs, each in a transaction of its own. How many certificates were issued."""
    with sessions.begin() as s:
        due = evidence.due(s, limit)
    issued = 0
    for job_id in due:
        try:
            decided = evidence.decide(sessions, storage, secrets, job_id)
        except Exception as error:  # whatever is wrong with one is no reason to keep the others waiting
            trace = not isinstance(error, UnlearnError)  # its report cannot be read now
            log.error("a certificate waits", job_id=job_id, error=type(error).__name__, exc_info=trace)
            continue
        if decided and decided.envelope:
            log.info("certificate issued", job_id=job_id, certificate=decided.id, key=decided.key_id)
            issued += 1
        elif decided:
            log.info("no certificate", job_id=job_id, reason=decided.refusal)
    return issued


def check_logs(sessions: Sessions) -> int:
    """Checks the audit logs that are due. How many do not hold."""
    with sessions.begin() as s:
        due = audit.due(s, CHECK_EVERY)
    faults = [(tenant_id, audit.check(sessions, tenant_id).fault) for tenant_id in due]
    for tenant_id, fault in faults:
        if fault:
            log.error("the audit log does not hold", tenant=tenant_id, **fault._asdict())
    return sum(fault is not None for _, fault in faults)
