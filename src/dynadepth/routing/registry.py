"""Finding implementations without a list to edit: importing a package's modules is what registers their classes."""

from __future__ import annotations

import importlib
import pkgutil
import re
from functools import cache
from typing import TypeVar

from dynadepth.errors import ConfigError, did_you_mean

T = TypeVar("T")


@cache
def import_modules(package: str) -> None:
    """Imports every module of `package`, once."""
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")


def subclasses(base: type[T]) -> list[type[T]]:
    """All concrete subclasses, however deep, in order of definition."""
    found = []
    for child in base.__subclasses__():
        if not getattr(child, "__abstractmethods__", None):
            found.append(child)
        found.extend(subclasses(child))
    return found


def named_subclass(base: type[T], name: str, package: str, kind: str | None = None) -> type[T]:
    """The subclass of `base` whose `name` is `name`, after importing the modules of `package`; `kind`: what the error
    for an unknown one calls it (None: as the class is called)."""
    import_modules(package)
    known = {child.name: child for child in subclasses(base) if "name" in vars(child)}  # type: ignore[attr-defined]  # bases declare it
    if name not in known:
        kind = kind or " ".join(re.findall("[A-Z][a-z]*", base.__name__.removeprefix("Abstract"))).lower()
        raise ConfigError(
            f"Unknown {kind} {name!r}; known: {', '.join(sorted(known))}.{did_you_mean(str(name), known)}"
        )
    return known[name]
