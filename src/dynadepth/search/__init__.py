"""Tree search for routes that answer a prompt better, or with fewer layers, than the dense model (Dr.LLM's labels).

`search_files` does all of it: reads data files, searches, writes a file of routes (`route_file.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dynadepth.search.pool import Load
    from dynadepth.search.run import Found
    from dynadepth.search.searcher import SearchSettings

Say = Callable[[str], object]


def search_files(
    model: Any,
    tokenizer: Any,
    files: Sequence[str | Path],
    out: str | Path,
    settings: SearchSettings,
    *,
    limit: int | None = None,
    resume: bool = False,
    workers: int = 1,
    load: Load | None = None,
    provenance: dict[str, Any] | None = None,
    progress: Say | None = None,
    warn: Say | None = None,
) -> Found:
    """Searches routes for the prompts of data files with known answers, and writes them to `out` as they are found.

    `limit`: the first prompts of each file. `resume`: go on with what `out` holds. `load`: gives the model to each of
    several `workers` (processes). `warn` is given a sentence on prompts that are left out and workers that die.

    Raises `DataError` for data without answers or of no known format and for files of other models, `ConfigError` for
    an `out` that exists or was begun with other settings, `BudgetError` for a budget that no route can meet,
    `UnsupportedModelError` where layers cannot be run apart.
    """
    from dynadepth.architectures import positions_of
    from dynadepth.errors import DataError
    from dynadepth.search.questions import digest, load_questions, source_of
    from dynadepth.search.run import header_for, search

    names = [source_of(file) for file in files]
    if len(set(names)) < len(names):
        raise DataError(
            f"two data files have the same name ({', '.join(names)}): the file of routes tells by it. Rename one."
        )
    questions, remarks = load_questions(files, tokenizer, positions_of(model), limit)
    for remark in remarks:
        if warn is not None:
            warn(remark)
    data = dict(sorted(zip(names, map(digest, files), strict=True)))
    header = header_for(model, settings, data, provenance or {})
    return search(
        model,
        questions,
        settings,
        Path(out),
        header,
        resume=resume,
        workers=workers,
        load=load,
        progress=progress,
        warn=warn,
    )
