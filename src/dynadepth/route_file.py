"""Files of searched routes: which layers to skip, execute or repeat for each prompt, and what that did to its answer.

JSON Lines, gzipped where the name ends in `.gz`. The first line is the header (format, model, depth, settings of the
search, provenance), every further line one prompt. A search appends each prompt as a gzip member of its own and
flushes it to the disk, so that a kill at any moment costs at most the prompt that was being written: `recover` finds
the last whole line, and cuts off what lies behind it.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dynadepth.adapter import atomically
from dynadepth.errors import DataError, check_file

FORMAT = 2
KIND = "dynadepth-routes"
PIECE = 1 << 14
"""Bytes unpacked at once."""
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
"""What two models must have in common, beside the fingerprint, for a route of one to mean something in the other."""


@dataclass(frozen=True)
class Answer:
    """How a model answered a prompt under some route."""

    correct: bool
    """Whether nothing is preferred to the gold answer (`margin > 0`)."""

    margin: float
    """Log-probability of the gold answer minus that of the best other one, nats."""


@dataclass(frozen=True)
class Route(Answer):
    """A route that the search kept."""

    counts: tuple[int, ...]
    """How often each layer runs: 0 skips it, 1 executes it, 2 repeats it."""

    @property
    def layers(self) -> int:
        """Layers run altogether."""
        return sum(self.counts)

    @property
    def can_be_routed(self) -> bool:
        """A routed model runs a layer twice at most; a search may be asked for more."""
        return max(self.counts) <= 2


@dataclass(frozen=True)
class PromptRoutes:
    """One prompt: what the dense model answers, and the routes that do as well with less, or better."""

    id: str
    source: str
    """The data file's name without `.jsonl`."""

    prompt: str
    """The text in front of the answer, as the model reads it."""

    options: tuple[str, ...] | None
    """The texts to choose from, as they follow the prompt (with their blank in front); None for a short answer."""

    gold: int | None
    """Index of the right option; None for a short answer."""

    completion: str
    """The gold answer, as it follows the prompt."""

    dense: Answer
    routes: tuple[Route, ...]
    """Best first; empty where the search found none worth keeping."""

    control: float | None
    """Best margin that the same search reached towards a wrong answer, nats; None where it was not run."""

    executions: int
    """Layers run for this prompt by the search and its control."""

    naive_executions: int
    """Layers of all routes that either of them tried, each route run once and whole."""

    apart_executions: int
    """Layers that both would have run whole and apart: a route that both tried counts twice."""

    control_routes: tuple[Route, ...] = ()
    """As `routes`, of the control: their margins are those of the wrong answer, and none is correct."""

    tried: tuple[Route, ...] = ()
    """Every route that the search towards the right answer tried, whatever it gave, but for the dense one; in the order
    of trying. (`routes` are those of them that were kept.)"""


@dataclass(frozen=True)
class Header:
    """The first line."""

    model: dict[str, Any]
    """The model's identity, as saved routers carry it: `name`, its shape, `fingerprint` of its weights."""

    n_layers: int
    search: dict[str, Any]
    """Settings of the search; a search is only resumed with the same ones."""

    provenance: dict[str, Any]


@dataclass(frozen=True)
class RouteFile:
    """A file as it was read."""

    header: Header
    prompts: list[PromptRoutes]

    def check_model(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        """Raises `DataError` naming both models where `identity` (`adapter.identity`) is not the header's."""
        made_for = self.header.model
        names = f"The routes in {path} were found for {made_for.get('name')!r}, not for {identity.get('name')!r}"
        if self.header.n_layers != identity.get("num_hidden_layers"):
            raise DataError(
                f"{names}: they have {self.header.n_layers} layers and the model has "
                f"{identity.get('num_hidden_layers')}; search routes for this model with `dynadepth search`."
            )
        for key in (*SHAPE, "fingerprint"):
            if made_for.get(key) != identity.get(key):
                raise DataError(
                    f"{names}: {key} is {made_for.get(key)!r} there and {identity.get(key)!r} here; search routes for "
                    "this model with `dynadepth search`."
                )


def read(path: str | Path, identity: Mapping[str, Any] | None = None) -> RouteFile:
    """The whole file. With a model's `identity` it must be that model's.

    Raises `DataError` for a missing or damaged file (naming the line), a newer format, another model or depth.
    """
    header: Header | None = None
    prompts: dict[tuple[str, str], PromptRoutes] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        if header is None:
            header = _header(line, path)
        else:
            prompt = _prompt(line, header.n_layers, path, number)
            prompts.setdefault(
                (prompt.source, prompt.id), prompt
            )  # one found twice must not be on two sides of a split
    if header is None:
        raise DataError(f"{path} is empty: it is no file of routes that `dynadepth search` has begun.")
    found = RouteFile(header, list(prompts.values()))
    if identity is not None:
        found.check_model(path, identity)
    return found


class RouteWriter:
    """Appends lines; each is on the disk when `append` returns. A context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> RouteWriter:
        self._file = self.path.open("ab")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError:  # what is still in its buffer cannot be written either: the first error says so
            if kind is None:
                raise

    def start(self, header: Header) -> None:
        """Writes the header, as the first line of a new file."""
        self._append(_document(header))

    def append(self, prompts: Iterable[PromptRoutes]) -> None:
        """Writes one line a prompt."""
        for prompt in prompts:
            kept = {"routes": _plain(prompt.routes), "control_routes": _plain(prompt.control_routes)}
            tried = [[_digits(route.counts), route.margin] for route in prompt.tried]
            self._append({**asdict(prompt), **kept, "tried": tried})

    def _append(self, document: dict[str, Any]) -> None:
        if self._file is None:
            raise AssertionError("a RouteWriter writes inside its `with` block")
        try:
            self._file.write(_packed(self.path, _line(document)))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(_unwritable(self.path, error)) from error


def write_header(path: Path, header: Header) -> None:
    """Replaces the first line of a whole file, and nothing else of it; all or nothing."""
    data = path.read_bytes()
    first, end = next(_members(data)) if path.name.endswith(".gz") else (data, len(data))
    _, rest = first.split(b"\n", 1)  # others may have packed several lines into one member
    blob = _packed(path, _line(_document(header)) + rest) + data[end:]
    try:
        atomically(path, lambda temporary: temporary.write_bytes(blob))
    except OSError as error:
        raise DataError(_unwritable(path, error)) from error


def _document(header: Header) -> dict[str, Any]:
    return {"format": FORMAT, "kind": KIND, **asdict(header)}


def _line(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _packed(path: Path, lines: bytes) -> bytes:
    """A gzip member of their own where the file is zipped."""
    return gzip.compress(lines, mtime=0) if path.name.endswith(".gz") else lines


def _plain(routes: Iterable[Route]) -> list[dict[str, Any]]:
    return [{**asdict(route), "layers": route.layers} for route in routes]


def recover(path: str | Path) -> RouteFile | None:
    """Reads a file that a search may have left in the middle of a line, and cuts off that last part on the disk.

    None where not even the header is whole: the file is then empty. Raises `DataError` as `read` does for what a kill
    cannot explain: another kind of file, a damaged line in the middle.
    """
    path = Path(path)
    data, zipped = path.read_bytes(), path.name.endswith(".gz")
    good = _whole(data, zipped)
    if data and not _may_be_header(data[:PIECE], zipped):
        raise DataError(_foreign(path))
    if good < len(data):
        with path.open("r+b") as file:
            file.truncate(good)
    return read(path) if good else None


def _members(data: bytes) -> Iterator[tuple[bytes, int]]:
    """What each gzip member of `data` holds, and where in `data` it ends; stops in front of one that is cut off.

    Raises `zlib.error` at one that is damaged.
    """
    at, member, content = 0, zlib.decompressobj(wbits=31), b""
    while at < len(data):
        piece = data[at : at + PIECE]
        content += member.decompress(piece)
        at += len(piece) - len(member.unused_data)
        if member.eof:
            yield content, at
            member, content = zlib.decompressobj(wbits=31), b""


def _whole(data: bytes, zipped: bool) -> int:
    """How many bytes at the start of a file are whole lines; all of them where a line is damaged, not cut off."""
    if not zipped:
        return data.rfind(b"\n") + 1
    try:
        return max((end for _, end in _members(data)), default=0)
    except zlib.error:
        return len(data)


def _may_be_header(data: bytes, zipped: bool) -> bool:
    """Whether a file that begins so, and may be cut off anywhere, can be one of routes."""
    if zipped:
        try:
            data = zlib.decompressobj(wbits=31).decompress(data)
        except zlib.error:
            return False
    start = b'{"format": '
    return data[: len(start)] == start[: len(data)]


def _lines(path: Path) -> Iterator[str]:
    check_file(path, "file of routes")
    number, whole = 0, 0
    try:
        data = path.read_bytes()
        for content, end in _members(data) if path.name.endswith(".gz") else [(data, len(data))]:
            whole = end
            for line in content.splitlines(keepends=True):
                number += 1
                if not line.endswith(b"\n"):
                    raise DataError(_damaged(path, number, "it is cut off"))
                yield line.decode()
    except UnicodeDecodeError as error:
        raise DataError(_damaged(path, number, f"no UTF-8: {error.reason}")) from error
    except (OSError, zlib.error) as error:
        raise DataError(_damaged(path, number + 1, str(error))) from error
    if whole < len(data):
        raise DataError(_damaged(path, number + 1, "it is cut off"))


def _damaged(path: str | Path, line: int, why: str) -> str:
    return (
        f"{path} is damaged at line {line} ({why}): the same `dynadepth search` with --resume drops a last line that "
        "was cut off; where another one is damaged, search anew."
    )


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path} could not be written ({error.strerror or error}): make room, then --resume."


def _foreign(path: str | Path) -> str:
    return f"{path} is no file of routes: its first line is not the header of `dynadepth search`."


def _header(line: str, path: str | Path) -> Header:
    try:
        data = json.loads(line)
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise DataError(_foreign(path))
        if type(data["format"]) is not int or data["format"] < 1:
            raise ValueError(f"format {data['format']!r}")
        if data["format"] > FORMAT:
            raise DataError(
                f"{path} has format {data['format']}, this version reads up to {FORMAT}: upgrade with "
                "pip install -U dynadepth."
            )
        if data["format"] < FORMAT:
            raise DataError(
                f"{path} has format {data['format']}, of an older version, and does not hold what this one keeps of a "
                "search: search again into another file."
            )
        header = Header(data["model"], data["n_layers"], data["search"], data["provenance"])
        if type(header.n_layers) is not int or header.n_layers < 1 or not isinstance(header.model, dict):
            raise ValueError(f"n_layers {header.n_layers!r}")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(_damaged(path, 1, repr(error))) from error
    return header


def _prompt(line: str, n_layers: int, path: str | Path, number: int) -> PromptRoutes:
    try:
        data = json.loads(line)
        options = None if data["options"] is None else tuple(map(str, data["options"]))
        found = PromptRoutes(
            id=str(data["id"]),
            source=str(data["source"]),
            prompt=str(data["prompt"]),
            options=options,
            gold=data["gold"],
            completion=str(data["completion"]),
            dense=Answer(bool(data["dense"]["correct"]), float(data["dense"]["margin"])),
            routes=_routes(data["routes"], n_layers),
            control=None if data["control"] is None else float(data["control"]),
            executions=int(data["executions"]),
            naive_executions=int(data["naive_executions"]),
            apart_executions=int(data["apart_executions"]),
            control_routes=_routes(data["control_routes"], n_layers),
            tried=_tried(data["tried"], n_layers),
        )
        if (found.gold is None) != (options is None):
            raise ValueError("options and gold go together")
        if options is not None and not (type(found.gold) is int and 0 <= found.gold < len(options)):
            raise ValueError(f"gold {found.gold!r} of {len(options)} options")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(_damaged(path, number, repr(error))) from error
    return found


def _routes(data: list[dict[str, Any]], n_layers: int) -> tuple[Route, ...]:
    """Raises `ValueError` saying what is wrong with one."""
    found = tuple(Route(bool(route["correct"]), float(route["margin"]), tuple(route["counts"])) for route in data)
    for route in found:
        _check(route, n_layers)
    return found


def _tried(data: list[list[Any]], n_layers: int) -> tuple[Route, ...]:
    """From pairs of digits and a margin; raises as `_routes`."""
    found = []
    for digits, margin in data:
        route = Route(float(margin) > 0, float(margin), tuple(map(int, digits)))
        _check(route, n_layers)
        found.append(route)
    return tuple(found)


def _digits(counts: tuple[int, ...]) -> str:
    """`(1, 0, 2)` as `102`: hundreds of routes a prompt take little room."""
    return "".join(map(str, counts))


def _check(route: Route, n_layers: int) -> None:
    if len(route.counts) != n_layers:
        raise ValueError(f"a route of {len(route.counts)} layers in a file for {n_layers}")
    if any(type(count) is not int or count < 0 for count in route.counts):
        raise ValueError(f"counts {list(route.counts)}")
    if not math.isfinite(route.margin):
        raise ValueError(f"margin {route.margin}")
