"""`dynadepth search`: routes that answer prompts better or with fewer layers, for `tune --method drllm`."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from dynadepth.cli import options
from dynadepth.cli.session import (
    number,
    open_model,
    out,
    percent,
    progress,
    quiet_libraries,
    reporting,
    say,
    table,
    write_json,
)
from dynadepth.errors import BudgetError, ConfigError


def search(
    model: options.Model,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            help="Prompts with known answers (.jsonl, .jsonl.gz): multiple choice, or short answers such as GSM8K; may "
            "be repeated.",
        ),
    ],
    out_file: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="File of routes (.jsonl.gz, .jsonl), written as they are found."),
    ],
    simulations: Annotated[
        int,
        typer.Option("--simulations", metavar="N", help="Routes tried for each prompt, and as many by its control."),
    ] = 50,
    max_consecutive_skips: Annotated[
        int, typer.Option("--max-consecutive-skips", metavar="N", help="Longest run of skipped layers.")
    ] = 2,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="How often a layer may run again.")] = 1,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            metavar="B",
            help="Most layers that a kept route runs, as a share of the model's. (default: 1 where the dense route is "
            "right, else 2)",
        ),
    ] = None,
    margin: Annotated[
        float,
        typer.Option("--margin", metavar="NATS", help="By how much the right answer must lead under a kept route."),
    ] = 0.5,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Search the first N prompts of each file.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the prompts that FILE does not hold yet.")
    ] = False,
    workers: Annotated[
        int,
        typer.Option("--workers", metavar="N", help="Processes, each with a model of its own; they share the cores."),
    ] = 1,
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
) -> None:
    """Search routes (which layers to skip, execute or repeat) for prompts with known answers, with a control beside."""
    with reporting(f"what was found is in {out_file}; the same command with --resume goes on from there."):
        for value, option in (
            (simulations, "--simulations"), (limit, "--limit"), (workers, "--workers"),
        ):  # fmt: skip
            options.check_at_least(value, option)
        options.check_at_least(max_consecutive_skips, "--max-consecutive-skips", 0)
        options.check_at_least(repeats, "--repeats", 0)
        if not 0 <= margin < math.inf:
            raise ConfigError(f"--margin must be a number of nats from 0, not {margin:g}.")
        options.check_seed(seed)
        options.check_output_file(out_file, {"--data": data}, "--out")
        options.check_output_file(json_file, {"--data": data, "--out": [out_file]})
        if not out_file.name.endswith((".jsonl", ".jsonl.gz")):
            raise ConfigError(f"--out {out_file} must end in .jsonl or .jsonl.gz.")
        if out_file.exists() and out_file.stat().st_size and not resume:
            raise ConfigError(f"{out_file} exists: give another name, or go on by --resume if it holds routes.")
        from dynadepth.search import search_files
        from dynadepth.search.figures import summarise
        from dynadepth.search.searcher import SearchSettings
        from dynadepth.search.tree import TreeSettings

        if budget is not None and not 0 < budget <= TreeSettings.max_path:
            raise BudgetError(
                f"--budget must be above 0 and at most {TreeSettings.max_path:g} (layers run, of the model's), not "
                f"{budget:g}."
            )
        settings = SearchSettings(
            TreeSettings(simulations=simulations, max_consecutive_skips=max_consecutive_skips, repeats=repeats),
            margin=margin,
            budget=budget,
            seed=seed,
        )
        if repeats > 1:
            say(
                f"--repeats {repeats}: a routed model runs a layer twice at most, so that routes with more are no use "
                "to tune and frontier.",
                "yellow",
                "warning: ",
            )
        loaded, tokenizer = open_model(model, dtype=dtype)
        from dynadepth.report.stamp import stamp

        provenance = stamp(model, loaded, seed=seed)
        with progress(f"searching routes for {', '.join(path.name for path in data)}") as tell:
            found = search_files(
                loaded,
                tokenizer,
                data,
                out_file,
                settings,
                limit=limit,
                resume=resume,
                workers=workers,
                load=functools.partial(_load, model, dtype, str(loaded.device)),
                provenance=provenance,
                progress=tell,
                warn=lambda sentence: say(sentence, "yellow", "warning: "),
            )
        results = {
            **summarise(found.file),
            "new_prompts": found.new,
            "left_out": found.left_out,
            "seconds": found.seconds,
            "prompts_per_minute": found.prompts_per_minute,
            "search": found.file.header.search,
            "provenance": provenance,
        }
        show(results)
        if found.left_out:
            say(
                f"{found.left_out} prompts were left out, since every worker died at them: the same command with "
                "--resume tries them again.",
                "yellow",
                "warning: ",
            )
        if not results["all"]["routes"]:
            say("no route was kept for any prompt: ask for less --margin or more --budget.", "yellow", "warning: ")
        say(f"wrote {out_file}")
        write_json(json_file, results)


def _load(name: str, dtype: str, device: str) -> Any:
    """The model of another process, without the bars of its loading."""
    from dynadepth.hub import load_model

    quiet_libraries()
    return load_model(name, dtype=dtype, device=device)


def show(results: dict[str, Any]) -> None:
    """Prints what the file holds, and what this run spent."""
    rows = dict(results["sources"])
    if len(rows) > 1:
        rows["all"] = results["all"]
    console = out()
    answers = table(
        "Answers: dense, with the best of the routes found (oracle), and the control's luck",
        "data", "prompts", "dense", "oracle", "corrected", "control", "right with fewer layers",
    )  # fmt: skip
    spent = table(
        "Routes and what they took",
        "data", "routes", "layers", "skip", "execute", "repeat", "layers run", "naive, ×", "apart, ×",
    )  # fmt: skip
    for name, row in rows.items():
        answers.add_row(
            name,
            number(row["prompts"]),
            percent(row["dense"]),
            percent(row["oracle"]),
            percent(row["corrected"]),
            percent(row["control_corrected"]),
            percent(row["shorter"]),
        )
        actions = (number(row["actions"][action]) for action in ("skip", "execute", "repeat"))
        fewer = (number(row[key], 2) for key in ("times_fewer", "times_fewer_apart"))
        spent.add_row(name, number(row["routes"]), percent(row["layers"]), *actions, number(row["executions"]), *fewer)
    console.print(answers)
    console.print(
        "corrected: of the prompts that dense answers wrongly; control: of these, the same search towards another "
        "wrong answer.",
        style="dim",
    )
    if results["all"]["dense_wrong"] > results["all"]["controls_dense_wrong"]:
        alone = results["all"]["dense_wrong"] - results["all"]["controls_dense_wrong"]
        console.print(f"{number(alone)} of them have no control, as between two options alone.", style="dim")
    for row in results["all"]["by_margin"]:
        console.print(
            f"With a lead of {row['margin']} nats: corrected {percent(row['corrected'])}, control "
            f"{percent(row['control_corrected'])}.",
            style="dim",
        )
    console.print(spent)
    console.print(
        "naive: layers of all routes tried, each run whole and once, for one that was run; apart: a route that its "
        "control tried too counted twice.",
        style="dim",
    )
    if results["prompts_per_minute"] is not None:
        rate, new = number(results["prompts_per_minute"], 1), number(results["new_prompts"])
        console.print(f"{new} prompts searched, {rate} a minute.", markup=False)
