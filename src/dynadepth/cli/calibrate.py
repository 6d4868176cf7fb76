"""`dynadepth calibrate`: the budgets of saved routers, measured on prompts of one's own."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from dynadepth.cli import options
from dynadepth.cli.session import open_model, out, percent, progress, reporting, table, write_json


def calibrate(
    model: options.Model,
    routers: Annotated[Path, typer.Option("--routers", metavar="DIR", help="Routers that `dynadepth tune` saved.")],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE|NAME",
            help="Prompts like those to come: JSON Lines, or a `datasets` name, with the columns that `tune` reads; "
            "prompts without answers as `text`.",
        ),
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for the calibrated routers; may be that of --routers.")
    ],
    max_samples: Annotated[int, typer.Option("--max-samples", metavar="N", help="Prompts used.")] = 160,
    max_length: Annotated[
        int, typer.Option("--max-length", metavar="N", help="Most tokens of a prompt; never more than the model reads.")
    ] = 1024,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of which prompts are drawn.")] = 0,
    json_file: options.Json = None,
) -> None:
    """Measure the budgets of routers on prompts of your own, so that they are met there. Nothing is tuned."""
    with reporting(f"nothing was saved in {out_dir}."):
        options.check_at_least(max_samples, "--max-samples")
        options.check_at_least(max_length, "--max-length", 2)
        options.check_seed(seed)
        options.check_output_folder(out_dir)
        read = {"--data": [Path(data)], "--routers": options.saved_routers(routers)}
        options.check_output_file(json_file, {**read, "--out": options.saved_routers(out_dir)})
        loaded, tokenizer = open_model(model, routers)
        from dynadepth.architectures import positions_of
        from dynadepth.model import save
        from dynadepth.report.stamp import stamp
        from dynadepth.routed import routing_of
        from dynadepth.routing.calibration import TOLERANCE
        from dynadepth.tuning.data import load_examples, pad_token_id
        from dynadepth.tuning.recalibrate import recalibrate

        max_length = min(max_length, positions_of(loaded) or max_length)
        with progress(f"reading {data}"):
            examples = load_examples(data, tokenizer, max_samples=max_samples, max_length=max_length, seed=seed)
        with progress(f"calibrating on {len(examples)} prompts") as tell:
            found = recalibrate(
                loaded,
                examples,
                pad_token_id(tokenizer),
                lambda stage, done, total: tell(f"{stage}: {done} of {total} budgets"),
            )
        provenance = stamp(model, loaded, routers=routers, seed=seed)
        document = {**asdict(found), "data": data, "max_length": max_length, "provenance": provenance}
        routing_of(loaded).provenance["calibrated"] = document
        save(loaded, out_dir)
        write_json(json_file, document)

        grid = table(f"Executed of {found.n_held_back} prompts held back", "budget", "before", "now")
        for one in found.checked:
            grid.add_row(percent(one.budget), percent(one.before), percent(one.after))
        console = out()
        console.print(grid)
        missed = [percent(one.budget) for one in found.checked if abs(one.after - one.budget) > TOLERANCE]
        if missed:
            console.print(
                Text(
                    f"Further off than {percent(TOLERANCE)}: {', '.join(missed)}. {found.n_held_back} prompts are few: "
                    "more of them (--max-samples) tell better, and calibrate better."
                )
            )
        console.print(Text(f"Calibrated on {found.n_calibrated} prompts; saved in {out_dir}."))
