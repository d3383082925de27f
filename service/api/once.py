"""Idempotency-Key (draft-ietf-httpapi-idempotency-key-header): a creation that is sent twice is carried out once.

A route opts in with a parameter `once: OnceOnly` and, in the transaction that creates, `once.first(s)` before all else
and `once.keep(s, answer, headers)` after it. What is sent again gets the stored answer before it is judged: the files
that it names may have been purged meanwhile. The same is what has the same bytes, or as a form the same fields and files.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated

from anyio.to_thread import run_sync
from fastapi import Depends, FastAPI, Header, Request, Response
from pydantic import BaseModel, JsonValue
from sqlalchemy.orm import Session
from starlette.datastructures import FormData, UploadFile

from service.api.bodies import in_thread_if_large
from service.api.deps import Here, Who, media_type
from service.domain.errors import FieldProblem, InvalidRequest, UnlearnError
from service.store import idempotency
from service.store.idempotency import Answer, Asked
from service.store.secrets import Secrets

KEY_MAX = 255
QUOTED = re.compile(r'"(?P<inner>(?:[ !#-\[\]-~]|\\["\\])*)"')  # a String of RFC 9651
BARE = re.compile(r"[!#-+\--~]+")  # visible, without quotes and commas
EITHER = rf"^(?:{QUOTED.pattern.replace('?P<inner>', '?:')}|{BARE.pattern})$"
REPLAYED = {"Idempotent-Replayed": "true"}


class Replayed(UnlearnError):
    """No mistake, but it leaves the same way: nothing that follows in the route is to happen."""

    def __init__(self, answer: Answer) -> None:
        super().__init__("answered before")
        self.answer = answer


class Once:
    """The request as one that may come again; without a key, each is another."""

    def __init__(self, secrets: Secrets | None = None, asked: Asked | None = None) -> None:
        self._secrets, self._asked = secrets, asked

    def part(self, number: int, content: JsonValue) -> "Once":
        """One of many in the request, carried out by itself: under a name of its own, which no request has.

        The same part has the same JSON: members in the same order, whatever is between them.
        """
        if self._secrets is None or self._asked is None:
            return self
        fingerprint = _fingerprint(self._secrets, json.dumps(content).encode())
        route = f"{self._asked.route}#{number}"
        return Once(self._secrets, self._asked._replace(route=route, fingerprint=fingerprint))

    def look(self, s: Session) -> None:
        """Raises Replayed where it was answered, KeyReused where another one was."""
        if self._secrets is not None and self._asked is not None:
            answer = idempotency.recall(s, self._secrets, self._asked)
            if answer is not None:
                raise Replayed(answer)

    def first(self, s: Session) -> None:
        """Raises as `look` does, and KeyInFlight while the same request is in another transaction."""
        if self._asked is not None:
            idempotency.begin(s, self._asked)
            self.look(s)

    def keep(self, s: Session, answer: BaseModel, headers: Mapping[str, str], status: int = 201) -> None:
        if self._secrets is not None and self._asked is not None:
            body = answer.model_dump_json(warnings=False).encode()
            idempotency.keep(s, self._secrets, self._asked, Answer(status, body, headers))


ANEW = Once()


async def _asked(
    request: Request,
    here: Here,
    who: Who,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="for a day: the same body sent again, byte by byte, or the same fields and files of a form, is answered "
            "as it was",
            json_schema_extra={"pattern": EITHER},  # told, not judged: see `read_key`
        ),
    ] = None,
) -> Asked | None:
    if idempotency_key is None:
        return None
    key = read_key(idempotency_key)
    if key is None or len(request.headers.getlist("idempotency-key")) != 1:
        detail = f"Idempotency-Key: send one quoted string of 1 to {KEY_MAX} visible characters"
        raise InvalidRequest(FieldProblem("", detail, "idempotency_key"))
    query = f"?{request.url.query}" if request.url.query else ""
    route = f"{request.method} {request.url.path}{query}"
    if media_type(request.headers) == "multipart/form-data":
        content = await run_sync(_form, await request.form())
    else:
        content = await request.body()
    fingerprint = await in_thread_if_large(request, lambda body: _fingerprint(here.secrets, body), content)
    return Asked(who.id, route, key, fingerprint)


def _once(here: Here, asked: Annotated[Asked | None, Depends(_asked)]) -> Once:
    once = Once(here.secrets, asked)
    if asked is not None:
        with here.sessions.begin() as s:
            once.look(s)
    return once


OnceOnly = Annotated[Once, Depends(_once)]


def read_key(given: str) -> str | None:
    """A quoted string, or the same without quotes, which many clients send; None: neither.

    >>> read_key('"8e03978e-40d5"'), read_key("8e03978e-40d5"), read_key('"a b"'), read_key("a b"), read_key('""')
    ('8e03978e-40d5', '8e03978e-40d5', 'a b', None, None)
    """
    given = given.strip()
    quoted = QUOTED.fullmatch(given)
    key = re.sub(r"\\(.)", r"\1", quoted["inner"]) if quoted else given
    return key if (quoted or BARE.fullmatch(key)) and 1 <= len(key) <= KEY_MAX else None


def _fingerprint(secrets: Secrets, body: bytes) -> str:
    """Keyed: there may be rows in it."""
    return secrets.digest("idempotency", body)


def _form(form: FormData) -> bytes:
    """What it says, however it is cut into parts: of a file, what the client calls it and the digest of its bytes."""
    said = list[list[str]]()
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            value.file.seek(0)
            digest = hashlib.file_digest(value.file, "sha256").hexdigest()  # type: ignore[arg-type]  # reads like a file
            value.file.seek(0)
            said.append([name, value.filename or "", digest])
        else:
            said.append([name, value])
    return json.dumps(sorted(said)).encode()


def install(app: FastAPI) -> None:
    app.add_exception_handler(Replayed, _replay)


async def _replay(request: Request, error: Exception) -> Response:
    assert isinstance(error, Replayed)
    status, body, headers = error.answer
    return Response(body, status, headers={**headers, **REPLAYED}, media_type="application/json")
