"""Fits linear skip paths in closed form: reduced-rank ridge regression of what a sublayer contributes on what its path
may see.

All sites are fitted to the dense model's own stream, whatever will be skipped together, since one set of paths serves
every budget. The target is what the host adds to the residual stream, behind any post-norm. Only the normal equations
are kept: (3D+1)² + (3D+1)·D float32 numbers a site, in as many passes over the batches as `memory` asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth.architectures import ArchitectureSpec, decoder_layers
from dynadepth.architectures.probe import quietly
from dynadepth.budget import Batches, forward
from dynadepth.errors import ConfigError
from dynadepth.model import disabled
from dynadepth.routed import routing_of, unwrapped
from dynadepth.routing.decision import Site
from dynadepth.routing.skip_path import LinearPath, Reality

RIDGE = 1e-2
"""Added to the diagonal, as a share of its mean."""
MEMORY = 4 * 1024**3
"""Bytes of normal equations held at once."""


@dataclass
class _Equations:
    """Sums over tokens: features' second moments `[F, F]`, with contributions `[F, D]`, and of these `[]`."""

    features: Tensor
    both: Tensor
    square: Tensor
    tokens: int = 0

    @staticmethod
    def empty(size: int, device: torch.device) -> _Equations:
        n = 3 * size + 1
        zeros = torch.zeros
        return _Equations(zeros(n, n, device=device), zeros(n, size, device=device), zeros((), device=device))

    def add(self, features: Tensor, contributions: Tensor) -> None:
        self.features += features.T @ features
        self.both += features.T @ contributions
        self.square += contributions.square().sum()
        self.tokens += len(features)


def fit_paths(
    model: nn.Module, batches: Batches, progress: Callable[[int, int], None] | None = None, memory: int = MEMORY
) -> dict[Site, float]:
    """Fits the linear skip path of every site in place; returns the share of variance each explains on `batches`.

    Raises ConfigError where no site has a linear path, or where there are fewer tokens than features.
    """
    routing = routing_of(model)
    paths = {site: path for site, path in routing.paths().items() if isinstance(path, LinearPath)}
    if not paths:
        raise ConfigError("No site has a linear skip path to fit: set skip_path to linear.")
    size = next(iter(paths.values())).bias.shape[0]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    if tokens < 3 * size + 1:
        raise ConfigError(
            f"{tokens} tokens are too few to fit skip paths of {3 * size + 1} features: give at least as many."
        )
    each = 4 * (3 * size + 1) * (4 * size + 1)
    sites, group = list(paths), max(1, memory // each)
    explained: dict[Site, float] = {}
    total = len(batches) * -(-len(sites) // group)
    done = 0
    for start in range(0, len(sites), group):
        chosen = {site: paths[site] for site in sites[start : start + group]}
        device = next(iter(chosen.values())).bias.device
        equations = {site: _Equations.empty(size, device) for site in chosen}
        for batch in batches:
            mask = batch["attention_mask"].bool().to(device)
            reality = Reality.of(mask)
            for site, hidden, contribution in observed(model, batch, list(chosen)):
                equations[site].add(_features(chosen[site], hidden, reality)[mask], contribution[mask].float())
            done += 1
            if progress:
                progress(done, total)
        for site, path in chosen.items():
            explained[site] = _solve(path, equations[site])
    return explained


def _features(path: LinearPath, hidden: Tensor, reality: Reality) -> Tensor:
    """`[B, T, 3D + 1]`, float32: the state now, the one before, the mean so far, and one."""
    now = path.scaled(hidden).float()
    index = reality.previous.clamp(min=0).unsqueeze(-1).expand_as(now)
    before = now.gather(1, index) * (reality.previous >= 0).unsqueeze(-1)
    total = now.masked_fill(~reality.real.unsqueeze(-1), 0).cumsum(1)
    mean = total / reality.count.clamp(min=1).unsqueeze(-1)
    return torch.cat([now, before, mean, torch.ones_like(now[..., :1])], -1)


def _solve(path: LinearPath, equations: _Equations) -> float:
    """Puts the best map of the path's rank in place; returns the share of variance explained."""
    n = equations.tokens
    moments, both = equations.features / n, equations.both / n
    ridge = RIDGE * moments.diagonal()[:-1].mean()
    damping = ridge.expand(len(moments)).clone()
    damping[-1] = 1e-6  # the constant feature is not shrunk
    weights = torch.linalg.solve(moments + torch.diag(damping), both)
    slopes, bias = weights[:-1], weights[-1]
    # The outputs' directions that carry most of the prediction's variance (reduced-rank regression).
    mean = moments[-1, :-1]
    spread = moments[:-1, :-1] - torch.outer(mean, mean)
    basis = torch.linalg.eigh(slopes.T @ spread @ slopes).eigenvectors[:, -path.rank :]
    reduced = slopes @ basis @ basis.T
    bias = bias + mean @ (slopes - reduced)
    with torch.no_grad():
        path.read.copy_(torch.cat((slopes @ basis).chunk(3, dim=0), dim=1))
        path.write.copy_(basis.T)
        path.bias.copy_(bias)
    cross = both[:-1] - torch.outer(mean, both[-1])
    variance = equations.square / n - both[-1].square().sum()
    error = variance - 2 * (reduced * cross).sum() + (reduced * (spread @ reduced)).sum()
    return float(1 - error / variance)


class _Reached(Exception):
    """The highest site of interest has run."""


def observed(
    model: nn.Module, batch: dict[str, Tensor], sites: Sequence[Site]
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Per site what its sublayer is given, and what it adds to the residual stream, both `[B, T, D]`, dense."""
    base, routing = unwrapped(model), routing_of(model)
    layers = decoder_layers(base, routing.spec)
    inputs: dict[Site, Tensor] = {}
    found: dict[Site, Tensor] = {}
    hooks = []
    for site in sites:
        module = routing.target.module(layers[site.layer], routing.spec)
        contributor = contributor_of(layers[site.layer], routing.spec, site.target)
        hooks.append(module.register_forward_pre_hook(_input(inputs, site), with_kwargs=True))
        hooks.append(contributor.register_forward_hook(_output(inputs, found, site, last=site == sites[-1])))
    try:
        with quietly(base), disabled(model):
            forward(model, batch)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        yield site, inputs[site], found.pop(site)


def contributor_of(layer: nn.Module, spec: ArchitectureSpec, target: str) -> nn.Module:
    """The module whose output a layer adds to its residual stream for a target (for `block`, the layer itself)."""
    module, norms = {"attention": (spec.attention, spec.attention_norms), "mlp": (spec.mlp, spec.mlp_norms)}.get(
        target, (None, (None, None))
    )
    return layer if module is None else getattr(layer, norms[1] or module)


def _input(inputs: dict[Site, Tensor], site: Site) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[site] = args[0] if args else kwargs["hidden_states"]

    return hook


def _output(inputs: dict[Site, Tensor], found: dict[Site, Tensor], site: Site, last: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        found[site] = hidden - inputs[site] if site.target == "block" else hidden
        if last:
            raise _Reached

    return hook
