"""What a log says of an error: where and of what kind, never its own words."""

import json
import subprocess
import sys

RAISES = """
import structlog
from service import logs
logs.configure("INFO")
def inner(row):
    raise KeyError(row)
try:
    try:
        inner("Ada lives in Ghent")
    except KeyError as error:
        raise ValueError("Ada again") from error
except ValueError:
    structlog.get_logger().exception("it broke", job_id="ujob_1")
"""


def test_a_logged_error_names_places_and_kinds_and_quotes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", RAISES], capture_output=True, text=True, check=True)
    told = json.loads(done.stderr)
    assert (told["event"], told["job_id"]) == ("it broke", "ujob_1")
    assert told["exception"].endswith("builtins.ValueError from builtins.KeyError")
    assert ", line " in told["exception"]
    assert "Ada" not in done.stderr
