"""A whole search: which prompts are done already, the rest in groups, each group written when it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dynadepth.adapter import identity
from dynadepth.architectures import decoder_layers
from dynadepth.errors import ConfigError
from dynadepth.route_file import Header, PromptRoutes, RouteFile, RouteWriter, recover, write_header
from dynadepth.search.layers import MEMORY, LayerRunner
from dynadepth.search.pool import Load, in_processes
from dynadepth.search.questions import Question
from dynadepth.search.searcher import Searcher, SearchSettings, grouped

Say = Callable[[str], object]


@dataclass(frozen=True)
class Found:
    """A file of routes as a search left it, and what this run added to it."""

    file: RouteFile
    new: int
    """Prompts searched by this run."""

    seconds: float
    """What they took, the loading of models included."""

    left_out: int = 0
    """Prompts at which process after process died."""

    @property
    def prompts_per_minute(self) -> float | None:
        """None where nothing was left to search."""
        return 60 * self.new / self.seconds if self.new else None


def header_for(model: Any, settings: SearchSettings, data: dict[str, str], provenance: dict[str, Any]) -> Header:
    """`data`: digests of the data files by name. Raises `BudgetError` where no route of this model meets the budget."""
    layers = decoder_layers(model)
    settings.check(len(layers))
    search = {**settings.to_dict(), "dtype": str(model.dtype).removeprefix("torch."), "data": data}
    return Header(identity(model, layers), len(layers), search, provenance)


def begin(out: Path, header: Header, resume: bool, warn: Say | None = None) -> RouteFile:
    """The file to be added to: what it holds, or a new one. Data files that it has no prompts of yet join its header,
    which `warn` is told.

    Raises `ConfigError` where there is one and `resume` is not said, or it was begun with other settings or with
    another file of the same name; `DataError` where it belongs to another model or is no such file.
    """
    found = None
    if out.exists() and out.stat().st_size:
        if not resume:
            raise ConfigError(f"{out} exists: give another name, or go on by --resume if it holds routes.")
        found = recover(out)
    if found is None:
        with RouteWriter(out) as writer:
            writer.start(header)
        return RouteFile(header, [])
    found.check_model(out, header.model)
    begun, wanted = dict(found.header.search), dict(header.search)
    before, now = begun.pop("data"), wanted.pop("data")
    for name in sorted({*before} & {*now}):
        if before[name] != now[name]:
            raise ConfigError(
                f"{out} was begun with another file {name} (digest {before[name]}, now {now[name]}): go on with the "
                "same data (files of other names may join), or give another name."
            )
    if begun != wanted:
        key = next(key for key in sorted({*begun, *wanted}) if begun.get(key) != wanted.get(key))
        raise ConfigError(
            f"{out} was begun with {key} = {begun.get(key)!r}, not {wanted.get(key)!r}: go on with the same settings, "
            "or give another name."
        )
    if joining := sorted({*now} - {*before}):
        if warn is not None:
            warn(f"{out} has no prompts of {', '.join(joining)} yet: they join those of {', '.join(sorted(before))}.")
        search = {**found.header.search, "data": dict(sorted({**before, **now}.items()))}
        found = RouteFile(replace(found.header, search=search), found.prompts)
        write_header(out, found.header)
    return found


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Inside, no other search adds to the file. Raises `ConfigError` where one does. (Two at once would search
    everything twice, and one would cut off the line that the other is writing.)"""
    beside = out.with_name(f".{out.name}.lock")
    lock = FileLock(beside, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another search is adding to {out}: wait for it, or give another name.") from None
    try:
        yield
    finally:
        lock.release()
        beside.unlink(missing_ok=True)


def search(
    model: Any,
    questions: Sequence[Question],
    settings: SearchSettings,
    out: Path,
    header: Header,
    *,
    resume: bool = False,
    workers: int = 1,
    load: Load | None = None,
    memory: int = MEMORY,
    progress: Say | None = None,
    warn: Say | None = None,
) -> Found:
    """Searches routes for the questions that are not in the file yet, and adds them to it.

    `load` gives the model to each of several `workers`. `progress` is given a line after each group, `warn` a sentence
    when a worker died and its prompts are searched again. Interrupted at any moment, it leaves the prompts of finished
    groups; those it was at are searched by the next run, in the same groups where the questions are the same. Raises as
    `alone`, `begin`, `LayerRunner.check` and `in_processes`.
    """
    if workers > 1 and load is None:
        raise ConfigError("several workers need `load`, a function that gives each its model.")
    with alone(out):
        file = begin(out, header, resume, warn)
        done = {(prompt.source, prompt.id) for prompt in file.prompts}
        groups = _left(questions, done, settings.seed)
        left = sum(map(len, groups))
        started, new = time.monotonic(), 0
        if groups:
            LayerRunner(model).check(groups[0][0].row)
        with RouteWriter(out) as writer:
            for prompts in _searched(model, settings, groups, workers, load, memory, warn):
                writer.append(prompts)
                file.prompts.extend(prompts)
                new += len(prompts)
                if progress is not None:
                    progress(_line(new, left, len(done), time.monotonic() - started))
        return Found(file, new, time.monotonic() - started, left - new)


def _left(questions: Sequence[Question], done: Collection[tuple[str, str]], seed: int) -> list[list[Question]]:
    """The groups that are still to be searched. Those that an interruption left whole stay as they were, because what
    is computed together moves what is found; what is left of the others makes new ones."""
    whole, rest = [], []
    for group in grouped(questions, seed):
        left = [question for question in group if (question.source, question.id) not in done]
        if len(left) == len(group):
            whole.append(group)
        else:
            rest += left
    return whole + grouped(rest, seed)


def _searched(
    model: Any,
    settings: SearchSettings,
    groups: list[list[Question]],
    workers: int,
    load: Load | None,
    memory: int,
    warn: Say | None,
) -> Iterator[list[PromptRoutes]]:
    if workers > 1 and load is not None and groups:
        yield from in_processes(load, settings, groups, workers, memory, warn)
        return
    searcher = Searcher(model, settings, memory)
    for group in groups:
        yield searcher.search(group)


def _line(new: int, total: int, before: int, seconds: float) -> str:
    rate = new / seconds
    minutes, rest = divmod(round((total - new) / rate), 60)
    again = f" ({before} were there)" if before else ""
    return f"{new} of {total} prompts{again}, {60 * rate:.0f} a minute, {minutes}:{rest:02d} left"
