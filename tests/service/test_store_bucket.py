"""A bucket whose server is away, slow, full, or refuses: real answers over HTTP, in our words. And the API on a bucket."""

import asyncio
import hashlib
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from aiobotocore.httpsession import AIOHTTPSession
from fsspec.config import conf
from pytest_httpserver import HTTPServer
from starlette.testclient import TestClient
from werkzeug import Request, Response

from service.domain.errors import StorageFull, StorageUnavailable
from service.domain.job import Verdict
from service.orphans import delete_orphans
from service.settings import Settings
from service.store import bucket, jobs
from service.store.rows import ArtifactRow
from service.store.session import Sessions
from service.store.storage import Storage
from tests.service.conftest import JOBS

ONCE = {"connect_timeout": 0.5, "read_timeout": 0.2, "retries": {"total_max_attempts": 1}}
URL = "s3://somebody-elses/root"


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Storage]:
    """at(endpoint) -> a storage there, which asks once; told as an operator tells it."""

    def storage(endpoint: str) -> Storage:
        told = {"endpoint_url": endpoint, "key": "ours", "secret": "secret", "config_kwargs": ONCE}
        monkeypatch.setitem(conf, "s3", told)
        return Storage(URL)

    return storage


def uses(storage: Storage) -> list[Callable[[], Any]]:
    return [
        lambda: storage.write("jobs/key", [b"x"]),
        lambda: storage.write("jobs/key", [bytes(9 * 2**20)]),
        lambda: list(storage.read("jobs/key")),
        lambda: list(storage.ages("jobs")),
        lambda: storage.delete("jobs/key"),
    ]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (507, "XMinioStorageFull", StorageFull),
        (400, "XMinioAdminBucketQuotaExceeded", StorageFull),
        (403, "QuotaExceeded", StorageFull),
        (507, "SomethingElse", StorageFull),
        (403, "AccessDenied", StorageUnavailable),
        (403, "InvalidAccessKeyId", StorageUnavailable),
        (404, "NoSuchBucket", StorageUnavailable),
        (500, "InternalError", StorageUnavailable),
        (503, "SlowDown", StorageUnavailable),
        (418, "OfAnotherKind", StorageUnavailable),
    ],
)
def test_what_the_server_refuses(
    at: Callable[[str], Storage], httpserver: HTTPServer, status: int, code: str, expected: type[Exception]
) -> None:
    body = f"<Error><Code>{code}</Code><Message>about somebody-elses/root/jobs/key</Message></Error>"
    httpserver.expect_request("/somebody-elses/root/jobs/key").respond_with_data(body, status)
    httpserver.expect_request("/somebody-elses").respond_with_data(body, status)
    storage = at(httpserver.url_for(""))
    with pytest.raises(expected) as caught:
        storage.write("jobs/key", [b"x"])
    assert "somebody" not in str(caught.value)
    for use in uses(storage):
        with pytest.raises((StorageFull, StorageUnavailable)):
            use()


def test_nobody_listens(at: Callable[[str], Storage]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    for use in uses(at(f"http://127.0.0.1:{port}")):
        with pytest.raises(StorageUnavailable, match="EndpointConnectionError"):
            use()


def test_nobody_answers(at: Callable[[str], Storage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to a request nor, before the body of a write is sent, that it may come."""
    monkeypatch.setattr(bucket, "REQUEST_S", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as silent:
        storage = at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for use in uses(storage):
            with pytest.raises(StorageUnavailable, match="ReadTimeoutError"):
                use()


def test_an_object_that_the_server_keeps_is_not_told_of_as_deleted(
    at: Callable[[str], Storage], httpserver: HTTPServer
) -> None:
    """Where several are deleted in one request, the answer is 200 whatever became of each."""
    kept = "<Error><Key>root/jobs/key</Key><Code>AccessDenied</Code></Error>"
    listed = (
        "<Contents><Key>root/jobs/key</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
    )
    listing = f"<ListBucketResult><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
    httpserver.expect_request("/somebody-elses", method="GET").respond_with_data(listing)
    httpserver.expect_request("/somebody-elses", method="POST").respond_with_data(
        f"<DeleteResult>{kept}</DeleteResult>"
    )
    httpserver.expect_request("/somebody-elses/root/jobs", method="DELETE").respond_with_data(status=204)
    httpserver.expect_request("/somebody-elses/root/jobs/key", method="DELETE").respond_with_data(kept, 403)
    with pytest.raises(StorageUnavailable):
        at(httpserver.url_for("")).delete("jobs")


def test_a_large_part_and_the_completion_get_the_time_that_they_take(
    at: Callable[[str], Storage], httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = "<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
    done = '<CompleteMultipartUploadResult><ETag>"whole"</ETag></CompleteMultipartUploadResult>'
    send, parts = AIOHTTPSession.send, []

    async def over_a_slow_line(session: AIOHTTPSession, request: Any) -> Any:
        await asyncio.sleep(1.2 if "partNumber=1" in request.url else 0)
        return await send(session, request)

    def put_together(_: Request) -> Response:
        time.sleep(1.2)  # without a word
        return Response(done)

    def part(request: Request) -> Response:
        parts.append(len(request.data))
        return Response(headers={"ETag": '"part"'})

    path = "/somebody-elses/root/jobs/key"
    httpserver.expect_request(path, method="POST", query_string="uploads").respond_with_data(begun)
    httpserver.expect_request(path, method="PUT").respond_with_handler(part)
    httpserver.expect_request(path, method="POST", query_string="uploadId=one").respond_with_handler(put_together)
    monkeypatch.setattr(AIOHTTPSession, "send", over_a_slow_line)
    monkeypatch.setattr(bucket, "REQUEST_S", 1.0)
    monkeypatch.setitem(ONCE, "read_timeout", 1.0)
    at(httpserver.url_for("")).write("jobs/key", [bytes(bucket.BLOCK_BYTES), b"x"])
    assert parts == [bucket.BLOCK_BYTES, 1]


def test_uploads_that_nobody_completed_are_found_on_every_page(
    at: Callable[[str], Storage], httpserver: HTTPServer
) -> None:
    def page(upload: str, after: str) -> str:
        told = "<Key>root/jobs/key</Key><Initiated>2026-01-01T00:00:00Z</Initiated>"
        return f"<R><Upload>{told}<UploadId>{upload}</UploadId></Upload>{after}</R>"

    markers = "<NextKeyMarker>root/jobs/key</NextKeyMarker><NextUploadIdMarker>one</NextUploadIdMarker>"
    second = {"uploads": "", "prefix": "root/jobs", "key-marker": "root/jobs/key", "upload-id-marker": "one"}
    httpserver.expect_request("/somebody-elses", query_string=second).respond_with_data(
        page("two", "<IsTruncated>false</IsTruncated>")
    )
    first = {"uploads": "", "prefix": "root/jobs"}
    httpserver.expect_request("/somebody-elses", query_string=first).respond_with_data(
        page("one", f"<IsTruncated>true</IsTruncated>{markers}")
    )
    empty = "<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
    httpserver.expect_request("/somebody-elses").respond_with_data(empty)
    httpserver.expect_request("/somebody-elses/root/jobs", method="HEAD").respond_with_data(status=404)
    httpserver.expect_request(re.compile("/somebody-elses/root/jobs.*"), method="DELETE").respond_with_data(status=204)
    storage = at(httpserver.url_for(""))
    assert len({key for key, _ in storage.ages("jobs")}) == 2
    storage.delete("jobs")
    aborted = [request.args["uploadId"] for request, _ in httpserver.log if "uploadId" in request.args]
    assert aborted == ["one", "two"]


class TestTheApiOnABucket:
    @pytest.fixture
    def settings(self, settings: Settings, bucket: str) -> Settings:
        return settings.model_copy(update={"storage_url": bucket})

    @pytest.fixture
    def storage(self, settings: Settings) -> Storage:
        return Storage(settings.storage_url)

    @pytest.fixture
    def artifact(
        self, http: TestClient, storage: Storage, sessions: Sessions, new_job: Callable[..., str]
    ) -> dict[str, Any]:
        """Of two chunks, published."""
        job_id = new_job()
        key = f"jobs/{job_id}/attempts/1/adapter.bin"
        row = ArtifactRow("adapter.bin", key, "application/octet-stream", *storage.write(key, [bytes(3 * 2**19)]))
        with sessions.begin() as s:
            claim = jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
            assert claim is not None
            jobs.succeed(s, job_id, claim.fence, Verdict(result="PASSED", gates=[], message="ok"), [row])
        (told,) = http.get(f"{JOBS}/{job_id}/artifacts").json()["data"]
        return {**told, "key": key}

    def test_a_set_is_kept_read_and_purged(
        self,
        http: TestClient,
        storage: Storage,
        upload: Callable[..., str],
        content_of: Callable[[str], bytes],
    ) -> None:
        file_id = upload("forget_set", [{"text": f"row {number}"} for number in range(20_000)])
        assert content_of(file_id).count(b"\n") == 20_000
        assert [key for key, _ in storage.ages("files")] == [f"files/{file_id}.sealed"]
        assert http.delete(f"/v1/files/{file_id}").status_code == 204
        assert list(storage.ages("files")) == []

    def test_an_artifact_is_downloaded_whole_and_in_parts(self, http: TestClient, artifact: dict[str, Any]) -> None:
        whole = http.get(artifact["content"])
        assert (whole.status_code, hashlib.sha256(whole.content).hexdigest()) == (200, artifact["sha256"])
        part = http.get(artifact["content"], headers={"Range": "bytes=5-9"})
        assert (part.status_code, part.content) == (206, bytes(5))

    def test_an_upload_that_nobody_completed_goes_and_the_artifact_of_its_key_stays(
        self, http: TestClient, storage: Storage, sessions: Sessions, artifact: dict[str, Any]
    ) -> None:
        fs, (name, _, root) = storage._place.fs, storage.root.partition("/")
        fs.call_s3("create_multipart_upload", Bucket=name, Key=f"{root}/{artifact['key']}")
        assert (delete_orphans(sessions, storage), delete_orphans(sessions, storage)) == (1, 0)
        assert [key for key, _ in storage.ages("jobs")] == [artifact["key"]]
        assert fs.list_multipart_uploads(name) == []
        assert http.get(artifact["content"]).status_code == 200

    def test_a_bucket_that_vanished_is_a_503_and_nothing_is_kept(
        self, http: TestClient, storage: Storage, artifact: dict[str, Any]
    ) -> None:
        fs = storage._place.fs
        fs.rm(storage.root.partition("/")[0], recursive=True)
        file = {"file": ("f.jsonl", '{"text": "row"}\n')}
        for reply in (
            http.get(artifact["content"]),
            http.get(artifact["content"], headers={"Range": "bytes=5-9"}),
            http.post("/v1/files", data={"purpose": "forget_set"}, files=file),
        ):
            assert (reply.status_code, reply.json()["type"]) == (503, "/docs#service-unavailable")
            assert reply.json()["detail"] == "the root of the storage is gone"
        assert [file for file in http.get("/v1/files").json()["data"] if file["bytes"] > 1] == []
