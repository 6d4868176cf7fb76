"""`dynadepth tune`: routers for a frozen model, and what is tuned beside them."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from dynadepth.cli import options
from dynadepth.cli.session import number, open_model, out, percent, progress, reporting, say, table


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
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="FILE|NAME", help="Settings: a YAML file, or a recipe's name.")
    ] = "default",
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="mindskip, static (one route for every input), or auto: tunes the recipe's method, and saves a static "
            "route with its skip paths unless the routers are better on held-out text. (default: the recipe's)",
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
        typer.Option("--granularity", metavar="NAME", help="sequence or token. (default: the recipe's, sequence)"),
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
) -> None:
    """Tune routers, or a static route, for a frozen model and save them, ready for every budget."""

    def interrupted() -> str:
        if (out_dir / "routing_config.json").is_file():
            return f"the last routers saved are in {out_dir}; the same command goes on from the last checkpoint."
        return f"no routers were saved in {out_dir} yet; the same command goes on from where it was."

    with reporting(interrupted):
        share = options.parse_budget(budget)
        options.check_at_least_one(max_samples, "--max-samples")
        options.check_at_least_one(lora, "--lora")
        options.check_output_folder(out_dir)
        from dynadepth.tuning.recipe import load_recipe

        settings = load_recipe(recipe)
        if method == "auto":
            settings = replace(settings, choose=True)
        elif method is not None:
            settings = settings.for_method(method)
        if lora is not None:
            settings = replace(settings, lora={**settings.lora, "rank": lora})
        config = settings.config(
            target=target, granularity=granularity, kv_policy=kv_policy
        )  # what is wrong is said now
        loaded, tokenizer = open_model(model)
        speedup = None
        if isinstance(share, options.Speed):
            from dynadepth.benchmark.speedup import Workload, speedup_of
            from dynadepth.lora import LoraSettings

            beside = LoraSettings.from_dict(settings.lora) if settings.lora else None
            with progress(f"solving {share}") as tell:
                found = speedup_of(loaded, config, share.times, Workload(**share.workload), tell, beside)
            say(str(found))
            share, speedup = found.budget, found.to_dict()
        from dynadepth.report.stamp import sign
        from dynadepth.routed import routing_of
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
            grid.add_row("KL of the static route at this budget", "", number(result.kl_static, 4))
        console = out()
        console.print(grid)
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


def _line(stage: str, done: int, total: int, figures: dict[str, float]) -> str:
    values = "".join(f", {name} {value:.4f}" for name, value in figures.items())
    return f"{stage}: {done} of {total}{values}"
