"""What the command line prints. Names and messages come from strangers: a terminal obeys none of them."""

import json
import unicodedata

import typer

# Control characters (C0, C1), format characters (directions of writing, zero widths), surrogates, private, unassigned; separators
# of lines and paragraphs.
OBEYED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """The text on one line, with each character that a terminal may obey, or hide, as Python's escape of it.

    >>> visible("a" + chr(27) + "[2J" + chr(10) + "b" + chr(0x202E))
    'a\\\\x1b[2J\\\\nb\\\\u202e'
    """
    return "".join(repr(char)[1:-1] if unicodedata.category(char) in OBEYED else char for char in text)


def line(text: str, *, error: bool = False) -> None:
    """One line to standard output, or to standard error."""
    typer.echo(visible(text), err=error)


def as_json(value: object, indent: int | None = None) -> None:
    """In ASCII: all else is escaped by JSON itself."""
    typer.echo(json.dumps(value, indent=indent))
