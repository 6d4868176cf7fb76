"""Losses whose logits are made a chunk at a time are those of whole logits, whatever the model does behind its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from dynadepth import MindSkipConfig, attach, disabled, routing_of, vocabulary
from dynadepth.tuning.data import Collator, Example
from dynadepth.tuning.objectives import ce_loss, kl_loss
from small import bare, ids


class Tripled(LlamaForCausalLM):
    """Does something to its logits that no configuration tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs["logits"] = 3 * outputs.logits
        return outputs


def batch() -> Any:
    rows = ids(4, 12).tolist()
    return Collator(0)([Example(row[: 8 + i], 2 + i) for i, row in enumerate(rows)])


def routed(kind: str) -> Any:
    """A routed tiny model in training mode; `kind` is what it does to its head's output."""
    base = bare("gemma3", final_logit_softcapping=1.5) if kind == "soft cap" else bare()
    if kind == "unknown":
        base.__class__ = Tripled
    model = attach(base, MindSkipConfig(layers="all", skip_path="linear", penalty=0.0)).train()
    generator = torch.Generator().manual_seed(0)
    for site, router in routing_of(model).routers().items():
        router.threshold.fill_(float("inf") if site.layer % 2 else float("-inf"))
    for path in routing_of(model).paths().values():
        with torch.no_grad():
            path.write.copy_(0.3 * torch.randn(path.write.shape, generator=generator))
    if kind == "head learns":
        base.lm_head.requires_grad_(True)
    return model


def learnt(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["plain", "soft cap", "unknown", "head learns"])
@pytest.mark.parametrize("objective", ["ce", "kl"])
def test_losses_and_gradients_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, kind: str, objective: str
) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 61 * 3)  # three positions at a time
    model, rows = routed(kind), batch()
    loss, _ = {"ce": ce_loss, "kl": kl_loss}[objective](model, rows, None)
    loss.backward()
    found = learnt(model)
    model.zero_grad()

    given = {name: value for name, value in rows.items() if name != "labels"}
    wanted = rows["labels"][:, 1:] != -100
    student = model(**given).logits[:, :-1][wanted]
    if objective == "ce":
        expected = nn.functional.cross_entropy(student, rows["labels"][:, 1:][wanted])
    else:
        with torch.no_grad(), disabled(model):
            teacher = model(**{k: v for k, v in given.items() if k != "prompt_mask"}).logits[:, :-1][wanted]
        expected = nn.functional.kl_div(
            student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
        )
    expected.backward()
    torch.testing.assert_close(loss, expected)
    own = learnt(model)
    assert found.keys() == own.keys()
    assert ("lm_head.weight" in found) == (kind == "head learns")
    for name, gradient in own.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-3


def test_no_more_logits_than_a_chunk_are_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 61 * 5)
    model, sizes = routed("plain"), []
    model.lm_head.register_forward_hook(lambda head, args, logits: sizes.append(logits.shape[:-1].numel()))
    for objective in (ce_loss, kl_loss):
        objective(model, batch(), None)[0].backward()
    assert max(sizes) == 5
    assert sum(sizes) > 3 * int((batch()["labels"][:, 1:] != -100).sum())


def test_a_loss_that_is_no_number_leaves_the_next_ones_as_they_were() -> None:
    model, sizes = routed("plain"), []
    norm = model.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
    assert torch.isnan(kl_loss(model, batch(), None)[0])
    with torch.no_grad():
        norm.copy_(kept)
    model.lm_head.register_forward_hook(lambda head, args, logits: sizes.append(tuple(logits.shape[:-1])))
    kl_loss(model, batch(), None)
    assert sizes[0] == (4, 1), "the whole batch's logits are made from now on"


def test_a_share_of_the_tokens_needs_no_more_logits_where_the_head_learns() -> None:
    model, sizes = routed("head learns"), []
    model.lm_head.register_forward_hook(lambda head, args, logits: sizes.append(logits.shape[:-1].numel()))
    kl_loss(model, batch(), None, share=0.25)
    whole = batch()["labels"].numel()
    assert max(sizes) < whole / 2
