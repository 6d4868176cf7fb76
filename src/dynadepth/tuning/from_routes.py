"""Tunes routers on searched routes: each learns to name what the route does with its layer, the rest stays frozen.

A plain loop and no `Trainer`: under teacher forcing the routers' inputs never change (`route_data`), so the model runs
once over each example and not once an epoch, and what is left is classification by small networks.

No budget is calibrated: routers trained apart, on states that differ a hundredfold in length, have no logits in common
that one threshold could cut. `set_control` shifts each one's own choice.

Shape suffixes: N examples, L routed layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynadepth import adapter
from dynadepth.architectures import decoder_layers
from dynadepth.architectures.probe import quietly
from dynadepth.budget import forward, prompts_to_batches
from dynadepth.errors import ConfigError, TuningError
from dynadepth.methods.drllm import ACTIONS, class_weights, focal_loss
from dynadepth.model import attach, detach, save
from dynadepth.route_file import RouteFile, read
from dynadepth.routed import is_attached, routing_of, unwrapped
from dynadepth.routing.recorder import recording
from dynadepth.tuning.data import pad_token_id
from dynadepth.tuning.route_data import RouteExample, Split, labels, shown, split
from dynadepth.tuning.route_recipe import RouteRecipe
from dynadepth.tuning.route_scores import ActionScores, action_scores, always_execute, commonest
from dynadepth.tuning.trainer import Progress


@dataclass(frozen=True)
class RouteTuneResult:
    """What a run did. Scores are those of held-out prompts, which steered nothing, under teacher forcing."""

    directory: str
    seconds: float
    epochs: int
    best_epoch: int
    """The epoch whose routers were kept, from 1."""
    n_trainable: int
    n_train: int
    n_validation: int
    n_heldout: int
    labels: dict[str, int]
    """How often each action occurs in training."""
    weights: dict[str, float]
    """Of the classes in the loss."""
    scores: ActionScores
    always_execute: ActionScores
    commonest: ActionScores
    """Of each layer's commonest action in training: a static route."""
    depth_labelled: float
    """Mean executions of the held-out routes, in layers."""
    depth_routed: float
    """Mean executions where the routers themselves decide, on the held-out prompts."""
    losses: list[float]
    """Mean training loss of each epoch."""
    validation: list[float]
    """Macro-F1 on the validation prompts after each epoch."""


def tune_from_routes(
    model: nn.Module,
    tokenizer: Any,
    routes: str | Path,
    recipe: RouteRecipe,
    *,
    out: str | Path,
    max_samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RouteTuneResult:
    """Attaches fresh routers to `model`, tunes them on the routes of a file and saves them in `out`.

    The routers kept are those of the epoch with the best macro-F1 on validation prompts; an interrupted run saves the
    best so far. Raises DataError for a file that does not fit the model, TuningError where too few prompts have routes
    or the loss turns NaN, ConfigError for a method that does not learn from routes.
    """
    started = time.monotonic()
    if is_attached(model):
        raise ConfigError("This model is already routed: dynadepth.detach(model) first.")
    config, base = recipe.config(), unwrapped(model)
    found = read(routes, adapter.identity(base, decoder_layers(base)))
    parts, pad = split(found, tokenizer, recipe, max_samples, seed), pad_token_id(tokenizer)
    torch.manual_seed(seed)
    attach(model, config)
    routing = routing_of(model)
    routing.provenance = {**learnt_from(routes, found, recipe, seed), "n_train": len(parts.training)}
    try:
        with quietly(base):
            result = _tune(model, parts, recipe, pad, Path(out), seed, started, progress)
    except TuningError:
        detach(model)
        raise
    routing.provenance["result"] = {k: v for k, v in asdict(result).items() if k != "directory"}
    save(model, out)
    return result


def learnt_from(path: str | Path, file: RouteFile, recipe: RouteRecipe, seed: int) -> dict[str, Any]:
    """The provenance of what was made from a file of routes."""
    routes = {"file": Path(path).name, "search": file.header.search, "provenance": file.header.provenance}
    return {"recipe": recipe.to_dict(), "seed": seed, "routes": routes}


def _tune(
    model: nn.Module,
    parts: Split,
    recipe: RouteRecipe,
    pad: int,
    out: Path,
    seed: int,
    started: float,
    progress: Progress | None,
) -> RouteTuneResult:
    routing = routing_of(model)

    def stage(name: str) -> Any:
        return None if progress is None else lambda done, total: progress(name, done, total, {})

    inputs, wanted = shown(model, parts.training, pad, stage("read")), labels(model, parts.training)
    check_inputs, check_wanted = shown(model, parts.validation, pad), labels(model, parts.validation)
    counts = torch.bincount(wanted.flatten(), minlength=len(ACTIONS))
    loop = _Loop(model, recipe, class_weights(counts, recipe.beta), len(inputs), seed)
    try:
        while loop.going:
            loop.epoch(inputs, wanted)
            loop.check(check_inputs, check_wanted)
            if progress:
                figures = {"loss": loop.losses[-1], "macro-F1": loop.validation[-1]}
                progress("tune", len(loop.losses), recipe.epochs, figures)
    except KeyboardInterrupt:
        if loop.validation:
            loop.take_best()
            routing.provenance["stopped"] = {"epoch": len(loop.losses), "why": "interrupted"}
            save(model, out)
        raise
    loop.take_best()
    held = labels(model, parts.heldout)
    return RouteTuneResult(
        directory=str(out),
        seconds=time.monotonic() - started,
        epochs=len(loop.losses),
        best_epoch=loop.best_epoch,
        n_trainable=sum(p.numel() for p in loop.parameters),
        n_train=len(parts.training),
        n_validation=len(parts.validation),
        n_heldout=len(parts.heldout),
        labels=dict(zip(ACTIONS, counts.tolist(), strict=True)),
        weights=dict(zip(ACTIONS, loop.weights.tolist(), strict=True)),
        scores=action_scores(loop.predict(shown(model, parts.heldout, pad)), held),
        always_execute=action_scores(always_execute(held), held),
        commonest=action_scores(commonest(wanted, held), held),
        depth_labelled=sum(sum(example.counts) for example in parts.heldout) / len(parts.heldout),
        depth_routed=_depth(model, parts.heldout, pad),
        losses=loop.losses,
        validation=loop.validation,
    )


class _Loop:
    """The epochs: routers, optimiser, and the best routers so far."""

    def __init__(self, model: nn.Module, recipe: RouteRecipe, weights: Tensor, n_examples: int, seed: int) -> None:
        self.model, self.recipe, self.weights = model, recipe, weights
        self.routers = list(routing_of(model).routers().values())
        self.parameters = [p for router in self.routers for p in router.parameters()]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self.parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
        steps = -(-n_examples // recipe.batch_size) * recipe.epochs
        warmup = max(1, min(recipe.warmup_steps, steps // 2))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))
        self.shuffle = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.best_epoch, self.best = 0, routing_of(model).tensors()

    @property
    def going(self) -> bool:
        done = len(self.losses)
        return done < self.recipe.epochs and done - self.best_epoch < self.recipe.patience

    def actions(self, inputs: Tensor) -> Tensor:
        """Logits `[n, L, 3]` of inputs `[n, L, W, D]`."""
        states = inputs.to(self.device, torch.float32)
        if states.shape[2] == 1:  # pooled into one vector
            states = states.squeeze(2)
        return torch.stack([router(states[:, i]) for i, router in enumerate(self.routers)], 1)

    @torch.enable_grad()
    def epoch(self, inputs: Tensor, wanted: Tensor) -> None:
        """Every example once."""
        total = 0.0
        for rows in torch.randperm(len(inputs), generator=self.shuffle).split(self.recipe.batch_size):
            weights = self.weights.to(self.device)
            loss = focal_loss(self.actions(inputs[rows]), wanted[rows].to(self.device), weights, self.recipe.gamma)
            if not torch.isfinite(loss):
                raise TuningError(
                    f"The loss became {loss.item()} in epoch {len(self.losses) + 1}: try a lower learning_rate."
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(rows)
        self.losses.append(total / len(inputs))

    def check(self, inputs: Tensor, wanted: Tensor) -> None:
        """Notes the validation score, and the routers where it is the best."""
        score = action_scores(self.predict(inputs), wanted).macro_f1
        if not self.validation or score > max(self.validation):
            self.best_epoch = len(self.losses)
            self.best = {name: tensor.clone() for name, tensor in routing_of(self.model).tensors().items()}
        self.validation.append(score)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """The likeliest actions, int64 `[N, L]`, on the host."""
        return torch.cat([self.actions(part).argmax(-1).cpu() for part in inputs.split(64)])

    def take_best(self) -> None:
        routing_of(self.model).load_tensors(self.best)


@torch.no_grad()
def _depth(model: nn.Module, examples: Sequence[RouteExample], pad: int) -> float:
    with recording() as record:
        for batch in prompts_to_batches([example.input_ids for example in examples], pad):
            forward(model, batch)
    depth = record.depth("prefill")
    assert depth is not None, "a routed model"
    return depth
