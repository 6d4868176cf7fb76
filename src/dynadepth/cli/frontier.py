"""`dynadepth frontier`: every method at every budget, measured alike; resumed where it was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dynadepth.cli import options
from dynadepth.cli.session import open_model, out, progress, reporting, say, table
from dynadepth.errors import ConfigError

if TYPE_CHECKING:
    from dynadepth.report.cells import Findings


def frontier(
    model: options.Model,
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for cells, figures and routers.")
    ] = Path("frontier-output"),
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            metavar="A,B",
            help="Rows of the comparison; dense is always one. (default: all whose data can be had)",
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="B,C", help="Shares of all sublayers of the target that may execute.")
    ] = "0.875,0.75,0.625,0.5",
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity",
            metavar="FILE",
            help="Text to be scored; may be repeated, the first is drawn. (default: Python's own help, 16 windows)",
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", metavar="N", help="First windows of each text. (default: all)")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="A,B", help="As for `dynadepth eval`. (default: none)")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", metavar="DIR", help="Folder of task files (.jsonl, .jsonl.gz).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Score the first N rows of a task.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="SOURCE|METHOD=SOURCE",
            help="Tuning data, of all methods or of one: FILE, NAME or self; of drllm and oracle searched routes. "
            "(default: the recipe's; without routes, these are left out)",
        ),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", metavar="N", help="Tuning samples used. (default: the recipe's)")
    ] = None,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Time every cell against dense.")] = True,
    context: Annotated[
        int, typer.Option("--context", metavar="N", help="Prompt length of the timing, in tokens.")
    ] = 1024,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")] = 0,
    dtype: options.Dtype = "auto",
) -> None:
    """Compare methods at several budgets: quality, keep ratio, speed. Finished cells are never measured twice."""
    with reporting(f"what was finished is kept in {out_dir}; the same command goes on from there."):
        for value, option in (
            (max_windows, "--max-windows"), (limit, "--limit"), (max_samples, "--max-samples"), (context, "--context"),
        ):  # fmt: skip
            options.check_at_least(value, option)
        options.check_seed(seed)
        options.check_output_folder(out_dir)
        from dynadepth.frontier.rows import ROWS, chosen, row_named
        from dynadepth.frontier.run import Teller, run_frontier
        from dynadepth.frontier.settings import Settings, parse_budgets, parse_data
        from dynadepth.report.frontier_figures import write_figures
        from dynadepth.report.html import require_extra

        require_extra()
        known = [row.name for row in ROWS]
        common, single = parse_data(data or [], known)
        every = [row.name for row in ROWS if row.needs is None or row.needs in single]
        names = options.parse_names(methods, "--methods") or every
        chosen(names)
        for row in map(row_named, single):
            if not row.reads_data:
                rather = f": it goes by that of {row.of}, --data {row.of}=FILE" if row.of else ""
                raise ConfigError(f"--data {row.name}={single[row.name]}: {row.name} reads no data of its own{rather}.")
        settings = Settings(
            model=model,
            methods=tuple(names),
            budgets=parse_budgets(budgets),
            perplexity=tuple(perplexity or [_help_text(out_dir, seed)]),
            max_windows=max_windows if perplexity or max_windows else 16,
            tasks=tuple(options.parse_names(tasks, "--tasks")),
            task_data=None if task_data is None else str(task_data),
            limit=limit,
            data=common,
            data_of=single,
            max_samples=max_samples,
            seed=seed,
            bench=bench,
            context=context,
        )
        settings.scored()  # what cannot be read is said before a large model is loaded
        loaded, tokenizer = open_model(model, dtype=dtype)
        with progress("comparing") as tell:
            found = run_frontier(loaded, tokenizer, settings, out_dir, Teller(say, tell), lenient=not methods)
        drawn = write_figures(out_dir, found)
        show(found)
        say(f"wrote {', '.join(path.name for path in drawn)} in {out_dir}; next: dynadepth report {out_dir}")


def show(found: Findings) -> None:
    """Prints the table, in two halves that fit a terminal."""
    from dynadepth.report.frontier_table import budgets_met, compared, halves, rough_timing

    titles = (f"Frontier of {found.model}: quality", "Cost, of the dense model's; times as fast")
    for title, (columns, lines) in zip(titles, halves(found), strict=True):
        grid = table(title, *columns)
        for line in lines:
            grid.add_row(*line.values)
        out().print(grid)
    for sentence in [*compared(found), *budgets_met(found)[2], rough_timing(found)]:
        if sentence:
            out().print(f"• {sentence}", markup=False)


def _help_text(folder: Path, seed: int) -> str:
    """Python's own help texts as a file: the text of a run that names none."""
    from dynadepth.records import write_text
    from dynadepth.report.measure import help_text

    file = folder / "python-help.txt"
    text = help_text(seed)
    if not file.is_file() or file.read_bytes() != text.encode():
        write_text(file, text)
    return str(file)
