"""unlearn: what an administrator does on the machine, and what a user does over HTTP.

What needs the database, a server or torch is imported by the command that needs it: the others answer at once.
"""

import gc
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service import printing, remote, remote_compliance, remote_webhooks, terminal
from service.domain import modelfiles
from service.domain.errors import UnlearnError
from service.domain.identity import ROLES
from service.domain.job import SPACE_WARNING, ModelEntry, PromptFormat
from service.evidence import command
from service.importing import importing

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from service.settings import Settings

app = typer.Typer(help=__doc__.partition("\n")[0], no_args_is_help=True, add_completion=False, rich_markup_mode=None)
tenants_app = typer.Typer(
    help="Whom the service serves; a tenant's first key.", no_args_is_help=True, rich_markup_mode=None
)
models_app = typer.Typer(
    help="The registry: the only models that a request can name.", no_args_is_help=True, rich_markup_mode=None
)
keys_app = typer.Typer(
    help="What certificates are signed with; all stay published.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(models_app, name="models")
app.add_typer(tenants_app, name="tenants")
app.add_typer(keys_app, name="signing-keys")
app.add_typer(remote.app)  # what goes over HTTP
app.add_typer(remote_compliance.app)
app.add_typer(remote_webhooks.app, name="webhooks")
app.add_typer(command.app)  # what needs neither a service nor a network: verify


TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Form(StrEnum):
    chat = "chat"
    plain = "plain"


FormOption = Annotated[
    Form | None, typer.Option("--prompt-format", help="default: chat if the tokeniser has a chat template, else plain")
]
System = Annotated[str | None, typer.Option(help="chat: the system's message")]
TemplateArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--template-argument",
        metavar="NAME=VALUE",
        help="chat: what the template reads beside the messages, as JSON or else as text: enable_thinking=false",
    ),
]
TemplateDate = Annotated[
    datetime | None,
    typer.Option(formats=["%Y-%m-%d"], help="chat: the date for a template that reads the clock [default: today]"),
]
UserStart = Annotated[str | None, typer.Option(help="plain: before the question [default: 'Question: ']")]
UserEnd = Annotated[str | None, typer.Option(help="plain: after it [default: a line's end]")]
GrantTo = Annotated[
    str | None, typer.Option(help="the role of the service and the workers: it gets what they need, and no more")
]
AssistantStart = Annotated[str | None, typer.Option(help="plain: before the answer [default: 'Answer: ']")]


@app.command()
def api() -> None:
    """Serve the API."""
    with importing():
        import structlog
        import uvicorn

        from service import logs
        from service.app import create_app
        from service.connections import timed
        from service.settings import Settings

    logs.configure()
    settings = Settings()
    logs.configure(settings.log_level)
    log = structlog.get_logger(__name__)
    try:
        served = create_app(settings)
    except RuntimeError as error:  # of a setting
        log.error("the API cannot start", error=str(error))
        raise typer.Exit(1) from error
    config = uvicorn.Config(
        served,
        http=timed(settings.request_head_s, settings.request_idle_s),
        ws="none",
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,  # as service.logs has set it up
        log_level=settings.log_level.lower(),
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        access_log=False,  # service.api.edge has a line without query strings: an external_reference may name a person
        timeout_graceful_shutdown=10,
    )
    server = uvicorn.Server(config)
    served.state.stopping = lambda: server.should_exit  # what is held open for a client ends then
    gc.collect()
    gc.freeze()  # else a body of many lists has the collector walk through all that was imported, again and again
    server.run()
    if not server.started:
        raise typer.Exit(1)


@app.command()
def migrate(
    revision: str = "head",
    grant_to: GrantTo = None,
    yes: Annotated[bool, typer.Option("--yes", help="go on where uploaded files would be lost")] = False,
) -> None:
    """Bring the database to a revision of the schema, as the owner of its tables."""
    with importing():
        from service import logs
        from service.migrate import DataLoss, upgrade
        from service.settings import Settings

    logs.configure()
    with _told():
        settings = Settings()
        logs.configure(settings.log_level)
        url = settings.database_url
        try:
            upgrade(url, revision, grant_to, accept_loss=yes)
        except DataLoss as loss:
            if not sys.stdin.isatty():
                raise UnlearnError(f"{loss}, then run `unlearn migrate --yes`") from loss
            typer.confirm(f"{loss}. Go on?", abort=True)
            upgrade(url, revision, grant_to, accept_loss=True)
    printing.line(f"the database is at {revision}")


@app.command()
def up(
    folder: Path = Path(".unlearn"),
    yes: Annotated[bool, typer.Option("--yes", help="go on where uploaded files would be lost")] = False,
) -> None:
    """Run the whole service on this machine: Postgres, Valkey, API, worker, sweep."""
    printing.line("Starting Postgres, Valkey, the API, a worker and the sweep; the first time takes longest.")
    with importing():
        from service import logs
        from service.local import up
        from service.migrate import DataLoss

    logs.configure("WARNING")  # beside the lines for people; each part has a log of its own
    with _told():
        try:
            up(folder, accept_loss=yes)
        except DataLoss as loss:
            raise UnlearnError(f"{loss}, then run `unlearn up --yes`") from loss


@app.command()
def demo(folder: Path = Path(".unlearn/demo"), seed: int = 0) -> None:
    """Make a model that has memorised people, and have it forget some of them."""
    printing.line("Starting the service, and training a small model that knows people by heart.")
    with importing():
        from service import logs
        from service.demo import demo

    logs.configure("WARNING")
    with _told():
        code = demo(folder, seed)
    raise typer.Exit(code)


@models_app.command("add")
def add(
    name: str,
    path: Annotated[Path | None, typer.Option(help="a folder below MODELS_ROOT")] = None,
    hub: Annotated[str | None, typer.Option(help="a Hub model at a commit", metavar="ID@SHA")] = None,
    prompt_format: FormOption = None,
    system: System = None,
    template_argument: TemplateArguments = None,
    template_date: TemplateDate = None,
    user_start: UserStart = None,
    user_end: UserEnd = None,
    assistant_start: AssistantStart = None,
    gpu_class: Annotated[str, typer.Option(help="the class of accelerator that it needs")] = "any",
) -> None:
    """Register a model. Safetensors only; nothing of it is run. In --user-start and the others, \\n is a line's end."""
    if (path is None) == (hub is None):
        raise typer.BadParameter("give exactly one of --path and --hub")
    form = _form(prompt_format, _chat(system, template_argument, template_date), user_start, user_end, assistant_start)
    with importing():
        from service import register
        from service.settings import Settings
        from service.store import models

    settings = Settings()
    with _told():
        entry = (
            register.folder_entry(settings, name, path, form, gpu_class)
            if path
            else register.hub_entry(settings, name, hub or "", form, gpu_class)
        )
        with _database() as (s, _):
            models.add(s, entry)
    printing.line(_line(entry))
    if entry.prompt_format.ends_in_space:
        printing.line(f"warning: {SPACE_WARNING}", error=True)


Approvals = Annotated[int, typer.Option(min=0, max=2, help="persons who must approve a deletion request")]
KeepFiles = Annotated[
    int | None, typer.Option(min=0, metavar="DAYS", help="purge uploaded sets so long after their upload")
]

KeepForgotten = Annotated[
    int, typer.Option(min=0, metavar="DAYS", help="keep what completed requests had forgotten, to be measured again")
]


MaxRunning = Annotated[int | None, typer.Option(min=0, metavar="JOBS", help="at once; more of them wait. 0: no bound")]
MaxOpen = Annotated[
    int | None, typer.Option(min=0, metavar="JOBS", help="that have not ended; more are refused. 0: no bound")
]


@tenants_app.command("add")
def add_tenant(
    name: str,
    approvals: Approvals = 0,
    keep_files: KeepFiles = None,
    keep_forgotten: KeepForgotten = 0,
    max_running: MaxRunning = None,
    max_open: MaxOpen = None,
) -> None:
    """Serve another tenant. Nothing of one is seen by another."""
    if TENANT.fullmatch(name) is None:
        raise typer.BadParameter("a tenant's name has lower-case letters, digits and '-', at most 63")
    with importing():
        from service.store import tenants

    with _told(), _database() as (s, _):
        tenants.add(
            s,
            name,
            approvals=approvals,
            keep_files_days=keep_files,
            keep_forgotten_days=keep_forgotten,
            max_running_jobs=max_running or None,
            max_open_jobs=max_open or None,
        )
    printing.line(name)


@tenants_app.command("change")
def change_tenant(
    name: str,
    approvals: Annotated[int | None, typer.Option(min=0, max=2)] = None,
    keep_files: Annotated[int | None, typer.Option(min=-1, metavar="DAYS")] = None,
    keep_forgotten: Annotated[int | None, typer.Option(min=0, metavar="DAYS")] = None,
    max_running: MaxRunning = None,
    max_open: MaxOpen = None,
) -> None:
    """What is given, for what is asked from now on. --keep-files -1: as long as nobody purges them."""
    rules = {"approvals": approvals, "keep_files_days": keep_files, "keep_forgotten_days": keep_forgotten}
    quotas = {"max_running_jobs": max_running, "max_open_jobs": max_open}
    with importing():
        from service.store import tenants

    with _told(), _database() as (s, _):
        given = {rule: None if value == -1 else value for rule, value in rules.items() if value is not None}
        given |= {quota: value or None for quota, value in quotas.items() if value is not None}
        tenants.change(s, name, **given)


@tenants_app.command("list")
def list_tenants() -> None:
    """A line each."""
    with importing():
        from service.store import tenants

    with _told(), _database() as (s, _):
        for tenant in tenants.every(s):
            kept = "for ever" if tenant.keep_files_days is None else f"{tenant.keep_files_days} days"
            running, open_ = (bound or "any" for bound in (tenant.max_running_jobs, tenant.max_open_jobs))
            printing.line(
                f"{tenant.id}  approvals {tenant.approvals}  keeps files {kept}, forgotten rows "
                f"{tenant.keep_forgotten_days} days  jobs running {running}, open {open_}"
            )


@tenants_app.command("key")
def tenant_key(
    name: Annotated[str | None, typer.Argument(help="none: the tenant that is there from the beginning")] = None,
    role: Annotated[str, typer.Option(help=", ".join(ROLES))] = "admin",
) -> None:
    """Make a key on this machine, the first of a tenant, and show it: once. More are made with it, over HTTP."""
    with importing():
        from service import register
        from service.settings import Settings
        from service.store import tenants

    with _told():
        printing.line(register.first_key(Settings(), name or tenants.DEFAULT, role))


@keys_app.command("rotate")
def rotate_signing_key() -> None:
    """Sign with another key from now on; prints its id. Certificates that are out stay valid."""
    with importing():
        from service.store import evidence_keys
        from service.store.secrets import secrets_of

    with _told(), _database() as (s, settings):
        printing.line(evidence_keys.rotate(s, secrets_of(settings)))


@keys_app.command("list")
def list_signing_keys() -> None:
    """A line each: the id, since when it signs, until when it did."""
    with importing():
        from service.store import evidence_keys

    with _told(), _database() as (s, _):
        for key in evidence_keys.every(s):
            until = f"retired {key.retired_at:%Y-%m-%d %H:%M} UTC" if key.retired_at else "signs"
            printing.line(f"{key.id}  made {key.created_at:%Y-%m-%d %H:%M} UTC  {until}")


@models_app.command("list")
def list_models() -> None:
    """Show the registry."""
    with importing():
        from service.store import models

    with _told(), _database() as (s, _):
        for entry in models.every(s):
            printing.line(_line(entry))


@models_app.command("remove")
def remove(name: str) -> None:
    """Forget a model's name. Its files stay where they are."""
    with importing():
        from service.store import models

    with _told(), _database() as (s, _):
        models.remove(s, name)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="a folder, or the name of a registered model")],
    suite: Annotated[str, typer.Option(help="tofu or muse")],
    data: Annotated[list[str], typer.Option(metavar="SET=FILE", help="JSON Lines, or a JSON array; one for each set")],
    adapter: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="a PEFT adapter's folder")] = None,
    retrained: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="what this printed of a retrained model")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16")] = None,
    threads: int | None = None,
    prompt_format: FormOption = None,
    system: System = None,
    template_argument: TemplateArguments = None,
    template_date: TemplateDate = None,
    user_start: UserStart = None,
    user_end: UserEnd = None,
    assistant_start: AssistantStart = None,
) -> None:
    """Run a suite here, without the service; prints figure -> agg_value, value_by_index, as the field's reference does."""
    form = _form(prompt_format, _chat(system, template_argument, template_date), user_start, user_end, assistant_start)
    with _told():
        folder, form = _model(model, form)
    given = {"--adapter": adapter, "--retrained": retrained, "--device": device, "--dtype": dtype, "--threads": threads}
    # -P: our worker, not one that lies in the folder from which somebody calls
    command = [sys.executable, "-P", "-m", "worker.evaluate", "--model", str(folder), "--suite", suite]
    command += ["--prompt-format", form.model_dump_json()]
    command += [part for pair in data for part in ("--data", pair)]
    command += [part for option, value in given.items() if value is not None for part in (option, str(value))]
    os.execv(command[0], command)  # noqa: S606  what it prints and how it ends is what this prints and how this ends


def _chat(system: str | None, arguments: Sequence[str] | None, day: datetime | None) -> dict[str, Any]:
    """What the options give of a chat format alone."""
    given: dict[str, Any] = {}
    if system:
        given["system"] = system
    if arguments:
        given["template_arguments"] = dict(map(_argument, arguments))
    if day is not None:
        given["template_date"] = day.date()
    return given


def _argument(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not (name.isidentifier() and equals):
        raise typer.BadParameter(f"--template-argument is NAME=VALUE, not {given!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _form(
    prompt_format: Form | None,
    chat: dict[str, Any],
    user_start: str | None,
    user_end: str | None,
    assistant_start: str | None,
) -> PromptFormat | None:
    """As the options say it; None: they say nothing."""
    strings = {"user_start": user_start, "user_end": user_end, "assistant_start": assistant_start}
    plain = {key: text.replace("\\n", "\n") for key, text in strings.items() if text is not None}
    if plain and (chat or prompt_format is Form.chat):
        raise typer.BadParameter(
            "a chat template brings its own strings: --user-start and the others do not go with it"
        )
    if chat and prompt_format is Form.plain:
        raise typer.BadParameter("--system, --template-argument and --template-date go with a chat template")
    if not (prompt_format or plain or chat):
        return None
    kind = prompt_format or (Form.chat if chat else Form.plain)
    return PromptFormat(type=kind.value, **chat, **plain)


def _model(model: str, form: PromptFormat | None) -> tuple[Path, PromptFormat]:
    """The folder, and how it is asked. A name is looked up in the registry unless there is a folder of that path."""
    if Path(model).is_dir():
        chat = form is None and modelfiles.inspect(Path(model)).chat_template
        return Path(model), form or PromptFormat(type="chat" if chat else "plain")
    if os.sep in model:
        raise UnlearnError(f"there is no folder {model}")
    with importing():
        from service.store import models

    with _database() as (s, settings):
        entry = models.get(s, model)
    if entry.source == "hub":
        raise UnlearnError(f"{model} is a Hub model: give the folder of its revision {entry.revision}")
    return settings.models_root / entry.location, form or entry.prompt_format


@contextmanager
def _database() -> "Iterator[tuple[Session, Settings]]":
    """A transaction on the database of the settings, and the settings."""
    with importing():
        from service.settings import Settings
        from service.store.session import make_engine, make_sessions

    settings = Settings()
    engine = make_engine(settings.database_url)
    try:
        with make_sessions(engine).begin() as s:
            yield s, settings
    finally:
        engine.dispose()


@contextmanager
def _told() -> Iterator[None]:
    """As over HTTP; and what the database says."""
    with terminal.told():
        try:
            yield
        except terminal.TOLD:
            raise
        except Exception as error:
            from sqlalchemy.exc import DBAPIError

            if not isinstance(error, DBAPIError):
                raise
            said = str(error.orig).partition("\n")[0]
            where = "; DATABASE_URL says where it is, and `. .unlearn/environment` sets it after `unlearn up`"
            unreached = error.orig is not None and getattr(error.orig, "sqlstate", None) is None
            raise UnlearnError(f"the database says: {said}{where if unreached else ''}") from error


def _line(entry: ModelEntry) -> str:
    what = f"{entry.location}@{entry.revision}" if entry.source == "hub" else f"{entry.location} {entry.digest}"
    return f"{entry.name}  {entry.source} {what}  prompt {entry.prompt_format.type}, GPU class {entry.gpu_class}"


if __name__ == "__main__":
    app()
