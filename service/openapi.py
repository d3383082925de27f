"""The OpenAPI document of the API, as the repository keeps it:

python -m service.openapi                 prints it
python -m service.openapi --check FILE    exits with 1 and shows the difference if FILE is not that
"""

import argparse
import json
import sys
from base64 import b64encode
from difflib import unified_diff
from pathlib import Path

from pydantic import SecretStr

from service.app import create_app
from service.settings import Settings
from service.store.secrets import KEY_BYTES


def rendered() -> str:
    """The same on every machine: no setting changes it, and nothing is connected to."""
    settings = Settings.model_construct(master_key=SecretStr(b64encode(bytes(KEY_BYTES)).decode()))
    return json.dumps(create_app(settings).openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.openapi", description="Print or check the document.")
    parser.add_argument("--check", type=Path, metavar="FILE", help="exit with 1 if FILE is not the current document")
    options = parser.parse_args(arguments)
    current = rendered()
    if options.check is None:
        sys.stdout.write(current)
        return 0
    stored = options.check.read_text(encoding="utf-8") if options.check.exists() else ""
    if stored == current:
        return 0
    sys.stderr.write(f"{options.check} is stale (run `make openapi`):\n")
    sys.stderr.writelines(unified_diff(stored.splitlines(True), current.splitlines(True), "stored", "current", n=1))
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
