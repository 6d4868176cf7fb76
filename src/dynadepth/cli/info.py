"""`dynadepth info`: what a model can be routed in, or what saved routers are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from dynadepth.cli.session import facts, open_model, out, percent, progress, reporting, table
from dynadepth.errors import AdapterError, DynadepthError


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL|DIR", help="A model, or a folder of saved routers.")],
) -> None:
    """Describe a model (what can be routed in it), or saved routers: sites, parameters, budgets, provenance."""
    with reporting("nothing was changed."):
        if (Path(model) / "routing_config.json").is_file():
            from dynadepth.report.info import describe_routers

            try:
                show_routers(model, describe_routers(model))
            except DynadepthError:
                raise  # says what is wrong, and where
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                damaged = Path(model) / "routing_config.json"
                raise AdapterError(f"{damaged} is damaged ({error!r}): save the routers again.") from error
            return
        loaded, _ = open_model(model)
        from dynadepth.report.info import describe_model

        with progress(f"probing {model}"):
            description = describe_model(model, loaded)
        show_model(description)


def show_model(description: dict[str, Any]) -> None:
    """Prints a model's facts, and which routing its probe allows."""
    console = out()
    labels = ("architecture", "layers", "hidden_size", "dtype", "fingerprint", "source", "licence")
    rows = [(label.replace("_", " "), description[label] or "-") for label in labels]
    console.print(facts(description["name"], [*rows, ("parameters", f"{description['parameters']:,}")]))
    grid = table("What can be routed", "target", *description["routable"]["attention"])
    reasons = []
    for target, allowed in description["routable"].items():
        answers = (allowed.get(label) for label in description["routable"]["attention"])
        cells = {True: f"{description['layers']} sites", None: "-"}
        grid.add_row(target, *(cells.get(answer, "refused") for answer in answers))
        reasons += [f"{target}, {label}: {answer}" for label, answer in allowed.items() if answer is not True]
    console.print(grid)
    for reason in reasons:
        console.print(Text(reason, style="dim"))


def show_routers(folder: str, description: dict[str, Any]) -> None:
    """Prints what saved routers are."""
    from dynadepth.report.info import layer_ranges

    config, base, n_layers = description["config"], description["base_model"], description["layers"]
    rows: list[tuple[str, object]] = [
        ("made for", f"{base.get('name')} (fingerprint {base.get('fingerprint')})"),
        ("method", config.get("method")),
        ("granularity", _granularity(config)),
    ]
    layers: dict[str, list[int]] = {}
    for site in description["sites"]:
        layer, _, target = site.partition(".")
        layers.setdefault(target, []).append(int(layer))
    for target, routed in layers.items():
        rows.append((f"sites, {target}", f"{len(routed)} of {n_layers}: layers {layer_ranges(routed)}"))
    rows.append(("router parameters", f"{description['parameters']:,}"))
    rows.append(("skip path parameters", f"{description['path_parameters']:,}"))
    if (lora := description["lora"]) is not None:
        rows.append(("LoRA", f"rank {lora['rank']} on {', '.join(lora['modules'])}; {lora['parameters']:,} parameters"))
    rows += _budgets(description) if "skip" not in config else _route(description)
    out().print(facts(f"Routers in {folder}", [*rows, *_provenance(description["provenance"])]))


def _budgets(description: dict[str, Any]) -> list[tuple[str, object]]:
    """The budget in force, and those at which thresholds were measured."""
    if not description["adjustable"]:
        return [("budgets", "none can be set: what executes is learnt")]
    budget, budgets = description["budget"], description["budgets"]
    measured = "none: only budget 1.0 can be set"
    if budgets is not None:
        measured = f"{percent(budgets[0])} to {percent(budgets[1])}, on {description['calibrated_on']} prompts"
    in_force = "the method's own threshold" if budget is None else percent(budget)
    return [("budget", in_force), ("calibrated budgets", measured)]


def _route(description: dict[str, Any]) -> list[tuple[str, object]]:
    """What a static route skips, and how far down its order reaches."""
    from dynadepth.report.info import layer_ranges

    config, budget, n_layers = description["config"], description["budget"], description["layers"]
    rows: list[tuple[str, object]] = [
        ("budget", "a route as it was given" if budget is None else percent(budget)),
        ("skips layers", layer_ranges(config["skip"]) or "none"),
    ]
    order = config.get("order")
    if not order:
        return [*rows, ("budgets", "none can be set: the route has no order")]
    lowest = percent((n_layers - len(order)) / n_layers)
    return [*rows, ("order", f"{', '.join(map(str, order))} (skipped first to last)"), ("budgets", f"from {lowest} on")]


def _granularity(config: dict[str, Any]) -> str:
    granularity = str(config.get("granularity"))
    return f"{granularity}, KV policy {config.get('kv_policy')}" if granularity == "token" else granularity


def _provenance(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """The parts that a reader can use, in order; what is absent is left out."""
    run, result, recipe, calibrated = (provenance.get(key) or {} for key in ("run", "result", "recipe", "calibrated"))
    rows = [
        ("recipe", recipe.get("name")),
        ("recipe's source", recipe.get("source")),
        ("seed", provenance.get("seed")),
        ("tuned on", f"{result['n_train']} samples in {result['seconds']:.0f} s" if "seconds" in result else None),
        ("chosen", "{chosen} ({why})".format(**result["choice"]) if result.get("choice") else None),
        ("calibrated on", calibrated.get("data")),
        ("stopped early", (provenance.get("stopped") or {}).get("why")),
        ("dynadepth", run.get("dynadepth")),
        ("commit", run.get("commit")),
        ("torch, transformers", ", ".join(str(run[key]) for key in ("torch", "transformers") if run.get(key)) or None),
        ("hardware", (run.get("hardware") or {}).get("cpu")),
        ("command", run.get("command")),
        ("date", run.get("date")),
    ]
    return [(label, str(value)) for label, value in rows if value is not None]
