"""Routers beside PEFT and accelerate: whichever comes first, each finds the model as it expects it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from dynadepth import (
    DrLLMConfig,
    MindSkipConfig,
    attach,
    detach,
    disabled,
    fixed_routes,
    is_attached,
    load,
    routing_of,
    save,
)
from dynadepth.errors import AdapterError, UnsupportedModelError
from small import ALL, FAMILIES, KINDS, bare, checkpoint, ids, mixed, ragged, routed, scatter

KIND = pytest.mark.parametrize(("granularity", "kv_policy"), KINDS)
ORDER = pytest.mark.parametrize("order", ["lora first", "routers first"])
BATCH = ragged([6, 3])
LABELLED = {**BATCH, "labels": BATCH["input_ids"].masked_fill(torch.arange(6) < 4, -100)}
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def lora(model: Any) -> PeftModel:
    """The model under a LoRA whose weights are already far from zero."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def both(order: str, **config: Any) -> PeftModel:
    settings = MindSkipConfig(layers=ALL, **config)
    if order == "lora first":
        return scatter(attach(lora(bare()), settings))
    return lora(scatter(attach(bare(), settings)))


@ORDER
@KIND
@pytest.mark.parametrize("target", ["attention", "block"])
def test_lora_before_or_after_the_routers(order: str, granularity: str, kv_policy: str, target: str) -> None:
    model, unrouted = both(order, granularity=granularity, kv_policy=kv_policy, target=target), lora(bare())
    assert is_attached(model)
    with fixed_routes(model, {}):
        assert torch.equal(model(**BATCH).logits, unrouted(**BATCH).logits)
    with disabled(model):
        assert torch.equal(model.generate(**BATCH, **OPTIONS), unrouted.generate(**BATCH, **OPTIONS))
    # The sparse paths run the adapted projections: they must agree with the masked path, which runs whole modules.
    sparse = model(**BATCH).logits
    masked = model.train()(**BATCH).logits.detach()
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(sparse[real], masked[real], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(sparse[real], unrouted(**BATCH).logits[real], atol=1e-2)


@ORDER
@KIND
def test_merging_keeps_the_routers(order: str, granularity: str, kv_policy: str) -> None:
    model = both(order, granularity=granularity, kv_policy=kv_policy)
    wanted, routes = model(**BATCH).logits, model(**BATCH).past_key_values.routes
    merged = model.merge_and_unload()
    assert is_attached(merged)
    assert not any("lora_" in name for name in merged.state_dict())
    found = merged(**BATCH)
    torch.testing.assert_close(found.logits, wanted, atol=1e-4, rtol=1e-4)
    assert found.past_key_values.routes == routes
    torch.testing.assert_close(
        detach(merged)(**BATCH).logits, lora(bare()).merge_and_unload()(**BATCH).logits, atol=1e-5, rtol=1e-5
    )
    assert list(merged.state_dict()) == list(bare().state_dict())


@ORDER
def test_unloading_and_disabling_adapters(order: str) -> None:
    model, plain = both(order), routed()
    with model.disable_adapter():
        assert torch.equal(model(**BATCH).logits, plain(**BATCH).logits)
    assert torch.equal(model.unload()(**BATCH).logits, plain(**BATCH).logits)


def test_both_train_when_lora_comes_first() -> None:
    model = both("lora first", penalty=0.1, capacity=0.1).train()
    model(**LABELLED).loss.backward()
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name or "depth_router" in name
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None) == wanted, name
    detach(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in lora(bare()).named_parameters() if p.requires_grad
    }


def test_peft_freezes_routers_that_it_finds_until_they_are_thawed() -> None:
    model = both("routers first", penalty=0.1, capacity=0.1).train()
    routers = list(routing_of(model).routers().values())
    assert not any(p.requires_grad for router in routers for p in router.parameters())
    for router in routers:
        router.requires_grad_(True)
    model(**LABELLED).loss.backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in routers)


@ORDER
def test_lora_trains_under_checkpointing(order: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = both(order).train()
        if checkpointing:
            checkpoint(model.get_base_model(), {"use_reentrant": False})
        with fixed_routes(model, mixed(2)):
            out = model(**LABELLED)
        out.loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@ORDER
def test_peft_files_are_those_of_the_unrouted_model(tmp_path: Path, order: str) -> None:
    both(order).save_pretrained(tmp_path / "routed")
    lora(bare()).save_pretrained(tmp_path / "unrouted")
    saved, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("routed", "unrouted"))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    # And they load on a bare model as on a routed one.
    expected = lora(bare())(**BATCH).logits
    assert torch.equal(PeftModel.from_pretrained(bare(), tmp_path / "routed").eval()(**BATCH).logits, expected)
    on_routed = PeftModel.from_pretrained(routed(), tmp_path / "unrouted").eval()
    with fixed_routes(on_routed, {}):
        assert torch.equal(on_routed(**BATCH).logits, expected)


@ORDER
def test_routers_save_and_load_around_lora(tmp_path: Path, order: str) -> None:
    model = both(order)
    save(model, tmp_path)
    # The fingerprint is the backbone's: LoRA beside it is no other model.
    for again in (load(lora(bare()), tmp_path), lora(load(bare(), tmp_path))):
        assert torch.equal(again(**BATCH).logits, model(**BATCH).logits)
    assert torch.equal(load(bare(), tmp_path)(**BATCH).logits, routed()(**BATCH).logits)


def test_a_copy_of_both() -> None:
    model = both("lora first")
    wanted, twin = model(**BATCH).logits, copy.deepcopy(model)
    detach(model)
    assert torch.equal(twin(**BATCH).logits, wanted)


# ---- accelerate's hooks replace `forward` on the instance


class Counting(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("when", ["before attach", "after attach"])
@pytest.mark.parametrize("part", ["model.layers.1.self_attn", "model.layers.1", "model", ""])
def test_hooks_on_routed_modules(when: str, part: str) -> None:
    base, hook = bare(), Counting()
    if when == "before attach":
        add_hook_to_module(base.get_submodule(part), hook)
    model = routed(base=base)
    if when == "after attach":
        add_hook_to_module(base.get_submodule(part), hook)
    before = hook.calls
    assert torch.equal(model(**BATCH).logits, routed()(**BATCH).logits)
    assert hook.calls == before + 1
    detach(model)
    assert torch.equal(model(**BATCH).logits, bare()(**BATCH).logits)
    assert hook.calls == before + 2
    remove_hook_from_module(base.get_submodule(part))
    assert torch.equal(model(**BATCH).logits, bare()(**BATCH).logits)


@KIND
def test_weights_that_are_offloaded_after_attaching(granularity: str, kv_policy: str) -> None:
    model = routed(granularity=granularity, kv_policy=kv_policy)
    wanted = model.generate(**BATCH, **OPTIONS)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(model.generate(**BATCH, **OPTIONS), wanted)


def test_plain_hooks_see_the_routed_modules() -> None:
    model, shapes = routed(), []
    model.model.layers[2].self_attn.register_forward_hook(lambda _, args, output: shapes.append(output[0].shape))
    model(input_ids=ids(3, 5))
    assert shapes == [(3, 5, 16)]


# ---- forwards that others set on the instance


def wrapped_by_accelerate(model: Any, folder: Path) -> None:
    """What `Trainer(bf16=True)` leaves on a model: accelerate's autocast around its forward."""
    arguments = TrainingArguments(
        str(folder), bf16=True, max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": BATCH["input_ids"][0], "labels": BATCH["input_ids"][0]}] * 2
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.accelerator.prepare_model(model)
    assert "forward" in vars(model)


def test_routers_come_off_under_accelerates_autocast(tmp_path: Path) -> None:
    model = routed()
    wrapped_by_accelerate(model, tmp_path)
    detach(model)
    plain = bare()
    wrapped_by_accelerate(plain, tmp_path)
    assert torch.equal(model(**BATCH).logits, plain(**BATCH).logits)


def test_a_forward_that_would_go_round_the_routers_is_refused(tmp_path: Path) -> None:
    model = bare()
    wrapped_by_accelerate(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM has a forward of its own.*unwrap_model"):
        attach(model, MindSkipConfig(layers=ALL))
    assert not is_attached(model)
    for part, config in (
        ("model.layers.1.self_attn", MindSkipConfig(layers=ALL)),
        ("model.layers.1.mlp", MindSkipConfig(layers=ALL, target="mlp")),
        ("model.layers.1.input_layernorm", MindSkipConfig(layers=ALL)),
        ("model", MindSkipConfig(layers=ALL)),
    ):
        model = bare()
        module = model.get_submodule(part)
        module.forward = type(module).forward.__get__(module)
        with pytest.raises(UnsupportedModelError, match=f"{part} has a forward of its own"):
            attach(model, config)
        del module.forward
        attach(model, config)


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_a_routed_model_generates_under_torch_compile(granularity: str) -> None:
    model = routed(granularity=granularity)
    wanted = model.generate(**BATCH, **OPTIONS)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(**BATCH, **OPTIONS), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_pickled(family: str) -> None:
    model = routed(family, skip_path="linear", skip_rank=4)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is type(model)
    assert torch.equal(twin.generate(**BATCH, **OPTIONS), model.generate(**BATCH, **OPTIONS))
    assert routing_of(twin) is not routing_of(model)
    assert torch.equal(detach(twin)(**BATCH).logits, bare(family)(**BATCH).logits)


def test_all_linear_layers_are_the_models_own(tmp_path: Path) -> None:
    model = attach(bare(), DrLLMConfig())
    names = set(routing_of(model).tensors())
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear"))
    assert set(routing_of(model).tensors()) == names
    save(model, tmp_path)
    assert is_attached(load(bare(), tmp_path))


def test_weights_that_were_offloaded_before(tmp_path: Path) -> None:
    routers = save(routed(), tmp_path)
    model = bare()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"offloaded ones .* is on the meta device"):
        attach(model, MindSkipConfig(layers=ALL))
    with pytest.raises(AdapterError, match="offloaded weights, whose fingerprint cannot be read"):
        load(model, routers)
