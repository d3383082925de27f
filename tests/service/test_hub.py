"""Sets of a benchmark from the Hub: its real client, over HTTP, in front of a server that answers as the Hub does."""

import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants
from pytest_httpserver import HTTPServer
from starlette.testclient import TestClient
from typer.testing import Result
from werkzeug import Request, Response

from service import hub, terminal
from service.domain import rows
from service.domain.errors import InvalidRequest
from service.settings import Settings
from service.store.storage import Storage
from tests.service import test_cli
from tests.service.test_api_benchmarks import BENCHMARKS, Body, problems, row, tofu

run, url = test_cli.run, test_cli.url  # the command line, and an API on a port of its own
REPO, SHA, OTHER_SHA = "locuslab/TOFU", "3" * 40, "4" * 40
UPLOAD_MAX_BYTES = 20_000
RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
STORE = re.compile(r"/store/(?P<digest>[0-9a-f]{64})")
FORGET = [row(["question", "answer", "paraphrased_answer", "perturbed_answer"], number) for number in range(3)]


def json_lines(given: list[Body]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in given).encode()


class Hub(NamedTuple):
    """Files at one commit, by path; large ones lie on another host, as the Hub's do. What was asked is noted."""

    server: HTTPServer
    files: dict[str, bytes]
    elsewhere: set[str]
    names: dict[str, str]  # branches and tags -> the commit
    asked: list[Request]

    def answer(self, request: Request) -> Response:
        self.asked.append(request)
        found = RESOLVE.fullmatch(request.path)
        assert found is not None
        commit = self.names.get(found["revision"], found["revision"])
        if found["repo"] != REPO:
            return _error(401, "RepoNotFound")
        if found["path"] == "gated.json":
            return _error(401, "GatedRepo")
        if commit != SHA:
            return _error(404, "RevisionNotFound")
        if found["path"] == "down.json":
            return Response("later", 503)
        if found["path"] == "forbidden.json":
            return Response("no", 403)
        if found["path"] not in self.files:
            return _error(404, "EntryNotFound")
        content = self.files[found["path"]]
        digest = hashlib.sha256(content).hexdigest()
        told = {"X-Repo-Commit": SHA, "ETag": f'"{digest}"'}
        if found["path"] not in self.elsewhere:
            return Response(content, headers=told)
        told |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        return Response(status=302, headers=told | {"Location": f"http://127.0.0.1:{self.server.port}/store/{digest}"})

    def store(self, request: Request) -> Response:
        self.asked.append(request)
        found = STORE.fullmatch(request.path)
        assert found is not None
        return Response(next(one for one in self.files.values() if hashlib.sha256(one).hexdigest() == found["digest"]))

    def fetched(self) -> list[str]:
        """The paths whose bytes were asked for, not what is told of them."""
        return [request.path.rpartition("/")[2] for request in self.asked if request.method == "GET"]


def _error(status: int, code: str) -> Response:
    return Response(status=status, headers={"X-Error-Code": code})


@pytest.fixture
def the_hub(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator")
    assert httpserver.host == "localhost", "127.0.0.1 is another host then, as far as the client can tell"
    there = Hub(httpserver, {"forget10_perturbed.json": json_lines(FORGET)}, set(), {}, [])
    httpserver.expect_request(RESOLVE).respond_with_handler(there.answer)
    httpserver.expect_request(STORE).respond_with_handler(there.store)
    return there


@pytest.fixture
def settings(settings: Settings, the_hub: Hub) -> Settings:
    there = {"hub_datasets": True, "hub_endpoint": the_hub.server.url_for("/"), "upload_max_bytes": UPLOAD_MAX_BYTES}
    return settings.model_copy(update=there)


@pytest.fixture
def body(http: TestClient, upload: Callable[..., str]) -> Body:
    """A benchmark whose forget set is on the Hub, the others uploaded."""
    sets: Body = {
        name: upload("eval_set", [row(form["columns"], number) for number in range(2)])
        for name, form in tofu(http)["sets"].items()
        if form["required"] and name != "forget"
    }
    return {"name": "b", "suite": "tofu", "corpus": "TOFU forget10", "sets": sets | {"forget": on_hub()}}


def on_hub(**changes: Any) -> Body:
    return {"repo": REPO, "revision": SHA, "path": "forget10_perturbed.json"} | changes


def with_forget(body: Body, **changes: Any) -> Body:
    return body | {"sets": body["sets"] | {"forget": on_hub(**changes)}}


@pytest.fixture
def kept(http: TestClient, body: Body, settings: Settings) -> Iterator[Callable[[], list[str]]]:
    """The names of the files that came beside the uploaded ones, and the bytes of each are there and of no other."""

    def look() -> list[str]:
        data = http.get("/v1/files", params={"limit": 100}).json()["data"]
        stored = {key for key, _ in Storage(settings.storage_url).ages("files")}
        assert stored == {f"files/{one['id']}.sealed" for one in data}
        return [one["filename"] for one in data if one["filename"] != "eval_set.jsonl"]

    return look


def test_a_set_is_fetched_at_its_commit_and_kept_as_an_upload_is(
    http: TestClient, body: Body, the_hub: Hub, kept: Callable[[], list[str]], content_of: Callable[[str], bytes]
) -> None:
    reply = http.post(BENCHMARKS, json=body)
    assert reply.status_code == 201, reply.text
    forget = reply.json()["sets"].pop("forget")
    assert reply.json()["sets"] == body["sets"] | {"forget": forget}
    file, content = http.get(f"/v1/files/{forget}").json(), the_hub.files["forget10_perturbed.json"]
    assert (file["purpose"], file["rows"], file["bytes"]) == ("eval_set", 3, len(content))
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert content_of(forget) == content
    assert kept() == [f"{REPO}@{SHA}/forget10_perturbed.json"]
    assert the_hub.fetched() == ["forget10_perturbed.json"]
    assert not any("Authorization" in request.headers for request in the_hub.asked), "the operator's token stays here"
    assert http.delete(f"/v1/files/{forget}").status_code == 409, "the benchmark needs it"
    assert http.get(f"{BENCHMARKS}/b").json() == reply.json()


def test_a_large_file_that_lies_elsewhere_is_fetched_from_there(http: TestClient, body: Body, the_hub: Hub) -> None:
    the_hub.elsewhere.add("forget10_perturbed.json")
    assert http.post(BENCHMARKS, json=body).status_code == 201
    digest = hashlib.sha256(the_hub.files["forget10_perturbed.json"]).hexdigest()
    assert the_hub.fetched() == [digest]


def test_columns_are_renamed(http: TestClient, body: Body, the_hub: Hub, content_of: Callable[[str], bytes]) -> None:
    """Also in a circle, and those of another name are kept."""
    theirs = {"question": "answer", "answer": "query", "perturbed_answer": "wrong"}
    given = [
        {theirs.get(name, name): value for name, value in one.items()} | {"note": {"of": "é"}, "id": number}
        for number, one in enumerate(FORGET)
    ]
    the_hub.files["nested/other.jsonl"] = json_lines(given)
    reply = http.post(BENCHMARKS, json=with_forget(body, path="nested/other.jsonl", columns=theirs))
    assert reply.status_code == 201, reply.text
    lines = content_of(reply.json()["sets"]["forget"]).splitlines()
    expected = [one | {"note": {"of": "é"}, "id": number} for number, one in enumerate(FORGET)]
    assert [json.loads(line) for line in lines] == expected


def test_one_json_array_becomes_lines(
    http: TestClient, body: Body, the_hub: Hub, content_of: Callable[[str], bytes]
) -> None:
    the_hub.files["array.json"] = b"\xef\xbb\xbf\n" + json.dumps(FORGET, indent=2).encode()
    reply = http.post(BENCHMARKS, json=with_forget(body, path="array.json"))
    assert reply.status_code == 201, reply.text
    assert content_of(reply.json()["sets"]["forget"]) == json_lines(FORGET)


SPACED = len(json.dumps(FORGET[0])) + 1
COMPACT = json.dumps([FORGET[0]] * (UPLOAD_MAX_BYTES // SPACED + 1), separators=(",", ":")).encode()
LACKING = [{"question": "q", "answer": "a"}]
UNSOUND: list[tuple[str, bytes | list[Body], Body, str, str]] = [  # path, content, changes, pointer, words
    ("x.json", LACKING, {}, "", "line 1: lacks paraphrased_answer and perturbed_answer"),
    ("x.json", [FORGET[0], FORGET[1] | {"perturbed_answer": "x"}], {}, "", "line 2: perturbed_answer is not a list"),
    ("x.json", [FORGET[0] | {"answer": "\ud800"}], {}, "", "half a surrogate"),
    ("x.json", json.dumps([FORGET[0] | {"answer": "\ud800"}]).encode(), {}, "", "half a surrogate"),
    ("x.json", b"no json", {}, "", "line 1: not JSON"),
    ("x.json", b"", {}, "", "no rows"),
    ("x.json", b"[]", {}, "", "no rows"),
    ("x.json", b"[1, 2]", {}, "", "line 2: not a JSON object"),
    ("x.json", b'[{"question": "q"}, ', {}, "", "begins as a JSON array does"),
    ("x.json", [FORGET[0], FORGET[1] | {"why": 1}], {"columns": {"answer": "why"}}, "/columns", "line 1: lacks why"),
    ("x.json", FORGET, {"columns": {"anser": "answer"}}, "/columns/anser", "the set has no column 'anser'"),
    ("x.json", [FORGET[0]] * 200, {}, "/path", f"at most {UPLOAD_MAX_BYTES} bytes are taken; it has "),
    ("x.json", COMPACT, {}, "/path", "becomes more than that"),
    ("x.json", FORGET, {"repo": "nobody/none"}, "/repo", "no public data set 'nobody/none'"),
    ("x.json", FORGET, {"repo": "locuslab--x/TOFU"}, "/repo", "no public data set"),
    ("x.json", FORGET, {"repo": "TOFU"}, "/repo", "pattern"),
    ("x.json", FORGET, {"revision": OTHER_SHA}, "/revision", f"{REPO} has no commit {OTHER_SHA}"),
    ("x.json", FORGET, {"revision": "5" * 40}, "/revision", f"a name for {SHA}"),
    ("x.json", FORGET, {"revision": "main"}, "/revision", "a branch or a tag moves"),
    ("x.json", FORGET, {"revision": SHA[:7]}, "/revision", "40 hex digits of a commit"),
    ("x.json", FORGET, {"path": "none.json"}, "/path", "has no file 'none.json'"),
    ("x.json", FORGET, {"path": "../x.json"}, "/path", "pattern"),
    ("x.json", FORGET, {"path": "gated.json"}, "/repo", "is gated; upload the file instead"),
    ("x.json", FORGET, {"path": "forbidden.json"}, "/path", "status 403"),
    ("x.json", FORGET, {"token": "t"}, "/token", "not permitted"),
]


def test_what_is_wrong_is_named_and_nothing_is_kept(
    http: TestClient, body: Body, the_hub: Hub, kept: Callable[[], list[str]]
) -> None:
    the_hub.names["5" * 40] = SHA
    for path, content, changes, pointer, words in UNSOUND:
        the_hub.files[path] = content if isinstance(content, bytes) else json_lines(content)
        reply = http.post(BENCHMARKS, json=with_forget(body, **({"path": path} | changes)))
        told = problems(reply)
        assert told[-1][0] == f"/sets/forget{pointer}", (changes, told)
        assert words in told[-1][1], (changes, told)
        assert kept() == []
    assert http.get(BENCHMARKS).json()["data"] == []


def test_a_file_over_the_limit_is_not_fetched(http: TestClient, body: Body, the_hub: Hub) -> None:
    the_hub.files["x.json"] = json_lines(FORGET * 100)
    assert problems(http.post(BENCHMARKS, json=with_forget(body, path="x.json")))[0][2] == "too_large"
    assert (len(the_hub.asked), the_hub.fetched()) == (1, [])


def test_every_set_is_judged_and_one_refusal_leaves_no_file(
    http: TestClient, body: Body, the_hub: Hub, kept: Callable[[], list[str]]
) -> None:
    sets = body["sets"] | {"retain": on_hub(path="none.json"), "world_facts": on_hub(revision=OTHER_SHA)}
    told = problems(http.post(BENCHMARKS, json=body | {"sets": sets}))
    assert [pointer for pointer, _, _ in told] == ["/sets/retain/path", "/sets/world_facts/revision"]
    assert kept() == []
    assert http.post(BENCHMARKS, json=body).status_code == 201
    taken = http.post(BENCHMARKS, json=body)
    assert (taken.status_code, "is registered" in taken.json()["detail"]) == (409, True)
    assert kept() == [str(hub.HubFile(**on_hub()))], "the one of the benchmark that is registered"


def test_nothing_is_fetched_for_what_is_refused_anyway(http: TestClient, body: Body, the_hub: Hub) -> None:
    assert problems(http.post(BENCHMARKS, json=body | {"retrained_model": "none"}))[0][0] == "/retrained_model"
    assert the_hub.asked == []


def test_a_hub_that_fails_is_named(
    http: TestClient, body: Body, the_hub: Hub, kept: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = http.post(BENCHMARKS, json=with_forget(body, path="down.json"))
    assert (failed.status_code, "fails, with status 503" in failed.json()["detail"]) == (503, True)
    assert failed.headers["Retry-After"]
    the_hub.server.stop()
    try:
        silent = http.post(BENCHMARKS, json=body)
    finally:
        the_hub.server.start()  # for the tests that follow
    assert (silent.status_code, "does not answer" in silent.json()["detail"]) == (503, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert http.post(BENCHMARKS, json=body).status_code == 503
    assert kept() == []


class TestWhereItIsNotAllowed:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        assert Settings.model_fields["hub_datasets"].default is False
        return settings.model_copy(update={"hub_datasets": False})

    def test_it_says_so_and_how_to_upload(self, http: TestClient, body: Body, the_hub: Hub) -> None:
        ((pointer, detail, code),) = problems(http.post(BENCHMARKS, json=body))
        assert (pointer, code) == ("/sets/forget", "hub_disabled")
        assert "does not fetch from the Hub" in detail
        assert "POST /v1/files, purpose=eval_set" in detail
        assert the_hub.asked == []


def read(content: bytes) -> list[Any]:
    return [json.loads(line) for line in hub.lines(io.BytesIO(content), {}, 10**6, "/p")]


def test_an_array_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a part ends: within a character, a string, an escape, between elements."""
    given: list[Any] = [{"text": 'é"],[\\ \u2028'}, {}, {"list": [1, [2.5e3, None]]}, {"text": ""}]
    spellings = [
        json.dumps(given, indent=indent, ensure_ascii=ascii_) for indent in (None, 1) for ascii_ in (True, False)
    ]
    for chars in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(hub, "READ_CHARS", chars)
        for spelling in spellings:
            assert read(f" \n{spelling} \n".encode()) == given
        for broken in ("[", "[{}", "[{},", "[{},]", "[{} {}]", "[{}]]", "[{}] {}", "[,]", '[{"a"}]', "[" * 100_000):
            with pytest.raises(InvalidRequest, match="begins as a JSON array"):
                read(broken.encode())
    with pytest.raises(InvalidRequest, match="begins as a JSON array"):
        read(b'[{"text": "\xff"}]')


def test_an_endless_element_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LINE_MAX_BYTES", 1000)
    content = io.BytesIO(b'[{"text": "' + b"x" * 200_000 + b'"}]')
    with pytest.raises(InvalidRequest, match="rows below 1000 bytes"):
        list(hub.lines(content, {}, 10**6, "/p"))
    assert content.tell() < 100_000


def test_parquet_without_its_reader_is_refused_by_name(
    http: TestClient, body: Body, the_hub: Hub, kept: Callable[[], list[str]]
) -> None:
    if importlib.util.find_spec("pyarrow"):
        pytest.skip("pyarrow is installed here")
    the_hub.files["train.parquet"] = b"PAR1" + b"\0" * 100
    ((pointer, detail, _),) = problems(http.post(BENCHMARKS, json=with_forget(body, path="train.parquet")))
    assert (pointer, "no pyarrow" in detail, "as JSON Lines instead" in detail) == ("/sets/forget/path", True, True)
    assert kept() == []


def test_parquet_becomes_lines(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(FORGET), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    assert read(content) == FORGET
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read(content[:-20])


def test_the_command_line_names_files_of_the_hub(run: Callable[..., Result], url: str, the_hub: Hub) -> None:
    forms = test_cli.suite_sets(url, "tofu")
    sets = list[str]()
    for name, form in forms.items():
        the_hub.files[f"sets/{name}.json"] = json_lines([row(form.columns)])
        sets += ["--set", f"{name}=hub:{REPO}@{SHA}/sets/{name}.json"]
    options = ["benchmarks", "add", "b", "--suite", "tofu", "--corpus", "c", *sets, "--url", url]
    moved = run(*options, "--set", f"forget=hub:{REPO}@main/sets/forget.json")
    assert (moved.exit_code, "a branch or a tag moves" in moved.stderr) == (2, True), moved.output
    malformed = run(*options, "--set", f"forget=hub:{REPO}/sets/forget.json")
    assert (malformed.exit_code, "hub:OWNER/NAME@SHA/PATH" in malformed.stderr) == (2, True), malformed.output
    added = run(*options)
    assert added.exit_code == 0, added.output
    with terminal.connected(url) as api:
        assert {one.filename for one in api.files.list()} == {f"{REPO}@{SHA}/sets/{name}.json" for name in forms}
    assert run("benchmarks", "remove", "b", "--url", url).exit_code == 0
    with terminal.connected(url) as api:
        assert all(one.purged_at for one in api.files.list())


def test_openapi_tells_both_forms_of_a_set(http: TestClient) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    either = schemas["BenchmarkCreate"]["properties"]["sets"]["additionalProperties"]["oneOf"]
    assert {one.get("$ref", one.get("pattern")) for one in either} == {
        "#/components/schemas/HubFile",
        "^ufile_[0-9a-f]{32}$",
    }
    assert schemas["HubFile"]["properties"]["revision"]["pattern"] == "^[0-9a-f]{40}$"
    assert set(schemas["HubFile"]["required"]) == {"repo", "revision", "path"}
