"""Fits linear skip paths in closed form: reduced-rank ridge regression of what a sublayer contributes on what its path
may see.

All sites are fitted to the dense model's own stream, whatever will be skipped together, since one set of paths serves
every budget. The target is what the host adds to the residual stream, behind any post-norm. Only the normal equations
are kept: (3D+1)² + (3D+1)·D float32 numbers a site, in as many passes over the batches as `memory` asks for.

A model of width D has 3D + 1 features, for which a fit of minutes has few tokens where D is large. So each ridge is
chosen on batches that are held out for it, and these are fitted on, too, afterwards.
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

RIDGES = (1e-2, 0.1, 1.0)
"""Added to the diagonal, as shares of its mean: of each site the least that is good enough (`CLOSE`)."""
CLOSE = 0.02
"""Of the variance of the held-out contributions: what the ridge taken may explain less than the best one."""
HELD_OUT = 8
"""One batch of so many chooses ridges, and at least one of two."""
TOKENS_A_FEATURE = 16
"""That a fit wants at least."""
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
        n, zeros = n_features(size), torch.zeros
        return _Equations(zeros(n, n, device=device), zeros(n, size, device=device), zeros((), device=device))

    def add(self, features: Tensor, contributions: Tensor) -> None:
        self.features += features.T @ features
        self.both += features.T @ contributions
        self.square += contributions.square().sum()
        self.tokens += len(features)

    def moments(self) -> tuple[Tensor, Tensor]:
        """A token's: features' `[F, F]`, with contributions `[F, D]`."""
        return self.features / self.tokens, self.both / self.tokens


@dataclass(frozen=True)
class _Map:
    """contribution = features · read · write + bias: `[3D, r]`, `[r, D]`, `[D]`."""

    read: Tensor
    write: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return features[:, :-1] @ self.read @ self.write + self.bias


class _Fit:
    """One path's: the equations so far, the maps that they give once held-out batches come, and what these miss."""

    def __init__(self, path: LinearPath) -> None:
        self.path = path
        self.equations = _Equations.empty(path.bias.shape[0], path.bias.device)
        self.candidates: list[_Map] = []
        self.missed = torch.zeros(1 + len(RIDGES), device=path.bias.device)
        """By the mean contribution, and by the map of each ridge: sums of squares."""

    def propose(self) -> None:
        """From now on batches are held out: what they are fitted on comes behind what is known of them."""
        maps = (_solved(self.equations, ridge, self.path.rank) for ridge in RIDGES)
        self.candidates = [_constant(self.equations), *maps]

    def add(self, hidden: Tensor, contribution: Tensor, reality: Reality) -> None:
        features = _features(self.path, hidden, reality)[reality.real]
        wanted = contribution[reality.real].float()
        for i, candidate in enumerate(self.candidates):
            self.missed[i] += (candidate(features) - wanted).square().sum()
        self.equations.add(features, wanted)

    def finish(self) -> float:
        """Puts the map in place; returns the share of variance that it explains."""
        found = _solved(self.equations, _ridge(self.missed), self.path.rank)
        with torch.no_grad():
            self.path.read.copy_(torch.cat(found.read.chunk(3, dim=0), dim=1))
            self.path.write.copy_(found.write)
            self.path.bias.copy_(found.bias)
        return _explained(found, self.equations)


def n_features(hidden_size: int) -> int:
    """Of a linear path's fit: now, before, mean, and one."""
    return 3 * hidden_size + 1


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
    if tokens < n_features(size):
        raise ConfigError(
            f"{tokens} tokens are too few to fit skip paths of {n_features(size)} features: give at least as many."
        )
    held_out = batches[HELD_OUT // 2 - 1 :: HELD_OUT] or batches[1:2]
    others = [batch for batch in batches if not any(batch is held for held in held_out)]
    each = 4 * n_features(size) * (n_features(size) + size)
    sites, group = list(paths), max(1, memory // each)
    explained: dict[Site, float] = {}
    total = len(batches) * -(-len(sites) // group)
    done = 0
    for start in range(0, len(sites), group):
        fits = {site: _Fit(paths[site]) for site in sites[start : start + group]}
        for batch in [*others, *held_out]:
            if held_out and batch is held_out[0]:
                for fit in fits.values():
                    fit.propose()
            reality = Reality.of(batch["attention_mask"].bool().to(next(iter(fits.values())).path.bias.device))
            for site, hidden, contribution in observed(model, batch, list(fits)):
                fits[site].add(hidden, contribution, reality)
            done += 1
            if progress:
                progress(done, total)
        explained |= {site: fit.finish() for site, fit in fits.items()}
    return explained


def _features(path: LinearPath, hidden: Tensor, reality: Reality) -> Tensor:
    """`[B, T, 3D + 1]`, float32: the state now, the one before, the mean so far, and one."""
    now = path.scaled(hidden).float()
    index = reality.previous.clamp(min=0).unsqueeze(-1).expand_as(now)
    before = now.gather(1, index) * (reality.previous >= 0).unsqueeze(-1)
    total = now.masked_fill(~reality.real.unsqueeze(-1), 0).cumsum(1)
    mean = total / reality.count.clamp(min=1).unsqueeze(-1)
    return torch.cat([now, before, mean, torch.ones_like(now[..., :1])], -1)


def _constant(equations: _Equations) -> _Map:
    """The mean contribution, whatever the features are."""
    size = equations.both.shape[1]
    nothing = equations.both.new_zeros(3 * size, 0)
    return _Map(nothing, equations.both.new_zeros(0, size), equations.both[-1] / equations.tokens)


def _solved(equations: _Equations, ridge: float, rank: int) -> _Map:
    """The best map of a rank."""
    moments, both = equations.moments()
    damping = (ridge * moments.diagonal()[:-1].mean()).expand(len(moments)).clone()
    damping[-1] = 1e-6  # the constant feature is not shrunk
    weights = torch.linalg.solve(moments + torch.diag(damping), both)
    slopes, bias = weights[:-1], weights[-1]
    # The outputs' directions that carry most of the prediction's variance (reduced-rank regression).
    mean = moments[-1, :-1]
    spread = moments[:-1, :-1] - torch.outer(mean, mean)
    basis = torch.linalg.eigh(slopes.T @ spread @ slopes).eigenvectors[:, -rank:]
    read = slopes @ basis
    return _Map(read, basis.T, bias + mean @ slopes - mean @ read @ basis.T)


def _ridge(missed: Tensor) -> float:
    """The one to take, by what the mean and each of `RIDGES` missed; the first where nothing was held out."""
    variance, *each = missed.tolist()
    enough = min(each) + CLOSE * variance
    return next((ridge for ridge, error in zip(RIDGES, each, strict=True) if error <= enough), RIDGES[0])


def _explained(found: _Map, equations: _Equations) -> float:
    """The share of variance that a map explains of what it was fitted on."""
    moments, both = equations.moments()
    mean = moments[-1, :-1]
    slopes = found.read @ found.write
    spread = moments[:-1, :-1] - torch.outer(mean, mean)
    cross = both[:-1] - torch.outer(mean, both[-1])
    variance = equations.square / equations.tokens - both[-1].square().sum()
    error = variance - 2 * (slopes * cross).sum() + (slopes * (spread @ slopes)).sum()
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
