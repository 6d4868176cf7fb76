"""Loss under causal decisions against loss under the choice of the best k, and how often they agree."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dynadepth import MoDConfig, StaticConfig, attach, expert_choice, routing_of
from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation.causal import causal_gap
from small import bare, ids, ragged


def test_the_gap_is_of_all_label_tokens() -> None:
    torch.manual_seed(0)
    model = attach(bare(), MoDConfig(capacity=0.25, sampling="aux_loss")).train()
    first, second = ragged([16, 9], side="right"), {"input_ids": ids(1, 12, seed=2)}
    batches = [
        {**first, "labels": first["input_ids"].masked_fill(first["attention_mask"] == 0, -100)},
        {**second, "labels": second["input_ids"]},
    ]
    found = causal_gap(model, batches)
    assert model.training
    assert found.n_tokens == 15 + 8 + 11
    model.eval()
    losses, same, executed = [[], []], [], []
    for batch in batches:
        real = batch["labels"] != -100
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            with expert_choice(model):
                best = model(**inputs)
            alone = model(**inputs)
        for out, into in ((best, losses[0]), (alone, losses[1])):
            into.append(F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
        for row in range(len(real)):
            decisions = best.depth_trace.decisions.values()
            same.append(torch.stack([((d.logits >= 0) == d.top)[row, real[row]].float().mean() for d in decisions]))
            decisions = alone.depth_trace.decisions.values()
            executed.append(torch.stack([d.execute[row, real[row]].float().mean() for d in decisions]))
    assert found.top_k == pytest.approx(float(sum(losses[0])) / 34, rel=1e-5)
    assert found.causal == pytest.approx(float(sum(losses[1])) / 34, rel=1e-5)
    assert found.accuracy == pytest.approx(float(torch.stack(same).mean()), rel=1e-5)
    assert found.keep.routed == pytest.approx(float(torch.stack(executed).mean()), rel=1e-5)
    assert found.gap == pytest.approx(found.causal / found.top_k - 1)
    assert found.gap != 0


def test_refusals() -> None:
    with pytest.raises(DataError, match="No batch with a label"):
        causal_gap(attach(bare(), MoDConfig()), [])
    static = attach(bare(), StaticConfig(skip=(1,)))
    with pytest.raises(ConfigError, match="'static' decide about each unit alone"):
        causal_gap(static, [{"input_ids": ids(1, 4), "labels": ids(1, 4)}])
    assert not routing_of(static).chooses
