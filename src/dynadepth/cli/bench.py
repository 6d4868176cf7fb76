"""`dynadepth bench`: time and memory of dense, routed and pruned, interleaved."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dynadepth.cli import options
from dynadepth.cli.session import number, open_model, out, percent, progress, reporting, table, write_json


def bench(
    model: options.Model,
    routers: options.Routers = None,
    budget: options.Budget = None,
    control: options.Control = None,
    batch: Annotated[str, typer.Option("--batch", metavar="1,8", help="Batch sizes.")] = "1",
    context: Annotated[
        str, typer.Option("--context", metavar="32,512", help="Prompt lengths in tokens.")
    ] = "32,512,2048",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", help="Tokens decoded after each prompt.")
    ] = 32,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Rounds of each measurement.")] = 5,
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
) -> None:
    """Time prefill and decode of the dense, the routed and the pruned model in the same run."""
    with reporting("nothing was written."):
        share = options.parse_budget(budget)
        batches, contexts = options.parse_counts(batch, "--batch"), options.parse_counts(context, "--context")
        options.check_at_least_one(new_tokens, "--new-tokens")
        options.check_at_least_one(repeats, "--repeats")
        options.check_output_file(json_file)
        loaded, tokenizer = open_model(model, routers, share, dtype, control)
        from dynadepth.benchmark import cut_prompts, run
        from dynadepth.report.stamp import stamp

        prompts = cut_prompts(tokenizer, count=max(batches), length=max(contexts) + new_tokens)
        with progress("timing") as tell:
            cells = run(
                loaded,
                prompts,
                batches=batches,
                contexts=contexts,
                new_tokens=new_tokens,
                repeats=repeats,
                progress=tell,
            )
        show(cells)
        write_json(json_file, {"cells": cells, "provenance": stamp(model, loaded, routers=routers)})


def show(cells: list[dict[str, Any]]) -> None:
    """Prints one row a cell."""
    columns = (
        "variant",
        "batch",
        "context",
        "phase",
        "dense",
        "routed",
        "pruned",
        "spread",
        "speed-up",
        "efficiency",
        "KV",
    )
    grid = table(f"Milliseconds, median ({cells[0]['dtype']})", *columns)
    for cell in cells:
        grid.add_row(
            cell["variant"],
            str(cell["batch"]),
            str(cell["context"]),
            cell["phase"],
            _ms(cell["dense_s"]),
            _ms(cell["routed_s"]),
            _ms(cell["pruned_s"]),
            percent(cell["spread"]),
            "-" if cell["speedup"] is None else f"{cell['speedup']:.2f}×",
            number(cell["skip_efficiency"], 2),
            _kv(cell),
        )
    out().print(grid)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else number(1000 * seconds, 2)


def _kv(cell: dict[str, Any]) -> str:
    dense, routed = cell["kv_bytes_dense"], cell["kv_bytes_routed"]
    return percent(routed / dense) if dense and routed is not None else "-"
