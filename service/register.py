"""What an administrator does on the deployment's machine: register a model, which is then all that requests can name; make
a tenant's first API key, with which the others are made over HTTP.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from service.domain import modelfiles, modelsizes
from service.domain.errors import FieldProblem, InvalidRequest
from service.domain.identity import ROLES
from service.domain.job import ModelEntry, ModelName, PromptFormat
from service.prompts import folder as files
from service.prompts import template
from service.prompts.template import TemplateRefused
from service.settings import Settings
from service.store import evidence_keys, keys, tenancy, tenants
from service.store.secrets import secrets_of
from service.store.session import make_engine, make_sessions
from service.store.tenants import DEFAULT

HUB = re.compile(r"(?P<id>(?:[A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*)@(?P<revision>[0-9a-f]{40})")


def folder_entry(
    settings: Settings, name: str, folder: Path, prompt_format: PromptFormat | None = None, gpu_class: str = "any"
) -> ModelEntry:
    """A folder below the models root, looked at but not loaded. Raises InvalidRequest with the reason why it is refused.

    Args:
        prompt_format: None: the tokeniser's chat template if it has one, else the plain default.
    """
    _check(settings, name, gpu_class)
    root = settings.models_root.resolve()
    found = [path for path in (folder.resolve(), (root / folder).resolve()) if path.is_dir() and root in path.parents]
    if not found:
        raise _refused(f"{folder} is no folder below the models root, {root} (MODELS_ROOT)", "path")
    facts = modelfiles.inspect(found[0])
    if prompt_format is None:
        prompt_format = PromptFormat(type="chat" if facts.chat_template else "plain")
    if prompt_format.type == "chat" and not facts.chat_template:
        raise _refused("its tokeniser has no chat template: use the plain prompt format", "chat_template")
    prompt_format = _with_a_date(prompt_format)
    return ModelEntry(
        name=name,
        source="path",
        location=found[0].relative_to(root).as_posix(),
        digest=facts.digest,
        tokenizer_digest=facts.tokenizer_digest,
        prompt_format=prompt_format,
        gpu_class=gpu_class,
        info={
            "architecture": facts.architecture,
            "context_tokens": facts.context_tokens,
            "vocabulary": facts.vocabulary,
            **_for_plans(found[0], prompt_format),
        },
    )


def hub_entry(
    settings: Settings, name: str, reference: str, prompt_format: PromptFormat | None, gpu_class: str = "any"
) -> ModelEntry:
    """A model of the Hub at one commit. Its files are fetched, and judged, by the worker that first needs them."""
    _check(settings, name, gpu_class)
    match = HUB.fullmatch(reference)
    if match is None:
        raise _refused(
            f"{reference!r} is not ID@SHA with the 40 hex digits of a commit: a branch or a tag moves", "revision"
        )
    if prompt_format is None:
        raise _refused("say the prompt format: a Hub model's tokeniser is not read here", "prompt_format")
    prompt_format = _with_a_date(prompt_format)
    source: Literal["hub"] = "hub"
    return ModelEntry(
        name=name,
        source=source,
        location=match["id"],
        revision=match["revision"],
        prompt_format=prompt_format,
        gpu_class=gpu_class,
    )


def first_key(settings: Settings, tenant: str = DEFAULT, role: str = "admin", name: str = "first key") -> str:
    """The secret. Raises NotFound for a tenant that is not there, InvalidRequest for a role that is none."""
    if role not in ROLES:
        raise InvalidRequest(FieldProblem("/role", f"the roles are: {', '.join(ROLES)}", "enum"))
    engine, secrets = make_engine(settings.database_url), secrets_of(settings)
    sessions = make_sessions(engine)
    try:
        evidence_keys.check_master_key(sessions, secrets)
        with sessions.begin() as s:
            tenants.get(s, tenant)
            tenancy.bind(s, tenant)
            return keys.create(s, secrets, name=name, scopes=ROLES[role]).secret
    finally:
        engine.dispose()


def _with_a_date(prompt_format: PromptFormat) -> PromptFormat:
    """That of the registration, unless another is given."""
    if prompt_format.type == "plain" or prompt_format.template_date is not None:
        return prompt_format
    return prompt_format.model_copy(update={"template_date": datetime.now(UTC).date()})


def _for_plans(folder: Path, prompt_format: PromptFormat) -> dict[str, Any]:
    """What a dry run counts with. Raises InvalidRequest for a chat template in which no answer would be found."""
    sizes = modelsizes.read(folder)
    found: dict[str, Any] = {"sizes": sizes.model_dump()} if sizes else {}
    if prompt_format.type == "chat":
        try:
            found["chat"] = template.around(files.template(folder), prompt_format, files.special_tokens(folder))
        except TemplateRefused as reason:
            raise _refused(str(reason), "chat_template") from reason
    return found


def _check(settings: Settings, name: str, gpu_class: str) -> None:
    try:
        TypeAdapter(ModelName).validate_python(name)
    except ValidationError as error:
        raise _refused(f"{name!r} is not a name: letters, digits, '.', '_', '-', at most 64", "name") from error
    if gpu_class not in settings.gpu_classes:
        raise _refused(f"the GPU classes are: {', '.join(settings.gpu_classes)} (GPU_CLASSES)", "gpu_class")


def _refused(message: str, code: str) -> InvalidRequest:
    return InvalidRequest(FieldProblem("/model", message, code))
