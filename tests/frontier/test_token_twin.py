"""The static twin of tokens: the same share of them at each attention, at fixed positions."""

from __future__ import annotations

import pytest
import torch

from dynadepth import MindSkipConfig, attach, is_attached, routing_of
from dynadepth.frontier.given import giving_positions
from dynadepth.frontier.run import run_frontier
from dynadepth.report.frontier_table import compared


def test_the_static_twin_of_tokens(opened, settings, tmp_path):
    found = run_frontier(*opened, settings("default-token-static", budgets=(0.5,), bench=True), tmp_path)
    assert [row["name"] for row in found.methods] == ["dense", "default-token", "default-token-static"]
    own, cell = found.cells["default-token"][0.5], found.cells["default-token-static"][0.5]
    assert cell["site_keep"] == pytest.approx(own["site_keep"], abs=0.01)
    assert len({round(share, 1) for share in own["site_keep"].values()}) > 1, "one share for all would pass"
    assert cell["text"]["keep_ratio"]["all"] == pytest.approx(own["text"]["keep_ratio"]["all"], abs=0.01)
    assert cell["text"]["kl"] != own["text"]["kl"]
    assert (cell["granularity"], cell["against"]["row"]) == ("token", "default-token")
    assert not is_attached(opened[0])
    (sentence,) = compared(found)
    assert sentence.startswith("default-token-static at 0.5: perplexity ")


class TestPositions:
    def test_each_site_executes_its_share_of_the_positions(self, opened):
        model, _ = opened
        attach(model, MindSkipConfig(granularity="token", layers="all"))
        first, second, *others = routing_of(model).sites
        shares = {first: 0.25, second: 0.5, **dict.fromkeys(others, 1.0)}
        ids = torch.randint(4, 20, (2, 200))
        with giving_positions(model, shares), torch.no_grad():
            chosen = model(input_ids=ids).depth_trace.decisions
        assert chosen[first].execute.float().mean().item() == pytest.approx(0.25, abs=0.01)
        assert chosen[second].execute.float().mean().item() == pytest.approx(0.5, abs=0.01)
        assert torch.equal(chosen[first].execute[0], chosen[first].execute[1]), "whatever the tokens are"

    def test_padding_has_no_position_and_steps_go_on_counting(self, opened):
        model, _ = opened
        attach(model, MindSkipConfig(granularity="token", layers="all"))
        shares = dict.fromkeys(routing_of(model).sites, 0.5)
        ids = torch.randint(4, 20, (1, 12))
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
        with giving_positions(model, shares), torch.no_grad():
            whole = model(input_ids=ids).logits
            behind = model(input_ids=padded, attention_mask=(padded > 0).long()).logits[:, 3:]
            cache = model(input_ids=ids[:, :7], use_cache=True).past_key_values
            steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(7, 12)]
        torch.testing.assert_close(behind, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat(steps, 1), whole[:, 7:], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert not torch.allclose(model(input_ids=ids).logits, whole), "the routers decide again"
