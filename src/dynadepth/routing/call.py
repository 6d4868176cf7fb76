"""A call of a model's own sublayer, and the same call for some of its rows or tokens.

Nothing here knows an architecture: tensors are recognised by shape (`[B or 1, T, ...]`), masks and caches by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from dynadepth.errors import ConfigError

CACHE_NAMES = ("past_key_values", "layer_past")


class SublayerCall:
    """`forward(*args, **kwargs)` of a base module whose first argument (or `hidden_states`) is `[B, T, D]`."""

    __slots__ = ("args", "forward", "kwargs")

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.forward, self.args, self.kwargs = forward, args, kwargs

    @property
    def hidden(self) -> Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @property
    def attention_mask(self) -> Tensor | None:
        return self.kwargs.get("attention_mask")

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)

    def _map(self, change: Callable[[str, Any], Any]) -> SublayerCall:
        def visit(name: str, value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(visit(name, item) for item in value)
            return change(name, value) if isinstance(value, Tensor) else value

        args = tuple(visit("hidden_states" if i == 0 else "", value) for i, value in enumerate(self.args))
        return SublayerCall(self.forward, args, {name: visit(name, value) for name, value in self.kwargs.items()})

    def rows(self, index: Tensor, hidden: Tensor | None = None) -> SublayerCall:
        """The same call for the batch rows `index` (int64 `[n]`), whose states are `hidden` if they are at hand."""
        batch = self.hidden.shape[0]
        if not isinstance(self.attention_mask, Tensor | None):
            raise ConfigError(
                f"Rows of one batch that take different routes need attention masks that can be split, not a "
                f"{type(self.attention_mask).__name__}: load the model with attn_implementation='sdpa' or 'eager'."
            )

        def change(name: str, value: Tensor) -> Tensor:
            if name == "hidden_states" and hidden is not None:
                return hidden
            return value.index_select(0, index) if value.dim() > 1 and value.shape[0] == batch else value

        return self._map(change)

    def tokens(self, rows: Tensor, index: Tensor, mask: Tensor | None) -> SublayerCall:
        """The same call for tokens `index` (`[n, t]`) of rows `rows` (`[n]`), under the given attention mask."""
        batch, length = self.hidden.shape[:2]

        def change(name: str, value: Tensor) -> Tensor | None:
            if name == "attention_mask":
                return mask
            if value.dim() > 1 and value.shape[1] == length and value.shape[0] in (1, batch):
                return value.expand(batch, *value.shape[1:])[rows[:, None], index]
            return value

        call = self._map(change)
        if "attention_mask" in call.kwargs:  # a mask that was None is no tensor, so `change` did not see it
            call.kwargs["attention_mask"] = mask
        return call

    def with_hidden(self, hidden: Tensor) -> SublayerCall:
        """The same call for other states `[B, T, D]`."""
        if self.args:
            return SublayerCall(self.forward, (hidden, *self.args[1:]), self.kwargs)
        return SublayerCall(self.forward, (), {**self.kwargs, "hidden_states": hidden})

    def with_cache(self, cache: Any) -> SublayerCall:
        """The same call writing its keys and values to `cache`."""
        name = next((name for name in CACHE_NAMES if name in self.kwargs), CACHE_NAMES[0])
        return SublayerCall(self.forward, self.args, {**self.kwargs, name: cache})


def named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """The arguments of a bound forward, all but the first by name (GPT-2's decoder gives its layers some by place)."""
    if len(args) > 1:
        kwargs = {**dict(zip(names_of(forward), args[1:], strict=False)), **kwargs}
    return args[:1], kwargs


def names_of(forward: Callable[..., Any]) -> list[str]:
    """Of the arguments of a bound forward behind the first."""
    method = getattr(forward, "__func__", None)
    return _parameters(forward)[1:] if method is None else _parameters(method)[2:]


@cache
def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)
