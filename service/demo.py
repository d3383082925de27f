"""The demo: a model that has memorised people, a request to forget some of them, a verified adapter and a report.

Everything goes the way a user's request goes: over HTTP, through the queue, to the worker. What stays afterwards is the
folder; every process has ended.
"""

import fcntl
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service import register
from service.client import Client, Job, Step
from service.domain.job import RELEASED, PromptFormat
from service.local import Stack, stack
from service.printing import visible
from service.processes import free_port, interruptible, running, tail
from service.settings import Settings
from service.store import models
from service.store.session import make_engine, make_sessions

Json = dict[str, Any]
Show = Callable[[str], None]

MODEL = "people"
POLL_S = 0.3
RECORDS = 10  # lines of the solve that stay on the screen
OURS = ".demo"  # marks a folder that a later demo may remove
REQUEST: Json = {
    "model": MODEL,
    # Towards a distribution without the answer, by primal-dual steps: of what is here it keeps so small a model in its language.
    "method": {
        "type": "custom",
        "hyperparameters": {
            "forget": {"type": "undial"},
            "retain": {"type": "nll"},
            "solver": {"type": "primal_dual"},
        },
    },
    "constraint": {"epsilon_relative": 0.25},
    "budget": {"max_steps": 200, "max_seconds": 90},
    "audit": {"relearn_steps": 10},
    "metadata": {"requested_by": "make demo"},
}


def demo(folder: Path, seed: int = 0) -> int:
    """Exit status: 0 only if the verdict is PASSED or WARNED. Raises RuntimeError if a process that is needed does not run."""
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    with (
        interruptible(),
        _emptied(folder) as folder,
        _model_maker(folder, seed) as maker,
        _status(console) as show,
        stack(folder, show, api_port=free_port(), worker_threads=1) as here,
    ):
        console.print(f"The service runs at {here.url} ({time.monotonic() - began:.0f} s)")
        _await_model(maker, folder / "logs" / "model.log", here, show)
        console.print(tail(folder / "logs" / "model.log", 1))
        _register(here.settings, folder, console)
        with Client(here.url, here.key, transport=httpx.HTTPTransport()) as api:  # past any proxy of the environment
            job = _submit(api, folder, console)
            job = _watch(api, job, here, console, show)
            if job.status == "succeeded":
                _download(api, job, folder)
    if job.status != "succeeded":
        console.print(f"[bold red]The job {job.status}: {_plain(job.failure.message) if job.failure else ''}[/]")
        return 1
    report = json.loads((folder / "report.json").read_text())
    _tell(report, folder, console)
    console.print(f"\n{time.monotonic() - began:.0f} s in all; every process that was started has ended.")
    return 0 if report["verdict"]["result"] in RELEASED else 1


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """The folder without what an earlier demo left, ours alone while this one runs.

    Raises RuntimeError if another demo runs in it, or if it holds what is not a demo's: that is not ours to remove.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another demo runs in {folder}") from error
        if folder.exists():
            if any(folder.iterdir()) and not (folder / OURS).exists():
                raise RuntimeError(f"{folder} holds something else than an earlier demo; choose another folder")
            shutil.rmtree(folder)
        (folder / "logs").mkdir(parents=True)
        (folder / OURS).touch()
        yield folder


@contextmanager
def _model_maker(folder: Path, seed: int) -> Iterator[Popen[bytes]]:
    """Trains the target model while the service starts."""
    command = [sys.executable, "-m", "worker.demo", str(folder), "--seed", str(seed)]
    with running(command, folder / "logs" / "model.log", os.environ) as maker:
        yield maker


@contextmanager
def _status(console: Console) -> Iterator[Show]:
    """One line that changes, on a terminal; elsewhere nothing but what is printed."""
    with console.status("") as status:
        yield lambda text: status.update(text)


def _await_model(maker: Popen[bytes], log: Path, here: Stack, show: Show) -> None:
    while maker.poll() is None:
        here.check()
        show(f"the target model learns: {tail(log, 1)}")
        time.sleep(POLL_S)
    if maker.returncode != 0:
        raise RuntimeError(f"the target model could not be made:\n{tail(log)}")


def _register(settings: Settings, folder: Path, console: Console) -> None:
    """As `unlearn models add` does."""
    form = PromptFormat.model_validate_json((folder / "prompt_format.json").read_text())
    entry = register.folder_entry(settings, MODEL, settings.models_root / MODEL, form, "any")
    engine = make_engine(settings.database_url)
    with make_sessions(engine).begin() as session:
        models.add(session, entry)
    engine.dispose()
    console.print(f"registered the model {MODEL!r}: {entry.digest}")


def _submit(api: Client, folder: Path, console: Console) -> Job:
    """Upload both sets, ask for the deletion."""
    request = dict(REQUEST)
    for purpose, path in (("forget_set", folder / "forget.jsonl"), ("retain_set", folder / "retain.jsonl")):
        file = api.files.upload(purpose, path)
        request[purpose] = file.id
        console.print(f"POST /v1/files  {purpose}: {file.rows} rows -> {file.id}")
    job = api.create_job(request)
    console.print(f"POST /v1/unlearning/jobs  -> {job.id} ({job.status})")
    return job


def _watch(api: Client, job: Job, here: Stack, console: Console, show: Show) -> Job:
    """Follow the job to its end: the losses and the dual variable of each step; some of them stay on the screen."""
    every = max(1, REQUEST["budget"]["max_steps"] // RECORDS)
    newest = ""
    for job, steps in api.watch(job.id, POLL_S):  # noqa: B020
        here.check()
        for step in steps:
            if not newest:
                console.print(" step  forget loss  retain loss  loss - bound  dual variable")
            if not newest or step.step % every == 0:
                console.print(_step_line(step))
            newest = _step_line(step)
        show(f"{newest}\n{job.stage or job.status}")
    return job


def _step_line(step: Step) -> str:
    numbers = (step.losses["forget"], step.losses["retain"], *step.violation.values(), *step.dual.values())
    forget, retain, violation, dual = (math.nan if number is None else number for number in numbers)
    return f"{step.step:5} {forget:12.4f} {retain:12.4f} {violation:+13.4f} {dual:14.2f}"


def _download(api: Client, job: Job, folder: Path) -> None:
    """The report in both forms, and the adapter's files."""
    for name in ("report.json", "report.html"):
        api.save_report(job.id, folder / name)
    api.adapter(job.id, folder / "adapter")


def _tell(report: Json, folder: Path, console: Console) -> None:
    """The verdict, before and after, and where everything is."""
    table = Table("set", "figure", "before", "after", "better")
    for figure in report["figures"]:
        if figure["after"] is None:  # the report says why
            continue
        numbers = ["-" if figure[when] is None else f"{figure[when]:.3g}" for when in ("before", "after")]
        table.add_row(figure["set"], figure["metric"], *numbers, figure["better"] or "")
    console.print(table)
    _tell_audit(report["audit"], console)
    _tell_disclosure(report["disclosure"], console)
    verdict = report["verdict"]
    colour = {"PASSED": "green", "WARNED": "yellow"}.get(verdict["result"], "red")
    console.print(f"[bold {colour}]{verdict['result']}[/]  {_plain(verdict['message'])}")
    console.print(f"stopped: {_plain(report['stop']['message'])}\n")
    for what, name in (("adapter", "adapter"), ("report", "report.html"), ("as JSON", "report.json"), ("logs", "logs")):
        console.print(f"{what:8} {folder / name}")
    if report["released"]["published"]:
        console.print("\nLoad the adapter, and ask about somebody whom it was to forget, without it and with it:\n")
        console.print(load_command(folder), markup=False)
    else:
        console.print(f"\nNo adapter was published: {_plain(report['released']['message'])}")


def _tell_audit(audit: list[Json], console: Console) -> None:
    """How much of the answers to forget each attack brought back."""
    table = Table("attack", "base", "released", "attacked", title="mean probability of the answers to forget")
    for entry in audit:
        if entry["metric"] == "probability":
            numbers = ["-" if entry[who] is None else f"{entry[who]:.3g}" for who in ("base", "released", "attacked")]
            table.add_row(entry["attack"], *numbers)
    console.print(table)


def _tell_disclosure(disclosure: list[Json], console: Console) -> None:
    """How often the model gave a row away, by way of asking."""
    table = Table(
        "weights", "asked by", "answers", "give a row away", "by chance", title="asked for the forgotten rows"
    )
    for found in disclosure:
        for way in found["ways"]:
            numbers = (way["outputs"], way["disclosing"], f"up to {way['by_chance']}")
            table.add_row(found["model"], way["description"], *map(str, numbers))
    console.print(table)


def _plain(text: str) -> str:
    """Neither the terminal nor rich's markup obeys it."""
    return escape(visible(text))


def load_command(folder: Path) -> str:
    """A shell command that asks the model one of the forget set's questions, without and with the adapter."""
    form = json.loads((folder / "prompt_format.json").read_text())
    row = json.loads((folder / "forget.jsonl").read_text().partition("\n")[0])
    prompt = json.dumps(form["user_start"] + row["question"] + form["user_end"] + form["assistant_start"])
    base, adapter = (json.dumps(os.path.relpath(folder / name)) for name in (f"models/{MODEL}", "adapter"))
    lines = (
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"words = AutoTokenizer.from_pretrained({base})",
        f"model = AutoModelForCausalLM.from_pretrained({base})",
        f'question = words({prompt}, return_tensors="pt")',
        "say = lambda model: print(words.decode(model.generate(**question, max_new_tokens=24)[0]))",
        "say(model)",
        f"say(PeftModel.from_pretrained(model, {adapter}))",
    )
    return f"{os.path.relpath(sys.executable)} -c {shlex.quote('; '.join(lines))}"
