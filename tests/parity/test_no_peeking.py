"""Semantic 4: a router never sees what it must not. Changing token t + 1 changes no logits at or before t."""

from __future__ import annotations

import pytest
import torch

from .matrix import SHORT, TOKENS, Cell, assert_same, inputs, over, routed
from .models import VOCABULARY

PROMPT = 6


@pytest.mark.parametrize("training", [True, False], ids=["masked", "sparse"])
@over(SHORT)
def test_the_future_changes_nothing(name: str, cell: Cell, training: bool) -> None:
    batch = inputs()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(torch.arange(TOKENS) < PROMPT, -100)  # the answer begins at PROMPT
    model = routed(name, cell, batch, labels=labels).train(training)
    first = PROMPT if cell.sticky else int((mask == 0).sum(1).max()) + 1
    with torch.no_grad():
        before = model(**batch, labels=labels)
        for changed in range(first, TOKENS):
            other = ids.clone()
            other[:, changed:] = (other[:, changed:] + 11) % (VOCABULARY - 1) + 1
            after = model(input_ids=other, attention_mask=mask, labels=labels)
            real = mask[:, :changed].bool()
            assert_same(after.logits[:, :changed], before.logits[:, :changed], real, atol=1e-5)
            assert (after.logits[:, changed] - before.logits[:, changed]).abs().max() > 0.1
            if cell.sticky:
                for site in cell.sites:
                    assert_same(after.depth_logits[site], before.depth_logits[site], atol=1e-5)
