"""Static rows: the same layers skipped for every input, the first ones of an order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from dynadepth import adapter
from dynadepth.frontier.makers import Budget, Maker, Part, attached, check_reach, read_files
from dynadepth.frontier.orders import LEFT_OUT, ORDERS, check_order, every_site, order_settings, path_settings
from dynadepth.frontier.workbench import Workbench
from dynadepth.methods import StaticConfig
from dynadepth.methods.static import skip_count
from dynadepth.routed import routing_of
from dynadepth.tuning import load_recipe


@dataclass(frozen=True)
class Static(Maker):
    """A fixed route at the nearest whole number of skipped sublayers."""

    order: str
    """One of `ORDERS`."""
    target: str = "attention"
    fitted: bool = False
    """Gives what is skipped the default recipe's skip paths, fitted in closed form and not tuned; else nothing."""

    def budgets(self, name: str, asked: Iterable[float], n_layers: int) -> tuple[Budget, ...]:
        asked, most = tuple(asked), n_layers - LEFT_OUT.get(self.order, 0)
        for budget in asked:
            check_reach(name, budget, n_layers, most, skip_count(budget, n_layers) <= most)
        return asked

    def settings(self, bench: Workbench, name: str) -> dict[str, Any]:
        made = {"order": self.order, "target": self.target, **order_settings(self.order, bench, name, self.target)}
        if self.fitted:
            made["paths"] = bench.fit_settings(name, load_recipe(), every_site(self.target))
        return made

    def ready(self, bench: Workbench, name: str) -> None:
        check_order(self.order, bench, name, self.target)
        unfitted = self.fitted and not bench.is_fitted(name, load_recipe(), every_site(self.target))
        if order_settings(self.order, bench, name, self.target) or unfitted:
            read_files(bench, name, load_recipe())

    def parts(self, bench: Workbench, name: str, budget: Budget) -> list[Part]:
        assert budget is not None
        order = ORDERS[self.order](bench, name, self.target)
        config = StaticConfig(target=self.target, skip=tuple(sorted(order[: skip_count(budget, bench.n_layers)])))
        if not self.fitted:
            return [Part(lambda: attached(bench.model, config))]
        folder = bench.paths(name, load_recipe(), every_site(self.target))
        return [Part(lambda: _with_paths(bench.model, replace(config, **path_settings()), folder))]


@contextmanager
def _with_paths(model: PreTrainedModel, config: StaticConfig, folder: Path) -> Iterator[PreTrainedModel]:
    """The model under a static route, with the saved skip paths of what it skips."""
    with attached(model, config):
        routing, saved = routing_of(model), adapter.read(folder)[1]
        routing.load_tensors({name: saved[name] for name in routing.tensors()})
        for path in routing.paths().values():
            path.to(model.dtype)
        yield model
