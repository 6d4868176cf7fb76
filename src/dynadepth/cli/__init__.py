"""The command `dynadepth`: one file per verb, which parses, calls and prints.

Tables go to stdout, progress and messages to stderr. What a user can change ends as one sentence and exit code 2,
Ctrl-C as one sentence and 130; anything else is a bug and keeps its traceback. Verbs import torch when they run, so
that `--help` is instant.
"""

from __future__ import annotations

import typer

from dynadepth.cli.bench import bench
from dynadepth.cli.calibrate import calibrate
from dynadepth.cli.demo import demo
from dynadepth.cli.eval import evaluate
from dynadepth.cli.frontier import frontier
from dynadepth.cli.generate import generate
from dynadepth.cli.info import info
from dynadepth.cli.isoflop import isoflop
from dynadepth.cli.pretrain import pretrain
from dynadepth.cli.report import report
from dynadepth.cli.search import search
from dynadepth.cli.session import one_line_warnings
from dynadepth.cli.tune import tune

app = typer.Typer(
    name="dynadepth",
    help="Dynamic depth for pretrained transformers: small routers decide, per input, which sublayers run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        from dynadepth.provenance import dynadepth_version

        typer.echo(f"dynadepth {dynadepth_version() or '(not installed)'}")
        raise typer.Exit()


app.command("demo")(demo)
app.command("tune")(tune)
app.command("calibrate")(calibrate)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("info")(info)
app.command("frontier")(frontier)
app.command("report")(report)
app.command("pretrain")(pretrain)
app.command("isoflop")(isoflop)
app.command("search")(search)


def main() -> None:
    """Entry point of the command; leaves with its exit code."""
    one_line_warnings()
    app(prog_name="dynadepth")
