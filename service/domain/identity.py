"""Who asks, and what they may do."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple


class Scope(StrEnum):
    REQUESTS_READ = "requests:read"
    REQUESTS_CREATE = "requests:create"
    REQUESTS_APPROVE = "requests:approve"
    REQUESTS_CANCEL = "requests:cancel"
    SUBJECTS_READ = "subjects:read"
    JOBS_READ = "jobs:read"
    JOBS_CREATE = "jobs:create"
    JOBS_CANCEL = "jobs:cancel"
    JOBS_RETRY = "jobs:retry"
    FILES_READ = "files:read"
    FILES_WRITE = "files:write"
    ARTIFACTS_READ = "artifacts:read"
    REPORTS_READ = "reports:read"
    CERTIFICATES_READ = "certificates:read"
    WEBHOOKS_MANAGE = "webhooks:manage"
    AUDIT_READ = "audit:read"
    KEYS_MANAGE = "keys:manage"
    METRICS_READ = "metrics:read"
    ADMIN = "admin"


S = Scope
ALL = frozenset(Scope)
ROLES: Mapping[str, frozenset[Scope]] = MappingProxyType(
    {
        "compliance_submitter": frozenset(
            {S.REQUESTS_READ, S.REQUESTS_CREATE, S.REQUESTS_CANCEL, S.SUBJECTS_READ, S.FILES_READ, S.FILES_WRITE}
            | {S.JOBS_READ, S.REPORTS_READ, S.CERTIFICATES_READ}
        ),
        "compliance_approver": frozenset(
            {S.REQUESTS_READ, S.REQUESTS_APPROVE, S.SUBJECTS_READ, S.JOBS_READ, S.REPORTS_READ, S.CERTIFICATES_READ}
        ),
        "mlops": frozenset(
            {S.JOBS_READ, S.JOBS_CREATE, S.JOBS_CANCEL, S.JOBS_RETRY, S.FILES_READ, S.FILES_WRITE, S.ARTIFACTS_READ}
            | {S.REPORTS_READ, S.CERTIFICATES_READ, S.WEBHOOKS_MANAGE, S.METRICS_READ, S.REQUESTS_READ}
        ),
        "auditor": frozenset(
            {S.REQUESTS_READ, S.JOBS_READ, S.REPORTS_READ, S.CERTIFICATES_READ, S.AUDIT_READ, S.ARTIFACTS_READ}
        ),
        "dashboard": frozenset({S.METRICS_READ}),
        "admin": ALL,
    }
)


class Principal(NamedTuple):
    """Who asks: an API key ("key_..."), or a person that an identity provider vouches for ("oidc:...")."""

    id: str
    tenant: str
    scopes: frozenset[Scope]

    @property
    def is_person(self) -> bool:
        return self.id.startswith("oidc:")

    def lacks(self, needed: frozenset[Scope]) -> frozenset[Scope]:
        """`admin` is all of them."""
        return frozenset() if Scope.ADMIN in self.scopes else needed - self.scopes


SYSTEM = "system"  # the actor of what happens by itself
