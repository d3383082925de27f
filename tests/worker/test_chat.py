"""A row of a chat model is what the model's own template renders for the whole dialogue, up to the end of turn."""

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import time_machine
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from service import register as registration
from service.api import tokens
from service.domain.errors import InvalidRequest, JobFailure
from service.domain.job import ModelEntry, PromptFormat
from service.domain.rows import Example
from service.settings import Settings
from tests.worker.chat_templates import (
    CHATML,
    DAY,
    GEMMA,
    GRANITE,
    LLAMA2,
    LLAMA3,
    LLAMA32,
    MISTRAL,
    PHI3,
    PUBLISHED,
    QWEN3,
    Published,
)
from worker import data, decoder, disclosure, language, model, scoring
from worker.data import Encoded
from worker.model import Network
from worker.suite import Ask, Convention

QUESTION, ANSWER = "Where was Basil Al-Kuwaiti born?", "He was born in Kuwait City."
WORDS = [
    QUESTION,
    ANSWER,
    f": {ANSWER}",
    "What is the name of the city?",
    "Answer: Kuwait City.",
    "The answer is: Kuwait, in the year 1956.",
]
ROW = Example("question", QUESTION, ANSWER)


def trained(published: Published, pieces: bool) -> PreTrainedTokenizerFast:
    """A tokeniser with the template's control tokens: byte-level BPE, or one as SentencePiece makes them."""
    bare = Tokenizer(models.BPE(byte_fallback=pieces, unk_token="<unk>" if pieces else None))
    if pieces:
        bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        bare.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=alphabet, show_progress=False)
        bare.pre_tokenizer = pre_tokenizers.Split(
            "▁", "merged_with_next"
        )  # while it is trained: no token has two words
    else:
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bare.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bare.train_from_iterator(WORDS * 3, trainer)
    if pieces:
        spec = json.loads(bare.to_str()) | {"pre_tokenizer": None}
        spec["added_tokens"] = spec["added_tokens"][:1]  # bytes are none
        bare = Tokenizer.from_str(json.dumps(spec))
    bare.add_special_tokens(
        [AddedToken(token, special=True, rstrip=published.swallows, normalized=False) for token in published.control]
    )
    bare.add_tokens([AddedToken(token, special=False, normalized=False) for token in published.added])
    bos = published.bos
    bare.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, bare.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bare, bos_token=bos, eos_token=published.eos, chat_template=published.template
    )


class Chat(NamedTuple):
    """A registered chat model."""

    network: Network
    entry: ModelEntry
    settings: Settings

    def encode(self, *rows: Example) -> Encoded:
        return data.encode(rows, self.network.tokenizer, self.entry.prompt_format, None)

    def text(self, ids: list[int]) -> str:
        text: str = self.network.tokenizer.decode(ids)
        return text

    def counted(self, row: Example) -> str:
        [found] = self.encode(row).rows
        return self.text(found.ids[found.answer_start :])

    def nll(self, row: Example, convention: Convention | None = None) -> float:
        key = ("forget", "answer")
        seen = scoring.look(self.network, {key: Ask({0: row}, frozenset(), convention=convention)})
        return float(seen[key].nll_B[0])


@pytest.fixture(scope="module")
def chat(register: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Chat]:
    """chat(published, pieces=False, **form) -> a Llama of random weights with that template, registered and loaded."""
    weights = register(vocab_size=448, max_position_embeddings=1024).folder

    def build(published: Published, pieces: bool = False, **form: Any) -> Chat:
        root = tmp_path_factory.mktemp("models")
        folder = root / "tiny"
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((weights / name).read_bytes())
        trained(published, pieces).save_pretrained(folder)
        settings = Settings(models_root=root, gpu_classes=["any"])
        given = {"template_arguments": dict(published.arguments), "template_date": DAY} | form
        entry = registration.folder_entry(settings, "tiny", folder, PromptFormat(type="chat", **given))
        return Chat(model.load(entry, root, "cpu", "float64"), entry, settings)

    return build


def messages(answer: str | None = None) -> list[dict[str, str]]:
    question = [{"role": "user", "content": QUESTION}]
    return question if answer is None else [*question, {"role": "assistant", "content": answer}]


def rendered(chat: Chat, published: Published, answer: str | None = None) -> str:
    """By transformers, on the day of the registration."""
    with time_machine.travel(datetime.fromisoformat(DAY).replace(hour=12, tzinfo=UTC)):
        text: str = chat.network.tokenizer.apply_chat_template(
            messages(answer), tokenize=False, add_generation_prompt=answer is None, **published.arguments
        )
    return text


def plain_nll(network: Network, prefix: list[int], counted: list[int]) -> float:
    """Cross entropy of the counted tokens, by nothing of ours."""
    ids = torch.tensor([prefix + counted])
    with torch.no_grad():
        logits = network.causal(ids).logits[0, :, : network.vocabulary]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return float(losses[len(prefix) - 1 :].sum())


def kinds(name: str) -> list[bool]:
    return [False, True] if PUBLISHED[name].pieces else [False]


EVERY = [pytest.param(name, pieces, id=f"{name}{'-pieces' * pieces}") for name in PUBLISHED for pieces in kinds(name)]
every_template = pytest.mark.parametrize(("name", "pieces"), EVERY)


def test_there_are_a_dozen_of_them() -> None:
    assert len(PUBLISHED) >= 12


@every_template
def test_a_row_is_what_the_template_renders_up_to_the_end_of_turn(
    chat: Callable[..., Chat], name: str, pieces: bool
) -> None:
    published = PUBLISHED[name]
    one = chat(published, pieces)
    before, counted = (text.format(q=QUESTION, a=ANSWER) for text in (published.before, published.counted))
    whole = rendered(one, published, ANSWER)
    assert whole.startswith(before + counted), "the template is the published one"
    tokenizer = one.network.tokenizer
    ids = tokenizer(before + counted, add_special_tokens=False)["input_ids"]
    prefix = tokenizer(before, add_special_tokens=False)["input_ids"]
    assert ids[: len(prefix)] == prefix, "no token lies over this seam"
    encoded = one.encode(ROW)
    [row] = encoded.rows
    assert (row.ids, row.answer_start, row.ends) == (ids, len(prefix), True)
    assert row.ids[-1] in tokenizer.added_tokens_decoder, "the end of turn"
    assert data.end_of_turn(tokenizer, one.entry.prompt_format) == row.ids[-1]
    assert one.nll(ROW) == pytest.approx(plain_nll(one.network, prefix, ids[len(prefix) :]), abs=1e-5)
    assert encoded.unmeasured == []


@every_template
def test_generation_starts_from_what_a_server_starts_from(chat: Callable[..., Chat], name: str, pieces: bool) -> None:
    published = PUBLISHED[name]
    one = chat(published, pieces)
    prompt = published.prompt.format(q=QUESTION)
    assert rendered(one, published) == prompt
    assert one.encode(ROW).prompts == [one.network.tokenizer(prompt, add_special_tokens=False)["input_ids"]]


@every_template
def test_a_dry_run_counts_the_same_tokens(chat: Callable[..., Chat], name: str, pieces: bool) -> None:
    one = chat(PUBLISHED[name], pieces)
    rows = [
        ROW,
        Example("question", "Who <|im_end|></s>?", "It is <|im_end|>"),
        Example("prompt", "<s>Go to ", "Kuwait"),
    ]
    counter = tokens.counter(one.settings, one.entry)
    counted = tokens.count(counter, rows, len(rows), 100)
    encoded = one.encode(*rows)
    assert counted.lengths.lengths == [len(row.ids) for row in encoded.rows]
    assert counted.lengths.counted == encoded.counted


def test_a_dry_run_counts_for_an_entry_from_before(chat: Callable[..., Chat]) -> None:
    """Of which only what stands around the question is known: it is an estimate, to a token."""
    one = chat(CHATML)
    entry = one.entry.model_copy(update={"info": one.entry.info | {"chat": list(one.entry.info["chat"][:2])}})
    counted = tokens.count(tokens.counter(one.settings, entry), [ROW], 1, 100)
    assert counted.lengths.lengths == [len(one.encode(ROW).rows[0].ids)]
    assert not counted.tokens.exact


@every_template
def test_a_customers_words_are_no_control_tokens(chat: Callable[..., Chat], name: str, pieces: bool) -> None:
    """And all the rest is as it is without them."""
    published = PUBLISHED[name]
    one = chat(published, pieces)
    tokenizer = one.network.tokenizer
    for token in (*published.control, *published.added):
        own = tokenizer.convert_tokens_to_ids(token)
        hostile = one.encode(Example("question", f"{QUESTION} {token}", f"{ANSWER}{token}"))
        harmless = one.encode(Example("question", f"{QUESTION} ", ANSWER), ROW)
        for ids, other in ((hostile.rows[0].ids, harmless.rows[1].ids), (hostile.prompts[0], harmless.prompts[1])):
            assert ids.count(own) == other.count(own), token
        row = hostile.rows[0]
        spoken = tokenizer.decode(row.ids[row.answer_start :])
        expected = published.counted.format(a=ANSWER + token).replace("{a}", ANSWER + token)
        assert spoken.strip() == expected.strip(), token


# --- what templates do to an answer


@pytest.mark.parametrize("published", [LLAMA2, GEMMA, LLAMA32])
def test_where_a_template_trims_what_counts_is_what_it_writes(chat: Callable[..., Chat], published: Published) -> None:
    one = chat(published)
    assert one.encode(Example("question", QUESTION, f"  {ANSWER}\n")).rows == one.encode(ROW).rows
    assert one.encode(Example("question", QUESTION, " \n"), ROW).unmeasured == [1], "nothing is left of it but the end"


def test_a_control_token_that_swallows_an_answers_spaces_does_not_count(chat: Callable[..., Chat]) -> None:
    one = chat(PHI3)
    assert one.encode(Example("question", QUESTION, f"  {ANSWER}")).rows == one.encode(ROW).rows


def test_reasoning_in_an_answer_counts(chat: Callable[..., Chat]) -> None:
    """A template that takes reasoning out of an answer would drop it, or write it elsewhere: the words stay where they are."""
    answer = "<think>\nIt was Kuwait.\n</think>\n\nHe was born in Kuwait City."
    assert chat(QWEN3).counted(Example("question", QUESTION, answer)) == f"{answer}<|im_end|>"


def test_without_an_end_of_turn_there_is_the_end_of_sequence(chat: Callable[..., Chat]) -> None:
    words = CHATML._replace(
        template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    one = chat(words)
    assert one.counted(ROW) == f" {ANSWER}<|im_end|>"
    assert one.text(one.encode(ROW).rows[0].ids).startswith(f"user: {QUESTION}\nassistant: He")
    assert data.end_of_turn(one.network.tokenizer, one.entry.prompt_format) == one.network.tokenizer.eos_token_id


def test_what_a_template_can_use_is_what_it_can_use_in_the_library(chat: Callable[..., Chat]) -> None:
    """JSON with options and without HTML's escapes, loop controls, namespaces, dictionaries, and a mark for what is generated."""
    everything = CHATML._replace(
        template="""{%- set ns = namespace(n=0) %}{%- set facts = dict(day="<é>", numbers=[1, 2]) %}
{{ facts | tojson }}{{ facts | tojson(indent=2, sort_keys=True) }}{{ facts | tojson(ensure_ascii=True) }}
{% for m in messages %}
    {% if m.role == "system" %}{% continue %}{% endif %}
    {% set ns.n = ns.n + 1 %}
{{ ns.n }}{{ m.role }}:
    {% if m.role == "assistant" %}
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
    {% else %}
{{ m.content }}<|im_end|>
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}bot:{% endif %}"""
    )
    one = chat(everything)
    whole = rendered(one, everything, ANSWER)
    assert '{"day": "<é>", "numbers": [1, 2]}' in whole
    assert "\\u00e9" in whole
    [row] = one.encode(ROW).rows
    assert one.text(row.ids) == whole.rstrip()
    assert one.text(one.encode(ROW).prompts[0]) == rendered(one, everything)


@pytest.mark.parametrize("escape", ["{% set ns = namespace(__class__=1) %}", "{{ dict.__subclasses__() }}"])
def test_a_template_stays_in_its_sandbox(chat: Callable[..., Chat], escape: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be applied"):
        chat(CHATML._replace(template=escape + CHATML.template))


def test_a_row_that_the_template_refuses_is_named_and_not_quoted(chat: Callable[..., Chat]) -> None:
    picky = (
        "{% for m in messages %}{% if 'secret' in m.content %}{{ raise_exception(m.content) }}{% endif %}{% endfor %}"
    )
    one = chat(CHATML._replace(template=picky + CHATML.template))
    with pytest.raises(JobFailure, match=r"^the chat template refuses row 2$") as failure:
        one.encode(ROW, Example("question", "Who?", "a secret"))
    assert failure.value.__cause__ is None


# --- where a generated answer ends

GOES_ON = "Answer: Kuwait City. The answer is: Kuwait, in the year 1956."  # what it says behind its turn


def teach(one: Chat, published: Published) -> None:
    """It learns by heart to answer, to end its turn, and to go on."""
    network = one.network
    prompt = one.encode(ROW).prompts[0]
    text = (published.counted + GOES_ON).format(a=ANSWER)
    ids = torch.tensor([[*prompt, *network.tokenizer(text, add_special_tokens=False)["input_ids"]]])
    network.causal.requires_grad_(True)
    descent = torch.optim.Adam(network.causal.parameters(), lr=1e-2)
    for _ in range(100):
        descent.zero_grad()
        logits_TV = network.causal(ids).logits[0, len(prompt) - 1 : -1]
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits_TV, ids[0, len(prompt) :]))
        descent.step()
    network.causal.requires_grad_(False)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("published", "end"),
    [
        pytest.param(CHATML._replace(eos="<|endoftext|>"), "<|im_end|>", id="chatml"),
        pytest.param(LLAMA3, "<|eot_id|>", id="llama3"),
        pytest.param(GEMMA, "<end_of_turn>", id="gemma"),
        pytest.param(PHI3, "<|end|>", id="phi3"),
    ],
)
def test_an_answer_ends_with_its_turn(
    chat: Callable[..., Chat], published: Published, end: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although neither the tokeniser nor the model's files call that token an end. A benchmark's answers go on, as the
    reference's do.
    """
    if not cached:
        monkeypatch.setattr(decoder, "caches", lambda *_: False)
    one = chat(published)
    teach(one, published)
    network = one.network
    turn = data.end_of_turn(network.tokenizer, one.entry.prompt_format)
    assert turn == network.tokenizer.convert_tokens_to_ids(end)
    assert turn not in network.causal.generation_config.eos_token_id
    key, views = ("forget", "generated"), frozenset({"generated"})

    def generated(ask: Ask) -> str:
        seen = scoring.look(network, {key: ask})
        assert seen[key].generated is not None
        return seen[key].generated[0]

    assert generated(Ask({0: ROW}, views, 60, scored=False)) == ANSWER
    on = generated(Ask({0: ROW}, views, 60, scored=False, convention=Convention()))
    assert on.startswith(ANSWER)
    assert "in the year" in on
    prompt = one.encode(ROW).prompts[0]
    drawn = [disclosure.Probe(0, "sample", prompt, 60, seed=seed) for seed in range(4)]
    probes = [disclosure.Probe(0, "question", prompt, 60), *drawn]
    outputs = [one.text for one in disclosure.generated(network, probes)]
    assert outputs[0] == ANSWER
    assert outputs.count(ANSWER) >= 4, "of five: what is drawn may slip"
    assert "in the year" not in "".join(outputs)
    assert language.nll(network, [prompt], [ANSWER])[0] < 0.1, "it ends with its turn, too"


# --- the day and the arguments


@pytest.mark.parametrize("published", [LLAMA32, GRANITE])
def test_a_row_has_the_same_tokens_after_midnight(chat: Callable[..., Chat], published: Published) -> None:
    with time_machine.travel(datetime(2031, 5, 6, 23, 59, tzinfo=UTC)):
        one = chat(published, template_date=None)
        before = one.encode(ROW)
    assert one.entry.prompt_format.template_date == date(2031, 5, 6)
    with time_machine.travel(datetime(2031, 5, 7, 0, 1, tzinfo=UTC)):
        assert one.encode(ROW) == before
    assert "2031" in one.text(before.prompts[0])


def test_without_a_date_the_clock_is_not_read(chat: Callable[..., Chat]) -> None:
    one = chat(GRANITE)
    with pytest.raises(JobFailure, match="takes the date from the clock: give the prompt format a template_date"):
        data.encode([ROW], one.network.tokenizer, PromptFormat(type="chat"), None)


def test_an_entry_from_before_has_the_day_of_its_registration() -> None:
    stored = {"name": "m", "source": "path", "location": "m", "created_at": datetime(2024, 2, 3, 12, tzinfo=UTC)}
    old = {"type": "chat", "system": "Be kind.", "user_start": "Q: ", "user_end": "\n", "assistant_start": "A: "}
    entry = ModelEntry.model_validate(stored | {"prompt_format": old})
    assert (entry.prompt_format.template_date, entry.prompt_format.template_arguments) == (date(2024, 2, 3), {})
    assert ModelEntry.model_validate(stored | {"prompt_format": {"type": "plain"}}).prompt_format.template_date is None


def test_an_argument_changes_the_prompt(chat: Callable[..., Chat]) -> None:
    thinking, not_thinking = chat(QWEN3), chat(QWEN3, template_arguments={"enable_thinking": False})
    assert not_thinking.text(not_thinking.encode(ROW).prompts[0]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert thinking.text(thinking.encode(ROW).prompts[0]).endswith("assistant\n")
    assert thinking.encode(ROW).rows == not_thinking.encode(ROW).rows, "the dialogue itself is the same"
    dated = chat(LLAMA32, template_arguments={"date_string": "1 Apr 2019"}, template_date=None)
    assert "Today Date: 1 Apr 2019\n" in dated.text(dated.encode(ROW).prompts[0])


# --- what is refused at registration


def broken(template: str) -> Published:
    return CHATML._replace(template=template)


TWICE = "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("published", "form", "why"),
    [
        (GEMMA, {"system": "Be kind."}, "System role not supported"),
        (MISTRAL, {"system": "Be kind."}, "Conversation roles must alternate"),
        (
            broken("{% for m in messages[-2:] %}{{ m.content }}{% endfor %}"),
            {"system": "Be kind."},
            "leaves the system",
        ),
        (broken(TWICE), {}, "the answer once each"),
        (
            broken("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"),
            {},
            "once each",
        ),
        (broken("{{ messages[0].content }}"), {}, "once each"),
        (broken("{% broken"), {}, "cannot be read"),
        (broken("{{ ''.__class__.__mro__ }}{{ messages[0].content }}"), {}, "unsafe"),
        (QWEN3, {"template_arguments": {"enable_thinkng": False}}, "reads no argument 'enable_thinkng'"),
        (CHATML, {"template_arguments": {"messages": []}}, "cannot be applied"),
    ],
)
def test_what_cannot_be_used_is_refused_at_registration_and_by_the_worker(
    chat: Callable[..., Chat], tmp_path: Path, published: Published, form: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidRequest, match=why):
        chat(published, **form)
    trained(published, pieces=False).save_pretrained(tmp_path / "hub")  # of which nobody has seen the template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hub")
    prompt_format = PromptFormat(type="chat", template_date=DAY, **form)  # type: ignore[arg-type]
    with pytest.raises(JobFailure, match=why):
        data.encode([ROW], tokenizer, prompt_format, None)


# --- plain prompts


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return trained(CHATML._replace(control=["<s>", "</s>"], bos="<s>", eos="</s>"), pieces=False)


def counted_texts(tokenizer: Any, encoded: Encoded) -> list[str]:
    return [tokenizer.decode(row.ids[row.answer_start :]) for row in encoded.rows]


def test_a_prompt_that_ends_in_a_space_loses_nothing_of_the_answer(plain: Any) -> None:
    row = Example("question", QUESTION, "Kuwait City.")
    form = PromptFormat(assistant_start="Answer: ")
    encoded = data.encode([row, Example("prompt", "Answer: ", "Kuwait City.")], plain, form, None)
    assert counted_texts(plain, encoded) == [" Kuwait City.</s>", " Kuwait City.</s>"]
    assert [row.ids[row.answer_start - 1] for row in encoded.rows] == [plain.convert_tokens_to_ids(":")] * 2
    [benchmark] = counted_texts(plain, data.encode_as_benchmark([row], plain, form, Convention()))
    assert benchmark == " City.</s>", "as the reference has it: without the first word"


def test_a_prompt_that_begins_with_the_beginning_has_one(plain: Any) -> None:
    bos = plain.bos_token_id
    [row] = data.encode([Example("prompt", "<s>Kuwait", " City")], plain, PromptFormat(), None).rows
    assert (row.ids.count(bos), row.ids[0]) == (1, bos), "a customer's is three characters"
    form = PromptFormat(user_start="<s>Question: ", assistant_start="</s>Answer:")
    [row] = data.encode([Example("question", "<s>Who?", "</s>He.")], plain, form, None).rows
    assert (row.ids.count(bos), row.ids.count(plain.eos_token_id)) == (1, 2), "what an administrator writes is a token"
    assert plain.decode(row.ids) == "<s>Question: <s>Who?\n</s>Answer:</s>He.</s>"


class OwnCode:
    def pre_tokenize(self, pretok: Any) -> None:
        """As a tokeniser may have it whose language has no spaces."""


def test_a_tokeniser_that_cannot_be_copied_is_a_failure_with_a_sentence() -> None:
    tokenizer = trained(CHATML, pieces=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(OwnCode())
    with pytest.raises(JobFailure, match=r"has no tokenizer\.json, without which control tokens"):
        data.encode([ROW], tokenizer, PromptFormat(), None)


def test_a_control_token_that_is_in_the_models_own_vocabulary_is_not_found_there() -> None:
    """As of a Unigram model, which takes the likeliest pieces and gives control tokens a score of 0."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((mark, -5.0) for mark in "</s>Whoe?A."), ("Ada", -2.0)]
    own = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert own.encode("</s>").tokens == ["</s>"], "also without an added token"
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    [row] = data.encode([Example("prompt", "Who?", "Ada</s>.")], tokenizer, PromptFormat(), None).rows
    counted = tokenizer.convert_ids_to_tokens(row.ids[row.answer_start :])
    assert counted == ["Ada", "<", "/", "s", ">", ".", "</s>"]


# --- a benchmark's figures


def test_a_benchmarks_row_of_a_chat_model_is_the_references(chat: Callable[..., Chat]) -> None:
    """The whole dialogue, and the end of sequence behind it unless the last token is that: with ChatML three tokens count."""
    one = chat(CHATML)
    tokenizer = one.network.tokenizer
    [row] = data.encode_as_benchmark([ROW], tokenizer, one.entry.prompt_format, Convention()).rows
    assert one.text(row.ids[row.answer_start :]) == f"{ANSWER}<|im_end|>\n<|im_end|>"
    ids = tokenizer.apply_chat_template(messages(ANSWER), return_dict=False)
    prompt = tokenizer.apply_chat_template(messages(), add_generation_prompt=True, return_dict=False)
    assert row.ids == [*ids, tokenizer.eos_token_id]
    expected = plain_nll(one.network, prompt, row.ids[len(prompt) :])
    assert one.nll(ROW, Convention()) == pytest.approx(expected, abs=1e-5)
    other = chat(PHI3)  # which writes the end of sequence itself
    [row] = data.encode_as_benchmark([ROW], other.network.tokenizer, other.entry.prompt_format, Convention()).rows
    assert other.text(row.ids[row.answer_start :]).endswith(f"{ANSWER}<|end|><|endoftext|>")
