"""A dry run's numbers: tokens by the model's own tokeniser, steps, memory by hand, and what they warn of."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from httpx import Response
from starlette.testclient import TestClient
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from service import planned, register
from service.api import tokens
from service.api.deps import Parts
from service.batches import serve_deletions
from service.domain import answers, memory, modelsizes
from service.domain.answers import RowLength, SetLengths
from service.domain.job import Lora, ModelEntry, PromptFormat
from service.domain.memory import Load
from service.domain.modelfiles import digest_model, digest_tokenizer
from service.domain.modelsizes import Linear, Sizes
from service.domain.rows import Example
from service.prompts import folder as files
from service.prompts import template
from service.prompts.template import TemplateRefused
from service.settings import Settings
from service.store import jobs, tenants, workers
from service.store import models as registry
from service.store.session import Sessions
from service.store.tenants import DEFAULT
from tests.service import deleting
from tests.service.deleting import ADA, BOB

parts = deleting.parts
JOBS = "/v1/unlearning/jobs"
DRY = {"dry_run": True}
WORDS = ["<s>", "</s>", "<unk>", "Who", "is", "Ada", "Bob", "?", "A", "poet", ".", "baker", "Answer", ":"]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 12,
    "vocab_size": 14,
    "num_hidden_layers": 2,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
SHAPES = {
    "model.embed_tokens.weight": [14, 4],
    **{
        f"model.layers.{k}.{name}.weight": shape
        for k in range(2)
        for name, shape in {
            "self_attn.q_proj": [4, 4],
            "self_attn.k_proj": [2, 4],
            "self_attn.v_proj": [2, 4],
            "self_attn.o_proj": [4, 4],
            "mlp.gate_proj": [6, 4],
            "mlp.up_proj": [6, 4],
            "mlp.down_proj": [4, 6],
            "input_layernorm": [4],
            "post_attention_layernorm": [4],
        }.items()
    },
    "model.norm.weight": [4],
}
PARAMETERS = 14 * 4 + 2 * (16 + 8 + 8 + 16 + 24 + 24 + 24 + 4 + 4) + 4
FORM = PromptFormat(user_start="", user_end=" ", assistant_start="Answer:")


def weights(shapes: dict[str, list[int]]) -> bytes:
    """Headers alone: no weight is read."""
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    return len(header).to_bytes(8, "little") + header.encode()


@pytest.fixture
def folder(settings: Settings) -> Path:
    """A model whose tokeniser makes a token of each word and of each mark."""
    made = settings.models_root / "words"
    made.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(made / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    (made / "config.json").write_text(json.dumps(CONFIG))
    (made / "model.safetensors").write_bytes(weights(SHAPES))
    return made


@pytest.fixture
def body(http: TestClient, settings: Settings, sessions: Sessions, folder: Path, request_body: dict[str, Any]) -> Any:
    with sessions.begin() as s:
        registry.add(s, register.folder_entry(settings, "words", folder, FORM))
    return request_body | {"model": "words"}


def test_the_plan_has_tokens_steps_and_memory(http: TestClient, body: dict[str, Any]) -> None:
    plan = http.post(JOBS, json=body | {"budget": {"max_steps": 10}}, params=DRY).json()
    forget, retain = (plan["sets"][name]["tokens"] for name in ("forget_set", "retain_set"))
    # <s> Who is Ada ? Answer : | A poet . </s>  and  <s> | Ada <unk> <unk> <unk> . </s>
    assert (forget["total"], forget["counted"], forget["longest"]) == (11 + 7, 4 + 6, 11)
    assert (retain["total"], retain["counted"], retain["longest"]) == (11, 4, 11)
    assert (forget["exact"], forget["reason"], forget["rows_counted"], forget["too_long"]) == (True, None, 2, 0)
    assert plan["steps"] == {
        "max_steps": 10,
        "forget_rows": 2,
        "retain_rows": 1,
        "texts": 1,
        "forget_passes": 10.0,
        "tokens_per_step": 29,
        "tokens_max": 290,
    }
    # for figures 2 x 200 tokens; in every way 7 x (2 x 4 + 16), 8 x (4 + 16) and, of the text, 24 + 26 + 24 + 22; to keep 24;
    # with weights rounded to 8 and to 4 bits 24 + 96 each
    attacks = ["quantise_8", "quantise_4", "paraphrase", "prefix"]
    assert plan["evaluation"] == {
        "answers": 2 + 7 + 8 + 4 + 1 + 2 * 5,
        "tokens_max": 400 + 168 + 160 + 96 + 24 + 2 * 120,
        "attacks": attacks,
    }
    for name, bytes_each in (("cpu_float32", 4), ("accelerator_bfloat16", 2)):
        told = plan["memory"][name]
        assert told["weights"] == bytes_each * PARAMETERS
        parts = ("weights", "adapter", "reference", "activations", "head", "rounded")
        assert told["total"] == sum(told[part] for part in parts)
    assert plan["warnings"] == []
    taught = http.post(
        JOBS, json=body | {"forget_set": body["forget_set"][:1], "method": {"type": "idk_dpo"}}, params=DRY
    )
    assert (taught.json()["steps"]["texts"], taught.json()["steps"]["tokens_per_step"]) == (2, 2 * 11 + 11)


def test_passes_are_over_the_whole_forget_set(http: TestClient, body: dict[str, Any]) -> None:
    body["forget_set"] = [{"text": f"Ada {number}"} for number in range(20)]
    steps = http.post(JOBS, json=body | {"budget": {"max_steps": 6}}, params=DRY).json()["steps"]
    assert (steps["forget_rows"], steps["forget_passes"]) == (8, 2.0), "three steps of eight rows for twenty"


NO_LAYER = (
    "'nope' names no linear layer of model 'words'; there are: "
    "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
)


@pytest.mark.parametrize("params", [{}, DRY], ids=["created", "dry-run"])
def test_an_adapter_target_that_the_model_does_not_have_is_refused(
    http: TestClient, body: dict[str, Any], params: dict[str, Any]
) -> None:
    lora = {"target_modules": ["q_proj", "nope", "mlp.down_proj", "model.layers.1.self_attn.v_proj"]}
    reply = http.post(JOBS, json=body | {"lora": lora}, params=params)
    assert reply.status_code == 422
    wrong = {"pointer": "/lora/target_modules/1", "detail": NO_LAYER, "code": "target_module"}
    assert reply.json()["errors"] == [wrong]
    lora["target_modules"].remove("nope")
    assert http.post(JOBS, json=body | {"lora": lora}, params=params).status_code in (200, 201)


def test_a_deletion_plan_whose_adapter_target_the_model_does_not_have_is_refused(
    http: TestClient, upload: Callable[..., str], body: dict[str, Any]
) -> None:
    job = {"method": {"type": "pdu"}, "constraint": {"epsilon": 0.3}, "retain_set": upload("retain_set", [BOB])}
    plan = {"job": job | {"lora": {"target_modules": ["nope"]}}, "window_seconds": 0, "requests_max": 2}
    reply = http.put("/v1/deletion-plans/words", json=plan)
    assert reply.status_code == 422
    wrong = {"pointer": "/job/lora/target_modules/0", "detail": NO_LAYER, "code": "target_module"}
    assert reply.json()["errors"] == [wrong]


def test_an_adapter_target_is_left_to_the_worker_where_the_layers_are_not_known(
    http: TestClient, settings: Settings, sessions: Sessions, folder: Path, request_body: dict[str, Any]
) -> None:
    hub = register.hub_entry(settings, "hub", "o/m@" + "0" * 40, FORM)
    mixture = register.folder_entry(settings, "mixture", folder, FORM)
    mixture.info["sizes"]["mixture"] = True
    asked = request_body | {"lora": {"target_modules": ["nope"]}}
    for entry in (hub, mixture):
        with sessions.begin() as s:
            registry.add(s, entry)
        assert http.post(JOBS, json=asked | {"model": entry.name}).status_code == 201


# of twenty rows, eight in each step: change of the body, what it is warned of
LIKELY_NOT_MEANT: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"constraint": {"epsilon_relative": 2.0}}, {}),
    (
        {"constraint": {"epsilon_relative": 25}},
        {
            "epsilon_loose": "epsilon_relative 25 lets the retain loss become 26 times what it was, and more than 3 times "
            "hardly constrains anything; it is a share: 0.25 allows 25 % more"
        },
    ),
    ({"constraint": {"epsilon": 25}}, {}),
    ({"budget": {"max_steps": 3}}, {}),
    (
        {"budget": {"max_steps": 2}},
        {
            "few_passes": "max_steps 2 with 8 forget rows each reads at most 16 of the 20 rows to forget: the others are "
            "never trained on"
        },
    ),
    ({"budget": {"max_steps": 3000}}, {}),
    (
        {"budget": {"max_steps": 99_000}},
        {
            "many_passes": "max_steps 99,000 is 33,000 passes over the 20 rows to forget, where published methods make "
            "5 to 50"
        },
    ),
]


@pytest.mark.parametrize("uploaded", [False, True], ids=["inline", "uploaded"])
def test_it_warns_of_a_bound_and_of_steps_that_are_likely_not_meant(
    http: TestClient, upload: Callable[..., str], body: dict[str, Any], uploaded: bool
) -> None:
    forget = [{"text": f"Ada {number}"} for number in range(20)]
    body["forget_set"] = upload("forget_set", forget) if uploaded else forget
    for change, expected in LIKELY_NOT_MEANT:
        for params in ({}, DRY):
            told = http.post(JOBS, json=body | change, params=params).json()["warnings"]
            assert {one["code"]: one["message"] for one in told} == expected, (change, params)


LONG = [{"text": "Bob"}, {"text": "Bob " * 10}, {"text": "Bob " * 11}, {"text": "Bob " * 40}]
LONG_SAYS = "longer than the context of model 'words', 12 tokens: rows 3, 4"  # twelve tokens fit, with both ends


@pytest.mark.parametrize("params", [{}, DRY], ids=["created", "dry-run"])
@pytest.mark.parametrize("purpose", ["forget_set", "retain_set", "holdout_set"])
def test_a_job_whose_rows_are_longer_than_the_context_is_refused(
    http: TestClient, upload: Callable[..., str], body: dict[str, Any], purpose: str, params: dict[str, Any]
) -> None:
    body[purpose] = LONG if purpose == "forget_set" else upload(purpose, LONG)
    reply = http.post(JOBS, json=body, params=params)
    assert reply.status_code == 422
    assert reply.json()["errors"] == [{"pointer": f"/{purpose}", "detail": LONG_SAYS, "code": "row_too_long"}]
    assert http.get(JOBS).json()["data"] == []


def test_a_deletion_request_whose_rows_are_longer_than_a_models_context_is_refused(
    http: TestClient, upload: Callable[..., str], body: dict[str, Any]
) -> None:
    asked = {"regulation": "gdpr", "models": ["m", "words"]}
    for forget_set in (LONG, upload("forget_set", LONG)):
        reply = http.post("/v1/deletion-requests", json=asked | {"forget_set": forget_set})
        assert reply.status_code == 422
        assert reply.json()["errors"] == [{"pointer": "/forget_set", "detail": LONG_SAYS, "code": "row_too_long"}]
    assert http.post("/v1/deletion-requests", json=asked | {"forget_set": LONG[:2]}).status_code == 201
    assert http.post("/v1/deletion-requests", json=asked | {"forget_set": LONG, "models": ["m"]}).status_code == 201


@pytest.mark.parametrize("purpose", ["retain_set", "holdout_set"])
def test_a_deletion_plan_whose_rows_are_longer_than_the_context_is_refused(
    http: TestClient, upload: Callable[..., str], body: dict[str, Any], purpose: str
) -> None:
    job = {"method": {"type": "pdu"}, "constraint": {"epsilon": 0.3}, "retain_set": upload("retain_set", [BOB])}
    plan = {"job": job | {purpose: upload(purpose, LONG)}, "window_seconds": 0, "requests_max": 2}
    reply = http.put("/v1/deletion-plans/words", json=plan)
    assert reply.status_code == 422
    assert reply.json()["errors"] == [{"pointer": f"/job/{purpose}", "detail": LONG_SAYS, "code": "row_too_long"}]


def test_a_request_whose_rows_could_not_be_counted_when_it_came_in_fails_before_a_job(
    http: TestClient, parts: Parts, upload: Callable[..., str], body: dict[str, Any], folder: Path
) -> None:
    job = {"method": {"type": "pdu"}, "constraint": {"epsilon": 0.3}, "retain_set": upload("retain_set", [BOB])}
    plan = {"job": job, "window_seconds": 0, "requests_max": 2}
    assert http.put("/v1/deletion-plans/words", json=plan).status_code == 200
    (folder / "tokenizer.json").rename(folder / "away")
    asked = {"regulation": "gdpr", "models": ["words"]}
    good, other = (
        http.post("/v1/deletion-requests", json=asked | {"forget_set": rows}).json() for rows in ([ADA], LONG)
    )
    (folder / "away").rename(folder / "tokenizer.json")
    assert serve_deletions(parts) == 1
    good, other = (http.get(made["links"]["self"]).json() for made in (good, other))
    assert (len(good["jobs"]), other["jobs"], other["status"]) == (1, [], "failed")
    assert LONG_SAYS in other["status_reason"]


def test_rows_that_cannot_be_counted_here_are_left_to_the_worker(
    http: TestClient, settings: Settings, sessions: Sessions, folder: Path, request_body: dict[str, Any]
) -> None:
    hub = register.hub_entry(settings, "hub", "o/m@" + "0" * 40, FORM)
    absent = register.folder_entry(settings, "absent", folder, FORM).model_copy(update={"location": "elsewhere"})
    for entry in (hub, absent):
        entry.info["context_tokens"] = 12
        with sessions.begin() as s:
            registry.add(s, entry)
        assert http.post(JOBS, json=request_body | {"model": entry.name, "retain_set": LONG}).status_code == 201


def test_by_an_estimate_only_what_is_far_too_long_is_refused(
    http: TestClient, settings: Settings, sessions: Sessions, folder: Path, request_body: dict[str, Any]
) -> None:
    written = (
        "{% for m in messages %}{{ 'Ada ' if loop.first }}{{ m.content }} {{ 'Answer: ' if loop.first }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(written)
    entry = register.folder_entry(settings, "chatty", folder, PromptFormat(type="chat"))
    entry.info |= {"context_tokens": 20}
    with sessions.begin() as s:
        registry.add(s, entry)

    def sent(words: int, params: dict[str, Any]) -> Response:
        row = {"question": "Who?", "answer": "Bob " * (words - 6)}  # Ada Who ? Answer : </s> are the others
        return http.post(JOBS, json=request_body | {"model": "chatty", "retain_set": [row]}, params=params)

    assert [warning["code"] for warning in sent(20, DRY).json()["warnings"]] == []
    assert [warning["code"] for warning in sent(22, DRY).json()["warnings"]] == ["rows_too_long"]
    assert sent(22, {}).status_code == 201
    (error,) = sent(23, {}).json()["errors"]
    assert (error["code"], "rows 1, by an estimate" in error["detail"]) == ("row_too_long", True)


def test_of_a_large_set_few_rows_are_counted(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = register.folder_entry(settings, "words", folder, FORM)
    counted: list[int] = []
    read = tokens._rows

    def counting(counter: Any, examples: Sequence[Example]) -> Any:
        counted.append(sum(len(example.answer) for example in examples))
        return read(counter, examples)

    monkeypatch.setattr(tokens, "_rows", counting)
    short, long, longest = (
        Example("text", "", "Bob"),
        Example("text", "", "x" * 3000),
        Example("text", "", "Bob " * 1000),
    )
    rows = tokens.LongRows(settings, entry)
    assert list(rows.watch([short] * 50_000)) == [short] * 50_000
    assert list(rows.problems("/forget_set")) == []
    assert counted == [], "no row has as many bytes as the context has tokens"
    given = [*[long] * 500, longest, *[long] * 500]
    rows = tokens.LongRows(settings, entry)
    assert list(rows.watch(given)) == given
    (problem,) = rows.problems("/forget_set")
    assert problem.detail.endswith("12 tokens: rows 501; shorter ones were not counted")
    assert 0 < sum(counted) <= tokens.JUDGED_BYTES


def test_rows_in_two_sets_are_refused_by_number_and_not_quoted(http: TestClient, body: dict[str, Any]) -> None:
    body["retain_set"] = [{"text": "Bob"}, *reversed(body["forget_set"])]
    reply = http.post(JOBS, json=body, params=DRY)
    told = [(error["pointer"], error["detail"]) for error in reply.json()["errors"]]
    assert reply.status_code == 422
    assert told == [("/forget_set", "forget row 1 is retain row 3"), ("/forget_set", "forget row 2 is retain row 2")]
    assert "Ada" not in reply.text


def test_what_cannot_be_told_is_null_with_a_reason(
    http: TestClient, settings: Settings, sessions: Sessions, folder: Path, request_body: dict[str, Any]
) -> None:
    def told(name: str, entry: ModelEntry) -> tuple[str, str]:
        with sessions.begin() as s:
            registry.add(s, entry)
        plan = http.post(JOBS, json=request_body | {"model": name}, params=DRY).json()
        one = plan["sets"]["forget_set"]
        if one["tokens"] is None:
            assert plan["steps"]["tokens_per_step"] is None
        return one["tokens_reason"], plan["memory"]["reason"]

    hub = register.hub_entry(settings, "hub", "o/m@" + "0" * 40, FORM)
    assert "fetched by the worker" in told("hub", hub)[0]
    absent = register.folder_entry(settings, "absent", folder, FORM).model_copy(update={"location": "elsewhere"})
    assert "cannot be read here" in told("absent", absent)[0]
    mixture = register.folder_entry(settings, "mixture", folder, FORM)
    mixture.info["sizes"]["mixture"] = True
    assert told("mixture", mixture) == (None, "what a mixture of experts needs was never measured")
    changed = register.folder_entry(settings, "changed", folder, FORM)
    (folder / "tokenizer_config.json").write_text("{}")
    assert "not those that were registered" in told("changed", changed)[0]


def test_it_warns_where_memory_will_not_do(http: TestClient, sessions: Sessions, body: dict[str, Any]) -> None:
    large = body | {"lora": {"r": 1024}, "resources": {"min_vram_gib": 0.001}}
    plan = http.post(JOBS, json=large, params=DRY).json()
    [warning] = plan["warnings"]
    assert warning["code"] == "memory_above_request"
    assert "by an estimate that was measured on none" in warning["message"]
    for vram_gib, codes in ((0.0, []), (0.001, ["memory_above_workers"]), (1.0, [])):
        with sessions.begin() as s:
            workers.seen(s, "w", ["cpu"], vram_gib)
        plan = http.post(JOBS, json=body | {"lora": {"r": 1024}}, params=DRY).json()
        assert [warning["code"] for warning in plan["warnings"]] == codes, vram_gib


def test_for_a_job_on_a_cpu_it_does_not_warn_of_accelerators(http: TestClient, body: dict[str, Any]) -> None:
    small = {"lora": {"r": 1024}, "resources": {"gpu_class": "cpu", "min_vram_gib": 0.001}}
    plan = http.post(JOBS, json=body | small, params=DRY).json()
    assert plan["memory"]["accelerator_bfloat16"]["total"] > 0.001 * 2**30
    assert plan["warnings"] == []


def test_it_tells_of_the_tenants_quotas(http: TestClient, sessions: Sessions, body: dict[str, Any]) -> None:
    def told() -> tuple[str | None, list[str]]:
        plan = http.post(JOBS, json=body, params=DRY).json()
        return plan["status_reason"], [warning["code"] for warning in plan["warnings"]]

    with sessions.begin() as s:
        workers.seen(s, "w", ["cpu"], 0)
        tenants.change(s, DEFAULT, max_running_jobs=1, max_open_jobs=2)
    assert told() == (None, [])
    assert http.post(JOBS, json=body).status_code == 201
    with sessions.begin() as s:
        assert jobs.claim(s, worker="w", classes=["cpu"], vram_gib=0, lease_s=60)
    assert told() == ("the tenant runs as many jobs at once as it may: 1", [])
    assert http.post(JOBS, json=body).status_code == 201
    assert told()[1] == ["open_jobs"]
    assert http.post(JOBS, json=body).status_code == 429
    with sessions.begin() as s:
        tenants.change(s, DEFAULT, max_running_jobs=2, max_open_jobs=3)
    assert told() == (None, [])


def test_it_is_printed_in_words(http: TestClient, body: dict[str, Any]) -> None:
    said = list(planned.lines(http.post(JOBS, json=body, params=DRY).json()))
    assert said[0].endswith("18 tokens, 10 of them counted, longest row 11")
    assert said[2].startswith(
        "steps: at most 300, each of 2 forget and 1 retain rows; 300 passes over the forget set; 29"
    )
    assert said[3].startswith(
        "evaluation after training: 32 answers, at most 1,088 tokens in all; attacks: quantise_8, "
    )
    assert said[4].startswith("memory on a CPU, float32: about ")
    assert said[6].startswith("jobs ahead: 0; no worker")
    said = list(planned.lines(http.post(JOBS, json=body | {"model": "m"}, params=DRY).json()))
    assert "tokens unknown: " in said[0]
    assert said[3] == "evaluation after training: attacks: quantise_8, quantise_4, paraphrase, prefix"
    assert said[4].startswith("memory unknown: ")
    assert said[-1].startswith("warning: ")


# --- memory by hand


SIZES = Sizes(
    parameters=1000,
    layers=2,
    width=4,
    inner=6,
    attention=4,
    keys=2,
    vocabulary=10,
    mixture=False,
    linear={"q_proj": Linear(modules=2, inputs=8, outputs=8), "down_proj": Linear(modules=2, inputs=12, outputs=8)},
)


def a_load(**given: Any) -> Load:
    one = SetLengths([RowLength(10, 5, 0)], 1)
    load = Load(one, one, 1, 1, 1, Lora(r=3), 0, frozenset({"nll"}), "primal_dual", {}, rounded=False)
    return load._replace(**given)


def test_memory_by_hand() -> None:
    cpu = memory.estimate(SIZES, a_load(), memory.CPU)
    # per layer: norms 2*4, queries and output 2*4, keys and values 2*2, feed-forward 3*6, inputs 2*4 + 6; adapters 3 each
    kept = 4 * (2 * (8 + 8 + 4 + 18 + 14) + 3 * 4)
    at_once = 4 * (2 * 4 + 5 * 6)
    assert memory.kept_per_token(SIZES, Lora(r=3), memory.CPU) == kept
    assert cpu.phase == "training"
    assert cpu.activations == 2 * 20 * (kept + at_once), "both rows in one micro-batch; twice, for the holes"
    assert cpu.head == 4 * 4 * 10 * 4 + 3 * 4 * 10 * 10
    assert (cpu.weights, cpu.adapter, cpu.reference) == (4000, 5 * 4 * 3 * 36, 0)
    half = memory.estimate(SIZES, a_load(), memory.ACCELERATOR)
    from_half = 2 * 2 * (8 + 4 + 18) + 4 * (2 * 8 + 8 + 12 + 3 * 4)
    assert half.activations == 20 * (from_half + at_once)
    assert half.weights == 2000
    both = memory.estimate(SIZES, a_load(solver="penalty_bilevel"), memory.ACCELERATOR)
    assert (both.weights, both.activations) == (6000, 20 * (kept + at_once)), "both copies, and a float32 forward pass"


def test_the_memory_of_answers_by_hand() -> None:
    """Of a question of 5 tokens whose answer has 5, in every way; the keys and values of a position take 32 bytes."""
    one = SetLengths([RowLength(10, 5, 1)], 1)
    found = memory.phases(SIZES, a_load(forget=one, retain=one), memory.CPU)["generating"]
    prompt, room = 5 + answers.PREFIX_TOKENS, 2 * 5 + 16
    at_once = 4 * (2 * 4 + 5 * 6)  # of a position of a prompt
    assert found.activations == 15 * ((prompt + room) * 32 + prompt * (32 + at_once))
    assert found.head == 10 * (15 * 4 + 8 * 20), "logits of fifteen answers, eight of them drawn in float64"
    each = {answers.Answer(prompt, room): 1e7}
    many = memory.generating(SIZES, each, memory.CPU)
    rows = memory.GENERATED_BYTES // 32 // (prompt + room)  # they are small: more than the usual 32,768 positions
    repeated = rows * (prompt + room) * 4 * 2 * 4  # by one layer, for all heads
    assert many.activations == rows * (prompt + room) * 32 + repeated, (
        "those that wait take the places of those that have ended"
    )
    large = SIZES.model_copy(update={"layers": 2000})
    rows = memory.GENERATED_TOKENS // (prompt + room)
    storage = rows * (prompt + room) * 32_000
    assert memory.generating(large, each, memory.CPU).activations == storage + 4096 * (32_000 + at_once)


def test_a_copy_with_rounded_weights_is_counted_while_it_is_judged() -> None:
    for machine, holes in ((memory.CPU, 2), (memory.ACCELERATOR, 1)):
        load = a_load(forget=SetLengths([RowLength(10, 5, 1)], 3))
        without, found = (memory.phases(SIZES, load._replace(rounded=rounded), machine) for rounded in (False, True))
        assert found.keys() - without.keys() == {"measuring_rounded", "generating_rounded"}
        assert {name: found[name] for name in without} == without
        for name in ("measuring_rounded", "generating_rounded"):
            assert found[name].rounded == holes * machine.weight_bytes * (2 * 4 * 4 + 2 * 6 * 4)
        kept = machine.weight_bytes * 2 * 2 * 2  # keys and values of all layers
        reading, answering = 5 * (kept + 4 * (2 * 4 + 5 * 6)), 31 * machine.weight_bytes * 2 * 4
        expected = 3 * (31 * kept + max(reading, answering))
        assert found["generating_rounded"].activations == expected, (
            "of questions with 5 tokens and answers of at most 26"
        )
    large = SIZES.model_copy(update={"linear": {"q_proj": Linear(modules=2, inputs=8000, outputs=8000)}})
    peak = memory.estimate(large, a_load(rounded=True, lora=Lora(r=1)), memory.CPU)
    assert (peak.phase, peak.rounded) == ("generating_rounded", 2 * 4 * 2 * 4000 * 4000)
    assert peak.total == peak.weights + peak.adapter + peak.reference + peak.activations + peak.head + peak.rounded


def test_what_the_reference_says_and_earlier_adapters_take_room() -> None:
    one = SetLengths([RowLength(10, 6, 1)] * 2, 50)  # a sample of two rows of fifty: six tokens of a row count
    needs = {"forget": frozenset({"reference", "refusal"}), "retain": frozenset({"reference_states"})}
    load = a_load(forget=one, retain=one, reference=needs, texts=2, earlier_rank=5)
    cpu = memory.estimate(SIZES, load, memory.CPU)
    assert cpu.reference == 2 * 4 * 300 + 4 * 4 * 300
    assert cpu.adapter == 5 * 4 * 3 * 36 + 4 * 5 * 36
    assert memory.estimate(SIZES, load, memory.ACCELERATOR).reference == 0


def test_sizes_are_read_from_headers(folder: Path) -> None:
    sizes = modelsizes.read(folder)
    assert sizes is not None
    assert (sizes.parameters, sizes.keys, sizes.linear["v_proj"]) == (
        PARAMETERS,
        2,
        Linear(modules=2, inputs=8, outputs=4),
    )
    assert set(sizes.linear) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    index = {"weight_map": dict.fromkeys(SHAPES, "weights/part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "weights").mkdir()
    (folder / "model.safetensors").rename(folder / "weights" / "part.safetensors")
    assert modelsizes.read(folder) == sizes, "where the index says"
    tied = SHAPES | {"lm_head.weight": [14, 4]}
    (folder / "model.safetensors").write_bytes(weights(tied))
    assert modelsizes.read(folder) == sizes, "a head that is the embeddings counts once"
    (folder / "config.json").write_text(json.dumps(CONFIG | {"tie_word_embeddings": False}))
    untied = modelsizes.read(folder)
    assert untied is not None
    assert untied.parameters == PARAMETERS + 56
    for broken in (b"weights", b"\xff" * 8, weights(SHAPES)[:-9]):
        (folder / "model.safetensors").write_bytes(broken)
        assert modelsizes.read(folder) is None
    assert digest_tokenizer(folder) == digest_model(folder)[1]


def test_what_a_chat_template_writes_around_question_and_answer_is_found(folder: Path) -> None:
    def around(source: str, **form: Any) -> tuple[str, ...]:
        (folder / "chat_template.jinja").write_text(source)
        special = files.special_tokens(folder)
        return template.around(files.template(folder), PromptFormat(type="chat", **form), special)

    plain = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    prompted = plain + "{% if add_generation_prompt %}[bot]{% endif %}"
    assert around(prompted) == ("<s>[user]", "\n[assistant]", "\n"), "as it writes an answer, not as it asks for one"
    assert around(plain, system="Hi.") == ("<s>[system]Hi.\n[user]", "\n[assistant]", "\n")
    for broken, why in {
        "{{ raise_exception('no') }}": "cannot be applied: no",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}": "once each",
        "{% for m in messages|reverse %}{{ m.content }}{% endfor %}": "once each",
        "nothing": "once each",
        "{{ ''.__class__.__mro__ }}{{ messages[0].content }}": "unsafe",
        "{% broken": "cannot be read",
    }.items():
        with pytest.raises(TemplateRefused, match=why):
            around(broken)


def test_where_the_files_have_no_template_that_is_said(folder: Path) -> None:
    with pytest.raises(TemplateRefused, match="no chat template that can be read"):
        files.template(folder)
    (folder / "chat_template.json").write_text('{"chat_template": [{"name": "default", "template": "T"}]}')
    assert files.template(folder) == "T"
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(TemplateRefused, match="config cannot be read"):
        files.special_tokens(folder)
