"""What every verb needs around its call: errors as sentences, progress on stderr, tables, JSON files, loaded models."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynadepth.cli.options import Speed
from dynadepth.errors import BudgetError, ConfigError, DynadepthError
from dynadepth.provenance import finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INTERRUPTED = 130
QUIET_SECONDS = 15.0
"""Where stderr is no terminal, progress is a line at most this often."""


def out() -> Console:
    """The console for results: a terminal's width, 120 columns in a pipe."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)


def say(text: str, style: str = "", label: str = "") -> None:
    """One message on stderr, never wrapped, its text taken literally."""
    message = Text.assemble((label, style), text)
    Console(stderr=True, highlight=False).print(message, soft_wrap=True)


@contextmanager
def reporting(interrupted: str | Callable[[], str]) -> Iterator[None]:
    """Turns errors that a user can do something about into one sentence and exit code 2, Ctrl-C into 130.

    `interrupted`: what Ctrl-C leaves behind, as a sentence.
    """
    try:
        yield
    except DynadepthError as error:
        say(" ".join(str(error).split()), "bold red", "error: ")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say(interrupted if isinstance(interrupted, str) else interrupted(), "bold", "interrupted: ")
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """A status line on stderr while the block runs; the function given changes what it says."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        with console.status(Text(what)) as status:
            yield lambda line: status.update(Text(line))
        return
    said, last = what, time.monotonic()

    def tell(line: str) -> None:
        nonlocal said, last
        if line != said and time.monotonic() - last >= QUIET_SECONDS:
            said, last = line, time.monotonic()
            say(f"  {line}")

    say(f"{what} ...")
    yield tell


def one_line_warnings() -> None:
    """Warnings become one line on stderr, without the place in the code that a user cannot change."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        say(" ".join(str(message).split()), "yellow", "warning: ")

    warnings.showwarning = show


def quiet_libraries() -> None:
    """No bars and no advice from transformers: what a user needs to know is said here."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def open_model(
    name: str,
    routers: Path | None = None,
    budget: float | Speed | None = None,
    dtype: str = "auto",
    control: float | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on its device, with its routers at their budget where they are given, and its tokenizer.

    What is wrong with the routers' files or the budget's text is said before a large model is loaded.
    """
    if budget is not None and routers is None:
        raise ConfigError(f"--budget {budget} needs --routers: a model without routers executes everything.")
    if control is not None and not -1 <= control <= 1:
        raise BudgetError(f"--control must be between -1 and 1, not {control:g}.")
    if control is not None and routers is None:
        raise ConfigError(f"--control {control} needs --routers: a model without routers executes everything.")
    if control is not None and budget is not None:
        raise ConfigError("--budget and --control both set the routers' thresholds: give one of them.")
    with progress(f"loading {name}"):
        import torch

        from dynadepth import adapter, hub
        from dynadepth.dial import set_budget, set_control
        from dynadepth.model import load
        from dynadepth.routed import routing_of

        quiet_libraries()
        if routers is not None:
            adapter.read(routers)
        tokenizer = hub.load_tokenizer(name)
        device = "cuda" if torch.cuda.is_available() else None
        model = hub.load_model(name, dtype=dtype, device=device)
        if routers is not None:
            load(model, routers)
            if isinstance(budget, float):
                set_budget(model, **{routing_of(model).target.name: budget})
            if control is not None:
                set_control(model, control)
    if isinstance(budget, Speed):
        from dynadepth.benchmark import set_speedup

        with progress(f"solving {budget}") as tell:
            found = set_speedup(model, budget.times, **budget.workload, progress=tell)
        say(str(found))
    return model, tokenizer


@contextmanager
def noting() -> Iterator[None]:
    """Says in a line each what is warned of inside, once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning)):
                say(message, "yellow", "note: ")


def compile_decode(model: PreTrainedModel) -> None:
    """Compiles the model's decode in place; what stays uncompiled is said in a line."""
    from dynadepth.compiled import compile_model

    with noting():
        compile_model(model)


def write_json(path: Path | None, document: dict[str, Any], quiet: bool = False) -> None:
    """Writes a whole file or none, and says so unless `quiet`. Numbers that JSON does not have (infinity, not-a-number)
    become null."""
    if path is None:
        return
    from dynadepth.adapter import atomically

    text = json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
    if not quiet:
        say(f"wrote {path}")


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    from rich import box

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index else "left", no_wrap=bool(index))
    return made


def facts(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """Labels and values, one a line, values taken literally and wrapped where they are long."""
    from rich import box

    made = Table(title=title, title_justify="left", box=box.SIMPLE, title_style="bold", show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for label, value in rows:
        made.add_row(label, Text(str(value)))
    return made


def number(value: float | int | None, digits: int = 3) -> str:
    """`value` for a table; `-` where there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """`0.75` as `75.0 %`."""
    return "-" if share is None else f"{100 * share:.1f} %"
