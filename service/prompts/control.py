"""Control tokens come from the prompt format only: a control token's text inside a customer's row is tokenised as plain text.

`split_special_tokens` does not fit: it applies to a whole text, and added tokens that are not declared special, as `<think>`
often is, are matched all the same. Tokenising piece by piece does not fit either: a SentencePiece-like tokeniser reads a piece
differently than the same piece inside a text. So the tokeniser is copied with its control tokens renamed to strings that no
text contains, and the control tokens that the prompt format wrote are renamed in the text. Everything else, merges over a seam
included, stays as in the original.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from secrets import token_hex
from typing import Any, NamedTuple

from tokenizers import Tokenizer

NO_CONTROL = re.compile(r"\s*|<0x[0-9A-F]{2}>")  # white space, and the bytes that unknown characters are made of


class Tokeniser(NamedTuple):
    renamed: Any  # tokenizers.Tokenizer with the control tokens renamed, and without a post-processor
    ids: Mapping[int, int]  # of its added tokens -> the model's own
    swaps: Mapping[str, str]  # control token -> its name here, and back
    named: frozenset[int]  # control tokens, as the copy numbers them
    either: re.Pattern[str]  # both
    control: re.Pattern[str]  # the names alone
    first: list[int]  # what the tokeniser puts in front of a text by itself
    last: list[int]  # and behind it


class Tokens(NamedTuple):
    ids: list[int]
    spans: list[tuple[int, int]]  # in the text, in characters; a control token's may have white space that it swallows
    control: list[bool]


def tokeniser(own: Any, written: str) -> Tokeniser:
    """Of a tokenizers.Tokenizer.

    Args:
        written: by the prompt format: a chat template's source, or the strings around a question. An added token that is not
            special is a control token if it is in there.
    """
    spec = json.loads(own.to_str())
    nonce = token_hex(8)
    names = {
        token["content"]: f"\U000f0000{nonce}{k}\U000f0001"
        for k, token in enumerate(spec["added_tokens"])
        if (token["special"] or token["content"] in written) and NO_CONTROL.fullmatch(token["content"]) is None
    }
    before = [(token["content"], token["id"]) for token in spec["added_tokens"]]
    renamed: Any = Tokenizer.from_str(json.dumps(_renamed(spec, names)))
    masks = own.encode("a", add_special_tokens=True)
    return Tokeniser(
        renamed=renamed,
        ids={renamed.token_to_id(names.get(content, content)): token_id for content, token_id in before},
        swaps=names | {name: content for content, name in names.items()},
        named=frozenset(map(renamed.token_to_id, names.values())),
        either=_any_of([*names, *names.values()]),
        control=_any_of([*names.values()]),
        first=_own(masks.ids, masks.special_tokens_mask),
        last=_own(masks.ids[::-1], masks.special_tokens_mask[::-1])[::-1],
    )


def swapped(tokeniser: Tokeniser, text: str) -> str:
    """The text with control tokens replaced by their names, and names by their control tokens.

    A customer's text is swapped before a template is rendered with it, and the rendering is swapped again. Then the names in it
    are those that the template wrote, and the customer's text is as it was.
    """
    return tokeniser.either.sub(lambda found: tokeniser.swaps[found[0]], text)


def tokens(tokeniser: Tokeniser, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of texts in which each control token stands under its name, without what is put around a text."""
    read = tokeniser.renamed.encode_batch(list(texts), add_special_tokens=False)
    return [
        Tokens([tokeniser.ids.get(i, i) for i in one.ids], one.offsets, [i in tokeniser.named for i in one.ids])
        for one in read
    ]


def _renamed(spec: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Also in the model's own vocabulary: a Unigram or WordLevel model would find the token there."""
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
    else:  # of pieces with their scores
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return spec | {"post_processor": None, "truncation": None, "padding": None}


def _own(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    return [i for i, _ in takewhile(lambda pair: pair[1], zip(ids, mask, strict=True))]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
