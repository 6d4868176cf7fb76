"""A LoRA beside the routers: at work in routed forwards alone, in PEFT's own files, refused where it is damaged."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from adapters import content, edit, refused
from dynadepth import attach, detach, disabled, fixed_routes, is_attached, load, routing_of, save
from dynadepth.adapter import CONFIG
from dynadepth.errors import AdapterError, ConfigError
from dynadepth.lora import CONFIG as LORA_CONFIG
from dynadepth.lora import WEIGHTS as LORA_WEIGHTS
from dynadepth.lora import LoraSettings, linear_sides
from dynadepth.methods import MindSkipConfig
from dynadepth.model import add_lora
from small import ALL, FAMILIES, KINDS, bare, checkpoint, mixed, ragged, routed, scatter

BATCH = ragged([6, 3])
OPTIONS = {"max_new_tokens": 4, "do_sample": False}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def fill(model: Any, seed: int = 3) -> Any:
    """Gives the LoRA random weights of some size. Returns the model."""
    generator = torch.Generator().manual_seed(seed)
    lora = routing_of(model).lora
    lora.load_tensors({k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in lora.tensors().items()})
    return model


def adapted(family: str = "llama", modules: tuple[str, ...] = (), **config: Any) -> Any:
    """A routed tiny model with a LoRA of rank 2 far from zero."""
    model = routed(family, **config)
    add_lora(model, LoraSettings(2, modules=modules))
    return fill(model).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = adapted()
    model.config._name_or_path = "tiny/llama"
    return save(model, tmp_path / "routers")


# ---- what it adapts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_lora_changes_nothing(family: str) -> None:
    model = routed(family)
    wanted = model(**BATCH).logits
    add_lora(model, LoraSettings(2))
    assert torch.equal(model(**BATCH).logits, wanted)
    assert list(linear_sides(bare(family))) == EVERY
    lora = routing_of(model).lora
    assert len(lora.layers) == 7 * len(ALL)
    assert all(p.requires_grad and p.dtype == torch.float32 for _, p in lora.named_parameters())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "depth_" in name for name in trainable)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
def test_the_dense_model_is_the_base_bit_for_bit(family: str, granularity: str, kv_policy: str) -> None:
    model, base = adapted(family, granularity=granularity, kv_policy=kv_policy), bare(family)
    plain = routed(family, granularity=granularity, kv_policy=kv_policy)
    assert not torch.allclose(model(**BATCH).logits, plain(**BATCH).logits, atol=1e-3)
    with disabled(model):
        assert torch.equal(model(**BATCH).logits, base(**BATCH).logits)
        assert torch.equal(model.generate(**BATCH, **OPTIONS), base.generate(**BATCH, **OPTIONS))
    detach(model)
    assert torch.equal(model(**BATCH).logits, base(**BATCH).logits)
    assert list(model.state_dict()) == list(base.state_dict())
    assert not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_it_is_peft_s_lora(saved: Path) -> None:
    """Where everything executes, the files give the same on the unrouted model under PEFT itself."""
    unrouted = PeftModel.from_pretrained(bare(), saved).eval()
    model = load(bare(), saved)
    with fixed_routes(model, {}):
        assert torch.equal(model(**BATCH).logits, unrouted(**BATCH).logits)


@pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
def test_sparse_and_masked_paths_agree(granularity: str, kv_policy: str) -> None:
    model = adapted(granularity=granularity, kv_policy=kv_policy)
    sparse = model(**BATCH).logits
    masked = model.train()(**BATCH).logits.detach()
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(sparse[real], masked[real], atol=1e-4, rtol=1e-4)


def test_one_thread_is_dense_while_the_other_is_routed() -> None:
    model = adapted()
    wanted, dense = model(**BATCH).logits, bare()(**BATCH).logits
    inside, done, found = threading.Event(), threading.Event(), []

    def other() -> None:
        inside.wait()
        found.append(model(**BATCH).logits)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with disabled(model):
        inside.set()
        done.wait()
        assert torch.equal(model(**BATCH).logits, dense)
    thread.join()
    assert torch.equal(found[0], wanted)


def test_gradients_reach_it_and_survive_checkpointing() -> None:
    labelled = {**BATCH, "labels": BATCH["input_ids"].masked_fill(torch.arange(6) < 4, -100)}
    gradients = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            checkpoint(model, {"use_reentrant": False})
        with fixed_routes(model, mixed(2)):
            loss = model(**labelled).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in routing_of(model).lora.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_copy_has_its_own() -> None:
    model = adapted()
    wanted, twin = model(**BATCH).logits, copy.deepcopy(model)
    detach(model)
    assert torch.equal(twin(**BATCH).logits, wanted)


def test_named_modules_alone() -> None:
    model = adapted(modules=("down_proj", "o_proj"))
    assert {name.rpartition(".")[2] for name in routing_of(model).lora.layers} == {"down_proj", "o_proj"}


# ---- on disk


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(tmp_path: Path, family: str) -> None:
    model = adapted(family)
    save(model, tmp_path)
    again = load(bare(family), tmp_path)
    assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    assert torch.equal(again.generate(**BATCH, **OPTIONS), model.generate(**BATCH, **OPTIONS))
    assert all(parameter.requires_grad for _, parameter in routing_of(again).lora.named_parameters())
    assert routing_of(again).lora.facts() == {"rank": 2, "alpha": 4, "modules": sorted(EVERY), "parameters": 1856}


def test_peft_s_own_files(saved: Path) -> None:
    """Names, shapes and settings are those that PEFT writes itself."""
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=EVERY, task_type="CAUSAL_LM")
    own = bare()
    own.config._name_or_path = "tiny/llama"
    get_peft_model(own, settings).save_pretrained(saved.parent / "peft")
    ours, theirs = (load_file(folder / LORA_WEIGHTS) for folder in (saved, saved.parent / "peft"))
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: t.shape for n, t in theirs.items()}
    written, wanted = (json.loads((folder / LORA_CONFIG).read_text()) for folder in (saved, saved.parent / "peft"))
    assert sorted(wanted.pop("target_modules")) == written.pop("target_modules")
    assert written == wanted


def test_it_takes_the_base_s_dtype(saved: Path) -> None:
    model = load(bare().to(torch.bfloat16), saved, strict=False)
    assert {p.dtype for _, p in routing_of(model).lora.named_parameters()} == {torch.bfloat16}
    assert model(**BATCH).logits.isfinite().all()


def test_the_model_is_saved_without_it(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path / "routed")
    bare().save_pretrained(tmp_path / "bare")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("routed", "bare"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_pushed_to_the_hub_is_the_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`push_to_hub` is the model's own: it uploads what `save_pretrained` writes. Nothing leaves this machine here."""
    from transformers.utils import hub

    pushed: dict[str, Any] = {}

    def upload(self: Any, folder: str, repo_id: str, **_: Any) -> None:
        pushed.update(load_file(Path(folder) / "model.safetensors"), repo=repo_id)

    model = adapted()
    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("me/mine")
    assert pushed.pop("repo") == "me/mine"
    wanted = bare().state_dict()
    assert pushed.keys() == wanted.keys()
    assert all(torch.equal(pushed[name], wanted[name]) for name in wanted)


def test_routers_saved_over_it_take_it_away(saved: Path) -> None:
    save(routed(), saved)
    assert sorted(content(saved)) == ["routers.safetensors", CONFIG]
    assert routing_of(load(bare(), saved)).lora is None


def test_routers_alone_have_the_older_format(tmp_path: Path, saved: Path) -> None:
    assert json.loads((save(routed(), tmp_path / "plain") / CONFIG).read_text())["format"] == 2
    assert json.loads((saved / CONFIG).read_text())["format"] == 3


# ---- damage


@pytest.mark.parametrize("name", [LORA_CONFIG, LORA_WEIGHTS])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"lacks {name}" in refused(bare(), saved)


@pytest.mark.parametrize("name", [LORA_CONFIG, LORA_WEIGHTS])
def test_a_changed_file(saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:-1])
    message = refused(bare(), saved)
    assert f"{name} is truncated or was changed" in message


def resigned(directory: Path) -> Path:
    """Makes the digests fit the files."""
    edit(
        directory,
        lora={n: hashlib.sha256((directory / n).read_bytes()).hexdigest() for n in (LORA_CONFIG, LORA_WEIGHTS)},
    )
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if ".0." not in k}, "are missing"),
        (
            lambda t: {**t, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)},
            "layer",
        ),
        (lambda t: {k: torch.zeros(3, 3) for k in t}, r"has the shape \[3, 3\]"),
    ],
    ids=["missing", "too many", "shapes"],
)
def test_tensors_of_another_lora(saved: Path, change: Any, message: str) -> None:
    save_file(change(load_file(saved / LORA_WEIGHTS)), saved / LORA_WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        load(bare(), resigned(saved))
    assert "does not fit its own configuration or this model" in refused(bare(), saved)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "damaged"), ("[1]", "damaged"), ("{}", "no LoRA"), ('{"peft_type": "LORE"}', "LORE")],
)
def test_a_configuration_that_is_none(saved: Path, text: str, message: str) -> None:
    (saved / LORA_CONFIG).write_text(text)
    assert message in refused(bare(), resigned(saved))


def test_tensors_that_are_none(saved: Path) -> None:
    (saved / LORA_WEIGHTS).write_bytes(b"not safetensors")
    assert "damaged" in refused(bare(), resigned(saved))


@pytest.mark.parametrize("entry", [3, {}, {LORA_WEIGHTS: "x"}, {"../other": "x", LORA_CONFIG: "y"}], ids=str)
def test_a_damaged_entry(saved: Path, entry: Any) -> None:
    edit(saved, lora=entry)
    assert "is damaged (its 'lora')" in refused(bare(), saved)


def test_another_model_s(saved: Path) -> None:
    assert "fingerprint" in refused(bare(seed=5), saved)


def test_a_model_that_peft_adapts_already(saved: Path) -> None:
    model = get_peft_model(bare(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="under a PEFT adapter already: merge it"):
        load(model, saved)
    assert not is_attached(model)
    model = scatter(attach(bare(), MindSkipConfig(layers=ALL)))
    add_lora(model, LoraSettings(2))
    with pytest.raises(ConfigError, match="under a PEFT adapter already"):
        add_lora(model, LoraSettings(2))


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a rank"),
        ({"rank": 0}, "rank .*not 0"),
        ({"rank": True}, "rank .*not True"),
        ({"rank": "16"}, "rank .*not '16'"),
        ({"rnak": 16}, "no setting 'rnak'.*Did you mean 'rank'"),
        ({"rank": 2, "alpha": 0}, "alpha .*not 0"),
        ({"rank": 2, "dropout": 1}, "dropout .*not 1"),
        ({"rank": 2, "modules": "q_proj"}, "modules .*not 'q_proj'"),
        ({"rank": 2, "modules": [3]}, r"modules .*not \[3\]"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSettings.from_dict(settings)


def test_a_layer_that_the_model_does_not_have() -> None:
    model = routed()
    with pytest.raises(ConfigError, match=r"no linear layer 'q_prj'.*Did you mean 'q_proj'"):
        add_lora(model, LoraSettings(2, modules=("q_prj",)))
    assert routing_of(model).lora is None
    assert list(detach(model).state_dict()) == list(bare().state_dict())


@pytest.mark.parametrize("modules", [(), ("k_proj",)])
def test_a_rank_that_no_layer_can_have(modules: tuple[str, ...]) -> None:
    highest = max(side for name, side in linear_sides(bare()).items() if not modules or name in modules)
    assert highest == (8 if modules else 16)
    with pytest.raises(ConfigError, match=f"rank {highest + 1} is more than any .*: give {highest} or less"):
        add_lora(routed(), LoraSettings(highest + 1, modules=modules))
    add_lora(routed(), LoraSettings(highest, modules=modules))


def test_it_is_not_put_into_the_folder_of_a_model(tmp_path: Path) -> None:
    """transformers would find PEFT's files there and adapt the model itself."""
    folder = tmp_path / "model"
    bare().save_pretrained(folder)
    with pytest.raises(AdapterError, match=r"is a model's folder.*a folder of their own"):
        save(adapted(), folder)
    assert not (folder / "adapter_config.json").exists()
    assert (save(routed(), folder) / "routers.safetensors").exists()
