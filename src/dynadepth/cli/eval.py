"""`dynadepth eval`: tasks, perplexity, and the distance from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dynadepth.cli import options
from dynadepth.cli.session import facts, number, open_model, out, percent, progress, reporting, table, write_json


def evaluate(
    model: options.Model,
    routers: options.Routers = None,
    budget: options.Budget = None,
    control: options.Control = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="A,B",
            help="Files of --task-data without .jsonl, names of lm-evaluation-harness, or the bundled `questions`.",
        ),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option("--task-data", metavar="DIR", help="Folder of task files (.jsonl, .jsonl.gz).")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Score the first N rows of a task.")] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option(
            "--perplexity",
            metavar="FILE",
            help="Text to be scored, in windows of 1,024 tokens; may be repeated. "
            "book.txt@4096: the last quarter of windows of 4,096.",
        ),
    ] = None,
    max_windows: Annotated[
        int | None, typer.Option("--max-windows", metavar="N", help="First windows of each text. (default: all)")
    ] = None,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Score the dense model beside it, on the same rows and tokens.")
    ] = False,
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
) -> None:
    """Score a model: tasks, perplexity on text files, and how far routing moves it from its dense self."""
    with reporting("nothing was written."):
        share, names, files = options.parse_budget(budget), options.parse_names(tasks, "--tasks"), perplexity or []
        options.check_at_least(limit, "--limit")
        options.check_at_least(max_windows, "--max-windows")
        from dynadepth.evaluation.files import with_window

        tables = [] if task_data is None else [*task_data.glob("*.jsonl"), *task_data.glob("*.jsonl.gz")]
        texts = [with_window(file)[0] for file in files]
        options.check_output_file(
            json_file, {"--perplexity": texts, "--task-data": tables, "--routers": options.saved_routers(routers)}
        )
        loaded, tokenizer = open_model(model, routers, share, dtype, control)
        from dynadepth.evaluation import evaluate as score
        from dynadepth.report.stamp import stamp

        with progress(f"scoring {', '.join([*names, *files])}") as tell:
            results = score(
                loaded,
                tokenizer,
                tasks=names,
                task_data=task_data,
                limit=limit,
                perplexity=files,
                compare_dense=compare_dense,
                max_windows=max_windows,
                progress=tell,
            )
        results["provenance"] = stamp(model, loaded, routers=routers)
        show(results)
        write_json(json_file, results)


def show(results: dict[str, Any]) -> None:
    """Prints the results as tables."""
    console, dense = out(), results["dense"]
    if results["tasks"]:
        columns = ["task", "metric", "score", "± stderr", "rows"]
        grid = table("Tasks", *columns, *(["dense", "difference, 95 %"] if dense else []))
        for name, task in results["tasks"].items():
            row = [name, str(task["metric"]), _score(task), number(task["stderr"]), number(task["n"])]
            if dense:
                interval = task.get("diff_vs_dense")
                row += [_score(dense["tasks"][name]), _interval(interval)]
            grid.add_row(*row)
            if dense and task["metric"] == "acc_norm" and task["acc"] is not None:
                others = (number(task["acc"]), "", "", number(dense["tasks"][name]["acc"]))
                grid.add_row("", "acc", *others, _interval(task.get("acc_diff_vs_dense")))
        if len(results["tasks"]) > 1:
            row = ["average", "", number(results["average"]), "", ""]
            grid.add_row(*row, *([number(dense["average"]), ""] if dense else []))
        console.print(grid)
    if results["perplexity"]:
        grid = table("Perplexity", "text", "perplexity", "nats a token", "tokens", *(["dense"] if dense else []))
        for file, figures in results["perplexity"].items():
            row = [Path(file).name, number(figures["ppl"], 2), number(figures["nll"]), number(figures["n_tokens"])]
            grid.add_row(*row, *([number(dense["perplexity"][file]["ppl"], 2)] if dense else []))
        console.print(grid)
    rows = []
    if results["kl"] is not None:
        rows.append(("KL(dense‖routed), nats a token", number(results["kl"], 4)))
        rows.append(("same most likely token as dense", percent(results["agreement"])))
    if results["keep_ratio"] is not None:
        rows.append(("executed, of the routed sites", percent(results["keep_ratio"]["routed"])))
        rows.append(("executed, of all sublayers of the target", percent(results["keep_ratio"]["all"])))
        rows.append(("executions of them, repeats counted twice", number(results["depth"], 2)))
        rows.append(("FLOPs of the dense model", percent(results["flops_share"])))
        rows.append(("FLOPs of the target's sublayers", percent(results["flops_share_target"])))
        rows.append(("KV bytes of the dense model", percent(results["kv_share"])))
    if rows:
        console.print(facts("Routing", rows))


def _score(task: dict[str, Any]) -> str:
    return number(task.get(task["metric"], task["perplexity"]))


def _interval(interval: list[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"
