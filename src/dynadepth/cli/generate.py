"""`dynadepth generate`: answers to prompts, and the route that each took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from dynadepth.cli import options
from dynadepth.cli.session import compile_decode, open_model, out, percent, progress, reporting, write_json
from dynadepth.errors import ConfigError


def generate(
    model: options.Model,
    routers: options.Routers = None,
    budget: options.Budget = None,
    control: options.Control = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to answer; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="One prompt a line, or JSON Lines with a field `prompt`."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Longest answer, in tokens.")
    ] = 128,
    show_route: Annotated[
        bool, typer.Option("--show-route", help="Show which layers ran for each prompt, and the keep ratio.")
    ] = False,
    compiled: options.Compile = False,
    dtype: options.Dtype = "auto",
    json_file: options.Json = None,
) -> None:
    """Answer prompts, greedily, all of them as one batch."""
    with reporting("nothing was written."):
        share = options.parse_budget(budget)
        options.check_at_least(max_new_tokens, "--max-new-tokens")
        read = {"--prompts": [prompts] if prompts else [], "--routers": options.saved_routers(routers)}
        options.check_output_file(json_file, read)
        if bool(prompt) == bool(prompts):
            raise ConfigError("Give either --prompt TEXT (it may be repeated) or --prompts FILE.")
        from dynadepth.report.samples import answers, read_prompts

        texts = list(prompt or []) or read_prompts(Path(str(prompts)))
        loaded, tokenizer = open_model(model, routers, share, dtype, control)
        if compiled:
            compile_decode(loaded)
        from dynadepth.architectures import decoder_layers
        from dynadepth.report.stamp import stamp

        with progress(f"answering {len(texts)} prompt{'s' if len(texts) > 1 else ''}"):
            outputs = answers(loaded, tokenizer, texts, max_new_tokens)
        show(outputs, len(decoder_layers(loaded)), show_route)
        write_json(json_file, {"outputs": outputs, "provenance": stamp(model, loaded, routers=routers)})


def show(outputs: list[dict[str, Any]], n_layers: int, show_route: bool) -> None:
    """Prints the answers; of several, each behind its prompt."""
    from dynadepth.report.routes import LEGEND, depth_of, strip

    console = out()
    for output in outputs:
        if len(outputs) > 1:
            console.print(Text(f"> {output['prompt']}", style="bold"))
        console.print(Text(output["text"].strip()))
        if show_route and output["route"] is not None:
            keep = output["keep_ratio"]
            kept = f"{percent(keep['all'])} of all, {percent(keep['routed'])} of the routed sites"
            if any(passes > 1 for passes in output["route"].values()):
                kept += f"; {depth_of(output['route'], n_layers):.0f} executions for {n_layers} layers"
            console.print(Text(f"{strip(output['route'], n_layers)}  {kept}", style="cyan"))
        elif show_route:
            console.print(Text(f"{'·' * n_layers}  dense: no routers, everything executes", style="cyan"))
        if len(outputs) > 1:
            console.print()
    if show_route:
        console.print(Text(LEGEND, style="dim"))
