"""`dynadepth demo`: the whole story, told in some minutes, ending with a table and a page."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from dynadepth.cli import options
from dynadepth.cli.session import out, progress, quiet_libraries, reporting, say, table, write_json


def demo(
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for everything that is written.")
    ] = Path("demo-output"),
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")] = 0,
) -> None:
    """Tune routers for a small model and show what is gained and what is lost, in about ten minutes on two cores."""
    left = f"what was finished is kept in {out_dir}; the same command goes on from there."
    with reporting(left):
        options.check_seed(seed)
        options.check_output_folder(out_dir)
        with progress("starting") as tell:
            quiet_libraries()
            from dynadepth.provenance import finite
            from dynadepth.report.demo import STEPS, Settings, Teller, run_demo
            from dynadepth.report.html import require_extra, write_page

            require_extra()
            started = time.monotonic()

            def step(number: int, title: str) -> None:
                seconds = time.monotonic() - started
                say(f"{title}", "bold", f"[{number}/{STEPS}] {seconds // 60:.0f}:{seconds % 60:02.0f}  ")
                if sys.stderr.isatty():
                    tell(f"{title} ...")

            results = finite(run_demo(out_dir, Settings(seed=seed), Teller(step, tell)))
        write_json(out_dir / "results.json", results)
        write_page(out_dir / "report.html", results)
        show(results, out_dir / "report.html")


def show(results: dict[str, Any], page: Path) -> None:
    """Prints the table, what it says, and a sample answer of each variant."""
    from dynadepth.report.summary import TITLES, VARIANTS, rows, verdict

    console, settings = out(), results["settings"]
    grid = table(
        f"{settings['model']} at a budget of {settings['budget']:.0%}", "", *(TITLES[name] for name in VARIANTS)
    )
    for row in rows(results):
        styles = ["bold" if name == row.better else "" for name in VARIANTS]
        grid.add_row(row.label, *(Text(text, style=style) for text, style in zip(row.values, styles, strict=True)))
    console.print(grid)
    for sentence in verdict(results):
        console.print(Text(f"• {sentence}"))
    for sample in results["samples"][:1]:
        console.print(Text(f"\n> {sample['prompt']}", style="bold"))
        for name in VARIANTS:
            text = " ".join(sample["answers"][name]["text"].split())
            console.print(Text.assemble((f"{TITLES[name]}: ", "bold"), text))
    console.print(Text(f"\nEverything on one page: {page}", style="bold"))
