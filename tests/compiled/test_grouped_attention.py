"""Attention by groups of heads gives what transformers' own gives, and is what compiled layers use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import dynadepth
from dynadepth import hub
from dynadepth.benchmark import pruned_twin
from dynadepth.compiled import attention, layers
from dynadepth.compiled.attention import grouped_attention
from small import ALL, FAMILIES, bare, ids


class Module(nn.Module):
    """An attention as far as its function asks."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def asked(heads: int, groups: int, tokens: int = 1, rows: int = 3, held: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, heads, tokens, 8), (rows, groups, held, 8), (rows, groups, held, 8))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def masks(rows: int = 3, held: int = 11) -> dict[str, Tensor | None]:
    shown = torch.rand(rows, 1, 1, held, generator=torch.Generator().manual_seed(1)) > 0.3
    return {"none": None, "shown": shown, "added": torch.where(shown, 0.5, -torch.inf)}


@pytest.mark.parametrize("mask", ["none", "shown", "added"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1)])
def test_it_is_transformers_own(heads: int, groups: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = (*asked(heads, groups), masks()[mask])
    expected, _ = sdpa_attention_forward(Module(heads // groups), *given, scaling=0.3)

    def own(*given: Any, **options: Any) -> None:
        raise AssertionError("it was left to transformers")

    monkeypatch.setattr(attention, "sdpa_attention_forward", own)
    found, _ = grouped_attention(Module(heads // groups), *given, scaling=0.3)
    assert found.shape == expected.shape == (3, 1, heads, 8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("why", ["several tokens", "a head each", "a mask of each head", "a bias", "dropout"])
def test_the_rest_is_transformers_own(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = asked(4, 4 if why == "a head each" else 2, tokens=3 if why == "several tokens" else 1)
    mask = masks()["shown"] if why != "a mask of each head" else torch.rand(3, 4, 1, 11) > 0.3
    options: dict[str, Any] = {"a bias": {"position_bias": torch.zeros(1)}, "dropout": {"dropout": 0.1}}.get(why, {})
    asked_for = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *given, **more: asked_for.append((given, more)))
    module = Module(2)
    grouped_attention(module, query, key, value, mask, **options)
    [(given, more)] = asked_for
    assert all(a is b for a, b in zip(given, (module, query, key, value, mask), strict=True))
    assert more == {"dropout": 0.0, "scaling": None, **options}


def steps(model: Any, between: Any = lambda model: None) -> Tensor:
    """Logits of two steps behind a prompt, each row of which has another length."""
    with torch.no_grad():
        mask = torch.ones(3, 6, dtype=torch.long)
        mask[0, :2] = 0
        out = model(input_ids=ids(3, 6), attention_mask=mask, use_cache=True)
        between(model)
        logits = []
        for seed in (1, 2):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = {"input_ids": ids(3, 1, seed), "attention_mask": mask, "past_key_values": out.past_key_values}
            logits.append(model(**given).logits)
    return torch.cat(logits, 1)


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of this attention that was not left to transformers. Forms run as plain Python."""
    calls: list[int] = []
    ordinary = nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *given: Any, **options: Any) -> Tensor:
        calls.append(len(query))
        return ordinary(query, *given, **options)

    original = layers.Steps.__init__
    monkeypatch.setattr(layers.Steps, "__init__", lambda self, routing: original(self, routing, lambda: layers.step))
    monkeypatch.setattr(attention.nn.functional, "scaled_dot_product_attention", counted)

    def own(*given: Any, **options: Any) -> Any:
        before = len(calls)
        output = sdpa_attention_forward(*given, **options)
        del calls[before:]
        return output

    monkeypatch.setattr(attention, "sdpa_attention_forward", own)
    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", own)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_use_it(family: str, grouped: list[int]) -> None:
    model = bare(family)
    expected = steps(model)
    assert not grouped
    dynadepth.compile(model)
    grouped.clear()
    torch.testing.assert_close(steps(model), expected, atol=1e-5, rtol=1e-5)
    assert grouped == [3] * 2 * len(ALL)
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_is_followed_from_the_next_prompt(grouped: list[int]) -> None:
    expected, model = steps(bare()), dynadepth.compile(bare())
    model.set_attn_implementation("eager")
    grouped.clear()
    torch.testing.assert_close(steps(model), expected, atol=1e-5, rtol=1e-5)
    assert not grouped


def test_layers_merged_of_several_are_compiled(grouped: list[int]) -> None:
    """A pruned twin's."""
    twin = pruned_twin(bare(), [dynadepth.Site(1, "attention")])
    expected = steps(twin)
    dynadepth.compile(twin)
    grouped.clear()
    torch.testing.assert_close(steps(twin), expected, atol=1e-5, rtol=1e-5)
    assert grouped == [3] * 2 * (len(ALL) - 1)


def test_a_model_that_magnifies_rounding_is_compiled(grouped: list[int], smollm2_path: Path) -> None:
    """Half of its attentions are gone, and it was trained with all of them."""
    twin = pruned_twin(hub.load_model(str(smollm2_path)), [dynadepth.Site(i, "attention") for i in range(1, 30, 2)])
    assert dynadepth.is_compiled(dynadepth.compile(twin))
    assert grouped == [2] * 2 * 15
