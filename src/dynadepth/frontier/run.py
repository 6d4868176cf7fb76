"""Runs a frontier, or what is left of it.

A cell whose file is there, made with the same settings, is used as it is. One made with other settings is an error that
names the difference, before anything is measured: figures of one folder are comparable. A damaged file is said and
measured again. Nothing is remembered beside the files, so a killed run goes on at the cell where it was, and within it
at the text or task (`pieces`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynadepth import adapter
from dynadepth.errors import ConfigError, DataError, DynadepthError, UnsupportedModelError
from dynadepth.evaluation.comparison import against
from dynadepth.frontier.makers import Budget
from dynadepth.frontier.pieces import Pieces, pieces_folder, remove, state_of
from dynadepth.frontier.rows import ROWS, Row, chosen
from dynadepth.frontier.scoring import blend, measured, timed
from dynadepth.frontier.settings import Settings
from dynadepth.frontier.workbench import Workbench
from dynadepth.provenance import provenance
from dynadepth.recipe_files import difference
from dynadepth.records import write_text
from dynadepth.report.cells import (
    DENSE,
    FORMAT,
    ROUTERS,
    SUMMARY,
    TABLE,
    Cell,
    Findings,
    cell_name,
    cell_path,
    plain,
    write_json,
)
from dynadepth.report.folder import read_folder, usable
from dynadepth.report.frontier_table import markdown, summary_of
from dynadepth.report.stamp import stamp

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Teller:
    """Where progress goes: `say(line)` once a cell, `detail(line)` as often as there is news."""

    say: Callable[[str], object] = lambda line: None
    detail: Callable[[str], None] = lambda line: None


def run_frontier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    out: Path,
    teller: Teller | None = None,
    lenient: bool = False,
) -> Findings:
    """Measures every cell that `out` does not hold yet, and writes `frontier.json`. The model is given back bare.

    Raises `ConfigError` for an unknown method or for cells and routers made with other settings, `BudgetError` for a
    budget that a method cannot reach, `DataError` for texts, tasks and tuning data that cannot be read: all of it
    before the first cell. A method that this model cannot have is said and left out, and so is, with `lenient`, one
    whose data cannot be had. What only measuring shows (texts too short to fit skip paths on, say) ends one method: the
    others go on, and its error is raised behind them (with `lenient` it is only said).
    """
    teller = teller or Teller()
    model.eval()
    bench = Workbench(model, tokenizer, settings, out, teller.detail, teller.say)
    rows = chosen(settings.methods)
    plan = [(row, b) for row in rows for b in row.maker.budgets(row.name, settings.budgets, bench.n_layers)]
    common = {"model": bench.fingerprint, "dtype": str(model.dtype).removeprefix("torch."), **settings.scored()}
    wanted = {row.name: plain({**common, "method": row.maker.settings(bench, row.name)}) for row in rows}
    _collect(bench, plan, wanted, teller)
    if settings.tasks and not all(_complete(bench, row, budget) for row, budget in plan):
        from dynadepth.evaluation.tasks import load_tasks

        load_tasks(settings.tasks, settings.task_data)  # a name that nobody knows is said now
    rows = [row for row in rows if _ready(bench, row, plan, teller, lenient)]
    plan = [(row, budget) for row, budget in plan if row in rows]
    _write_summary(bench, rows, plan)

    failed: dict[str, DynadepthError] = {}
    for number, (row, budget) in enumerate(plan, start=1):
        name = cell_name(row.name, budget)
        if _complete(bench, row, budget) or {row.name, row.of} & set(failed):
            continue
        place = f"[{number}/{len(plan)}] {name}"
        bench.tell = partial(_detail, teller, place)
        try:
            cell = _measure(bench, row, budget, wanted[row.name])
        except DynadepthError as error:
            if row.name == DENSE:
                raise
            failed[row.name] = error
            teller.say(f"{place}: {error} The other methods go on.")
            continue
        _write_summary(bench, rows, plan)
        teller.say(f"{place}: {_told(cell)}{_left(bench, plan)}")
    if failed and not lenient:
        raise next(iter(failed.values()))
    return read_folder(out)


def _collect(
    bench: Workbench, plan: list[tuple[Row, Budget]], wanted: Mapping[str, dict[str, Any]], teller: Teller
) -> None:
    """Takes in the finished cells of the plan."""
    for row, budget in plan:
        path = cell_path(bench.out, row.name, budget)
        if not path.exists():
            continue
        try:
            cell = usable(path)
        except DataError as error:
            teller.say(f"{error} It is measured again.")
            continue
        differs = difference(cell["settings"], wanted[row.name])
        if differs is None and bench.settings.bench and cell.get("speed") is not None:
            differs = difference(cell["speed_settings"], bench.settings.timed())
        if differs:
            raise ConfigError(
                f"{path} was made with other settings ({differs}): give another --out, or remove that file to have "
                "it measured again."
            )
        _check_routers(bench, row, cell.get("routers"))
        bench.finished[cell_name(row.name, budget)] = cell
        remove(pieces_folder(bench.out, cell_name(row.name, budget)))  # of a run killed just then


def _routers_of(bench: Workbench, row: Row) -> str | None:
    """A digest of the routers, skip paths and LoRA that the row runs with; None without any."""
    files = sorted((bench.out / ROUTERS / (row.of or row.name)).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16] if files else None


def _check_routers(bench: Workbench, row: Row, routers: str | None) -> None:
    """Raises `ConfigError` where finished cells of the row, or of the one it stands beside, were measured with other
    routers than these (cells of older versions do not say): budgets and twins of two tunings cannot be compared."""
    for name, cell in bench.finished.items():
        before = cell.get("routers")
        if cell["row"] in (row.name, row.of) and None not in (before, routers) and before != routers:
            raise ConfigError(
                f"{row.name} would be measured with other routers than cell {name} was, in {bench.out}: remove that "
                f"cell to have it measured again with those in {bench.out / ROUTERS / (row.of or row.name)}, or give "
                "another --out."
            )


def _complete(bench: Workbench, row: Row, budget: Budget) -> bool:
    cell = bench.finished.get(cell_name(row.name, budget))
    return cell is not None and (not bench.settings.bench or cell.get("speed") is not None)


def _ready(bench: Workbench, row: Row, plan: list[tuple[Row, Budget]], teller: Teller, lenient: bool) -> bool:
    """Can what is left of the row be measured? Said where it cannot."""
    if all(_complete(bench, row, budget) for of, budget in plan if of is row):
        return True
    try:
        row.maker.ready(bench, row.name)
    except (UnsupportedModelError, DataError) as error:
        if isinstance(error, DataError) and not lenient:
            raise
        teller.say(f"{row.name} is left out: {error}")
        return False
    return True


def _detail(teller: Teller, place: str, line: str) -> None:
    teller.detail(f"{place}: {line}")


def _measure(bench: Workbench, row: Row, budget: Budget, wanted: dict[str, Any]) -> Cell:
    """One cell, or what it lacks. It is kept as soon as it is scored, and again when it is timed: an interrupted timing
    loses no quality."""
    cell = bench.finished.get(cell_name(row.name, budget))
    if cell is None:
        cell = _scored(bench, row, budget, wanted)
        _keep(bench, row, budget, cell)
    if bench.settings.bench:
        started = time.monotonic()
        speed = []
        for part in row.maker.parts(bench, row.name, budget):
            with part.opened() as model:
                own = part.scored is None
                speed.append((part.share, timed(model, bench.tokenizer, bench.settings, bench.tell) if own else []))
        cell = {**cell, "speed": blend(speed), "speed_settings": bench.settings.timed()}
        cell["seconds"] += time.monotonic() - started
        _keep(bench, row, budget, cell)
    return cell


def _scored(bench: Workbench, row: Row, budget: Budget, wanted: dict[str, Any]) -> Cell:
    """A cell without times."""
    started = time.monotonic()
    settings = bench.settings
    found: list[tuple[float, Any]] = []
    mark: dict[str, Any] = {}
    parts = row.maker.parts(bench, row.name, budget)
    routers = _routers_of(bench, row)
    _check_routers(bench, row, routers)
    folder, before = pieces_folder(bench.out, cell_name(row.name, budget)), 0.0
    for number, part in enumerate(parts):
        with part.opened() as model:
            mark = mark or stamp(settings.model, model, seed=settings.seed)
            if part.scored is None:
                of = None if row.of is None else bench.cell(row.of, budget)["provenance"]["date"]
                depends = {"cell": wanted, "of": of, "share": part.share, "model": state_of(model)}
                pieces = Pieces(folder, str(number), depends)
                scores = measured(
                    model, bench.tokenizer, settings, bench.tell, keep=pieces, dense_states=bench.dense_states
                )
                before += pieces.before
            else:
                scores = part.scored(model)
            found.append((part.share, scores))
    cell: Cell = {"format": FORMAT, "row": row.name, "budget": budget, "model": settings.model, "settings": wanted}
    cell |= blend(found)
    dense = cell if row.name == DENSE else bench.cell(DENSE, 1.0)
    cell["against_dense"] = against(cell["rows"], dense["rows"], settings.seed)
    if row.of is not None:
        other = bench.cell(row.of, budget)["rows"]
        cell["against"] = {"row": row.of, **against(cell["rows"], other, settings.seed)}
    cell |= {"mixture": [part.share for part in parts], "provenance": mark, "tuning": _tuning(bench, row)}
    cell["routers"] = routers
    return cell | {"speed": None, "speed_settings": None, "seconds": before + time.monotonic() - started}


def _keep(bench: Workbench, row: Row, budget: Budget, cell: Cell) -> None:
    write_json(cell_path(bench.out, row.name, budget), cell)
    remove(pieces_folder(bench.out, cell_name(row.name, budget)))
    bench.finished[cell_name(row.name, budget)] = plain(cell)


def _tuning(bench: Workbench, row: Row) -> dict[str, Any] | None:
    """How the row's routers came about."""
    folder = bench.out / ROUTERS / row.name
    if not folder.is_dir():
        return None
    result = (adapter.read(folder)[0].get("provenance") or {}).get("result") or {}
    return {key: result.get(key) for key in ("seconds", "steps", "n_trainable", "n_train", "n_heldout")}


def _write_summary(bench: Workbench, rows: list[Row], plan: list[tuple[Row, Budget]]) -> None:
    """`frontier.json`: of this plan, and of finished cells that an earlier one left."""
    try:
        before = read_folder(bench.out)
    except DataError:
        before = Findings()
    named = {row["name"]: row for row in before.methods} | {
        row.name: {"name": row.name, "description": row.description} for row in rows
    }
    known = {row.name: row for row in ROWS}
    names = [name for name in known if name in named] + [name for name in named if name not in known]
    planned = [cell_name(row.name, budget) for row, budget in plan]
    planned += [cell_name(name, b) for name, cells in before.cells.items() for b in cells]
    before.rows = [named[name] for name in names]
    if before.cells:
        write_text(bench.out / TABLE, markdown(before))
    settings = bench.settings
    write_json(
        bench.out / SUMMARY,
        {
            "format": FORMAT,
            "model": settings.model,
            "rows": before.rows,
            "planned": list(dict.fromkeys(planned)),
            "cells": [summary_of(cell) for cells in before.cells.values() for cell in cells.values()],
            "settings": {**settings.scored(), **settings.timed(), "bench": settings.bench},
            "provenance": provenance(seed=settings.seed, dtype=bench.model.dtype),
        },
    )


def _told(cell: Cell) -> str:
    perplexity = next(iter(cell["text"]["perplexity"].values()))["ppl"]
    keep = cell["text"]["keep_ratio"]["all"]
    return f"perplexity {perplexity:,.2f}, {keep:.1%} executed, {cell['seconds']:.0f} s"


def _left(bench: Workbench, plan: list[tuple[Row, Budget]]) -> str:
    """Time that the other cells will take if they take as long as the finished ones."""
    left = sum(not _complete(bench, row, budget) for row, budget in plan)
    if not left:
        return ""
    took = [cell["seconds"] for cell in bench.finished.values()]
    minutes = left * sum(took) / len(took) / 60
    return f"; {left} left, about {minutes:.0f} min" if minutes >= 1 else f"; {left} left, under a minute"
