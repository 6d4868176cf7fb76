"""`dynadepth info`: what a model can be routed in, or what saved routers are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from dynadepth.cli.session import open_model, out, percent, progress, reporting, table


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL|DIR", help="A model, or a folder of saved routers.")],
) -> None:
    """Describe a model (what can be routed in it), or saved routers: sites, parameters, budgets, provenance."""
    with reporting("nothing was changed."):
        if (Path(model) / "routing_config.json").is_file():
            from dynadepth.report.info import describe_routers

            show_routers(model, describe_routers(model))
            return
        loaded, _ = open_model(model)
        from dynadepth.report.info import describe_model

        with progress(f"probing {model}"):
            facts = describe_model(model, loaded)
        show_model(facts)


def show_model(facts: dict[str, Any]) -> None:
    """Prints a model's facts, and which routing its probe allows."""
    console = out()
    grid = table(facts["name"], "", "value")
    for label in ("architecture", "layers", "hidden_size", "dtype", "fingerprint", "source", "licence"):
        grid.add_row(label.replace("_", " "), Text(str(facts[label] or "-")))
    grid.add_row("parameters", f"{facts['parameters']:,}")
    console.print(grid)
    grid = table("What can be routed", "target", *facts["routable"]["attention"])
    reasons = []
    for target, allowed in facts["routable"].items():
        answers = (allowed.get(label) for label in facts["routable"]["attention"])
        cells = {True: f"{facts['layers']} sites", None: "-"}
        grid.add_row(target, *(cells.get(answer, "refused") for answer in answers))
        reasons += [f"{target}, {label}: {answer}" for label, answer in allowed.items() if answer is not True]
    console.print(grid)
    for reason in reasons:
        console.print(Text(reason, style="dim"))


def show_routers(folder: str, facts: dict[str, Any]) -> None:
    """Prints what saved routers are."""
    from dynadepth.report.info import layer_ranges

    config, base = facts["config"], facts["base_model"]
    sites: dict[str, list[int]] = {}
    for site in facts["sites"]:
        layer, _, target = site.partition(".")
        sites.setdefault(target, []).append(int(layer))
    grid = table(f"Routers in {folder}", "", "value")
    grid.columns[1].no_wrap = False
    grid.add_row("made for", Text(f"{base.get('name')} (fingerprint {base.get('fingerprint')})"))
    grid.add_row("method", Text(str(config.get("method"))))
    grid.add_row("granularity", Text(_granularity(config)))
    for target, layers in sites.items():
        grid.add_row(f"sites, {target}", f"{len(layers)} of {facts['layers']}: layers {layer_ranges(layers)}")
    grid.add_row("router parameters", f"{facts['parameters']:,}")
    grid.add_row("budget", percent(facts["budget"]) if facts["budget"] is not None else "the method's own threshold")
    if facts["budgets"] is None:
        grid.add_row("calibrated budgets", "none: only budget 1.0 can be set")
    else:
        low, high = facts["budgets"]
        grid.add_row("calibrated budgets", f"{percent(low)} to {percent(high)}, on {facts['calibrated_on']} prompts")
    for label, value in _provenance(facts["provenance"]):
        grid.add_row(label, Text(value))
    out().print(grid)


def _granularity(config: dict[str, Any]) -> str:
    granularity = str(config.get("granularity"))
    return granularity if granularity == "sequence" else f"{granularity}, KV policy {config.get('kv_policy')}"


def _provenance(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts that a reader can use, in order; what is absent is left out."""
    run, result, recipe = (provenance.get(key) or {} for key in ("run", "result", "recipe"))
    rows = [
        ("recipe", recipe.get("name")),
        ("recipe's source", recipe.get("source")),
        ("seed", provenance.get("seed")),
        ("tuned on", f"{result['n_train']} samples in {result['seconds']:.0f} s" if "seconds" in result else None),
        ("stopped early", (provenance.get("stopped") or {}).get("why")),
        ("dynadepth", run.get("dynadepth")),
        ("commit", run.get("commit")),
        ("torch, transformers", ", ".join(str(run[key]) for key in ("torch", "transformers") if run.get(key)) or None),
        ("hardware", (run.get("hardware") or {}).get("cpu")),
        ("command", run.get("command")),
        ("date", run.get("date")),
    ]
    return [(label, str(value)) for label, value in rows if value is not None]
