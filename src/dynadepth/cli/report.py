"""`dynadepth report`: the page of a frontier, made from its folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynadepth.cli.session import out, reporting, say


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a `dynadepth frontier`.")],
) -> None:
    """Write DIR/report.html: one page with everything on it that a frontier found, and nothing beside it."""
    with reporting("no page was written."):
        from dynadepth.report.folder import read_folder
        from dynadepth.report.frontier_page import write_page
        from dynadepth.report.html import require_extra

        require_extra()
        found = read_folder(folder)
        for problem in found.problems:
            say(problem, "yellow", "warning: ")
        out().print(f"Everything on one page: {write_page(folder / 'report.html', found)}", markup=False)
