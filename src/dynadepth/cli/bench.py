"""`dynadepth bench`: time and memory of dense, routed and pruned, interleaved, over a grid of batches and contexts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynadepth.cli import options
from dynadepth.cli.session import noting, number, open_model, out, percent, progress, reporting, say, table, write_json
from dynadepth.errors import ConfigError

if TYPE_CHECKING:
    from dynadepth.benchmark.growth import Slope


def bench(
    model: options.Model,
    routers: options.Routers = None,
    budget: options.Budget = None,
    control: options.Control = None,
    batch: Annotated[str, typer.Option("--batch", metavar="1,8", help="Batch sizes.")] = "1",
    context: Annotated[
        str, typer.Option("--context", metavar="32,512", help="Prompt lengths in tokens.")
    ] = "32,512,2048",
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="KIND[@KEEP],...",
            help="Kinds of routing to time beside, nothing tuned: static, sequence, route, mixed and "
            "mixed-route (rows differ), token-project, token-drop; each at a keep ratio of all attentions (0.5), as "
            "in sequence@0.75; @1 executes everything.",
        ),
    ] = None,
    skip_path: Annotated[
        str, typer.Option("--skip-path", metavar="NAME", help="Skip path of what --compare names: identity, linear.")
    ] = "identity",
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", help="Tokens decoded after each prompt.")
    ] = 32,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Rounds of each measurement.")] = 5,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", metavar="S", help="No further round at a point after S seconds (3 always run)."),
    ] = None,
    compiled: options.Compile = False,
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the points that the --json file has of the same run.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option("--figure", metavar="FILE", help="Draw a heat map into this .svg or .png.")
    ] = None,
) -> None:
    """Time prefill and decode of the dense, the routed and the pruned model in the same run."""
    kept: list[dict[str, Any]] = []

    def interrupted() -> str:
        if json_file is None or not kept:
            return "nothing was written."
        return f"{json_file} has the points that were finished; the same command with --resume goes on from there."

    with reporting(interrupted):
        share = options.parse_budget(budget)
        batches, contexts = options.parse_counts(batch, "--batch"), options.parse_counts(context, "--context")
        options.check_at_least(new_tokens, "--new-tokens")
        options.check_at_least(repeats, "--repeats")
        read = {"--routers": options.saved_routers(routers)}
        options.check_output_file(json_file, read)
        options.check_output_file(figure, read if json_file is None else {**read, "--json": [json_file]}, "--figure")
        if seconds is not None and not seconds > 0:
            raise ConfigError(f"--seconds must be more than 0, not {seconds:g}.")
        if resume and json_file is None:
            raise ConfigError("--resume needs --json FILE: the file whose points are kept.")
        if skip_path != "identity" and compare is None:
            raise ConfigError(f"--skip-path {skip_path} is of what --compare names, and nothing is compared.")
        if figure is not None and routers is None and compare is None:
            raise ConfigError(f"--figure {figure} has nothing to draw: give --routers or --compare.")
        from dynadepth.report.grid import in_order, points, resumed
        from dynadepth.report.heatmap import check_figure, write_heat_map

        check_figure(figure)
        from dynadepth.benchmark.variants import Variant

        names = options.parse_names(None if compare is None else [compare], "--compare")
        compared = [Variant.parse(name, skip_path) for name in names]
        by_row = ", ".join(str(variant) for variant in compared if variant.by_row)
        if by_row and max(batches) < 2:
            raise ConfigError(f"{by_row} needs a --batch of 2 or more, not {batch}: one row cannot be mixed.")
        if by_row and min(batches) < 2:
            say(f"{by_row} is left out at a batch of 1: one row cannot be mixed.", "yellow", "note: ")
        loaded, tokenizer = open_model(model, routers, share, dtype, control)
        from dynadepth.benchmark import cut_prompts, grid
        from dynadepth.benchmark.growth import slopes
        from dynadepth.report.stamp import stamp

        provenance = stamp(model, loaded, routers=routers)
        provenance["bench"] = {
            "compare": [str(variant) for variant in compared],
            "skip_path": skip_path,
            "new_tokens": new_tokens,
            "repeats": repeats,
            "seconds": seconds,
            "compile": compiled,
        }
        if resume and json_file is not None:
            kept += resumed(json_file, provenance)
        prompts = cut_prompts(tokenizer, count=max(batches), length=max(contexts) + new_tokens)
        with noting(), progress("timing") as tell:
            for cells in grid(
                loaded,
                prompts,
                batches=batches,
                contexts=contexts,
                new_tokens=new_tokens,
                repeats=repeats,
                seconds=seconds,
                compare=compared,
                compiled=compiled,
                finished=points(kept),
                progress=tell,
            ):
                kept[:] = in_order([*kept, *cells])
                write_json(json_file, {"cells": kept, "provenance": provenance}, quiet=True)
        show(kept)
        show_growth(slopes(kept))
        if json_file is not None:
            say(f"wrote {json_file}")
        if figure is not None:
            write_heat_map(figure, kept)
            say(f"wrote {figure}")


def show(cells: list[dict[str, Any]]) -> None:
    """Prints one row a cell: its time, then its rate and memory."""
    keys = ("variant", "size", "phase")
    of_time = ("dense", "routed", "pruned", "spread", "speed-up", "ideal", "efficiency")
    times = table(f"Milliseconds, median, by batch × context ({cells[0]['dtype']})", *keys, *of_time)
    of_size = ("dense tokens/s", "tokens/s", "dense KV", "KV", "dense peak", "peak")
    rates = table("Tokens a second; keys, values and skip paths' states; MiB at the peak of a prefill", *keys, *of_size)
    for cell in cells:
        name = cell["variant"]
        place = (name, f"{cell['batch']}×{cell['context']}", cell["phase"])
        ideal, efficiency, nominal = cell["ideal_saving"], cell["skip_efficiency"], cell["nominal_efficiency"]
        times.add_row(
            *place,
            _ms(cell["dense_s"]),
            _ms(cell["routed_s"]),
            _ms(cell["pruned_s"]),
            percent(cell["spread"]),
            _times(cell["speedup"]),
            "-" if ideal is None else _times(1 / (1 - ideal)),
            number(efficiency, 2) if efficiency is not None or nominal is None else f"({nominal:.2f})",
        )
        own = "dense" if cell["routed_s"] is None else name
        rates.add_row(
            *place,
            number(cell["tokens_per_s"]["dense"], 1),
            number(cell["tokens_per_s"][own], 1),
            _mib(cell["kv_bytes_dense"]),
            _kv(cell),
            _mib(cell["peak_bytes"]["dense"]),
            _mib(cell["peak_bytes"][own]),
        )
    parts, notes = [times, rates], ["ideal: the speed-up by FLOPs (prefill) or bytes read (decode)"]
    if plain := [cell for cell in cells if cell["plain_s"] is not None]:
        notes.append("plain: the dense model, not compiled; the others are")
        against = table("Compiled, times as fast as plain", *keys, "plain tokens/s", "dense", "routed", "pruned")
        for cell in plain:
            place = (cell["variant"], f"{cell['batch']}×{cell['context']}", cell["phase"])
            rate = number(cell["tokens_per_s"]["plain"], 1)
            others = (cell[name] for name in ("dense_s", "routed_s", "pruned_s"))
            against.add_row(*place, rate, *(_times(cell["plain_s"] / s if s else None) for s in others))
        parts.append(against)
    if any(c["skip_efficiency"] is None and c["nominal_efficiency"] is not None for c in cells):
        notes.append("(efficiency): of the nominal saving, where rows or tokens differ")
    if beyond := sorted({c["context"] for c in cells if c["beyond_positions"]}):
        notes.append(f"longer than this model was made for: {', '.join(map(str, beyond))} (times hold, texts do not)")
    for part in parts:
        out().print(part)
    out().print("; ".join(notes), markup=False)


def show_growth(found: list[Slope]) -> None:
    """Prints one row a fit, if there are any."""
    if not found:
        return
    columns = ("variant", "phase", "along", "from", "to", "other", "dense time", "time", "dense peak", "peak")
    grid = table("Growth: exponent x of cost ∝ size^x", *columns)
    for one in found:
        other = "batch" if one.axis == "context" else "context"
        figures = (one.dense_time, one.time, one.dense_memory, one.memory)
        sizes = (str(one.low), str(one.high), f"{other} {one.fixed}")
        grid.add_row(one.variant, one.phase, one.axis, *sizes, *(number(figure, 2) for figure in figures))
    out().print(grid)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else number(1000 * seconds, 2)


def _mib(size: int | None) -> str:
    return "-" if size is None else number(size / 2**20, 1)


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}×"


def _kv(cell: dict[str, Any]) -> str:
    dense, routed = cell["kv_bytes_dense"], cell["kv_bytes_routed"]
    return percent((routed + (cell.get("state_bytes_routed") or 0)) / dense) if dense and routed is not None else "-"
