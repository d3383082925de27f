"""Evidence: what is altered by one byte is found and named; what is not altered holds, also after the key was changed."""

import base64
import copy
import io
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from service.domain.job import VERDICT_RULES, Gate
from service.domain.report import AdapterFile, Parent
from service.evidence import canonical, certificate, chain, dsse, keys, of_report
from service.evidence.chain import AuditEntry, AuditRow, Checked, Head
from service.evidence.command import app
from service.evidence.verify import Given, Verification, verify
from tests.worker import reports

KEY = keys.from_private_bytes(bytes(range(32)))
NEXT = keys.from_private_bytes(bytes(range(1, 33)))
FILES = {"README.md": b"# card\n", "adapter_config.json": b'{"r":8}', "adapter_model.safetensors": bytes(range(48))}
ENTRIES = 5
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-canonical.SAFE, canonical.SAFE)
    # a lone surrogate has no UTF-8
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def rows(count: int = ENTRIES, tenant: str = "tenant_1") -> list[AuditRow]:
    found, prev_hash = list[AuditRow](), chain.genesis(tenant)
    for seq in range(1, count + 1):
        entry = AuditEntry(
            tenant=tenant,
            seq=seq,
            id=f"aud_{seq}",
            created_at=f"2026-01-02T03:04:05.{seq:06}Z",
            actor="key_1",
            action="job.created",
            object_type="unlearning.job",
            object_id="ujob_1",
            data={"status": "queued", "share": 0.1, "who": "Zoë"},
        )
        found.append(chain.chained(prev_hash, entry))
        prev_hash = found[-1].hash
    return found


LOG = [chain.line(row) for row in rows()]
ANCHOR = Head(seq=3, hash=rows()[2].hash)


def known(report: bytes, anchor: Head = ANCHOR) -> of_report.Known:
    return of_report.Known(
        report_sha256=canonical.sha256(report),
        deletion_requests=["dreq_1"],
        forget_digest="hmac-sha256:" + 64 * "1",
        retain_digest="hmac-sha256:" + 64 * "2",
        started_at=datetime(2026, 1, 2, 3, tzinfo=UTC),
        finished_at=datetime(2026, 1, 2, 5, tzinfo=timezone(timedelta(hours=1))),
        audit_head=anchor,
    )


def certified(report: bytes = b"{}") -> certificate.Certificate:
    files = {name: canonical.sha256(content) for name, content in FILES.items()}
    return certificate.certify(files, of_report.predicate(reports.make(), known(report)))


CERTIFICATE = certificate.issue(certified(), KEY)


@pytest.fixture
def evidence(tmp_path: Path) -> Given:
    """A certificate and everything that it is about, as files."""
    (tmp_path / "adapter").mkdir()
    for name, content in FILES.items():
        (tmp_path / "adapter" / name).write_bytes(content)
    report = b'{"schema_version":"1"}'
    (tmp_path / "report.json").write_bytes(report)
    (tmp_path / "audit.jsonl").write_bytes(b"".join(LOG))
    (tmp_path / "keys.json").write_text(json.dumps(keys.jwks(map(public, (NEXT, KEY)))))
    (tmp_path / "certificate.json").write_bytes(dsse.to_json(certificate.issue(certified(report), KEY)))
    names = ("certificate.json", "adapter", "report.json", "keys.json", "audit.jsonl")
    return Given(*(tmp_path / name for name in names))


def public(key: keys.SigningKey) -> dict[str, str]:
    return keys.jwk(key.private.public_key())


def wrong(found: Verification) -> list[str]:
    assert (found.exit_status == 1) == any(one.proven == "no" for one in found.findings)
    return [one.what for one in found.findings if one.proven == "no"]


def flips(content: bytes, places: Iterable[int] | None = None) -> Iterator[tuple[int, bytes]]:
    """(place, the content with the byte there changed), at every place, each to a value of its own."""
    chance = random.Random(1)
    for place in places or range(len(content)):
        changed = bytes([content[place] ^ chance.randrange(1, 256)])
        yield place, content[:place] + changed + content[place + 1 :]


def named_at_each_flip(evidence: Given, path: Path, what: str) -> None:
    whole = path.read_bytes()
    for _, changed in flips(whole):
        path.write_bytes(changed)
        assert wrong(verify(evidence)) == [what]
    path.write_bytes(whole)


# --- one byte


def test_what_nobody_touched_holds(evidence: Given) -> None:
    found = verify(evidence)
    assert [(one.what, one.proven) for one in found.findings] == [
        (what, "yes") for what in ("certificate", "signature", "adapter", "report", "audit log")
    ]
    assert found.exit_status == 0
    assert KEY.id in found.findings[1].detail


@pytest.mark.parametrize("name", FILES)
def test_a_byte_of_the_adapter(evidence: Given, name: str) -> None:
    assert evidence.adapter
    named_at_each_flip(evidence, evidence.adapter / name, f"adapter file {name}")


def test_a_byte_of_the_report(evidence: Given) -> None:
    assert evidence.report
    named_at_each_flip(evidence, evidence.report, "report")


def test_a_byte_of_the_audit_log() -> None:
    """Behind the anchor too; and the entry is named."""
    whole = b"".join(LOG)
    for place, changed in flips(whole):
        found, number = chain.verify(io.BytesIO(changed), ANCHOR), whole[:place].count(b"\n")
        assert found.fault, changed
        assert (found.fault.seq, found.fault.kind) == (number + 1, "altered"), changed
        assert (found.entries, found.head) == (number, None)


def test_a_byte_of_the_audit_log_as_a_file(evidence: Given) -> None:
    assert evidence.audit
    evidence.audit.write_bytes(b"".join(LOG).replace(b"queued", b"paused", 1))
    found = verify(evidence)
    assert wrong(found) == ["audit log"]
    assert "entry 1 altered" in found.findings[-1].detail


def test_a_byte_of_the_certificate(evidence: Given) -> None:
    """The certificate or its signature is named, wherever it is: in unused bits of the base64, a space, the key's id."""
    raw, paths = evidence.certificate.read_bytes(), Given(evidence.certificate, keys=evidence.keys)
    payload = range(raw.index(b'"payload":"') + 11, raw.index(b'","payloadType"'))  # of it every 7th, all around it
    for _, changed in flips(raw, [*range(payload.start), *payload[::7], *range(payload.stop - 4, len(raw))]):
        paths.certificate.write_bytes(changed)
        assert set(wrong(verify(paths))) & {"certificate", "signature"}, changed


def test_the_same_in_other_bytes_is_not_what_was_issued(evidence: Given) -> None:
    """What every reader of envelopes accepts, with a signature that holds: the file was altered all the same."""
    raw = evidence.certificate.read_bytes()
    wire, whole = json.loads(raw), json.loads(raw)
    whole["signatures"][0]["sig"] = wire["signatures"][0]["sig"].translate(str.maketrans("+/", "-_"))
    unused = wire["signatures"][0]["sig"].removesuffix("==")
    unused = unused[:-1] + {"A": "B", "Q": "R", "g": "h", "w": "x"}[unused[-1]] + "=="
    for changed in (
        raw + b"\n",
        json.dumps(wire).encode(),
        canonical.dumps(wire | {"more": 1}),
        canonical.dumps(wire | {"signatures": [{**wire["signatures"][0], "sig": unused}]}),
        raw.replace(b"payloadType", b"\\u0070ayloadType"),
        *([canonical.dumps(whole)] if whole != wire else []),
    ):
        evidence.certificate.write_bytes(changed)
        assert wrong(verify(evidence)) == ["certificate"], changed


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_other_byte_of_the_certificate(data: st.DataObject) -> None:
    raw, trusted = dsse.to_json(CERTIFICATE), {KEY.id: KEY.private.public_key()}
    place = data.draw(st.integers(0, len(raw) - 1))
    new = data.draw(st.binary(max_size=3).filter(lambda new: new != raw[place : place + 1]))
    changed = raw[:place] + new + raw[place + 1 :]
    try:
        envelope = dsse.from_json(changed)
        dsse.verify(envelope, trusted)
    except ValueError:
        return
    assert dsse.to_json(envelope) != changed, "accepted, and in the form in which we write"


# --- the adapter's folder


def test_files_that_are_missing_or_that_nobody_certified(evidence: Given) -> None:
    assert evidence.adapter
    (evidence.adapter / "README.md").unlink()
    (evidence.adapter / "checkpoint").mkdir()
    (evidence.adapter / "checkpoint" / "adapter_model.bin").write_bytes(b"pickle")
    (evidence.adapter / "link").symlink_to(evidence.adapter.parent)
    named = ["adapter file README.md", "adapter file checkpoint/adapter_model.bin", "adapter file link"]
    assert wrong(verify(evidence)) == named


def test_the_evidence_may_lie_in_the_adapters_folder(evidence: Given) -> None:
    assert evidence.adapter
    moved = Given(evidence.certificate.rename(evidence.adapter / "certificate.json"), *evidence[1:])
    assert verify(moved).exit_status == 0


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../b", "a//b", "", ".", "a\n", "a\\b"])
def test_a_certificate_names_files_of_its_folder_alone(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        certificate.certify({name: 64 * "0"}, certified().predicate)


def test_a_run_that_released_nothing_has_no_certificate() -> None:
    with pytest.raises(ValueError, match="subject"):
        certificate.certify({}, certified().predicate)


# --- keys


def test_an_old_key_still_verifies_and_a_strange_one_does_not(evidence: Given) -> None:
    assert evidence.keys
    assert verify(evidence).exit_status == 0  # NEXT signs by now, KEY is still published
    evidence.keys.write_text(json.dumps(keys.jwks([public(NEXT)])))
    found = verify(evidence)
    assert (wrong(found), KEY.id in found.findings[1].detail) == (["signature"], True)


def test_without_keys_the_signature_is_not_proven(evidence: Given) -> None:
    found = verify(evidence._replace(keys=None))
    assert (found.findings[1].proven, found.exit_status) == ("not checked", 3)
    assert "not proven" in found.findings[1].detail
    assert wrong(verify(evidence._replace(keys=None, adapter=evidence.certificate.parent)))


def test_a_forger_signs_in_the_name_of_a_known_key(evidence: Given) -> None:
    forged = certificate.issue(certified(), NEXT)
    forged = forged._replace(signatures=(forged.signatures[0]._replace(keyid=KEY.id),))
    evidence.certificate.write_bytes(dsse.to_json(forged))
    assert "signature" in wrong(verify(evidence))


def test_a_set_of_keys() -> None:
    ours, rsa = public(KEY), {"kty": "RSA", "kid": "r", "n": "AQAB", "e": "AQAB"}
    found = keys.parse_jwks(json.dumps(keys.jwks([rsa, ours, {**ours, "unknown": "x"}])).encode())
    assert {name: key.public_bytes_raw() for name, key in found.items()} == {
        KEY.id: KEY.private.public_key().public_bytes_raw()
    }
    for broken in ({**ours, "kid": NEXT.id}, {**ours, "x": ours["x"] + "="}, {**ours, "x": "AAAA"}, {**ours, "x": 1}):
        with pytest.raises(ValueError, match="key "):
            keys.parse_jwks(json.dumps({"keys": [broken]}).encode())
    for no_set in (b"[]", b"{}", b'{"keys":{}}', b"\xff", b""):
        with pytest.raises(ValueError):  # noqa: PT011
            keys.parse_jwks(no_set)


def test_another_library_reads_our_keys_and_finds_our_signature() -> None:
    (found,) = jwt.PyJWKSet.from_dict(json.loads(json.dumps(keys.jwks([public(KEY)])))).keys
    assert found.key_id == KEY.id
    (signature,) = CERTIFICATE.signatures
    assert found.Algorithm.verify(dsse.pae(CERTIFICATE.payload_type, CERTIFICATE.payload), found.key, signature.sig)


def test_a_key_survives_its_bytes_and_no_two_are_alike() -> None:
    made = keys.generate()
    assert keys.from_private_bytes(made.private.private_bytes_raw()).id == made.id != keys.generate().id
    assert set(public(made)) == {"kty", "crv", "x", "kid", "use", "alg"}, "and never d"


# --- the envelope


def test_ed25519_is_that_of_rfc_8032() -> None:
    """Its test 2, so that somebody else's library verifies our envelopes."""
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    signed = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert Ed25519PrivateKey.from_private_bytes(secret).sign(b"\x72").hex() == signed


@pytest.mark.parametrize(
    ("kind", "payload", "expected"),
    [("", b"", b"DSSEv1 0  0 "), ("é", b"\0 1", b"DSSEv1 2 \xc3\xa9 3 \0 1"), ("a 1", b"b", b"DSSEv1 3 a 1 1 b")],
)
def test_what_is_signed_counts_bytes(kind: str, payload: bytes, expected: bytes) -> None:
    assert dsse.pae(kind, payload) == expected


def test_either_base64_is_read_and_one_is_written() -> None:
    envelope = dsse.sign("t", bytes(range(240, 256)), KEY)
    written = dsse.to_json(envelope)
    urlsafe = written.replace(b"+", b"-").replace(b"/", b"_")
    assert written != urlsafe
    assert dsse.from_json(written) == dsse.from_json(urlsafe) == envelope
    assert set(json.loads(written)) == {"payloadType", "payload", "signatures"}


def test_an_envelope_that_says_two_things_is_none() -> None:
    written = dsse.to_json(dsse.sign("t", b"x", KEY))
    with pytest.raises(ValueError, match="twice"):
        dsse.from_json(b'{"payload":"eQ==",' + written[1:])
    for broken in (b"[]", b"{}", written.replace(b'"t"', b"1"), written.replace(b"eA==", b"eA"), b"[" * 100_000):
        with pytest.raises(ValueError):  # noqa: PT011
            dsse.from_json(broken)


def test_a_second_signature_neither_helps_nor_harms_unless_it_is_in_a_known_name() -> None:
    ours, theirs = (dsse.sign("t", b"x", key).signatures[0] for key in (KEY, NEXT))
    trusted = {KEY.id: KEY.private.public_key()}
    assert dsse.signers(dsse.Envelope("t", b"x", (theirs, ours)), trusted) == [KEY.id]
    for signatures in ((theirs,), (), (ours, theirs._replace(keyid=KEY.id))):
        with pytest.raises(ValueError, match="sign"):
            dsse.verify(dsse.Envelope("t", b"x", signatures), trusted)


def test_another_type_does_not_pass_as_a_certificate(evidence: Given) -> None:
    payload = canonical.dumps(certified())
    evidence.certificate.write_bytes(dsse.to_json(dsse.sign("application/json", payload, KEY)))
    found = verify(evidence)
    assert (wrong(found), found.says) == (["certificate"], None)
    generic = certificate.issue(certificate.generic_result(certified()), KEY)
    evidence.certificate.write_bytes(dsse.to_json(generic))
    assert wrong(verify(evidence)) == ["certificate"]


# --- what is certified


def test_a_certificate_says_what_the_report_says() -> None:
    report = reports.whole(
        parent=Parent(
            job_id="ujob_0", files=[AdapterFile(name="adapter/a.safetensors", bytes=1, sha256=64 * "9")], forgotten=[]
        )
    )
    assert of_report.files(report) == {"adapter_model.safetensors": 64 * "c"}
    made = certificate.certify(of_report.files(report), of_report.predicate(report, known(b"{}")))
    payload = certificate.issue(made, KEY).payload
    assert certificate.read(certificate.issue(made, KEY)) == made
    plain = json.loads(payload)
    assert plain["_type"] == "https://in-toto.io/Statement/v1"
    assert plain["subject"] == [{"name": "adapter_model.safetensors", "digest": {"sha256": 64 * "c"}}]
    assert plain["predicateType"] == "urn:unlearning-service:unlearning:v2"
    said = plain["predicate"]
    assert said["verdict"]["result"] == report.verdict.result
    assert [gate["value"] for gate in said["verdict"]["gates"]] == [gate.value for gate in report.verdict.gates]
    assert (said["forget_set"]["rows"], said["retain_set"]["rows"]) == (40, 760)
    assert (said["constraint"]["measured"], said["constraint"]["feasible"]) == (0.72, True)
    assert (said["started_at"], said["finished_at"]) == ("2026-01-02T03:00:00.000000Z", "2026-01-02T04:00:00.000000Z")
    assert said["parent"]["files"][0]["name"] == "a.safetensors"
    assert set(report.caveats) < set(said["limitations"])
    assert 64 * "b" not in payload.decode(), "the sets' plain digests are not in it"


@pytest.mark.parametrize(
    ("loss", "says"),
    [(0.749999, "0.75 (bound kept)"), (0.750001, "0.75 (bound broken)"), (math.nan, "not measured")],
)
def test_a_loss_that_looks_like_its_bound_is_on_its_side_of_it(tmp_path: Path, loss: float, says: str) -> None:
    made = certificate.certify({"a": 64 * "0"}, of_report.predicate(reports.make(upper=loss), known(b"{}")))
    (tmp_path / "c.json").write_bytes(dsse.to_json(certificate.issue(made, KEY)))
    printed = CliRunner().invoke(app, [str(tmp_path / "c.json")]).stdout
    assert f"retain loss {says} with a bound of 0.75 nats per token" in printed


def test_the_generic_statement_says_the_same_in_in_totos_terms() -> None:
    gates = [
        Gate(metric="forget/probability", op=">=", threshold=0.5, severity="warn"),
        Gate(metric="retain/nll", op="<=", threshold=0.1),
    ]
    report = reports.make(gates=gates)
    made = certificate.certify(of_report.files(report), of_report.predicate(report, known(b"{}")))
    plain = json.loads(canonical.dumps(certificate.generic_result(made)))
    assert plain["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    assert plain["subject"] == json.loads(canonical.dumps(made))["subject"]
    said = plain["predicate"]
    assert said["result"] == "FAILED"
    assert [name.split()[0] for name in said["passedTests"]] == ["retain_nll", "forget_probability"]
    assert said["warnedTests"] == ["forget/probability >= 0.5"]
    assert said["failedTests"] == ["retain/nll <= 0.1"]
    (configuration,) = said["configuration"]
    content = base64.b64decode(configuration["content"])
    assert configuration["digest"]["sha256"] == canonical.sha256(content)
    assert json.loads(content)["method"]["type"] == "pdu"


def test_a_certificate_of_the_first_version_is_read_as_it_was_issued(evidence: Given) -> None:
    """Before verdicts said by which rules they were given."""
    value = canonical.loads(
        certificate.issue(certified(evidence.report.read_bytes() if evidence.report else b""), KEY).payload
    )
    assert value["predicateType"] == "urn:unlearning-service:unlearning:v2"
    assert value["predicate"]["verdict"]["rules"] == VERDICT_RULES

    def signed(value: Any) -> Verification:
        envelope = dsse.sign(certificate.PAYLOAD_TYPE, canonical.dumps(value), KEY)
        evidence.certificate.write_bytes(dsse.to_json(envelope))
        return verify(evidence)

    without = copy.deepcopy(value)
    del without["predicate"]["verdict"]["rules"], without["predicate"]["verdict"]["forgotten_by"]
    found = signed(without | {"predicateType": "urn:unlearning-service:unlearning:v1"})
    assert (found.exit_status, found.says and found.says.verdict.rules) == (0, 1)
    for mixed in (without, value | {"predicateType": "urn:unlearning-service:unlearning:v1"}):
        assert wrong(signed(mixed)) == ["certificate"]


REVERIFIED = "ujob_" + 32 * "2"


@pytest.fixture
def of_reverification(evidence: Given) -> Given:
    """A certificate of a reverification, about the same adapter."""
    assert evidence.report is not None
    files = {name: canonical.sha256(content) for name, content in FILES.items()}
    report = reports.make([], [], reverifies=REVERIFIED)
    statement = certificate.certify(files, of_report.predicate(report, known(evidence.report.read_bytes())))
    evidence.certificate.write_bytes(dsse.to_json(certificate.issue(statement, KEY)))
    return evidence


def test_the_certificate_of_a_reverification_names_the_job_that_it_reverifies(of_reverification: Given) -> None:
    found = verify(of_reverification)
    assert found.exit_status == 0
    assert isinstance(found.says, certificate.Reverification)
    assert found.says.reverifies == REVERIFIED
    done = run(of_reverification)
    assert done.exit_code == 0, done.output
    assert f"a reverification of job {REVERIFIED}: its adapter, under verdict rules {VERDICT_RULES}" in done.stdout
    assert json.loads(run(of_reverification, "--json").stdout)["certificate"]["reverifies"] == REVERIFIED


def test_a_reverification_and_nothing_else_names_such_a_job(of_reverification: Given) -> None:
    value = canonical.loads(dsse.from_json(of_reverification.certificate.read_bytes()).payload)
    assert value["predicateType"] == "urn:unlearning-service:reverification:v1"

    def signed(value: Any) -> Verification:
        envelope = dsse.sign(certificate.PAYLOAD_TYPE, canonical.dumps(value), KEY)
        of_reverification.certificate.write_bytes(dsse.to_json(envelope))
        return verify(of_reverification)

    assert signed(value).exit_status == 0
    for version in ("v1", "v2"):
        assert wrong(signed(value | {"predicateType": f"urn:unlearning-service:unlearning:{version}"})) == [
            "certificate"
        ]
    for name in ("reverifies", "verdict"):
        without = copy.deepcopy(value)
        del without["predicate"][name]
        assert wrong(signed(without)) == ["certificate"]
    unnumbered = copy.deepcopy(value)
    del unnumbered["predicate"]["verdict"]["rules"]
    assert wrong(signed(unnumbered)) == ["certificate"]


@pytest.fixture
def of_model(evidence: Given, tmp_path: Path) -> Given:
    """A certificate of a job whose rows the base model did not know, and that model's folder."""
    (tmp_path / "model").mkdir()
    for name, content in {**reports.MODEL, "README.md": b"# card\n"}.items():
        (tmp_path / "model" / name).write_bytes(content)
    assert evidence.report is not None
    report = reports.untrained()
    statement = certificate.certify(
        of_report.files(report), of_report.predicate(report, known(evidence.report.read_bytes()))
    )
    evidence.certificate.write_bytes(dsse.to_json(certificate.issue(statement, KEY)))
    return evidence._replace(adapter=None, model=tmp_path / "model")


def test_where_the_model_did_not_know_the_rows_its_files_are_certified(of_model: Given) -> None:
    found = verify(of_model)
    assert found.exit_status == 0
    assert [one[:2] for one in found.findings if one.what in ("adapter", "base model")] == [
        ("adapter", "not checked"),
        ("base model", "yes"),
    ]
    assert of_model.model is not None
    weights = of_model.model / "model.safetensors"
    for _, changed in flips(weights.read_bytes(), range(3)):
        weights.write_bytes(changed)
        assert wrong(verify(of_model)) == ["base model file model.safetensors"]
    weights.unlink()
    (of_model.model / "generation_config.json").write_text("{}")  # it would be loaded
    assert wrong(verify(of_model)) == [
        f"base model file {name}" for name in ("model.safetensors", "generation_config.json")
    ]
    without = verify(of_model._replace(model=None))
    assert [one.proven for one in without.findings if one.what == "base model"] == ["not checked"]
    assert wrong(verify(of_model._replace(model=None, adapter=of_model.model))) == ["adapter"]


def test_the_base_model_of_an_adapter_is_checked_by_its_digest(evidence: Given, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    assert wrong(verify(evidence._replace(model=tmp_path / "model"))) == ["base model"]


def test_a_base_model_whose_weights_lie_elsewhere_does_not_match(evidence: Given, of_model: Given) -> None:
    assert of_model.model is not None
    (of_model.model / "model.safetensors").rename(of_model.model.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"w": "../outside.safetensors"}}
    (of_model.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert wrong(verify(of_model)) == ["base model"]
    assert "below the model's folder" in str(verify(of_model).findings)


def test_policy_engines_are_warned_of_what_was_not_known() -> None:
    report = reports.untrained()
    told = certificate.generic_result(
        certificate.certify(of_report.files(report), of_report.predicate(report, known(b"{}")))
    )
    assert (told.predicate.result, told.predicate.passed_tests) == ("WARNED", ["base/log_ratio <= 0.25"])
    assert [subject.name for subject in told.subject] == sorted(reports.MODEL)


def test_where_an_earlier_adapter_had_forgotten_the_rows_its_files_are_certified() -> None:
    files = [AdapterFile(name="adapter/a.safetensors", bytes=1, sha256=64 * "9")]
    parent = Parent(job_id="ujob_" + 32 * "2", files=files, forgotten=[])
    report = reports.untrained(reports.knowledge("base", 0.3), reports.knowledge("start", 0.1), parent=parent)
    assert of_report.files(report) == {"a.safetensors": 64 * "9"}
    said = of_report.predicate(report, known(b"{}"))
    assert (said.verdict.forgotten_by, said.of_base_model) == (parent.job_id, False)


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63 - 1])
def test_a_seed_larger_than_a_double_is_exact(seed: int) -> None:
    report = reports.make()
    report.asked.seed = seed
    assert of_report.predicate(report, known(b"")).method.seed == str(seed)


def test_a_statement_is_read_strictly() -> None:
    plain = json.loads(canonical.dumps(certified()))
    changes: tuple[dict[str, Any], ...] = ({"more": 1}, {"_type": "x"}, {"predicateType": "x"}, {"subject": []})
    for change in changes:
        with pytest.raises(ValueError, match="validation error"):
            certificate.Certificate.model_validate(plain | change)
    plain["predicate"]["forget_set"]["rows"] = "40"
    with pytest.raises(ValueError, match="rows"):
        certificate.Certificate.model_validate(plain)


# --- the audit log


def kind(found: Checked) -> tuple[int, str] | None:
    return (found.fault.seq, found.fault.kind) if found.fault else None


def test_what_can_be_wrong_with_a_log_is_told_apart() -> None:
    assert chain.verify(LOG, ANCHOR) == Checked(ENTRIES, Head(seq=5, hash=rows()[4].hash), None)
    assert chain.verify([]) == Checked(0, None, None)
    assert kind(chain.verify(LOG[:1] + LOG[2:], ANCHOR)) == (2, "missing")
    assert kind(chain.verify(LOG[1:], ANCHOR)) == (1, "missing")
    assert kind(chain.verify([LOG[0], LOG[2], LOG[1], *LOG[3:]], ANCHOR)) == (2, "reordered")
    assert kind(chain.verify([LOG[0], LOG[0], *LOG[1:]], ANCHOR)) == (2, "reordered")
    assert kind(chain.verify(LOG[:2], ANCHOR)) == (3, "truncated")
    assert kind(chain.verify([], ANCHOR)) == (1, "truncated")
    assert kind(chain.verify([*LOG[:2], chain.line(rows(tenant="tenant_2")[2])], ANCHOR)) == (3, "altered")
    assert kind(chain.verify([*LOG[:-1], LOG[-1][:-1]])) == (5, "altered"), "the last line has no end"


def test_an_entry_in_other_bytes_is_not_what_was_exported() -> None:
    for changed in (
        LOG[0].replace(b":", b": ", 1),
        LOG[0].replace(b'"seq":1', b'"seq":1.0'),
        LOG[0].replace(b'{"action"', b'{"action":"job.deleted","action"'),
        LOG[0].replace("ë".encode(), rb"\u00eb"),
        LOG[0].replace(b"\n", b"\r\n"),
        b"\n" + LOG[0],
    ):
        assert changed != LOG[0]
        assert kind(chain.verify([changed, *LOG[1:]])) == (1, "altered")


def test_the_logs_of_two_tenants_begin_differently() -> None:
    assert chain.genesis("tenant_1") != chain.genesis("tenant_2")
    of_another = AuditEntry(**rows(1)[0].model_dump(exclude={"hash", "prev_hash"}))
    assert kind(chain.verify([chain.line(chain.chained(chain.genesis("tenant_2"), of_another))])) == (1, "altered")


def test_an_entry_that_was_rewritten_with_its_hash() -> None:
    first, second, third = rows(3)
    forged = chain.chained(
        first.hash, AuditEntry(**second.model_dump(exclude={"hash", "prev_hash"}) | {"actor": "key_2"})
    )
    found = chain.verify(map(chain.line, (first, forged, third)))
    assert kind(found) == (2, "altered")
    assert kind(chain.verify([chain.line(forged)])) == (1, "missing")


def test_a_log_written_anew_is_betrayed_by_the_anchor_alone() -> None:
    anew, prev_hash = [], chain.genesis("tenant_1")
    for row in rows():
        entry = AuditEntry(**row.model_dump(exclude={"hash", "prev_hash"}) | {"actor": "nobody"})
        anew.append(chain.chained(prev_hash, entry))
        prev_hash = anew[-1].hash
    lines = [chain.line(row) for row in anew]
    assert chain.verify(lines).fault is None
    assert kind(chain.verify(lines, ANCHOR)) == (ANCHOR.seq, "altered")


def test_what_follows_the_anchor_is_said_to_be_fixed_by_nothing(evidence: Given) -> None:
    assert "the 2 after it" in verify(evidence).findings[-1].detail


def test_the_hash_is_the_one_that_is_documented() -> None:
    """Worked by hand, so that a verifier in another language can be written from the docstring."""
    row = rows(1)[0]
    text = json.dumps(
        row.model_dump(exclude={"hash", "prev_hash"}), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert row.hash == canonical.sha256(bytes.fromhex(chain.genesis("tenant_1")) + text.encode())


# --- canonical JSON


def test_the_example_of_rfc_8785() -> None:
    text = (
        r'{"numbers":[333333333.33333329,1E30,4.50,2e-3,0.000000000000000000000000001],'
        r'"string":"\u20ac$\u000F\u000aA\u0027\u0042\u0022\u005c\\\"\/","literals":[null,true,false]}'
    )
    expected = (
        r'{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        r'"string":"€$\u000f\nA\'B\"\\\\\"/"}'.replace(r"\'", "'")
    )
    assert canonical.dumps(canonical.loads(text.encode())).decode() == expected


def test_keys_are_sorted_by_utf_16() -> None:
    """U+1F600 begins with a surrogate, so it comes before U+FB33 although its code point is larger; NFC and NFD stay two."""
    keyed = {"\ufb33": 1, "\U0001f600": 2, "\u20ac": 3, "e\u0301": 4, "\u00e9": 5, "1": 6, "\r": 7}
    written = json.loads(canonical.dumps(keyed))
    assert list(written) == ["\r", "1", "e\u0301", "\u00e9", "\u20ac", "\U0001f600", "\ufb33"]


@pytest.mark.parametrize("number", [1.0, -0.0, 1e16, 1e20, 57659361260341500.0, 1e21, 5e-324, 1.7976931348623157e308])
def test_a_number_has_one_form_however_it_comes_back(number: float) -> None:
    once = canonical.dumps([number])
    assert canonical.dumps(canonical.loads(once)) == once
    digits = Decimal(repr(number))  # as jsonb keeps it, and gives an integer back without a point
    assert digits != int(digits) or canonical.dumps([int(digits)]) == once


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_what_is_read_back_is_written_the_same(value: Any) -> None:
    once = canonical.dumps(value)
    assert canonical.dumps(canonical.loads(once)) == once
    assert json.loads(once, parse_int=float) == json.loads(json.dumps(value), parse_int=float), "as doubles"


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 2**53 + 1, 57659361260341504, 10**400, "\ud800", {1: 2}, {"\ud800": 1}, {1, 2}, b"x"],
)
def test_what_has_no_form_is_refused(value: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical.dumps([value])


def test_what_is_nested_too_deeply_is_refused() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(ValueError, match="deeply"):
        canonical.dumps(value)
    with pytest.raises(ValueError, match="deeply"):
        canonical.loads(b"[" * 100_000 + b"]" * 100_000)


@pytest.mark.parametrize(
    "text", [b'{"a":1,"a":1}', b"NaN", b"[Infinity]", b"\xff", b"\xef\xbb\xbf{}", '{"a":1}'.encode("utf-16"), b""]
)
def test_what_readers_could_disagree_on_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        canonical.loads(text)


# --- the command


def run(paths: Given, *more: str) -> Any:
    options = [part for name, path in paths._asdict().items() if path for part in (f"--{name}", str(path))][2:]
    return CliRunner().invoke(app, [str(paths.certificate), *options, *more])


def test_the_command_says_what_is_proven_and_what_is_not(evidence: Given) -> None:
    done = run(evidence)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["holds"] * 5
    assert "not a proof of erasure" in done.stdout
    assert "verdict PASSED" in done.stdout
    assert "anybody could" not in done.stdout
    unsigned = run(Given(evidence.certificate, evidence.adapter))
    assert (unsigned.exit_code, "anybody could have written" in unsigned.stdout) == (3, True)
    told = json.loads(run(evidence, "--json").stdout)
    assert told["certificate"]["job_id"] == reports.make().job_id
    assert {one["proven"] for one in told["findings"]} == {"yes"}


def test_the_command_names_the_file_that_differs(evidence: Given) -> None:
    assert evidence.adapter
    (evidence.adapter / "README.md").write_bytes(b"# other\n")
    done = run(evidence)
    assert done.exit_code == 1
    assert "FAILS        adapter file README.md: it differs" in done.stdout


def test_a_name_in_a_certificate_cannot_write_a_line_of_its_own(evidence: Given) -> None:
    issued = certificate.issue(certified(), NEXT)
    forged = issued.signatures[0]._replace(keyid="x\n\x1b[2J\nholds        signature: by key x")
    evidence.certificate.write_bytes(dsse.to_json(issued._replace(signatures=(forged,))))
    done = run(evidence._replace(keys=None))
    assert "\x1b" not in done.stdout
    assert not any(line.startswith("holds        signature") for line in done.stdout.splitlines())


def test_a_file_that_is_no_certificate(evidence: Given) -> None:
    for content in (b"", b"{}", b"\x00\xff", b"[" * 100_000):
        evidence.certificate.write_bytes(content)
        done = run(evidence)
        assert (done.exit_code, "FAILS        certificate" in done.stdout) == (1, True), done.output


def test_it_needs_neither_a_database_nor_a_server_nor_a_network(evidence: Given) -> None:
    code = (
        "import socket, sys; socket.socket = None; from service.evidence.command import app;"
        "app(sys.argv[1:], standalone_mode=False);"
        "assert not {'sqlalchemy', 'fastapi', 'torch', 'httpx'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(evidence.certificate), "--adapter", str(evidence.adapter)]
    done = subprocess.run([*command, "--keys", str(evidence.keys)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
