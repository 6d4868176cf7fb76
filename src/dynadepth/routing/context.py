"""What one forward knows: opened by the model, read by every routed sublayer, gone at the end.

It lives in ContextVars, so that two threads may run one model at once with different inputs, injections and recorders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynadepth.routing.decision import Assignments, RoutingTrace, Site
from dynadepth.routing.routes import RouteBook
from dynadepth.routing.skip_path import Memory, Reality

if TYPE_CHECKING:
    from dynadepth.routing.cache import RoutedCache

Injection = int | Tensor | list[bool] | list[int]
"""A given decision: one for all units, or one each. Whole numbers say how often a unit executes (0, 1, 2)."""


@dataclass
class ForwardContext:
    """One forward of one routed model: B rows, T new tokens.

    `token_mask`, `pool_mask`: bool `[B, T]` or None (all tokens): real tokens, and those a sequence-level router may
    see. `padding_unknown`: the attention mask does not say which tokens are real. `injected`: decisions given from
    outside; sites not named execute. `masked`: run every unit and select (routers learn); else run the executing units
    alone. `choosing`: tokens compete within their sequence (see `expert_choice`). `penalised`: the method's loss is a
    part of the model's. `whole`: sites whose sticky route lets every row execute, so that nothing is left to do there.
    `idle`: sites whose sticky route lets no row execute, and whose output is known without looking at anything:
    `zeros`, a view of one that is never written to.
    `resting`: sites known before they are reached to execute no row and to leave nothing for a skip path to look at.
    `parting`: sites known before they are reached to execute some of the rows, whose states alone are normed: `normed`.
    `planned`: sites whose routes were decided at a lower one, from what was `pooled` there.
    `attention_fixes[layer]` rebuilds the full-batch attention weights of a routed block from those its inner
    attention recorded, or is them (it did not run); `attention_again[layer]` puts those of a second pass in their
    place. `after_norm[site]` finishes a site behind its post-norm. `unpadded`: it was learnt that every token is real.
    `gates[layer]`: what the gate of a mixture chose just now. `running[layer]`: of the tokens gathered for a routed
    block, which ones execute (bool), for its gate.
    """

    owner: Any
    trace: RoutingTrace
    book: RouteBook
    cache: RoutedCache | None
    masked: bool
    grad: bool
    choosing: bool = False
    penalised: bool = True
    token_mask: Tensor | None = None
    pool_mask: Tensor | None = None
    padding_unknown: bool = False
    output_attentions: bool = False
    injected: Mapping[Site, Injection] | None = None
    whole: frozenset[Site] = frozenset()
    idle: frozenset[Site] = frozenset()
    zeros: Tensor | None = None
    resting: frozenset[Site] = frozenset()
    parting: frozenset[Site] = frozenset()
    normed: dict[Site, Tensor] = field(default_factory=dict)
    planned: frozenset[Site] = frozenset()
    pooled: Tensor | None = None
    pooled_at: Site | None = None
    attention_fixes: dict[int, Callable[[Tensor], Tensor] | Tensor] = field(default_factory=dict)
    attention_again: dict[int, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    after_norm: dict[Site, Callable[..., Tensor]] = field(default_factory=dict)
    unpadded: bool = False
    gates: dict[int, Assignments] = field(default_factory=dict)
    running: dict[int, Tensor] = field(default_factory=dict)
    _reality: Reality | None = None
    _length: Tensor | None = None
    _autocast: dict[str, bool] = field(default_factory=dict)

    def given(self, site: Site) -> Injection | None:
        """The decision injected for a site, None where its router decides."""
        return None if self.injected is None else self.injected.get(site, True)

    @property
    def past(self) -> int:
        """Tokens before this forward."""
        return self.cache.seen if self.cache is not None else 0

    def length(self, hidden: Tensor) -> Tensor:
        """T of the hidden states `[B, T, D]` that every site of this forward brings, float32 `[1]` on their device."""
        if self._length is None or self._length.device != hidden.device:
            self._length = torch.full((1,), hidden.shape[1], dtype=torch.float32, device=hidden.device)
        return self._length

    def autocast(self, hidden: Tensor) -> bool:
        """Does this forward run under autocast where `hidden` is? Looked up once a kind of device: it takes a while."""
        kind = hidden.device.type
        if kind not in self._autocast:
            self._autocast[kind] = torch.is_autocast_enabled(kind)
        return self._autocast[kind]

    # ---- what skip paths stream

    def reality_of(self, rows: Tensor | None) -> Reality | None:
        """Which tokens are real, of the logical rows `rows` (int64 index; None: all); None where all are."""
        if self.token_mask is None or self.unpadded:
            return None
        if self._reality is None:
            self._reality = Reality.of(self.token_mask)
        return self._reality if rows is None else self._reality.rows(rows.to(self.token_mask.device))

    def memory(self, state: Any, rows: Sequence[int], hidden: Tensor) -> Memory | None:
        """What a site's skip path remembers of `rows`; None where nothing outlives this forward."""
        return None if self.cache is None else self.cache.memories.of(state.site, rows, state.skip_path, hidden)

    def remember(self, site: Site, rows: Sequence[int], memory: Memory | None) -> None:
        """Hands a memory to the cache, if there is one."""
        if self.cache is not None:
            self.cache.memories.keep(site, rows, memory)

    # ---- decisions

    def to_host(self, times: Tensor | list[int]) -> list[Any]:
        """Decisions `[B]`, or of several sites `[S, B]`, as lists. The first call of a forward learns in the same
        transfer which rows decide now, and whether every token is pooled, so that the sites above need not mask."""
        trace, undecided = self.trace, self.book.decided
        if trace.fresh is None and self.token_mask is None:
            trace.fresh = [not d for d in undecided]
        if trace.fresh is None:
            assert self.token_mask is not None
            real = self.token_mask.any(1)
            whole = torch.ones_like(real) if self.pool_mask is None else self.pool_mask.all(1)
            asked = [real, whole] if isinstance(times, list) else [*times.view(-1, len(real)), real, whole]
            *decided, has_token, pooled = torch.stack(asked).tolist()
            trace.fresh = [not d and bool(has) for d, has in zip(undecided, has_token, strict=True)]
            if all(pooled):
                self.pool_mask, self.unpadded = None, True
            if isinstance(times, list):
                return times
            return decided if times.dim() == 2 else decided[0]
        return times if isinstance(times, list) else times.tolist()


_current: ContextVar[ForwardContext | None] = ContextVar("dynadepth_forward", default=None)
_disabled: ContextVar[tuple[Any, ...]] = ContextVar("dynadepth_disabled", default=())
_injected: ContextVar[Mapping[int, Mapping[Site, Injection]]] = ContextVar("dynadepth_injected", default={})  # noqa: B039
_prompted: ContextVar[Mapping[int, int]] = ContextVar("dynadepth_prompted", default={})  # noqa: B039
_choosing: ContextVar[tuple[Any, ...]] = ContextVar("dynadepth_choosing", default=())


def current() -> ForwardContext | None:
    """The forward in progress in this thread, if it is a routed one."""
    return _current.get()


@contextmanager
def entered(context: ForwardContext | None) -> Iterator[None]:
    """Makes `context` the forward in progress."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def is_disabled(owner: Any) -> bool:
    """Is routing of this model switched off in this thread?"""
    return any(entry is owner for entry in _disabled.get())


@contextmanager
def disabling(owner: Any) -> Iterator[None]:
    """Runs the model of this routing dense, in this thread."""
    token = _disabled.set((*_disabled.get(), owner))
    try:
        yield
    finally:
        _disabled.reset(token)


@contextmanager
def injecting(owner: Any, decisions: Mapping[Site, Injection]) -> Iterator[None]:
    """Replaces the routers' decisions of this routing, in this thread."""
    token = _injected.set({**_injected.get(), id(owner): decisions})
    try:
        yield
    finally:
        _injected.reset(token)


def injections(owner: Any) -> Mapping[Site, Injection] | None:
    """The decisions injected for this routing, by site; None where its routers decide."""
    return _injected.get().get(id(owner))


@contextmanager
def prompting(owner: Any, length: int) -> Iterator[None]:
    """Lets the first `length` positions of a sequence alone decide its route, in this thread."""
    token = _prompted.set({**_prompted.get(), id(owner): length})
    try:
        yield
    finally:
        _prompted.reset(token)


def prompted(owner: Any) -> int | None:
    """The prompt's length where a forward may bring more than the prompt; None where all of it may be pooled."""
    return _prompted.get().get(id(owner))


@contextmanager
def choosing(owner: Any) -> Iterator[None]:
    """Lets the tokens of a sequence compete in evaluation, too, in this thread."""
    token = _choosing.set((*_choosing.get(), owner))
    try:
        yield
    finally:
        _choosing.reset(token)


def is_choosing(owner: Any) -> bool:
    """Do tokens of this routing compete outside training, in this thread?"""
    return any(entry is owner for entry in _choosing.get())


def carrying_context(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient checkpointing function whose replay, long after the forward is over, still sees that forward's
    context."""

    def carried(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        context = current()

        def run(*inputs: Any, **options: Any) -> Any:
            with entered(context):
                return function(*inputs, **options)

        return checkpoint(run, *args, **kwargs)

    carried.__wrapped__ = checkpoint  # type: ignore[attr-defined]  # as functools.wraps does
    return carried
