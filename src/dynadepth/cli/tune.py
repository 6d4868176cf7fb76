"""`dynadepth tune`: routers for a frozen model, and what is tuned beside them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from dynadepth.cli import options
from dynadepth.cli.session import (
    number,
    open_model,
    out,
    percent,
    progress,
    reporting,
    say,
    table,
    write_json,
)
from dynadepth.errors import ConfigError


def tune(
    model: options.Model,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the routers.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="FILE|NAME|self",
            help="JSON Lines, a `datasets` name, or `self`: needs no data. (default: the recipe's)",
        ),
    ] = None,
    routes: Annotated[
        Path | None,
        typer.Option(
            "--routes", metavar="FILE", help="Searched routes to learn from (`dynadepth search`), for --method drllm."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="FILE|NAME",
            help="Settings: a YAML file, or a recipe's name. (default: default; with --routes, drllm-paper)",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="mindskip, static (one route for every input), drllm (with --routes), or auto: tunes the recipe's "
            "method in the order of sublayers that loses less on long texts, and saves a static route with its skip "
            "paths unless the routers are better on held-out text. With --routes, static finds the best route for all "
            "prompts, and auto takes it unless routers answer more. (default: the recipe's)",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            metavar="B|Sx",
            help="Share of all sublayers of the target that may execute, or a speed-up such as 1.3x. "
            "(default: the recipe's, 0.75)",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="NAME", help="attention, mlp or block. (default: the recipe's, attention)"),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option("--granularity", metavar="NAME", help="route, sequence or token. (default: the recipe's, route)"),
    ] = None,
    kv_policy: Annotated[
        str | None,
        typer.Option("--kv-policy", metavar="NAME", help="With tokens: project or drop the keys of skipped ones."),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora", metavar="RANK", help="Tune a LoRA of this rank beside the routers. (default: the recipe's)"
        ),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", metavar="N", help="Samples used. (default: the recipe's)")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything that is drawn.")] = 0,
    json_file: options.Json = None,
) -> None:
    """Tune routers, or a static route, for a frozen model and save them, ready for every budget.

    Routers tuned from --routes have no budgets: `--control` shifts what they choose.
    """

    def interrupted() -> str:
        if routes is not None and method == "static":
            return f"no route was saved in {out_dir} yet; the same command goes on from where it was."
        if routes is not None:
            return f"{out_dir} holds the best routers so far, if an epoch was over; the same command starts anew."
        if (out_dir / "routing_config.json").is_file():
            return f"the last routers saved are in {out_dir}; the same command goes on from the last checkpoint."
        return f"no routers were saved in {out_dir} yet; the same command goes on from where it was."

    with reporting(interrupted):
        share = options.parse_budget(budget)
        options.check_at_least(max_samples, "--max-samples")
        options.check_at_least(lora, "--lora")
        options.check_seed(seed)
        options.check_output_folder(out_dir)
        sources = {"--routes": [] if routes is None else [routes], "--data": [] if data is None else [Path(data)]}
        options.check_output_file(json_file, {**sources, "--out": options.saved_routers(out_dir)})
        from dynadepth.tuning.recipe import DEFAULT, load_recipe

        if routes is not None:
            given: dict[str, object] = {
                "--data": data,
                "--budget": budget,
                "--target": target,
                "--granularity": granularity,
            }
            given |= {"--kv-policy": kv_policy, "--lora": lora}
            _from_routes(model, routes, out_dir, recipe, method, max_samples, seed, given, json_file)
            return
        settings = load_recipe(recipe or DEFAULT)
        if method == "auto":
            settings = settings.in_doubt()
        elif method is not None:
            settings = settings.for_method(method)
        if lora is not None:
            settings = replace(settings, lora={**settings.lora, "rank": lora})
        from dynadepth.adapter import check_not_a_model
        from dynadepth.tuning.trainer import check_trainable

        if settings.lora:
            check_not_a_model(out_dir)
        check_trainable(settings)
        config = settings.config(
            target=target, granularity=granularity, kv_policy=kv_policy
        )  # what is wrong is said now
        loaded, tokenizer = open_model(model)
        from dynadepth.lora import LoraSettings

        beside = LoraSettings.from_dict(settings.lora) if settings.lora else None
        if beside is not None:
            beside.config(loaded)  # what does not fit this model is said now
        speedup = None
        if isinstance(share, options.Speed):
            from dynadepth.benchmark.speedup import Workload, speedup_of

            with progress(f"solving {share}") as tell:
                found = speedup_of(loaded, config, share.times, Workload(**share.workload), tell, beside)
            say(str(found))
            share, speedup = found.budget, found.to_dict()
        from dynadepth.report.stamp import sign
        from dynadepth.routed import routing_of
        from dynadepth.routing.calibration import TOLERANCE
        from dynadepth.tuning import examples_for
        from dynadepth.tuning import tune as tune_routers

        source = data or settings.data
        with progress(f"reading {source}" if source != "self" else "the model answers prompts to tune on") as tell:
            examples = examples_for(
                source,
                loaded,
                tokenizer,
                settings,
                max_samples=max_samples,
                seed=seed,
                cache_dir=out_dir / "self-data",
                progress=lambda done, total: tell(f"the model answers prompts to tune on: {done} of {total}"),
            )
        with progress(f"tuning routers on {len(examples)} samples") as tell:
            result = tune_routers(
                loaded,
                tokenizer,
                examples,
                settings,
                out=out_dir,
                budget=share,
                target=target,
                granularity=granularity,
                kv_policy=kv_policy,
                seed=seed,
                progress=lambda stage, done, total, figures: tell(_line(stage, done, total, figures)),
            )
        routing_of(loaded).speedup = speedup
        sign(loaded, out_dir, model, seed)
        _write(json_file, result, loaded, model, out_dir, seed)

        grid = table(
            f"Tuned {result.n_trainable:,} parameters in {result.seconds:.0f} s",
            "held out",
            "before",
            "after",
        )
        for label, which in (("routed sites", "routed"), ("all sublayers of the target", "all")):
            before, after = (getattr(keep, which, None) for keep in (result.keep_before, result.keep_after))
            grid.add_row(f"executed, of {label}", percent(before), percent(after))
        grid.add_row("KL(dense‖routed), nats a token", number(result.kl_before, 4), number(result.kl_after, 4))
        if result.kl_static is not None:
            grid.add_row("KL of the static route that executes as much", "", number(result.kl_static, 4))
        console = out()
        console.print(grid)
        met = None if result.keep_after is None else result.keep_after.all
        asked = routing_of(loaded).budget
        if routing_of(loaded).is_static and met is not None and asked is not None and abs(met - asked) > TOLERANCE:
            console.print(
                Text(f"{percent(met)} execute, not {percent(asked)}: a route for every input runs whole sublayers.")
            )
        if result.choice is None and result.kl_static is not None and result.kl_static < (result.kl_after or 0.0):
            console.print(
                Text(
                    "The static route is nearer to dense on these texts, and costs nothing to decide: --method auto "
                    "saves it where routers are not better."
                )
            )
        if result.choice is not None:
            console.print(Text(f"chosen: {result.choice.chosen} ({result.choice.why})"))
        words = [
            "dynadepth",
            "generate",
            model,
            "--routers",
            str(out_dir),
            "--prompt",
            "Why is the sky blue?",
            "--show-route",
        ]
        console.print(Text(f"Routers saved in {out_dir}. Next:\n  {shlex.join(words)}"))


def _from_routes(
    model: str,
    routes: Path,
    out_dir: Path,
    recipe: str | None,
    method: str | None,
    max_samples: int | None,
    seed: int,
    others: Mapping[str, object],
    json_file: Path | None,
) -> None:
    from dynadepth.tuning.route_recipe import DEFAULT, check_learns_from_routes, load_route_recipe

    idle = [name for name, value in others.items() if value is not None]
    if idle:
        raise ConfigError(f"{', '.join(idle)} cannot be set together with --routes, which say what every layer does.")
    compared = method in ("auto", "static")
    if method is not None and not compared:
        check_learns_from_routes(method)
    settings = load_route_recipe(recipe or DEFAULT)
    if method is not None and not compared:
        settings = replace(settings, method={**settings.method, "method": method})
    settings.config()  # what is wrong is said now
    loaded, tokenizer = open_model(model)
    from dynadepth.report.stamp import sign
    from dynadepth.tuning.from_routes import tune_from_routes

    if compared:
        from dynadepth.search.choice import choose_from_routes

        with progress(f"choosing a route for all prompts of {routes}") as tell:
            choice = choose_from_routes(
                loaded,
                tokenizer,
                routes,
                settings,
                out=out_dir,
                with_routers=method == "auto",
                max_samples=max_samples,
                seed=seed,
                progress=lambda stage, done, total, figures: tell(_line(stage, done, total, figures)),
            )
        sign(loaded, out_dir, model, seed)
        _write(json_file, choice, loaded, model, out_dir, seed)
        _tell_choice(choice, loaded, model, out_dir)
        return
    with progress(f"tuning routers on {routes}") as tell:
        result = tune_from_routes(
            loaded,
            tokenizer,
            routes,
            settings,
            out=out_dir,
            max_samples=max_samples,
            seed=seed,
            progress=lambda stage, done, total, figures: tell(_line(stage, done, total, figures)),
        )
    sign(loaded, out_dir, model, seed)
    _write(json_file, result, loaded, model, out_dir, seed)
    _tell_learnt(result, routes, model, out_dir)


def _tell_learnt(result: Any, routes: Path, model: str, out_dir: Path) -> None:
    from dynadepth.route_file import read
    from dynadepth.search.figures import summarise

    console = out()
    grid = table(
        f"Tuned {result.n_trainable:,} parameters on {result.n_train} routes in {result.seconds:.0f} s, best at epoch "
        f"{result.best_epoch} of {result.epochs}",
        f"{result.n_heldout} held-out routes",
        "always execute",
        "commonest of the layer",
        "routers",
    )
    predictors = (result.always_execute, result.commonest, result.scores)
    grid.add_row("macro-F1", *(number(one.macro_f1) for one in predictors))
    grid.add_row("layers predicted rightly", *(percent(one.accuracy) for one in predictors))
    for name in result.scores.classes:
        for figure in ("precision", "recall"):
            grid.add_row(f"{name}: {figure}", *(percent(getattr(one.classes[name], figure)) for one in predictors))
    console.print(grid)
    depths = f"{result.depth_labelled:.2f} layers in the held-out routes, {result.depth_routed:.2f} as routed"
    counts = ", ".join(f"{name} {count:,}" for name, count in result.labels.items())
    console.print(Text(f"{depths}; trained on {counts}"))
    found = summarise(read(routes))["all"]
    console.print(
        Text(
            f"The search's luck: of the prompts that dense answers wrongly it corrected {percent(found['corrected'])}; "
            f"its control reached another wrong answer of {percent(found['control_corrected'])}."
        )
    )
    words = ["dynadepth", "generate", model, "--routers", str(out_dir), "--prompt", "Why is the sky blue?"]
    console.print(Text(f"Routers saved in {out_dir}. Next:\n  {shlex.join([*words, '--show-route'])}"))


def _tell_choice(choice: Any, tuned: Any, model: str, out_dir: Path) -> None:
    from dynadepth.report.routes import strip
    from dynadepth.routed import routing_of

    columns = (f"{choice.n_validation} validation prompts", f"{choice.n_heldout} held out")
    grid = table(f"Chosen: {choice.chosen} ({choice.seconds:.0f} s)", "accuracy", *columns, "layers")
    for name, decided in choice.validation.items():
        cells = []
        for figures in (decided, choice.heldout[name]):
            mean, low, high = (100 * value for value in figures.difference)
            cells.append(
                percent(figures.accuracy) + ("" if name == "dense" else f" {mean:+.1f} ({low:+.1f} to {high:+.1f})")
            )
        grid.add_row(name, *cells, number(decided.layers, 1))
    console = out()
    console.print(grid)
    if choice.routers is not None:
        console.print(Text(choice.why))
    layers = {f"{layer}.block": count for layer, count in enumerate(choice.static.counts)}
    dense = "" if choice.static.steps else " (dense: no move gains beyond the noise)"
    console.print(Text(f"static route: {strip(layers, routing_of(tuned).n_layers)}{dense}"))
    words = ["dynadepth", "generate", model, "--routers", str(out_dir), "--prompt", "Why is the sky blue?"]
    console.print(Text(f"Saved in {out_dir}. Next:\n  {shlex.join([*words, '--show-route'])}"))


def _write(json_file: Path | None, result: Any, tuned: Any, model: str, out_dir: Path, seed: int) -> None:
    """The result, with where it comes from."""
    from dynadepth.report.stamp import stamp

    if json_file is not None:
        write_json(json_file, {**asdict(result), "provenance": stamp(model, tuned, routers=out_dir, seed=seed)})


def _line(stage: str, done: int, total: int, figures: dict[str, float]) -> str:
    values = "".join(f", {name} {value:.4f}" for name, value in figures.items())
    return f"{stage}: {done} of {total}{values}" if total else stage
