"""Routers that know, before any step, which tokens can be skipped: what skipping would cost, predicted in closed form.

At token granularity the importance of a site differs from token to token. It is taken here as the squared error of the
site's skip path (of nothing, without one) over the squared length of the residual stream that enters the layer, which
for an identity path is about twice 1 − cosine. Its logarithm is predicted by ridge regression on the state that the
router reads, so that one threshold for all sites is a budget in the same currency everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.architectures import decoder_layers
from dynadepth.budget import Batches
from dynadepth.errors import ConfigError
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.routing.skip_path import Reality
from dynadepth.tuning.surrogate import observed

RIDGE = 3e-2
"""Added to the diagonal, as a share of its mean."""
SMALLEST = 1e-12
"""Of errors: a token that a path meets exactly has no logarithm."""


def fit_token_routers(
    model: nn.Module, batches: Batches, progress: Callable[[int, int], None] | None = None
) -> dict[Site, float]:
    """Fits weights and biases of the routers in place, skip paths as they are; returns the share of the variance of the
    logarithm that each explains on `batches`.

    Raises ConfigError where there are fewer tokens than weights.
    """
    routing = routing_of(model)
    routers: dict[Site, Any] = dict(routing.routers())
    sites = list(routers)
    size = routers[sites[0]].weight.numel()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if tokens <= size:
        raise ConfigError(f"{tokens} tokens are too few to fit routers of {size} weights: give at least {size + 1}.")
    sums = {site: torch.zeros(size + 2, size + 2) for site in sites}
    for done, batch in enumerate(batches):
        mask = batch["attention_mask"].bool()
        with torch.no_grad(), _streams(model, sites) as streams:
            for site, hidden, contribution in observed(model, batch, sites):
                real = mask.to(hidden.device)
                logs = _log_errors(routing.states[site].skip_path, hidden, contribution, streams[site.layer], real)
                states = hidden[real].float()
                rows = torch.cat([states, torch.ones_like(states[:, :1]), logs[real].unsqueeze(1)], 1)
                sums[site] += (rows.T @ rows).cpu()
        if progress:
            progress(done + 1, len(batches))
    explained = {}
    for site, router in routers.items():
        weights, bias, explained[site] = _solved(sums[site] / tokens)
        with torch.no_grad():
            router.weight.copy_(weights)
            router.bias.copy_(bias)
    return explained


def _log_errors(path: Any, hidden: Tensor, contribution: Tensor, stream: Tensor, real: Tensor) -> Tensor:
    """`[B, T]`, float32."""
    stands_in = path(hidden, Reality.of(real))[0]
    missed = contribution.float() if stands_in is None else contribution.float() - stands_in.float()
    error = missed.square().sum(-1) / stream.float().square().sum(-1).clamp(min=SMALLEST)
    return error.clamp(min=SMALLEST).log()


def _solved(moments: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weights `[D]`, bias, and the share of variance explained, from the mean outer products of (state, 1, value)."""
    mean, value = moments[:-2, -2], moments[-1, -2]
    spread = moments[:-2, :-2] - torch.outer(mean, mean)
    both = moments[:-2, -1] - mean * value
    ridge = RIDGE * spread.diagonal().mean()
    weights = torch.linalg.solve(spread + ridge * torch.eye(len(spread)), both)
    variance = moments[-1, -1] - value.square()
    error = variance - 2 * (weights @ both) + weights @ spread @ weights
    return weights, value - mean @ weights, float(1 - error / variance.clamp(min=SMALLEST))


@contextmanager
def _streams(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[int, Tensor]]:
    """By layer: the residual stream `[B, T, D]` that entered it last."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    layers = decoder_layers(unwrapped(model), routing_of(model).spec)
    hooks = [
        layers[site.layer].register_forward_pre_hook(keep(site.layer), with_kwargs=True, prepend=True) for site in sites
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
