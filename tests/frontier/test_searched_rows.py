"""Rows of searched routes: learnt by routers, beside their controls, and given to the prompts they were found for."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from runs import forget_cells

from dynadepth import detach, is_attached, load, routing_of
from dynadepth.errors import ConfigError, DataError, TuningError
from dynadepth.frontier import searched
from dynadepth.frontier.rows import ROWS
from dynadepth.frontier.run import run_frontier
from dynadepth.report.frontier_figures import write_figures
from dynadepth.report.frontier_page import render
from dynadepth.report.frontier_table import compared, summary_of
from dynadepth.route_file import RouteWriter
from dynadepth.search import search_files
from dynadepth.search.searcher import SearchSettings
from dynadepth.search.static import StaticRoute
from dynadepth.search.tree import TreeSettings
from saved_model import save_model
from searched_routes import save_routes


class TestSearchedRoutes:
    CONTROLS = ("drllm-static", "drllm-best-static", "drllm-random", "drllm-shuffled")

    def test_the_rows(self, opened, settings, model_folder, tmp_path):
        file = save_routes(tmp_path / "routes.jsonl", model_folder, n=30)
        asked = settings(*self.CONTROLS, data_of={"drllm": str(file)})
        found = run_frontier(*opened, asked, tmp_path / "out")
        assert [row["name"] for row in found.methods] == ["dense", "drllm", *self.CONTROLS]
        assert not is_attached(opened[0])
        (own,) = found.cells["drllm"].values()
        assert own["budget"] is None
        assert own["text"]["depth"] == pytest.approx(sum(own["site_keep"].values()))
        assert own["text"]["keep_ratio"]["all"] == pytest.approx(sum(min(n, 1) for n in own["site_keep"].values()) / 4)
        assert any(count > 1 for count in own["site_keep"].values())
        assert own["tuning"]["n_train"] == 24
        for name in self.CONTROLS:
            (cell,) = found.cells[name].values()
            assert cell["against"]["row"] == "drllm"
        (static,) = found.cells["drllm-static"].values()
        least = min(own["site_keep"], key=own["site_keep"].get)
        assert static["site_keep"][least] == min(static["site_keep"].values())
        assert own["text"]["depth"] / 4 > own["text"]["keep_ratio"]["all"], "this test needs repeats"
        assert static["text"]["depth"] / 4 == pytest.approx(min(1.0, own["text"]["depth"] / 4), abs=0.02)
        (drawn,) = found.cells["drllm-random"].values()
        assert drawn["text"]["depth"] / 4 == pytest.approx(min(1.0, own["text"]["depth"] / 4), abs=0.25)
        assert "drllm" in render(found)
        assert len(write_figures(tmp_path / "out", found)) > 0
        tuned = (tmp_path / "out" / "routers" / "drllm" / "routers.safetensors").stat().st_mtime_ns
        run_frontier(*opened, asked, tmp_path / "out")
        assert (tmp_path / "out" / "routers" / "drllm" / "routers.safetensors").stat().st_mtime_ns == tuned

    def test_routes_are_needed_and_are_those_of_this_model(self, opened, settings, tmp_path):
        with pytest.raises(ConfigError, match="drllm needs searched routes: name their file as --data drllm=FILE"):
            run_frontier(*opened, settings("drllm"), tmp_path / "out")
        other = save_routes(tmp_path / "other.jsonl", save_model(tmp_path / "other", hidden_size=32))
        with pytest.raises(DataError, match="hidden_size is 32 there and 16 here"):
            run_frontier(*opened, settings("drllm", data_of={"drllm": str(other)}), tmp_path / "out")
        assert {row.name for row in ROWS if row.needs} == {"drllm", "oracle", *self.CONTROLS}

    def test_the_best_static_route_is_chosen_once(self, opened, settings, model_folder, tmp_path, monkeypatch):
        file = save_routes(tmp_path / "routes.jsonl", model_folder, n=30)
        asked = settings("drllm-best-static", data_of={"drllm": str(file)})
        monkeypatch.setattr(searched, "best_static", lambda *_, **__: StaticRoute((1, 2, 0, 1), 0.6, 0.5, 9, ()))
        reads, read = [], searched.read
        monkeypatch.setattr(searched, "read", lambda *given: (reads.append(given), read(*given))[1])
        found = run_frontier(*opened, asked, tmp_path / "out")
        assert len(reads) == 1
        (cell,) = found.cells["drllm-best-static"].values()
        assert list(cell["site_keep"].values()) == [1.0, 2.0, 0.0, 1.0]
        assert cell["against"]["row"] == "drllm"
        model = load(opened[0], tmp_path / "out" / "routers" / "drllm-best-static")
        assert routing_of(model).provenance["result"]["accuracy"] == 0.6
        detach(model)
        forget_cells(tmp_path / "out")
        monkeypatch.setattr(searched, "best_static", lambda *_, **__: pytest.fail("chosen again"))
        run_frontier(*opened, asked, tmp_path / "out")

    def test_the_oracle_is_right_where_the_search_was(self, opened, settings, tmp_path):
        (tmp_path / "tasks").mkdir()
        tasks, file = tmp_path / "tasks" / "words.jsonl", tmp_path / "routes.jsonl"
        words = ["sky", "class", "object", "function", "Python", "of"]
        rows = [
            {"query": f"what is {w}", "choices": ["blue", "sky", "the", "a"], "gold": n % 4}
            for n, w in enumerate(words)
        ]
        tasks.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        search = SearchSettings(TreeSettings(simulations=6), margin=0.0)
        prompts = search_files(*opened, [tasks], file, search).file.prompts
        with RouteWriter(file) as writer:  # a prompt that is no row of the task
            writer.append([replace(prompts[0], id="other", prompt="Question: why\nAnswer:")])
        right = sum(prompt.dense.correct or bool(prompt.routes) for prompt in prompts)
        dense = sum(prompt.dense.correct for prompt in prompts)
        assert dense < right < 6, "this test needs a prompt that a route corrects, and one that none does"
        asked = settings("oracle", tasks=("words",), task_data=str(tmp_path / "tasks"), data_of={"oracle": str(file)})
        found = run_frontier(*opened, asked, tmp_path / "out")
        (cell,) = found.cells["oracle"].values()
        assert not is_attached(opened[0])
        assert cell["tasks"]["tasks"]["words"]["acc"] == pytest.approx(right / 6)
        assert found.cells["dense"][1.0]["tasks"]["tasks"]["words"]["acc"] == pytest.approx(dense / 6)
        wrong = [prompt for prompt in [*prompts, prompts[0]] if not prompt.dense.correct]
        luck = [prompt.control > 0 for prompt in wrong if prompt.control is not None]
        corrected, reached = sum(bool(prompt.routes) for prompt in wrong) / len(wrong), sum(luck) / len(luck)
        assert cell["given"] == {"prompts": 6, "of": 7, "corrected": corrected, "control_corrected": reached}
        assert (
            f"oracle: 6 of 7 searched prompts were scored; by acc, the search's own measure, {right / 6:.1%} (dense "
            f"{dense / 6:.1%}); of what dense answers wrongly the search corrected {corrected:.1%}; the same search "
            f"towards a wrong one reached {reached:.1%}."
        ).replace("%", " %") in compared(found)
        line = summary_of(cell)
        for name in ("flops_share", "flops_share_target", "kv_share"):
            assert line[name] == cell["tasks"][name] < cell["text"][name]
        assert line["keep_all"] == cell["tasks"]["keep_ratio"]["all"] < 1
        assert line["routes"] is None
        assert cell["text"]["kl"] == pytest.approx(0, abs=1e-6), "texts have no routes"
        best = [prompt.routes[0].layers if prompt.routes else 4 for prompt in prompts]
        assert cell["tasks"]["depth"] == pytest.approx(sum(best) / 6)
        assert "oracle" in render(found)

    def test_an_oracle_of_other_prompts_is_refused(self, opened, settings, model_folder, tmp_path):
        file = save_routes(tmp_path / "routes.jsonl", model_folder)
        with pytest.raises(DataError, match=r"none of the 12 prompts of .* is scored: search routes on the rows of"):
            run_frontier(*opened, settings("oracle", tasks=("alpha",), data_of={"oracle": str(file)}), tmp_path / "out")
        assert not is_attached(opened[0])
        with pytest.raises(DataError, match="oracle is scored on tasks: name those whose rows were searched"):
            run_frontier(*opened, settings("oracle", data_of={"oracle": str(file)}), tmp_path / "none")
        thrice = save_routes(tmp_path / "thrice.jsonl", model_folder, counts=(1, 3, 1, 1))
        with pytest.raises(TuningError, match="0 of 12 prompts have a route to learn from"):  # routers repeat once
            run_frontier(*opened, settings("drllm", data_of={"drllm": str(thrice)}), tmp_path / "thrice")
