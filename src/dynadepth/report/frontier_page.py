"""The frontier as one HTML page that needs nothing beside it: no scripts, no network, no model.

It shares the style of the demo's page (`base.html.j2`): light and dark, readable on a phone. What is missing or damaged
in the folder stands on top of the page; the rest is shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynadepth.report import figures
from dynadepth.report.cells import Findings, budget_label
from dynadepth.report.frontier_figures import PALETTE, Drawing, colour_key, drawings, layer_maps
from dynadepth.report.frontier_samples import sample_budget, samples_at
from dynadepth.report.frontier_table import budgets_met, compared, halves, per_kind, rough_timing, task_table
from dynadepth.report.html import facts, rendered, write_text
from dynadepth.report.routes import LEGEND

TEMPLATE = "frontier.html.j2"


def write_page(path: Path, found: Findings) -> Path:
    """Writes the whole page or nothing."""
    return write_text(path, render(found))


def render(found: Findings) -> str:
    """The page of what `report.folder.read_folder` found."""
    task_columns, task_lines = task_table(found)
    budget_columns, budget_lines, missed = budgets_met(found)
    at = sample_budget(found)
    cells = [cell for by_budget in found.cells.values() for cell in by_budget.values()]
    rough, samples = rough_timing(found), list(samples_at(found, at))
    return rendered(
        TEMPLATE,
        title=f"{found.model or 'dynadepth'}: quality, depth and speed",
        subtitle=_subtitle(found, cells),
        problems=found.problems,
        colours={name: colour_key(found, name) for name in found.cells},
        tables=halves(found),
        remarks=[rough] if rough else [],
        compared=compared(found),
        figures=[_inlined(drawing) for drawing in drawings(found)],
        methods=found.methods,
        tasks={"columns": task_columns, "lines": task_lines},
        budgets={"columns": budget_columns, "lines": budget_lines},
        per_kind=per_kind(cells),
        missed=missed,
        maps=[_inlined(drawing) for drawing in layer_maps(found)],
        samples=samples,
        shaded=any(len(answer["pieces"]) > 1 for sample in samples for answer in sample["answers"]),
        at=None if at is None else budget_label(at),
        legend=LEGEND,
        facts=[*facts(found.provenance), *_commits(cells)],
    )


def _inlined(drawing: Drawing) -> dict[str, str]:
    palette = figures.COLOURS | PALETTE if drawing.name.startswith("layers-") else PALETTE
    return {
        "caption": drawing.caption,
        "svg": figures.inline(drawing.figure, drawing.name, drawing.caption, palette),
    }


def _subtitle(found: Findings, cells: list[dict[str, Any]]) -> str:
    texts = list(dict.fromkeys(name for cell in cells for name in cell["text"]["perplexity"]))
    tokens = max((f.get("n_tokens") or 0 for c in cells for f in c["text"]["perplexity"].values()), default=0)
    return (
        f"{len(cells)} cells of {len(found.cells)} methods; {cells[0]['layers']} layers; texts: {', '.join(texts)} "
        f"(up to {tokens:,} scored tokens each). The model itself is frozen."
    )


def _commits(cells: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The commits that the cells were measured with, where there are several."""
    commits = dict.fromkeys(str((cell.get("provenance") or {}).get("commit")) for cell in cells)
    return [("commits of the cells", ", ".join(commits))] if len(commits) > 1 else []
