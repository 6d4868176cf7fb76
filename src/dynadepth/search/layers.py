"""Runs the layers of an ordinary decoder in any order and number, for many prompts and routes at once.

What a layer gives depends on the prompt and on the layers run so far, so these outputs are the nodes of a trie, kept
under a memory limit (the least recently used go first): a route is run from where it leaves the routes before it.
All routes asked for together advance through the layers together, so each layer is called once or twice for all.

The layers are the model's own. What they are given beside hidden states is what the model gives them in a plain
forward, looked up by position (`rows.py`).

Shape suffixes: P prompts, N rows (a prompt under a route), T tokens of a row, Q positions, D features.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dynadepth.architectures import decoder_layers, decoder_of
from dynadepth.errors import ConfigError, UnsupportedModelError
from dynadepth.evaluation.scoring import Scorer, States
from dynadepth.routed import is_attached
from dynadepth.routing.call import named
from dynadepth.search.rows import Row, by_position, rows_of
from dynadepth.search.tree import Counts

MEMORY = 1 << 30
"""Bytes of layer outputs that are kept, by default, of each process that searches."""

TOKENS_AT_ONCE = 8192
"""Tokens in one call of a layer, at most."""

Path = tuple[int, ...]
"""Layers in the order in which they run."""

_Node = tuple[int, Path]
"""(prompt, layers run so far): a layer's output."""


def path_of(counts: Counts) -> Path:
    """`(1, 0, 2)` as the layers `(0, 2, 2)`."""
    return tuple(layer for layer, count in enumerate(counts) for _ in range(count))


class LayerRunner:
    """Gives the last layer's output for prompts under routes."""

    def __init__(self, model: PreTrainedModel, memory: int = MEMORY, tokens_at_once: int = TOKENS_AT_ONCE) -> None:
        """Raises `ConfigError` for a model with routers attached, `UnsupportedModelError` where its layers cannot be
        run apart from its own forward: see `check`."""
        if is_attached(model):
            raise ConfigError("routes are searched on the bare model: detach its routers first.")
        self.model, self.memory, self.tokens_at_once = model, memory, tokens_at_once
        self.layers = decoder_layers(model)
        self.executions: Counter[int] = Counter()
        """Layers run for each of the prompts, since they were given."""

        self._scorer = Scorer(model, takes_prompt_mask=False)
        self._tuples = self._gives_tuples()
        self._rows: list[Row] = []
        self._kwargs: list[dict[str, Any]] = []  # by layer, for the positions of all prompts: [P, T, ..]
        self._entered: list[Tensor] = []  # [T, D] of each prompt
        self._kept: OrderedDict[_Node, Tensor] = OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def take(self, rows: Sequence[Row]) -> None:
        """The prompts that `run` is about from now on; padded on the right to the longest, which no token sees."""
        self._rows = list(rows)
        self.executions.clear()
        self._kept.clear()
        self._bytes = 0
        device = self.model.device
        longest = max(len(row.ids) for row in rows)
        ids_PT, positions_PT, branches_PT = (
            torch.tensor([values + (fill,) * (longest - len(values)) for values in column], device=device)
            for column, fill in (
                ([row.ids for row in rows], 0),
                ([row.positions for row in rows], 0),
                ([row.branches for row in rows], -1),
            )
        )
        length = int(positions_PT.max()) + 1
        # What a query may see: its own branch (padding sees padding) and the prompt, as far as its position allows.
        allowed_PTT = (branches_PT[:, :, None] == branches_PT[:, None]) | (
            (branches_PT[:, :, None] >= 0) & (branches_PT[:, None] == 0)
        )
        calls = self._calls(length)
        made: dict[int, Any] = {}  # the layers share their arguments: each is looked up once

        def looked_up(value: Any) -> Any:
            if id(value) not in made:
                made[id(value)] = by_position(value, length, positions_PT, allowed_PTT)
            return made[id(value)]

        self._kwargs = [{name: looked_up(value) for name, value in kwargs.items()} for kwargs in calls]
        self._entered = list(self._enter(ids_PT, positions_PT))

    def _calls(self, length: int) -> list[dict[str, Any]]:
        """What each layer is given beside its hidden states in a plain forward of `length` tokens, batch 2."""
        calls: list[dict[str, Any]] = []

        def note(_: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
            calls.append(kwargs)
            return hidden

        ids = torch.ones((2, length), dtype=torch.long, device=self.model.device)
        mask = torch.ones_like(ids)
        mask[1, 0] = 0  # with padding the masks are made, where they might be left to the kernel
        with self._replaced(note):
            decoder_of(self.model)(input_ids=ids, attention_mask=mask, use_cache=False)
        if any(getattr(kwargs.get("attention_mask"), "ndim", 0) != 4 for kwargs in calls):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives its layers no mask of queries by keys, which the search needs: "
                "load it with attn_implementation='sdpa' or 'eager'."
            )
        return calls

    def _enter(self, ids_PT: Tensor, positions_PT: Tensor) -> Tensor:
        """What enters the first layer, `[P, T, D]`."""
        found: list[Tensor] = []

        def note(layer: int, hidden: Tensor, *_: Any) -> Tensor:
            if layer == 0:
                found.append(hidden)
            return hidden

        with self._replaced(note):
            decoder_of(self.model)(input_ids=ids_PT, position_ids=positions_PT, use_cache=False)
        return found[0]

    @torch.no_grad()
    def run(self, asked: Sequence[tuple[int, Counts]]) -> list[Tensor]:
        """The last layer's output `[T, D]` for each (number of the prompt, route)."""
        ends: list[_Node] = [(prompt, path_of(counts)) for prompt, counts in asked]
        waves: dict[tuple[int, int], dict[_Node, None]] = {}
        live: dict[_Node, Tensor] = {}
        uses: Counter[_Node] = Counter(ends)
        for prompt, path in ends:
            known = len(path)
            while known and (prompt, path[:known]) not in self._kept:
                known -= 1
            start = (prompt, path[:known])
            live[start] = self._kept[start] if known else self._entered[prompt]
            if known:
                self._kept.move_to_end(start)
            for end in range(known, len(path)):
                wave = waves.setdefault((path[end], path[:end].count(path[end])), {})
                if (prompt, path[: end + 1]) not in wave:
                    wave[prompt, path[: end + 1]] = None
                    uses[prompt, path[:end]] += 1
        for layer, again in sorted(waves):
            nodes = list(waves[layer, again])
            size = max(1, self.tokens_at_once // len(self._entered[0]))
            for first in range(0, len(nodes), size):
                self._run_layer(layer, nodes[first : first + size], live, uses)
        return [live[end] for end in ends]

    def _run_layer(self, layer: int, nodes: list[_Node], live: dict[_Node, Tensor], uses: Counter[_Node]) -> None:
        parents = [(prompt, path[:-1]) for prompt, path in nodes]
        prompts_N = torch.tensor([prompt for prompt, _ in nodes], device=self.model.device)
        hidden_NTD = torch.stack([live[parent] for parent in parents])
        for parent in parents:
            uses[parent] -= 1
            if not uses[parent]:
                del live[parent]
        output = self.layers[layer](hidden_NTD, **rows_of(self._kwargs[layer], prompts_N))
        for node, state_TD in zip(nodes, output[0] if isinstance(output, tuple) else output, strict=True):
            self.executions[node[0]] += 1
            live[node] = state_TD.clone()  # a view would keep the whole batch
            self._keep(node, live[node])

    def _keep(self, node: _Node, state_TD: Tensor) -> None:
        self._kept[node] = state_TD
        self._bytes += state_TD.nbytes
        while self._bytes > self.memory:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.nbytes

    def finish(self, states_NQD: Tensor) -> States:
        """What enters the vocabulary head after these outputs of the last layer, and the way from there to logits."""

        def give(layer: int, hidden: Tensor, *_: Any) -> Tensor:
            return states_NQD if layer == len(self.layers) - 1 else hidden

        ids_NQ = torch.ones(states_NQD.shape[:2], dtype=torch.long, device=states_NQD.device)
        with self._replaced(give):
            return self._scorer(ids_NQ, torch.ones_like(ids_NQ, dtype=torch.bool), None)

    @contextmanager
    def _replaced(self, give: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
        """Inside, each layer returns `give(number, hidden states, its other arguments)` instead of running."""
        before = [vars(layer).get("forward") for layer in self.layers]  # accelerate's hooks put one on the instance

        def stub(number: int, own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                _, named_kwargs = named(own, (hidden_states, *args), kwargs)
                output = give(number, hidden_states, named_kwargs)
                return (output,) if self._tuples else output

            return forward

        try:
            for number, layer in enumerate(self.layers):
                layer.forward = stub(number, type(layer).forward.__get__(layer))
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own

    @torch.no_grad()
    def check(self, row: Row) -> None:
        """Proves on one row that dense routes give what the model's own forward gives, for every continuation.

        Raises `UnsupportedModelError` where they do not.
        """
        dense = (1,) * len(self.layers)
        self.take([row])
        found_TD = self.finish(self.run([(0, dense)])[0][None]).states_BTD[0]
        branches = torch.tensor(row.branches, device=self.model.device)
        prompt_T = branches == 0
        for branch in sorted(set(row.branches)):
            place_T = prompt_T | (branches == branch)
            ids = torch.tensor(row.ids, device=self.model.device)[place_T][None]
            plain_TD = self._scorer(ids, torch.ones_like(ids, dtype=torch.bool), None).states_BTD[0].float()
            if not plain_TD.isfinite().all():
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} overflows in {str(self.model.dtype).removeprefix('torch.')}, without "
                    "any route: give --dtype bfloat16 or float32."
                )
            error = float((found_TD[place_T].float() - plain_TD).norm() / plain_TD.norm())
            if not error <= (1e-3 if self.model.dtype == torch.float32 else 0.1):
                raise UnsupportedModelError(
                    f"{type(self.model).__name__} cannot be searched: its layers, run one by one, differ from its own "
                    f"forward by {error:.2g} of the last hidden state's size."
                )

    @torch.no_grad()
    def _gives_tuples(self) -> bool:
        """Whether a layer's output is the first of several."""
        found: list[bool] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            found.append(isinstance(output, tuple))

        handle = self.layers[0].register_forward_hook(note)
        try:
            ids = torch.ones((1, 1), dtype=torch.long, device=self.model.device)
            decoder_of(self.model)(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return found[0]
