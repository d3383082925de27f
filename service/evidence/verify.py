"""What a certificate proves about the files at hand, offline.

Each finding is of one thing and says yes, no or not checked. A file that differs is named. What no file can show, that data is
gone from a model, is in the certificate's own limitations.
"""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from service.domain import modelfiles
from service.domain.errors import InvalidRequest
from service.evidence import canonical, certificate, chain, dsse, keys
from service.evidence.certificate import Certificate, Unlearning

NOT_GIVEN = "it was not given"
UNREADABLE = "the certificate cannot be read"
CERTIFICATE, SIGNATURE, ADAPTER, REPORT, AUDIT = "certificate", "signature", "adapter", "report", "audit log"
MODEL = "base model"


class Finding(NamedTuple):
    what: str
    proven: Literal["yes", "no", "not checked"]
    detail: str


class Given(NamedTuple):
    """Paths; null: not given."""

    certificate: Path
    adapter: Path | None = None  # the folder
    report: Path | None = None
    keys: Path | None = None  # a JWKS that the reader trusts
    audit: Path | None = None  # the export
    model: Path | None = None  # the base model's folder


class Verification(NamedTuple):
    findings: list[Finding]
    says: Unlearning | None  # null: the certificate cannot be read

    @property
    def signed(self) -> bool:
        """By a key that was given. Otherwise all that holds, holds of a certificate that anybody could have written."""
        return any(finding[:2] == (SIGNATURE, "yes") for finding in self.findings)

    @property
    def exit_status(self) -> int:
        """0: all that was given holds, the signature too; 1: something does not; 3: nothing fails, but no key was given."""
        if any(finding.proven == "no" for finding in self.findings):
            return 1
        return 0 if self.signed else 3


def verify(given: Given) -> Verification:
    """Raises OSError if a file that was given cannot be read."""
    raw = given.certificate.read_bytes()
    try:
        envelope = dsse.from_json(raw)
        statement = certificate.read(envelope)
    except ValueError as error:
        unread = [Finding(what, "not checked", UNREADABLE) for what in (SIGNATURE, ADAPTER, REPORT, AUDIT)]
        return Verification([Finding(CERTIFICATE, "no", f"it is none: {chain.reason(error)}"), *unread], None)
    beside = {path.resolve() for path in given if path is not None}
    findings = [
        _form(raw, envelope),
        _signature(envelope, given.keys),
        *_adapter(statement, given.adapter, beside),
        *_model(statement, given.model),
        _report(statement, given.report),
        _audit(statement, given.audit),
    ]
    return Verification(findings, statement.predicate)


def _form(raw: bytes, envelope: dsse.Envelope) -> Finding:
    if raw == dsse.to_json(envelope):
        return Finding(CERTIFICATE, "yes", f"{len(raw)} bytes in the form in which the service writes them")
    detail = (
        "its bytes are not those that the service writes: it was altered or written anew, be its content intact or not"
    )
    return Finding(CERTIFICATE, "no", detail)


def _signature(envelope: dsse.Envelope, path: Path | None) -> Finding:
    if path is None:
        named = ", ".join(signature.keyid for signature in envelope.signatures)
        detail = f"no keys were given: that key {named} signed it, or anybody did, is not proven (--keys)"
        return Finding(SIGNATURE, "not checked", detail)
    try:
        known = keys.parse_jwks(path.read_bytes())
    except ValueError as error:
        return Finding(SIGNATURE, "no", f"the file of keys cannot be used: {chain.reason(error)}")
    try:
        signed = dsse.signers(envelope, known)
    except ValueError as error:
        return Finding(SIGNATURE, "no", str(error))
    return Finding(
        SIGNATURE, "yes", f"by key {', '.join(signed)} of {path.name}; whose key that is, the file cannot show"
    )


def _adapter(statement: Certificate, folder: Path | None, beside: Collection[Path]) -> Iterator[Finding]:
    if folder is None:
        yield Finding(ADAPTER, "not checked", NOT_GIVEN)
        return
    if statement.predicate.of_base_model:
        detail = (
            "the certificate is about the base model, which did not know the rows; no adapter was released (--model)"
        )
        yield Finding(ADAPTER, "no", detail)
        return
    expected = _expected(statement)
    wrong = [*_differing(ADAPTER, folder, expected), *_unnamed(folder, expected, beside)]
    yield from wrong or [_same(ADAPTER, expected)]


def _model(statement: Certificate, folder: Path | None) -> Iterator[Finding]:
    """Of the base model's folder only what is loaded: a card or other formats of the weights may lie beside it."""
    if folder is None:
        if statement.predicate.of_base_model:
            yield Finding(MODEL, "not checked", f"the certificate is about its files, and {NOT_GIVEN} (--model)")
        return
    try:
        names, found = modelfiles.loaded(folder), modelfiles.digest_model(folder)[0]
    except InvalidRequest as error:
        yield Finding(MODEL, "no", str(error))
        return
    certified = statement.predicate.base_model.digest
    if not statement.predicate.of_base_model:
        kept = found == certified
        yield Finding(
            MODEL, "yes" if kept else "no", f"its digest is {found}" + f", certified is {certified}" * (not kept)
        )
        return
    expected = _expected(statement)
    wrong = list(_differing(MODEL, folder, expected))
    wrong += [_strange(MODEL, name) for name in sorted(set(names) - expected.keys())]
    yield from wrong or [_same(MODEL, expected)]


def _expected(statement: Certificate) -> dict[str, str]:
    return {subject.name: subject.digest.sha256 for subject in statement.subject}


def _same(what: str, expected: Collection[str]) -> Finding:
    return Finding(what, "yes", f"all {len(expected)} files are those of the certificate: {', '.join(expected)}")


def _differing(what: str, folder: Path, expected: dict[str, str]) -> Iterator[Finding]:
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            yield Finding(f"{what} file {name}", "no", "it is missing")
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            yield Finding(f"{what} file {name}", "no", f"it differs: SHA-256 {found}, certified is {sha256}")


def _unnamed(folder: Path, expected: Collection[str], beside: Collection[Path]) -> Iterator[Finding]:
    """Files that would be loaded, or read, as if they belonged to the adapter."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        folds = path.is_dir() and not path.is_symlink()
        if not folds and name not in expected and path.resolve() not in beside:
            yield _strange(ADAPTER, name)


def _strange(what: str, name: str) -> Finding:
    return Finding(f"{what} file {name}", "no", "the certificate does not name it")


def _report(statement: Certificate, path: Path | None) -> Finding:
    if path is None:
        return Finding(REPORT, "not checked", NOT_GIVEN)
    found, certified = canonical.sha256(path.read_bytes()), statement.predicate.report.sha256
    if found != certified:
        return Finding(REPORT, "no", f"{path.name} differs: SHA-256 {found}, certified is {certified}")
    return Finding(REPORT, "yes", f"{path.name} is the report of the certificate")


def _audit(statement: Certificate, path: Path | None) -> Finding:
    if path is None:
        return Finding(AUDIT, "not checked", NOT_GIVEN)
    anchor = statement.predicate.audit_head
    with path.open("rb") as lines:
        checked = chain.verify(lines, anchor)
    if checked.fault:
        return Finding(
            AUDIT, "no", f"{path.name}: entry {checked.fault.seq} {checked.fault.kind}: {checked.fault.detail}"
        )
    after = checked.entries - anchor.seq
    rest = f"; the {after} after it hang together, but nothing outside the log fixes them" if after else ""
    return Finding(AUDIT, "yes", f"{path.name}: entries 1 to {anchor.seq} are those that the certificate fixes{rest}")
