"""Uploads: judged line by line, stored whole or not at all."""

import hashlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from starlette.testclient import TestClient

from service.domain import rows
from service.domain.errors import InvalidRequest
from service.settings import Settings
from service.store import files
from service.store.session import Sessions
from tests.conftest import owner
from tests.service.conftest import ClientOf

ROW = b'{"question": "q", "answer": "a"}\n'


def send(http: TestClient, content: bytes, purpose: str = "forget_set", name: str = "f.jsonl") -> Any:
    return http.post("/v1/files", data={"purpose": purpose}, files={"file": (name, content)})


def stored(settings: Settings) -> list[Path]:
    return [path for path in Path(settings.storage_url).rglob("*") if path.is_file()]


def test_an_uploaded_file_is_kept_as_it_came_but_encrypted(
    http: TestClient, settings: Settings, content_of: Callable[[str], bytes]
) -> None:
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"prompt": "p", "completion": "c", "other": 1}\r\n'
    reply = send(http, content)
    assert reply.status_code == 201
    file = reply.json()
    assert (file["object"], file["rows"], file["bytes"]) == ("file", 2, len(content))
    assert file["sha256"] == hashlib.sha256(content).hexdigest()
    assert file["created_at"].endswith("Z")
    assert content_of(file["id"]) == content
    (kept,) = stored(settings)
    assert b"prompt" not in kept.read_bytes()
    assert http.get(reply.headers["Location"]).json() == file


WRONG_LINES = [
    (ROW + b"no json\n", "line 2: not JSON"),
    (ROW + b'\n{"question": "q"}\n', "line 3: lacks"),
    (b'{"question": "q", "answer": 1}\n', "line 1: answer is not a string"),
    (b'{"question": "q", "answer": " "}\n', "line 1: answer is empty"),
    (b'{"question": "q", "answer": "a", "text": "t"}\n', "line 1: has the fields of two forms"),
    (b"[1]\n", "line 1: not a JSON object"),
    (b"[" * 100_000 + b"\n", "line 1: not JSON"),
    (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
    (b'{"text": "\\ud800"}\n', "line 1: text has half a surrogate pair"),
    (b'{"text": "\xff"}\n', "line 1: not JSON in UTF-8"),
    (ROW + b'{"text": "' + b"x" * 2**20 + b'"}', "line 2: longer than 1048576 bytes"),
    (ROW + b"x" * 3_000_000 + b"\nnot json either\n", "line 2: longer than 1048576 bytes"),
    (b"", "no rows"),
    (b"\n\r\n", "no rows"),
]


def test_a_wrong_line_is_named_and_nothing_is_kept(http: TestClient, settings: Settings) -> None:
    for content, complaint in WRONG_LINES:
        reply = send(http, content)
        assert reply.status_code == 422, complaint
        assert complaint in reply.json()["detail"]
        assert reply.json()["errors"][0]["pointer"] == "/file"
    assert stored(settings) == []
    assert http.get("/v1/files").json()["data"] == []


def test_at_most_twenty_lines_are_named(http: TestClient) -> None:
    assert len(send(http, b"x\n" * 1000).json()["errors"]) == 20


def test_a_file_name_is_words_never_a_path(http: TestClient, settings: Settings) -> None:
    ids = []
    for name in ("../../etc/passwd", "..\\..\\x", "/abs", "a\nb.jsonl", "\u202e" * 300, ".."):
        reply = send(http, ROW, name=name)
        assert reply.status_code == 201, name
        file = reply.json()
        assert file["filename"].isprintable()
        assert not {"/", "\\"} & set(file["filename"])
        ids.append(file["id"])
    assert sorted(path.name for path in stored(settings)) == [f"{file_id}.sealed" for file_id in ids]


def test_a_file_over_the_limit_is_refused_however_it_is_sent(settings: Settings, client_of: ClientOf) -> None:
    small = settings.model_copy(update={"upload_max_bytes": 2000})
    with client_of(small) as http:
        assert send(http, ROW * 40).status_code == 201
        assert send(http, ROW * 100).status_code == 413  # more than the file may have, less than the body
        announced = send(http, ROW * 10_000)
        assert announced.status_code == 413
        assert announced.json()["type"].endswith("payload-too-large")

        def unannounced() -> Iterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            yield from (ROW for _ in range(10_000))
            yield b"\r\n--b--\r\n"

        streamed = http.post(
            "/v1/files", content=unannounced(), headers={"Content-Type": "multipart/form-data; boundary=b"}
        )
        assert streamed.status_code == 413
        assert len(http.get("/v1/files").json()["data"]) == 1
    assert len(stored(settings)) == 1


def test_a_long_line_is_never_read_whole() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            assert size > 0
            self.taken += size
            assert self.taken < 2 * rows.LINE_MAX_BYTES
            return b"x" * size

    with pytest.raises(InvalidRequest, match="line 1: longer than"):
        list(rows.each(rows.lines(Endless())))  # type: ignore[arg-type]


def test_lines_are_those_of_the_file() -> None:
    row = b'{"text": "' + b"x" * (rows.LINE_MAX_BYTES - 12) + b'"}'
    assert len(row) == rows.LINE_MAX_BYTES
    for content in (b"", b"a", b"a\n", b"\na\r\n\nb", row + b"\n" + row):
        whole = list(rows.lines(io.BytesIO(content)))
        assert whole == [line.removesuffix(b"\n") for line in io.BytesIO(content)]
    assert len(rows.read(rows.lines(io.BytesIO(row + b"\n" + row)))) == 2


def test_an_upload_whose_row_is_refused_leaves_no_bytes(
    http: TestClient, settings: Settings, sessions: Sessions
) -> None:
    with owner(sessions).begin() as s:
        s.execute(text("ALTER TABLE files ADD CONSTRAINT none CHECK (rows > 1)"))
    assert send(http, ROW).status_code == 500
    assert stored(settings) == []
    assert send(http, ROW * 2).status_code == 201
    assert len(stored(settings)) == 1


def test_the_form_is_strict(http: TestClient) -> None:
    for form, pointer in (
        ({"purpose": "other"}, "/purpose"),
        ({}, "/purpose"),
        ({"purpose": "eval_set", "x": "1"}, "/x"),
    ):
        reply = http.post("/v1/files", data=form, files={"file": ("f", ROW)})
        assert reply.status_code == 422
        assert [error["pointer"] for error in reply.json()["errors"]] == [pointer]


def test_other_bodies_than_a_form_are_refused(http: TestClient) -> None:
    assert http.post("/v1/files", content=ROW, headers={"Content-Type": "application/json"}).status_code == 415
    assert http.post("/v1/files", data={"purpose": "forget_set"}).status_code == 415
    broken = http.post("/v1/files", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert (broken.status_code, broken.headers["Content-Type"]) == (400, "application/problem+json")
    missing = http.post("/v1/files", files={"other": ("f", ROW)}, data={"purpose": "forget_set"})
    assert {error["pointer"] for error in missing.json()["errors"]} == {"/file", "/other"}


def test_pages_of_files_follow_each_other_both_ways(http: TestClient) -> None:
    ids = [send(http, ROW).json()["id"] for _ in range(5)]
    first = http.get("/v1/files", params={"limit": 2, "order": "asc"})
    assert [file["id"] for file in first.json()["data"]] == ids[:2]
    assert (first.json()["first_id"], first.json()["last_id"], first.json()["has_more"]) == (ids[0], ids[1], True)
    url = first.headers["Link"].partition(">")[0].removeprefix("<")
    second = http.get(url).json()
    assert [file["id"] for file in second["data"]] == ids[2:4]
    back = http.get("/v1/files", params={"limit": 2, "order": "asc", "before": ids[2]}).json()
    assert [file["id"] for file in back["data"]] == ids[:2]
    assert [file["id"] for file in http.get("/v1/files").json()["data"]] == ids[::-1]
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"lmit": 1}, {"after": "x" * 65}):
        assert http.get("/v1/files", params=wrong).status_code == 422, wrong


def test_a_purged_file_leaves_its_counts_and_its_keyed_digest(
    http: TestClient, settings: Settings, sessions: Sessions, request_body: dict[str, Any]
) -> None:
    file = send(http, ROW, name="ada.jsonl").json()
    assert http.delete(f"/v1/files/{file['id']}").status_code == 204
    assert stored(settings) == []
    left = http.get(f"/v1/files/{file['id']}").json()
    assert left.pop("purged_at").endswith("Z")
    assert left == {key: value for key, value in file.items() if key != "purged_at"} | {
        "sha256": None,
        "filename": None,
    }
    assert file["digest"] not in (f"hmac-sha256:{hashlib.sha256(ROW).hexdigest()}", "hmac-sha256:" + "0" * 64)
    with sessions.begin() as s:
        assert files.get(s, file["id"]).sealed is None
    assert http.delete(f"/v1/files/{file['id']}").status_code == 204, "again changes nothing"
    refused = http.post("/v1/unlearning/jobs", json=request_body | {"forget_set": file["id"]})
    assert [error["code"] for error in refused.json()["errors"]] == ["purged"]


def test_a_file_that_a_job_needs_stays(
    http: TestClient, upload: Callable[..., str], request_body: dict[str, Any]
) -> None:
    request_body["forget_set"] = upload("forget_set", [{"text": "x"}])
    job = http.post("/v1/unlearning/jobs", json=request_body).json()
    for purpose in ("forget_set", "retain_set"):
        assert http.delete(f"/v1/files/{job[purpose]}").status_code == 409
    http.post(job["links"]["cancel"])
    assert http.delete(f"/v1/files/{job['forget_set']}").status_code == 204
