"""What an adapter's folder says beside the adapter: on which base it goes, how that is prompted, how both are loaded.

All of it is a function of the registered model, so the same job gives the same bytes.
"""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from service.prompts import template

if TYPE_CHECKING:
    from worker.model import Network

FILE = "base_model.json"
LOADING = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter = {base!r}, "FOLDER OF THIS FILE"
tokenizer = AutoTokenizer.from_pretrained(base{revision})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{revision}), adapter)
prompt = {before!r} + "QUESTION" + {behind!r}
ids = tokenizer(prompt, add_special_tokens={special}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=64)[0]))
"""


class Prompt(NamedTuple):
    """A question becomes `before` + the question + `behind`, in which the model's answer begins."""

    before: str
    behind: str
    add_special_tokens: bool  # whether the tokeniser adds its own; a chat template has written them already


def base_name(network: "Network") -> str:
    """What an adapter's config calls its base: a Hub id, or what no Hub id looks like and nothing resolves; never a path.

    A registered name may be a Hub id by chance: whoever loads the adapter by it would get somebody else's weights.
    """
    entry = network.entry
    return entry.location if entry.source == "hub" else f"registered-model:{entry.name}@{network.digest}"


def prompt(network: "Network") -> Prompt:
    """Raises TemplateRefused for a chat template that cannot be applied."""
    form, tokenizer = network.entry.prompt_format, network.tokenizer
    if form.type == "plain":
        first = _before_a_prompt(tokenizer)
        return Prompt((first or "") + form.user_start, form.user_end + form.assistant_start, first is None)
    written = template.render(
        tokenizer.get_chat_template(), form, tokenizer.special_tokens_map, question=template.QUESTION
    )
    before, _, behind = written.partition(template.QUESTION)
    return Prompt(before, behind, False)


def _before_a_prompt(tokenizer: Any) -> str | None:
    """What the tokeniser writes in front of a text, if it also ends each text, as a prompt must not end. None: it does not."""
    bare, whole = (tokenizer("x", add_special_tokens=special)["input_ids"] for special in (False, True))
    if len(whole) == len(bare) or whole[-1] != tokenizer.eos_token_id:
        return None
    return "".join(tokenizer.convert_ids_to_tokens(whole[: -1 - len(bare)]))


def describe(network: "Network") -> str:
    """FILE: a JSON object."""
    entry = network.entry
    described: dict[str, Any] = {
        "name": entry.name,
        "hub_id": entry.location if entry.source == "hub" else None,
        "revision": entry.revision,
        "digest": network.digest,
        "tokenizer_digest": network.tokenizer_digest,
        "files": dict(network.files),
        "prompt_format": entry.prompt_format.model_dump(mode="json"),
        "prompt": prompt(network)._asdict(),
    }
    return json.dumps(described, indent=2, sort_keys=True) + "\n"


def card(network: "Network", contains_parent: bool) -> str:
    """README.md: a model card."""
    entry, on_hub, given = network.entry, network.entry.source == "hub", prompt(network)
    front = ["library_name: peft", "pipeline_tag: text-generation", "tags: [lora, unlearning]"]
    if on_hub:  # a card's base_model must be a Hub id
        front.insert(1, f"base_model: {entry.location}")
    loading = LOADING.format(
        base=entry.location if on_hub else "FOLDER OF THE BASE MODEL",
        revision=f", revision={entry.revision!r}" if on_hub else "",
        before=given.before,
        behind=given.behind,
        special=given.add_special_tokens,
    )
    parent = (
        "It contains the adapter of the earlier job that it started from: apply it to the base, in place of that one.\n"
    )
    return (
        "---\n" + "\n".join(front) + "\n---\n\n"
        f"# Unlearning adapter for {entry.location if on_hub else entry.name}\n\n"
        "A LoRA adapter, trained to make its base forget a set of rows while its loss on a retain set stays within a bound.\n"
        "What was measured, and what was not, is in the report of the job that made it.\n"
        + parent
        * contains_parent
        + "\n## Loading\n\n"
        "What was measured holds on this base alone, prompted in this way:\n\n"
        f"- the base's files digest to `{network.digest}`, those of its tokeniser to `{network.tokenizer_digest}`;\n"
        f"- `{FILE}` has the SHA-256 of each of them, and the prompt format;\n"
        "- `unlearn verify CERTIFICATE --adapter FOLDER --model FOLDER` checks both folders.\n\n"
        f"```python\n{loading}```\n"
    )
