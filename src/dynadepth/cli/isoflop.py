"""`dynadepth isoflop`: sizes by variants at equal training FLOPs; resumed cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynadepth.cli import options
from dynadepth.cli.session import out, progress, quiet_libraries, reporting, say, table

if TYPE_CHECKING:
    from dynadepth.isoflop import IsoflopRecipe
    from dynadepth.isoflop.recipe import Cell


def isoflop(
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="FILE|NAME", help="The study: a YAML file, or a recipe's name.")
    ],
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for cells, corpus and figures.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Plain text, as for `dynadepth pretrain`; repeatable. (default: the corpus that DIR holds)",
        ),
    ] = None,
    valid: Annotated[
        list[Path] | None, typer.Option("--valid", metavar="FILE", help="Held-out text; repeatable.")
    ] = None,
) -> None:
    """Train a family of sizes and variants at fixed FLOP budgets. Finished cells are never trained twice."""
    with reporting(f"what was finished is kept in {out_dir}; the same command goes on from there."):
        from dynadepth.isoflop.recipe import load_recipe
        from dynadepth.report import figures

        settings = load_recipe(recipe)
        figures.new(height=1.0)  # that matplotlib is missing is said before a long run, not after it
        options.check_output_folder(out_dir)
        quiet_libraries()
        from dynadepth.isoflop.figures import write_figures
        from dynadepth.isoflop.run import Teller, run_isoflop
        from dynadepth.isoflop.table import markdown
        from dynadepth.records import write_text

        with progress("preparing") as tell:
            found = run_isoflop(settings, data or (), out_dir, valid=valid or (), teller=Teller(say, tell))
        written = [out_dir / "table.md", *write_figures(settings, found, out_dir)]
        write_text(written[0], markdown(settings, found))
        show(settings, found)
        say(f"wrote {', '.join(path.name for path in written)} in {out_dir}")


def show(recipe: IsoflopRecipe, found: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Prints a table a budget, and what the study answers."""
    from dynadepth.isoflop.recipe import budget_label
    from dynadepth.isoflop.table import COLUMNS, lines, questions

    console = out()
    for budget in sorted({cell.budget for cell in found}):
        grid = table(f"{budget_label(budget)} FLOPs", *COLUMNS)
        for row in lines(found, budget):
            grid.add_row(*row)
        console.print(grid)
    for cell, document in found.items():
        if "failed" in document:
            console.print(f"• {cell.name} has no loss: {document['failed']}", markup=False)
    for sentence in questions(recipe, found):
        console.print(f"• {sentence}", markup=False)
