"""What holds of a job's row, its events and its audit entries at any time, and between any two."""

from typing import Any

from sqlalchemy import text

from service.domain.job import HELD, TERMINAL, TRANSITIONS, Status

S = Status
Row = dict[str, Any]
ENDS = {"job.succeeded": S.SUCCEEDED, "job.failed": S.FAILED, "job.cancelled": S.CANCELLED}

# All that there is of the jobs: their rows, and everything that hangs on them.
ALL = text(
    """
    SELECT jobs.*,
           ARRAY(SELECT seq || ' ' || type FROM job_events e WHERE e.job_id = jobs.id ORDER BY seq) AS events,
           ARRAY(SELECT fence || ' ' || step FROM job_steps r WHERE r.job_id = jobs.id ORDER BY fence, step) AS steps,
           ARRAY(SELECT fence || ' ' || step FROM job_checks c WHERE c.job_id = jobs.id ORDER BY fence, step) AS checks,
           ARRAY(SELECT fence || ' ' || step FROM job_checkpoints k
                  WHERE k.job_id = jobs.id ORDER BY fence DESC, step DESC) AS checkpoints,
           ARRAY(SELECT key FROM artifacts a WHERE a.job_id = jobs.id) AS artifacts,
           ARRAY(SELECT action FROM audit_events o
                  WHERE o.tenant_id = jobs.tenant_id AND o.seq > :since AND o.object_id = jobs.id ORDER BY seq) AS audited
      FROM jobs
    """
)


def is_whole(row: Row) -> None:
    """What must hold of a job at any time."""
    types = [event.split()[1] for event in row["events"]]
    assert [int(event.split()[0]) for event in row["events"]] == list(range(1, row["last_seq"] + 1))
    assert types.count("job.started") == row["fence"]
    assert types.count("job.succeeded") == (row["status"] == S.SUCCEEDED), "once, or never"
    assert types.count("job.cancelled") == (row["status"] == S.CANCELLED)
    if row["status"] in TERMINAL:
        assert ENDS[types[-1]] == row["status"], "its end is its last event"
    held = row["status"] in HELD
    assert {row[name] is not None for name in ("lease_owner", "lease_until", "beat_at")} == {held}
    assert held or (row["stage"] is None and all(stage["finished_at"] for stage in row["stage_history"]))
    assert (row["verdict"] is not None, bool(row["artifacts"])) == (row["status"] == S.SUCCEEDED,) * 2
    assert row["not_before"] is None or row["status"] == S.QUEUED
    assert len(row["checkpoints"]) <= (0 if row["status"] in {S.SUCCEEDED, S.CANCELLED} else 2)
    if row["status"] in {S.QUEUED, S.PAUSED}:
        newest = row["checkpoints"][0].split()[1] if row["checkpoints"] else 0
        assert row["step"] == int(newest), "the next attempt goes on from there"
    if row["status"] in {S.QUEUED, S.RUNNING}:
        assert row["cancel_requested_at"] is row["pause_requested_at"] is None, "nobody wants it to stop"
    if row["status"] in {S.PAUSING, S.PAUSED}:
        assert row["pause_requested_at"] is not None


def goes_on(before: Row, after: Row) -> None:
    """What must hold between two looks with one verb between them."""
    if before["status"] in TERMINAL and before["status"] == after["status"]:
        assert after == before, "what has ended does not change"
    if before["status"] != after["status"]:
        assert Status(after["status"]) in TRANSITIONS[Status(before["status"])]
        assert after["audited"] == [*before["audited"], f"job.{after['status']}"]
        assert after["version"] == before["version"] + 1
        assert len(after["events"]) > len(before["events"])
    else:
        assert after["audited"] == before["audited"]
    assert after["fence"] - before["fence"] == (before["status"] == S.QUEUED and after["status"] == S.RUNNING)
    assert after["events"][: before["last_seq"]] == before["events"], "what was told stays told"
    assert len(after["steps"]) >= len(before["steps"]), "whosever they become"
