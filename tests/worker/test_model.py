"""Loading what was registered and nothing else; the head as the model has it; the adapter as PEFT has it."""

import json
import re
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from service.domain import modelfiles
from service.domain.errors import JobFailure
from service.domain.job import FailureCode, Lora, ModelEntry, PromptFormat
from service.domain.rows import Example
from worker import data, measure, model, scoring
from worker.losses.retain.nll import nll
from worker.model import Network
from worker.views import Term

LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
FAR_ID = 315
IDS = torch.tensor([[0, 40, 41, 42, 43, 44], [0, 50, 60, 70, 80, 90]])


def logits(network: Network) -> Tensor:
    with torch.no_grad():
        return network.causal(input_ids=IDS, use_cache=False).logits  # type: ignore[no-any-return]


def disturb(network: Network) -> None:
    """An adapter that does something: a fresh one is the identity."""
    generator = torch.Generator().manual_seed(5)
    model.assign(
        network, {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in model.trainable(network).items()}
    )


# --- loading


def test_a_loaded_model_is_frozen_quiet_and_cut_to_the_tokenisers_vocabulary(register: Any) -> None:
    network = register(attention_dropout=0.5).load("float32")
    assert not network.causal.training
    assert not any(p.requires_grad for p in network.causal.parameters())
    torch.testing.assert_close(logits(network), logits(network), rtol=0, atol=0)
    assert network.head is not None
    assert network.vocabulary == len(network.tokenizer) < network.causal.config.vocab_size
    assert network.head.weight_VD.shape == (network.vocabulary, 16)
    assert network.head.weight_VD.data_ptr() == network.causal.get_input_embeddings().weight.data_ptr(), "tied"
    assert network.context_tokens == 128
    assert network.parameters == sum(p.numel() for p in network.causal.parameters())


@pytest.fixture
def broken(register: Any, tmp_path: Path) -> Callable[[Callable[[Path], Any]], Network]:
    """broken(f): loads a copy of the tiny model whose folder f has changed, registered as it is then."""

    def load(change: Callable[[Path], Any]) -> Network:
        folder = tmp_path / "tiny"
        shutil.copytree(register().folder, folder)
        change(folder)
        return model.load(register().entry.model_copy(update={"digest": None}), tmp_path, "cpu", "float32")

    return load


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def leave_a_hole(folder: Path) -> None:
    """The tokeniser's " Paris" has an id beyond those of all other tokens, as that of a special token often has."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["ĠParis"] = FAR_ID
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("head", ["fused", "plain"])
def test_every_id_of_a_tokeniser_with_holes_counts(
    broken: Callable[[Callable[[Path], Any]], Network], head: str
) -> None:
    network = broken(leave_a_hole)
    if head == "plain":
        network = network._replace(head=None)
    assert len(network.tokenizer) < FAR_ID < network.causal.config.vocab_size - 1
    examples = [Example("question", "Where?", " Paris and Lima"), Example("question", "Who?", " nobody")]
    encoded = data.encode(examples, network.tokenizer, PromptFormat(assistant_start="Answer:"), 128)
    assert FAR_ID in encoded.rows[0].ids[encoded.rows[0].answer_start :]
    expected = []
    for row in encoded.rows:
        own_TV = network.causal(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, :-1, : FAR_ID + 1]
        logp_T = own_TV.log_softmax(-1).gather(1, torch.tensor(row.ids[1:])[:, None])[:, 0]
        expected.append(-float(logp_T[row.answer_start - 1 :].sum()))
    checked, _ = measure.score(network, Term(nll(), {"answer": encoded}), [0, 1])
    seen = scoring.score(network, encoded.rows, frozenset({"logp", "hits", "standardised"}))
    assert checked.nll_B.tolist() == pytest.approx(expected, abs=1e-5)
    assert seen.nll_B.tolist() == pytest.approx(expected, abs=1e-5)
    assert network.vocabulary == FAR_ID + 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (make_pickle, "pickle"),
        (drop_a_weight, r"lacks 1 of its architecture's weights: model\.layers\.1\.mlp\.up_proj\.weight"),
        (lambda f: edit_json(f / "config.json", intermediate_size=25), "cannot be loaded"),
        (lambda f: edit_json(f / "config.json", model_type="nosuch", architectures=["NoSuchForCausalLM"]), "nosuch"),
        (lambda f: edit_json(f / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}), "remote code"),
        (lambda f: edit_json(f / "config.json", architectures=["T5ForConditionalGeneration"]), "T5"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 100), "cannot be loaded"),
    ],
    ids=["pickle", "missing", "shape", "architecture", "remote-code", "not-causal", "tokenizer", "corrupt"],
)
def test_what_cannot_be_loaded_is_refused(
    broken: Callable[[Callable[[Path], Any]], Network], change: Callable[[Path], Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(JobFailure, match=says) as failure:
        broken(change)
    assert failure.value.code is FailureCode.UNSUPPORTED_ARCHITECTURE
    assert str(tmp_path) not in str(failure.value), "a path of the worker's machine is nobody's business"


def test_other_files_than_those_registered_are_refused(register: Any, tmp_path: Path) -> None:
    shutil.copytree(register().folder, tmp_path / "tiny")
    edit_json(tmp_path / "tiny" / "config.json", rms_norm_eps=1e-5)
    with pytest.raises(JobFailure, match="registered was sha256:") as failure:
        model.load(register().entry, tmp_path, "cpu", "float32")
    assert failure.value.code is FailureCode.MODEL_REVISION_MISMATCH


def test_weights_in_subfolders_are_held_against_the_digest(register: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(register().folder, tmp_path / "tiny"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"shards/{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    index = {"metadata": {"total_size": 0}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "shards").mkdir()

    def write(factor: float) -> None:
        for path in set(names.values()):
            own = {name: factor * tensor for name, tensor in tensors.items() if names[name] == path}
            save_file(own, folder / path, metadata={"format": "pt"})

    write(1.0)
    entry = register().entry.model_copy(update={"digest": modelfiles.digest_model(folder)[0]})
    loaded = model.load(entry, tmp_path, "cpu", "float32")
    torch.testing.assert_close(logits(loaded), logits(register().load("float32")), rtol=0, atol=0)
    assert set(names.values()) < loaded.files.keys()
    write(0.5)
    with pytest.raises(JobFailure, match="registered was sha256:") as failure:
        model.load(entry, tmp_path, "cpu", "float32")
    assert "again" not in str(failure.value)
    earlier = entry.model_copy(update={"digest": modelfiles.digest_at_the_top(folder)})
    with pytest.raises(JobFailure, match="register it again"):
        model.load(earlier, tmp_path, "cpu", "float32")


@pytest.mark.parametrize("location", ["gone", "../outside", "."])
def test_only_folders_below_the_models_root_are_read(register: Any, tmp_path: Path, location: str) -> None:
    (tmp_path / "root").mkdir()
    shutil.copytree(register().folder, tmp_path / "outside")
    entry = register().entry.model_copy(update={"location": location})
    with pytest.raises(JobFailure) as failure:
        model.load(entry, tmp_path / "root", "cpu", "float32")
    assert failure.value.code is FailureCode.MODEL_NOT_FOUND


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub that cannot be reached, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


HUB_ENTRY = ModelEntry(
    name="hub-model", source="hub", location="owner/name", revision="0" * 40, prompt_format=PromptFormat()
)


def test_a_hub_that_cannot_be_reached_is_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFailure, match=r"owner/name at 0000.* could not be fetched from the Hub") as failure:
        model.load(HUB_ENTRY, tmp_path, "cpu", "float32")
    assert failure.value.code is FailureCode.MODEL_NOT_FOUND


def test_a_hub_model_is_read_at_its_revision_and_named_by_its_id(hub: Path, register: Any, tmp_path: Path) -> None:
    snapshot = hub / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(register().folder, snapshot)
    network = model.adapt(model.load(HUB_ENTRY, tmp_path, "cpu", "float32"), Lora(), 0)
    model.save(network, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "0" * 40)
    assert card_front(tmp_path / "adapter")["base_model"] == "owner/name"
    described = json.loads((tmp_path / "adapter" / "base_model.json").read_text())
    assert (described["hub_id"], described["revision"]) == ("owner/name", "0" * 40)
    elsewhere = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        theirs = elsewhere(input_ids=IDS).logits
    torch.testing.assert_close(
        theirs, logits(network), rtol=0, atol=1e-6, msg="found at its revision: no other is here"
    )


# --- the head

HEADS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {}, "fused"),
    "llama-untied": ("llama", {"tie_word_embeddings": False}, "fused"),
    "phi-bias": ("phi", {"tie_word_embeddings": False, "num_key_value_heads": 2}, "fused"),
    "gemma2-capped": ("gemma2", {"final_logit_softcapping": 5.0}, "plain"),
    "gemma2-uncapped": ("gemma2", {"final_logit_softcapping": None}, "fused"),
    "cohere-scaled": ("cohere", {"logit_scale": 0.0625}, "plain"),
    "granite-scaled": ("granite", {"logits_scaling": 8.0}, "plain"),
    "granite-unscaled": ("granite", {"logits_scaling": 1.0}, "fused"),
    "granitemoe-scaled": ("granitemoe", {"logits_scaling": 8.0, "num_local_experts": 2}, "plain"),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_says_what_the_model_says(register: Any, case: str) -> None:
    model_type, config, kind = HEADS[case]
    network = register(model_type, **config).load("float32")
    if case == "phi-bias":
        torch.nn.init.normal_(network.causal.get_output_embeddings().bias)
    assert ("plain" if network.head is None else "fused") == kind
    hidden_ND = network.causal.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state.flatten(0, 1)
    target_N = IDS.flatten()
    now = network.predictions(hidden_ND, target_N)
    own_NV = logits(network).flatten(0, 1)[:, : network.vocabulary]
    own_N = own_NV.log_softmax(-1).gather(1, target_N[:, None])[:, 0]
    torch.testing.assert_close(now.logp_N(), own_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(now.margin_N(), own_NV.max(-1).values - own_NV.mean(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case, (*_, kind) in HEADS.items() if kind == "plain"])
def test_the_probe_finds_what_the_config_does_not_say(
    register: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, config, _ = HEADS[case]
    monkeypatch.setattr(model, "CAPS_AND_SCALES", ())
    assert register(model_type, **config).load("float32").head is None


def test_a_head_that_is_not_understood_is_refused(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "own_logits", lambda causal: lambda hidden_nD: hidden_nD.new_zeros(len(hidden_nD), 320))
    with pytest.raises(JobFailure, match="not understood") as failure:
        register("gemma2", final_logit_softcapping=5.0).load("float32")
    assert failure.value.code is FailureCode.UNSUPPORTED_ARCHITECTURE


def test_the_models_own_logits_leave_the_decoder_where_it_was(register: Any) -> None:
    network = register("gemma2", final_logit_softcapping=5.0).load("float32")
    before, decoder = logits(network), network.causal.model
    hidden_ND = decoder(input_ids=IDS, use_cache=False).last_hidden_state.flatten(0, 1).requires_grad_()
    network.predictions(hidden_ND, IDS.flatten()).logp_N().sum().backward()
    assert hidden_ND.grad is not None
    assert network.causal.model is decoder
    torch.testing.assert_close(logits(network), before, rtol=0, atol=0)


# --- the adapter


def test_every_linear_layer_but_the_head_is_adapted_in_float32_over_bfloat16(register: Any) -> None:
    network = model.adapt(register(tie_word_embeddings=False).load("bfloat16"), Lora(r=4), 0)
    params = model.trainable(network)
    assert {p.dtype for p in params.values()} == {torch.float32}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in params} == set(LINEAR)
    assert len(params) == 2 * 2 * len(LINEAR), "two layers, A and B"
    others = [p for name, p in network.causal.named_parameters() if ".lora_" not in name]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert not any(p.requires_grad for p in others)
    assert model.facts(network).trainable_parameters == sum(p.numel() for p in params.values())


def test_with_the_adapter_off_it_is_the_base_bit_for_bit(register: Any) -> None:
    base = register().load("float32")
    before = logits(base)
    network = model.adapt(base, Lora(), 0)
    torch.testing.assert_close(logits(network), before, rtol=0, atol=0, msg="a fresh adapter is the identity")
    disturb(network)
    assert not torch.allclose(logits(network), before)
    assert network.peft is not None
    with network.peft.disable_adapter():
        torch.testing.assert_close(logits(network), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in model.trainable(network).values())


def test_an_adapter_begins_as_a_function_of_the_seed_alone(register: Any) -> None:
    def start(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        network = model.adapt(register().load("float32"), Lora(), seed)
        assert torch.initial_seed() == noise
        return model.trainable(network)

    first, again, other = start(3, noise=1), start(3, noise=2), start(4, noise=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("lm_head", "is the head or an embedding"),
        ("embed_tokens", "is the head or an embedding"),
        ("model.embed_tokens", "is the head or an embedding"),
        ("all-linear", "names no linear layer"),
        ("q_prj", "names no linear layer.*; there are: " + ", ".join(LINEAR)),
        ("self_attn", "names no linear layer"),
        ("_proj", "names no linear layer"),
    ],
)
def test_targets_that_are_refused(register: Any, target: str, says: str) -> None:
    with pytest.raises(JobFailure, match=says) as failure:
        model.adapt(register().load("float32"), Lora(target_modules=["q_proj", target]), 0)
    assert failure.value.code is FailureCode.UNSUPPORTED_ARCHITECTURE


def test_the_router_of_a_mixture_is_not_adapted(register: Any) -> None:
    network = register("qwen2_moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8).load("float32")
    with pytest.raises(JobFailure, match="router"):
        model.adapt(network, Lora(target_modules=["gate"]), 0)
    adapted = model.trainable(model.adapt(network, Lora(), 0))
    assert not [name for name in adapted if ".gate." in name or ".shared_expert_gate." in name]


def test_named_targets_are_those_that_are_adapted(register: Any) -> None:
    lora = Lora(r=2, target_modules=["v_proj", "layers.1.mlp.up_proj"])
    adapted = {name.split(".lora_")[0] for name in model.trainable(model.adapt(register().load("float32"), lora, 0))}
    assert {name.partition("layers.")[2] for name in adapted} == {
        "0.self_attn.v_proj",
        "1.self_attn.v_proj",
        "1.mlp.up_proj",
    }


def card_front(folder: Path) -> dict[str, Any]:
    front: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    return front


def test_the_config_of_an_adapter_is_written_in_one_order(register: Any, tmp_path: Path) -> None:
    """Bit for bit the same in every process, though names are a set to PEFT, and hashes differ."""
    network = model.adapt(register().load("float32"), Lora(), 0)
    assert network.peft is not None
    network.peft.peft_config["default"].target_modules = ["v_proj", "k_proj", "q_proj"]
    model.save(network, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert list(written) == sorted(written)


def test_what_is_saved_loads_anywhere_and_says_the_same(register: Any, tmp_path: Path) -> None:
    registered = register()
    network = model.adapt(registered.load("float32"), Lora(r=4, alpha=8), 0)
    disturb(network)
    expected = logits(network)
    model.save(network, tmp_path / "adapter")

    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model.json",
    }
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert str(registered.root) not in text
    config = json.loads(text)
    assert config["base_model_name_or_path"] == f"registered-model:tiny-model@{registered.entry.digest}"
    assert config["revision"] is None
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    front = card_front(tmp_path / "adapter")
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front, "a card's base model must be a Hub id, which a local one has not"
    assert str(registered.root) not in (tmp_path / "adapter" / "README.md").read_text()

    elsewhere = AutoModelForCausalLM.from_pretrained(registered.folder, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(elsewhere, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)
    for start in (network, registered.load("float32")):
        reloaded = model.load_adapter(start, tmp_path / "adapter")
        torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=0)
        assert not model.trainable(reloaded), "what was published is not trained on"


def test_the_name_of_a_base_that_is_on_no_hub_resolves_nowhere(
    register: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though "gpt2" may be registered here, and is on the Hub."""
    entry = register().entry.model_copy(update={"name": "gpt2"})
    network = model.adapt(register().load("float32")._replace(entry=entry), Lora(), 0)
    model.save(network, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    with pytest.raises(HFValidationError):
        validate_repo_id(base)
    connections: list[object] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda _, address: connections.append(address))
    with pytest.raises(OSError, match="registered-model:gpt2"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert connections == []


@pytest.mark.parametrize("kind", ["plain", "chat", "ends"])
def test_the_folder_says_on_which_base_the_adapter_goes_and_how_it_is_prompted(
    register: Any, byte_tokenizer: Any, kind: str, tmp_path: Path
) -> None:
    registered = register(chat=kind == "chat")
    network = registered.load("float32")
    if kind == "chat":
        form = PromptFormat(type="chat", system="Be kind.", template_date=date(2025, 3, 9))
    else:
        form = PromptFormat(user_start="Q: ", user_end="\n", assistant_start="Answer:")
    if kind == "ends":
        network = network._replace(tokenizer=byte_tokenizer(ends=True))
    network = network._replace(entry=registered.entry.model_copy(update={"prompt_format": form}))
    adapted = model.adapt(network, Lora(), 0)
    disturb(adapted)
    model.save(adapted, tmp_path / "adapter")

    described = json.loads((tmp_path / "adapter" / "base_model.json").read_text())
    files = modelfiles.sums(registered.folder)
    assert described["files"] == files
    assert (described["digest"], described["tokenizer_digest"]) == modelfiles.digest_files(files)
    assert PromptFormat.model_validate(described["prompt_format"]) == form
    for digest in (described["digest"], described["tokenizer_digest"]):
        assert digest in (tmp_path / "adapter" / "README.md").read_text()

    if kind == "ends":
        network.tokenizer.save_pretrained(tmp_path / "tokenizer")
    (loading,) = re.findall("```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)
    for placeholder, given in {
        "FOLDER OF THE BASE MODEL": str(registered.folder),
        "FOLDER OF THIS FILE": str(tmp_path / "adapter"),
        "QUESTION": "Who?",
        "AutoTokenizer.from_pretrained(base)": f"AutoTokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r})"
        if kind == "ends"
        else "AutoTokenizer.from_pretrained(base)",
    }.items():
        assert placeholder in loading
        loading = loading.replace(placeholder, given)
    loaded: dict[str, Any] = {}
    exec(loading, loaded)
    (expected,) = data.encode([Example("question", "Who?", " Lima")], network.tokenizer, form, 128).prompts
    assert loaded["ids"].tolist() == [expected]
    with torch.no_grad():
        theirs = loaded["model"](input_ids=IDS).logits
    torch.testing.assert_close(theirs, logits(adapted), rtol=0, atol=1e-6)


def test_the_same_adapter_is_saved_as_the_same_bytes(register: Any, tmp_path: Path) -> None:
    for folder in ("first", "second"):
        network = model.adapt(register().load("float32"), Lora(), 0)
        disturb(network)
        model.save(network, tmp_path / folder)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in ("first", "second"))
    assert first == second
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_the_digest_is_that_of_the_files_that_are_loaded(register: Any) -> None:
    network = register().load("float32")
    assert (network.digest, network.tokenizer_digest) == modelfiles.digest_model(register().folder)
