"""Scores of sites on disk: `DIR/scores/NAME.json`, whole or not at all, with the settings that they depend on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynadepth.errors import DataError
from dynadepth.provenance import provenance
from dynadepth.report.cells import FORMAT, SCORES, read_json, write_json
from dynadepth.routing.decision import Site

Scores = dict[Site, float]


def scores_path(out: Path, name: str) -> Path:
    """Where the scores of a row are."""
    return out / SCORES / f"{name}.json"


def read_scores(path: Path, *parts: str) -> tuple[dict[str, Any], list[Scores]]:
    """The settings of a file and its parts, each in its own order. Raises `DataError` for a missing or damaged file."""
    document = read_json(path)
    if document.get("format") != FORMAT:
        raise DataError(f"{path} has format {document.get('format')!r}, this version reads {FORMAT}.")
    try:
        found = [{Site.parse(site): float(score) for site, score in document[part].items()} for part in parts]
        return dict(document["settings"]), found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged: its scores cannot be read ({error!r}).") from error


def write_scores(path: Path, settings: Mapping[str, Any], parts: Mapping[str, Scores], seed: int, dtype: Any) -> None:
    """Writes a whole file or none."""
    named = {part: {str(site): score for site, score in scores.items()} for part, scores in parts.items()}
    document = {"format": FORMAT, "settings": settings, **named, "provenance": provenance(seed=seed, dtype=dtype)}
    write_json(path, document)
