"""A bucket that fails: uploads say so within their time, what does not need it is answered, and what is sent again is kept."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.abuse.live import ALONE_S, LIST, READYZ, Live, Seen, live, statuses, struck, upload
from tests.abuse.proxy import REFUSED, SILENT, Fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
UPLOADS = 8
BYTES = 2**18


@pytest.fixture
def here(database_url: str, bucket: str, s3: str, tmp_path: Path) -> Iterator[Live]:
    with live(database_url, tmp_path, s3, storage_url=bucket) as started:
        yield started


def test_uploads_to_a_bucket_that_fails(here: Live) -> None:
    assert here.bucket is not None
    for name, fault, expected in (
        ("refuses", REFUSED, {503}),
        ("is cut", Fault(request_bytes=2**14), {503}),
        ("is delayed", Fault(delay_s=0.3), {201}),
        (
            "is silent",
            SILENT,
            {0, 503},
        ),  # 0: not within a minute; it is tried again and again, and others are refused meanwhile
    ):
        uploads = Seen()
        with struck(here, f"bucket {name}", here.bucket.fault(fault)) as (_, seen), ThreadPoolExecutor(UPLOADS) as pool:
            keys = [f"{name}-{number}".replace(" ", "-") for number in range(UPLOADS)]
            for answer, seconds in pool.map(lambda key: upload(here, key, BYTES), keys):
                uploads.note(answer, seconds)
        print(f"    uploads                        {uploads}")
        assert statuses(uploads) <= expected
        assert statuses(seen[LIST]) == {200}
        assert 200 in statuses(seen[READYZ])
        assert seen[LIST].longest_s < ALONE_S
        again = Seen()
        for key in keys:
            again.note(*upload(here, key, BYTES))
        assert statuses(again) == {201}
