"""`dynadepth pretrain`: a small model from scratch, or on from another, within a FLOP budget."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from dynadepth.cli import options
from dynadepth.cli.session import number, out, percent, progress, quiet_libraries, reporting, table
from dynadepth.errors import ConfigError

if TYPE_CHECKING:
    from dynadepth.pretraining import PretrainRecipe, PretrainResult

Recipe = Annotated[
    str, typer.Option("--recipe", metavar="FILE|NAME", help="Settings: a YAML file, or a recipe's name.")
]


def pretrain(
    recipe: Recipe,
    out_dir: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the model and its checkpoints.")],
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="Plain text (.txt, .jsonl or .jsonl.gz with `text`); repeatable."),
    ],
    valid: Annotated[
        list[Path] | None,
        typer.Option(
            "--valid",
            metavar="FILE",
            help="Held-out text; repeatable. (default: rows of the data whose `split` is `valid`, or its end)",
        ),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option("--flops", metavar="F", help="Training budget, forward and backward, such as 1e14. (default: "
                     "the recipe's)"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in DIR, or begin one where there is none.")
    ] = False,
) -> None:  # fmt: skip
    """Train a small model on plain text, dense or with Mixture-of-Depths, within a FLOP budget.

    `accelerate launch --multi_gpu --num_processes 2 -m dynadepth pretrain ...` shares every batch, on CPUs as well.
    """

    def interrupted() -> str:
        if any((out_dir / "checkpoints").glob("checkpoint-*")):
            return f"the last step is kept in {out_dir}; the same command with --resume goes on from there."
        return f"{out_dir} holds no checkpoint yet; the same command with --resume begins again."

    with reporting(interrupted):
        budget = parse_flops(flops)
        from dynadepth.pretraining.recipe import load_recipe

        settings = load_recipe(recipe)
        options.check_output_folder(out_dir)
        quiet_libraries()
        from dynadepth.pretraining.run import pretrain as train

        first = os.environ.get("RANK", "0") == "0"
        with progress("starting") as tell:
            result = train(
                settings,
                data,
                out_dir,
                valid=valid or (),
                flops=budget,
                resume=resume,
                progress=steps_told(tell) if first else None,
            )
        if first:
            show(settings, result, out_dir)


def parse_flops(text: str | None, option: str = "--flops") -> float | None:
    """`"1e14"` as a number above 0; None stays None. Raises `ConfigError` for anything else."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{option} must be a number of FLOPs above 0, such as 1e14, not {text!r}.")
    return value


def steps_told(tell: Callable[[str], None]) -> Callable[[str, int, int, dict[str, float]], None]:
    """A progress function that adds how long the rest will take, from the steps that it saw."""
    first: tuple[int, float] | None = None

    def progressed(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        nonlocal first
        if not total:
            return tell(stage)
        now = time.monotonic()
        if first is None:
            first = (done, now)
        left = ""
        if done > first[0]:
            left = f", {duration((total - done) * (now - first[1]) / (done - first[0]))} left"
        values = "".join(f", {name} {value:.4f}" for name, value in figures.items())
        tell(f"{stage}: step {done} of {total}{values}{left}")

    return progressed


def duration(seconds: float) -> str:
    """`95` as `1 min 35 s`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show(recipe: PretrainRecipe, result: PretrainResult, folder: Path) -> None:
    """Prints what came of a run."""
    grid = table(f"{recipe.name}: {result.steps} steps, {duration(result.seconds)}", "held-out loss", "nats a token",
                 "bits a byte", "executed", "decided as trained")  # fmt: skip
    words = {"causal": "decided as in generation", "top_k": "decided as in training"}
    for name, loss in result.valid.items():
        label = words[name] if len(result.valid) > 1 else "dense"
        grid.add_row(label, number(loss["nats"], 4), number(loss["bits_per_byte"], 4), percent(loss["executed"]),
                     percent(loss["accuracy"]))  # fmt: skip
    console = out()
    console.print(grid)
    forward, dense = result.plan["forward_per_token"], result.plan["dense_forward_per_token"]
    console.print(
        f"{result.flops:.4g} FLOPs on {result.tokens:,} tokens ({result.epochs:.2f} times the text), "
        f"{result.parameters:,} parameters; a forward costs {forward:.4g} FLOPs a token, {percent(forward / dense)} of "
        "running every block for every token."
    )
    model = folder / "model"
    words_ = ["dynadepth", "generate", str(model), "--prompt", "Once upon a time"]
    if recipe.method:
        words_ += ["--routers", str(model / "routers")]
    console.print(Text(f"Model saved in {model}. Next:\n  {shlex.join(words_)}"))
