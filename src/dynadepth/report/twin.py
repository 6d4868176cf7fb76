"""Static twins: the fixed routes that a dynamic one has to beat, at exactly its keep ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dynadepth.benchmark.pruned import bare_twin
from dynadepth.budget import mixture
from dynadepth.methods import StaticConfig
from dynadepth.methods.static import skip_count
from dynadepth.model import adopt_lora, attach
from dynadepth.routed import routing_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Figures = dict[str, float | None]


class StaticTwins:
    """Static routes of every length for one routed model, each skipping the least important sublayers of its target.

    The twins share the model's weights, have routing modules of their own, and skip paths that are copies of the
    routed model's: tuned by the same steps.
    """

    def __init__(self, model: PreTrainedModel, order: Sequence[int]) -> None:
        """`order`: the layers whose sublayers may be skipped, the one that is skipped first coming first."""
        self.model, self.order = model, tuple(order)
        self.n_layers, self.target = routing_of(model).n_layers, routing_of(model).target.name
        self._made: dict[int, PreTrainedModel] = {}

    def skipped(self, count: int) -> tuple[int, ...]:
        """The layers that the route of this length skips."""
        return tuple(sorted(self.order[:count]))

    def skipping(self, count: int) -> PreTrainedModel:
        """The model under the static route that skips `count` sublayers."""
        if count not in self._made:
            skip = self.skipped(count)
            layers = tuple(sorted(self.order))
            routing = routing_of(self.model)
            path, rank = routing.config.skip_path, routing.config.skip_rank
            config = StaticConfig(target=self.target, layers=layers, skip=skip, skip_path=path, skip_rank=rank)
            twin = attach(bare_twin(self.model), config)
            routing_of(twin).take_paths(routing)
            if routing.lora is not None:
                adopt_lora(twin, routing.lora)
            self._made[count] = twin
        return self._made[count]

    def nearest(self, keep: float) -> PreTrainedModel:
        """The twin whose keep ratio (of all sublayers of the target) is the nearest to `keep`."""
        return self.skipping(min(skip_count(keep, self.n_layers), len(self.order)))

    def mixture(self, keep: float) -> list[tuple[int, float]]:
        """(count skipped, share of the inputs): the one or two whole counts whose mean keep ratio is exactly `keep`."""
        return mixture(keep, self.n_layers, len(self.order))

    def matched(self, keep: float, measure: Callable[[PreTrainedModel], Figures]) -> Figures:
        """What `measure` gives in the mean where inputs are spread over the twins of `mixture(keep)`.

        Every figure must be a mean over inputs (negative log-likelihood, not perplexity). None where a twin has None.
        """
        parts = [(share, measure(self.skipping(count))) for count, share in self.mixture(keep)]
        mixed: Figures = {}
        for key in parts[0][1]:
            values = [(share, figures[key]) for share, figures in parts]
            mixed[key] = (
                None if any(v is None for _, v in values) else sum(share * float(v or 0) for share, v in values)
            )
        return mixed
