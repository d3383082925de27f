"""Chat templates, rendered as transformers renders them: in jinja's sandbox, for they are programs that come with a model.

The environment is our own, since the service has no transformers, and since `strftime_now` must not read the clock: the same
row has to have the same tokens after midnight.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from service.domain.job import PromptFormat

QUESTION = "ThisIsTheQuestion"
ANSWER = "ThisIsTheAnswer"
CLOCK = "strftime_now"
BROKEN = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class TemplateRefused(Exception):
    """Why a chat template cannot be used with this prompt format, for people."""


class Around(NamedTuple):
    """What a template writes around a question and its answer."""

    before: str
    between: str
    behind: str = ""  # of a model that was registered before this was looked for


def render(
    template: str,
    form: PromptFormat,
    special_tokens: Mapping[str, str],
    question: str,
    answer: str | None = None,
    shots: Sequence[tuple[str, str]] = (),
) -> str:
    """The whole dialogue or, without an answer, the prompt that a server generates from. Raises TemplateRefused.

    Args:
        special_tokens: "bos_token" and the others, as the tokeniser has them.
        shots: questions and answers that stand before the question.
    """
    messages = [{"role": "system", "content": form.system}] if form.system else []
    for user, assistant in [*shots, (question, answer)]:
        messages.append({"role": "user", "content": user})
        if assistant is not None:
            messages.append({"role": "assistant", "content": assistant})
    arguments = {**special_tokens, **form.template_arguments, CLOCK: _clock(form.template_date)}
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=answer is None, **arguments)
    except BROKEN as error:
        raise TemplateRefused(f"the chat template cannot be applied: {error}") from error


def around(template: str, form: PromptFormat, special_tokens: Mapping[str, str]) -> Around:
    """What the template writes around a question and an answer. Raises TemplateRefused where that cannot be found.

    So it is verified that every row's answer will be found: the question and the answer stand in the rendering once each, the
    system's message is there too, and no argument is one that the template never reads.
    """
    if unread := sorted(form.template_arguments.keys() - _variables(template)):
        raise TemplateRefused(f"the chat template reads no argument {', '.join(map(repr, unread))}")
    whole = render(template, form, special_tokens, QUESTION, ANSWER)
    prompt = render(template, form, special_tokens, QUESTION)
    before, _, rest = whole.partition(QUESTION)
    between, _, behind = rest.partition(ANSWER)
    if (whole.count(QUESTION), whole.count(ANSWER), rest.count(ANSWER), prompt.count(QUESTION)) != (1, 1, 1, 1):
        raise TemplateRefused("the chat template does not write the question and, behind it, the answer once each")
    if form.system and form.system.strip() not in before:
        raise TemplateRefused("the chat template leaves the system's message out")
    return Around(before, between, behind)


# --- the environment: what transformers puts into it


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _variables(template: str) -> set[str]:
    try:
        return meta.find_undeclared_variables(_environment().parse(template))
    except jinja2.TemplateError as error:
        raise TemplateRefused(f"the chat template cannot be read: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {"raise_exception": _refuse, "dict": _Dict(), "namespace": _Namespace}
    return made


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; here it only has the scope of its block."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """The type itself has attributes through which a template could leave the sandbox."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)

    def fromkeys(self, *keys: Any) -> dict[Any, Any]:
        return dict.fromkeys(*keys)


class _Namespace(Namespace):
    """Of which a template can set no attribute that begins with an underscore."""

    def __init__(*given: Any, **named: Any) -> None:
        own, *pairs = given
        attributes = dict(*pairs, **named)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(own, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template cannot set {name!r} on a namespace")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would misread."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _clock(day: date | None) -> Any:
    def strftime_now(form: str) -> str:
        if day is None:
            raise jinja2.TemplateError("it takes the date from the clock: give the prompt format a template_date")
        return day.strftime(form)

    return strftime_now


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
