"""What single routes gave on single prompts, kept in a file while a long comparison of them runs.

JSON Lines: the settings that the numbers depend on, then one line a group of prompts that ran together. Groups are used
again whole or not at all, since in bfloat16 what is computed together moves what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynadepth.records import plain, write_text
from dynadepth.search.tree import Counts

Key = tuple[str, str]
"""Source and id of a prompt."""
Leads = dict[tuple[Key, Counts], float]


class Journal:
    """Leads by prompt and route. Without a path nothing is kept; what other settings left is begun anew."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self._known = path, Leads()
        if path is None:
            return
        lines = [json.dumps(plain(settings))]
        for line in _lines_of(path, lines[0]):
            with suppress(ValueError, TypeError):  # cut short where a run was killed
                self._known |= {
                    ((source, name), tuple(counts)): float(lead) for source, name, counts, lead in json.loads(line)
                }
                lines.append(line)
        write_text(path, "\n".join(lines) + "\n")

    def group(self, asked: Sequence[tuple[Key, Counts]], run: Callable[[], Leads]) -> Leads:
        """The leads of what is asked: those of an earlier run where it has them all, else `run` now and kept."""
        if all(pair in self._known for pair in asked):
            return {pair: self._known[pair] for pair in asked}
        found = run()
        if self.path is not None:
            row = [[*key, list(counts), lead] for (key, counts), lead in found.items()]
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return found


def _lines_of(path: Path, head: str) -> list[str]:
    """The lines behind the first, where that one is `head`."""
    try:
        first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):  # missing, or empty
        return []
    return lines if first == head else []
