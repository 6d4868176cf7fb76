"""The words and rows of the demo's results: honest whoever wins, and silent where nothing is known."""

from __future__ import annotations

import pytest
from results import ROUTE, answer, cell, results

from dynadepth.report.info import layer_ranges
from dynadepth.report.routes import keep_of, strip
from dynadepth.report.summary import rows, verdict


def _changed(**routed: float) -> dict:
    made = results()
    made["variants"]["routed"] |= routed
    return made


@pytest.mark.parametrize(
    ("perplexity", "said"),
    [
        (25.0, "the static twin is better"),
        (22.0, "routing per input is better"),
        (24.05, "equal within half a percent"),
    ],
)
def test_the_winner_is_named(perplexity, said):
    assert said in " ".join(verdict(_changed(perplexity=perplexity)))


def test_noise_is_called_noise():
    assert "within the noise" in " ".join(verdict(_changed()))
    assert "beyond the noise" in " ".join(verdict(_changed(accuracy_difference=[-0.2, -0.1])))


def test_one_route_for_all_prompts_is_said():
    assert "every prompt took the same route" in " ".join(verdict(results()))
    other = {"prompt": "Who?", "answers": {"routed": answer("x", ROUTE | {"1.attention": 0.0})}}
    assert "2 different routes for 2 prompts" in " ".join(verdict(results(samples=[*results()["samples"], other])))


def test_reused_routers_are_said():
    assert "used again" not in " ".join(verdict(results()))
    assert "used again" in " ".join(verdict(results(tuning=results()["tuning"] | {"reused": True})))


def test_a_missed_budget_is_said():
    assert "budget asked for" not in " ".join(verdict(_changed(keep_all=0.77, keep_questions=0.73)))
    missed = " ".join(verdict(_changed(keep_all=0.7, keep_questions=0.74)))
    assert "The budget asked for 75.0 %; what was executed is 70.0 % on the text." in missed


def test_a_busy_machine_is_said():
    assert "busy" not in " ".join(verdict(results()))
    assert "up to 60%" in " ".join(verdict(results(speed={"routed": [cell("prefill", 1.1) | {"spread": 0.6}]})))


def test_rows_mark_the_better_one():
    by_label = {row.label: row for row in rows(results())}
    assert by_label["perplexity"].better == "static"
    assert by_label["KL from dense, nats a token"].better == "routed"
    assert by_label["same next token as dense"].better is None  # equal
    assert by_label["accuracy, 160 questions"].values == ("50.0 %", "48.0 %", "45.0 %")
    assert by_label["decode a token at 2,048"].values == ("500 ms", "1.20×", "1.25×")
    assert by_label["KV cache at 2,048"].values == ("40.0 MB", "30.0 MB", "30.0 MB")


def test_unknown_values_are_dashes_and_unknown_rows_absent():
    made = rows(
        results(variants={"dense": {"perplexity": 20.0}}, speed={"static": [cell("prefill", 1.0) | {"speedup": None}]})
    )
    assert [row.values for row in made] == [("20.00", "-", "-"), ("500 ms", "-", "-")]
    assert rows({}) == []
    assert verdict({}) == []


def test_strips():
    assert strip({"0.attention": 1.0, "1.attention": 0.0, "3.attention": 0.5}, 5) == "■□·▄·"
    assert strip({"0.mlp": 0.01, "1.mlp": 0.99}, 2) == "▁▇"


def test_keep_ratio_of_one_route():
    keep = keep_of({"0.attention": 1.0, "1.attention": 0.0}, 4)
    assert (keep.routed, keep.all) == (0.5, 0.75)


def test_ranges_of_layers():
    assert layer_ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert layer_ranges([]) == ""
