"""A model's chat template, special tokens and tokeniser, as its files have them."""

import json
from pathlib import Path
from typing import Any

from service.prompts.template import TemplateRefused

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def template(folder: Path) -> str:
    """Raises TemplateRefused where there is none that can be read."""
    try:
        if (folder / "chat_template.jinja").exists():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        beside = (folder / "chat_template.json").exists()
        given = _json(folder, "chat_template.json" if beside else "tokenizer_config.json")["chat_template"]
        if isinstance(given, list):
            given = {one["name"]: one["template"] for one in given}["default"]
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise TemplateRefused("its tokeniser has no chat template that can be read") from error
    return str(given)


def special_tokens(folder: Path) -> dict[str, str]:
    """What a template may write by name: "bos_token" and the others. Raises TemplateRefused where the files are broken."""
    try:
        given: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one is the newer
            if (folder / name).exists():
                given |= _json(folder, name)
        return {name: _text(given[name]) for name in SPECIAL if given.get(name) is not None}
    except (LookupError, OSError, TypeError, ValueError) as error:
        raise TemplateRefused("its tokeniser's config cannot be read") from error


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_bytes())


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
