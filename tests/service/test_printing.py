"""What the command line prints when names, messages and a whole server are a stranger's."""

import ast
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import typer
import uvicorn
from typer.testing import Result

from service.app import create_app
from service.cli import app
from service.domain.job import ModelEntry, PromptFormat
from service.printing import visible
from service.settings import Settings
from service.store import models
from service.store.session import Sessions
from tests.service import test_cli
from tests.service.conftest import Bell

run = test_cli.run
sets = test_cli.sets
ROOT = Path(__file__).parents[2]
COMMANDS = ("cli", "local", "planned", "printing", "remote", "remote_compliance", "remote_webhooks", "terminal")
# Clears the screen, names the window, begins a line anew, and a line, in one byte each of C1; turns the writing round; hides.
HOSTILE = "\x1b[2J\x1b]0;x\x07\r\nforged\x9b31m\x85\u202egpj\u2066\u200b\u2028\x00\x7f"
LISTS = {"list", "show", "status", "suites", "deliveries", "rows", "watch"}
KEPT = {"id", "status"}  # what the client goes on with


def hostile(value: Any, key: str = "") -> Any:
    """The same JSON with the characters in every string that is not a time, and in names."""
    if isinstance(value, dict):
        return {
            name + (HOSTILE if key in ("sets", "losses") else ""): hostile(one, name) for name, one in value.items()
        }
    if isinstance(value, list):
        return [hostile(one, key) for one in value]
    if not isinstance(value, str) or key in KEPT or key.endswith("_id"):
        return value
    try:
        datetime.fromisoformat(value)
    except ValueError:
        return value + HOSTILE
    return value


class Hostile:
    """ASGI: the API, each of whose JSON answers was altered on its way."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.active = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not self.active or scope["type"] != "http":
            await self.served(scope, receive, send)
            return
        start: dict[str, Any] = {}
        body = b""

        async def altered(message: Any) -> None:
            nonlocal body
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                content = body
                headers = dict(start["headers"])
                if b"json" in headers.get(b"content-type", b"") and body:
                    content = json.dumps(hostile(json.loads(body))).encode()
                headers[b"content-length"] = str(len(content)).encode()
                await send({**start, "headers": list(headers.items())})
                await send({"type": "http.response.body", "body": content})

        await self.served(scope, receive, altered)


@pytest.fixture
def server(
    settings: Settings, sessions: Sessions, make_key: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Hostile]]:
    monkeypatch.setenv("UNLEARN_API_KEY", make_key("admin"))
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="m", source="path", location="m", prompt_format=PromptFormat()))
    served = Hostile(create_app(settings, dispatcher=Bell()))
    serving = uvicorn.Server(uvicorn.Config(served, port=0, log_level="error"))
    thread = threading.Thread(target=serving.run)
    thread.start()
    while not serving.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{serving.servers[0].sockets[0].getsockname()[1]}", served
    serving.should_exit = True
    thread.join()


def leaves(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from leaves(one, *path, name)
    else:
        yield path


def assert_obeys_nobody(printed: str) -> None:
    assert printed == "".join(f"{visible(line)}\n" for line in printed.split("\n")[:-1])


def test_no_command_lets_a_terminal_obey_what_a_server_answers(
    run: Callable[..., Result], server: tuple[str, Hostile], sets: list[object], tmp_path: Path
) -> None:
    url, served = server
    job = run("submit", "--model", "m", *sets, "--epsilon", 1, "--url", url).stdout.strip()
    request = run(
        "requests", "submit", "--regulation", "gdpr", "--model", "m", *sets[:2], "--reference", "R", "--url", url
    )
    request_id = request.stdout.strip()
    assert run("plans", "set", "m", *sets[2:], "--epsilon", 1, "--url", url).exit_code == 0
    endpoint = run("webhooks", "add", "https://8.8.8.8/hook", "--url", url).stdout.split()[0]
    assert run("webhooks", "test", endpoint, "--url", url).exit_code == 0
    added = run(
        "benchmarks", "add", "b", "--suite", "tofu", "--corpus", "C", *test_cli.tofu_sets(url, tmp_path), "--url", url
    )
    assert added.exit_code == 0, added.output
    assert run("cancel", job, "--url", url).stdout == "cancelled\n"
    commands: dict[tuple[str, ...], list[tuple[object, ...]]] = {
        ("status",): [(), (job,), ("--json",)],
        ("watch",): [(job,), (job, "--json")],
        ("submit",): [("--model", "m", *sets, "--epsilon", 1), ("--model", "m", *sets, "--epsilon", 1, "--dry-run")],
        ("benchmarks", "suites"): [()],
        ("benchmarks", "list"): [()],
        ("keys", "list"): [(), ("--json",)],
        ("requests", "list"): [(), ("--json",)],
        ("requests", "show"): [(request_id,)],
        ("requests", "rows"): [(request_id,)],
        ("requests", "approve"): [(request_id,)],
        ("plans", "show"): [("m",)],
        ("webhooks", "list"): [()],
        ("webhooks", "deliveries"): [(endpoint,), (endpoint, "--json")],
    }
    here = {("models", "list"), ("tenants", "list"), ("signing-keys", "list")}  # of the database, below
    lists = {path for path in leaves(typer.main.get_command(app)) if path[-1] in LISTS}
    assert lists <= commands.keys() | here, "a command that lists or shows is not tried here"
    for command, every in commands.items():
        for arguments in every:
            served.active = False
            plain = run(*command, *arguments, "--url", url)
            served.active = True
            altered = run(*command, *arguments, "--url", url)
            assert altered.exception is None or isinstance(altered.exception, SystemExit), (command, altered.exception)
            assert_obeys_nobody(altered.output)
            if command[-1] in LISTS - {"watch"} and "--json" not in arguments:
                assert altered.output.count("\n") == plain.output.count("\n"), (command, altered.output)
    assert "\\x1b[2J" in run("keys", "list", "--url", url).stdout


def test_the_registry_is_shown_and_not_obeyed(run: Callable[..., Result], sessions: Sessions) -> None:
    location = HOSTILE.replace("\x00", "")
    with sessions.begin() as s:
        models.add(s, ModelEntry(name="h", source="path", location=location, prompt_format=PromptFormat()))
    for command in (("models", "list"), ("tenants", "list"), ("signing-keys", "list")):
        listed = run(*command)
        assert listed.exit_code == 0
        assert_obeys_nobody(listed.stdout)
    assert visible(location) in run("models", "list").stdout


def test_an_error_of_a_server_forges_no_line(run: Callable[..., Result], server: tuple[str, Hostile]) -> None:
    url, served = server
    served.active = True
    for arguments in (("status", "ujob_none"), ("keys", "create", "x", "--role", "none")):
        refused = run(*arguments, "--url", url)
        assert refused.exit_code == 2
        assert_obeys_nobody(refused.stderr)
        assert refused.stderr.count("\\x1b[2J") >= 2, "the title's and the detail's"
        assert not re.search("^forged", refused.stderr, re.MULTILINE)


def test_a_reference_is_shown_and_not_obeyed(
    run: Callable[..., Result], server: tuple[str, Hostile], sets: list[object]
) -> None:
    url, _ = server
    hidden = HOSTILE.replace("\x00", "")
    sent = run(
        "requests", "submit", "--regulation", "gdpr", "--model", "m", *sets[:2], "--reference", hidden, "--url", url
    )
    assert sent.exit_code == 0, sent.output
    listed = run("requests", "list", "--url", url).stdout
    assert_obeys_nobody(listed)
    assert listed.count("\n") == 1
    assert visible(hidden) in listed


def test_ordinary_names_are_printed_as_they_are() -> None:
    for text in ("Müller", "山田 太郎", "C:\\new", "R&D «x»", "e\u0301", "🙂"):
        assert visible(text) == text
    assert visible("\ud800") == "\\ud800"


def test_the_command_line_prints_through_one_function() -> None:
    files = [*(ROOT / "service" / f"{name}.py" for name in COMMANDS), ROOT / "service" / "evidence" / "command.py"]
    prints = {"echo", "secho", "print", "write", "style"}
    found = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in prints
        and not (
            isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "opened"
        )
    ]
    assert {one.partition(":")[0] for one in found} == {"printing.py"}, found
