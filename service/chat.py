"""What a model's chat template puts around a question, found once, when an administrator registers the model.

The template is rendered as transformers does it, in jinja's sandbox, with a marker for the question. The service counts
tokens with what was found and never renders a template again: they are programs that come with a model.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.domain.job import PromptFormat

QUESTION = "ThisIsTheQuestion"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def around(folder: Path, prompt_format: PromptFormat) -> tuple[str, str] | None:
    """(before, behind) the question; None where that cannot be told: such counts as one row differs from the next."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = json.dumps
    messages = [{"role": "system", "content": prompt_format.system}] if prompt_format.system else []
    messages.append({"role": "user", "content": QUESTION})
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        tokens = {name: _text(config[name]) for name in SPECIAL if config.get(name) is not None}
        template = environment.from_string(_template(folder, config))
        said = template.render(messages=messages, add_generation_prompt=True, **tokens)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError):
        return None
    before, *behind = said.split(QUESTION)
    return (before, behind[0]) if len(behind) == 1 else None


def _template(folder: Path, config: dict[str, Any]) -> str:
    """Raises LookupError, OSError or ValueError where there is none."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if (folder / "chat_template.json").exists():
        config = json.loads((folder / "chat_template.json").read_bytes())
    given = config["chat_template"]
    if isinstance(given, list):
        given = {one["name"]: one["template"] for one in given}["default"]
    return str(given)


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
