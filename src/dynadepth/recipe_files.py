"""Recipes on disk: strict YAML, found by name or as a file, and checked against the dataclass that reads them.

`kind: pretraining` or `kind: isoflop` in a file says which command it is for; a file without it is for tuning.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dynadepth.errors import ConfigError, did_you_mean

COMMANDS = {"tuning": "tune", "pretraining": "pretrain", "isoflop": "isoflop"}
"""The command of each kind of recipe."""

_TYPES: dict[str, Any] = {
    "int": int, "float": (int, float), "str": str, "bool": bool, "float | None": (int, float, type(None)),
    "int | None": (int, type(None)), "dict[str, Any]": dict, "tuple[str, ...]": (list, tuple),
    "tuple[int, ...]": (list, tuple), "tuple[float, ...]": (list, tuple),
    "tuple[dict[str, Any], ...]": (list, tuple), "dict[str, dict[str, Any]]": dict,
}  # fmt: skip


def recipe_folder() -> Path:
    """The packaged recipes, or those of the checkout in an editable install."""
    packaged = Path(str(resources.files("dynadepth"))) / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def known_recipes(kind: str = "tuning") -> list[str]:
    """Names of the shipped recipes of a kind."""
    found = []
    for path in recipe_folder().glob("*.yaml"):
        said = re.search(r"^kind:\s*(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if (said[1] if said else "tuning") == kind:
            found.append(path.stem)
    return sorted(found)


def read_recipe(name_or_path: str | Path, kind: str = "tuning") -> tuple[dict[str, Any], str]:
    """The settings of a recipe of that kind, by name or from a YAML file, and the file's name.

    Raises `ConfigError` where there is none, where it is no YAML, and where it is for another command.
    """
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("Recipes need pyyaml: pip install 'dynadepth[train]'.") from error

    path = Path(name_or_path)
    if not path.is_file():
        path = recipe_folder() / f"{name_or_path}.yaml"
    if not path.is_file():
        known = known_recipes(kind)
        raise ConfigError(
            f"There is no recipe {str(name_or_path)!r}; known: {', '.join(known)}, or a YAML file."
            f"{did_you_mean(str(name_or_path), known)}"
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _loader(yaml))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings.")
    named = "kind" in data
    said = data.pop("kind", "tuning")
    if said not in COMMANDS:
        raise ConfigError(f"{path}: kind must be one of {', '.join(COMMANDS)}, not {said!r}.")
    if said != kind:
        way_out = "" if named else f" A file without a kind is for tuning: add `kind: {kind}` if it is not."
        raise ConfigError(
            f"{path} is a recipe for `dynadepth {COMMANDS[said]}`, not for `dynadepth {COMMANDS[kind]}`.{way_out}"
        )
    return data, str(path)


def _loader(yaml: Any) -> Any:
    """YAML 1.1 takes `1e13` for text, since it has no point: here it is a number, as in JSON."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    return Loader


def checked(kind: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings as arguments of the dataclass `kind`, each checked for name and type; lists become tuples.

    Raises `ConfigError` naming an unknown setting (and its near ones), one of another type, or what is missing.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(f"{where} has an unknown setting {key!r}.{did_you_mean(str(key), fields)}")
        allowed = _TYPES[str(fields[key].type)]
        if not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool):
            raise ConfigError(f"{where}: {key} must be {fields[key].type}, not {value!r}.")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def difference(made: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> str | None:
    """The first setting in which two differ, in words; None where they are the same."""
    for key in {**made, **wanted}:
        a, b = made.get(key), wanted.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if inner := difference(a, b, f"{where}{key}: "):
                return inner
        elif a != b:
            return f"{where}{key} is {_short(a)} there and {_short(b)} here"
    return None


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def at_least(recipe: Any, least: float, names: Sequence[str]) -> None:
    """Raises `ConfigError` where one of these settings is below `least`."""
    for name in names:
        if getattr(recipe, name) < least:
            raise ConfigError(f"{name} must be at least {least:g}, not {getattr(recipe, name):g}.")
