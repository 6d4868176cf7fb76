"""Tunes routers, skip paths and a LoRA where asked for, with `transformers.Trainer`: the backbone is frozen,
checkpoints hold what is tuned and optimiser state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dynadepth import budget as budgets
from dynadepth.dial import set_budget
from dynadepth.errors import ConfigError, TuningError
from dynadepth.lora import LoraSettings
from dynadepth.methods import StaticConfig
from dynadepth.model import add_lora, attach, detach, fixed_routes, save
from dynadepth.routed import is_attached, routing_of, unwrapped
from dynadepth.routing.decision import KeepRatio
from dynadepth.routing.sublayer import PATH, ROUTER
from dynadepth.tuning.choice import STATIC, Choice, choose, settle
from dynadepth.tuning.controller import QuantileController, RouteController
from dynadepth.tuning.data import Collator, Example, pad_token_id
from dynadepth.tuning.heldout import distance, distances
from dynadepth.tuning.objectives import OBJECTIVES
from dynadepth.tuning.recipe import Recipe
from dynadepth.tuning.start import (
    check_learnable,
    damage_of,
    data_digest,
    fit,
    held_out,
    initialise,
    keep_of,
    resumable,
    scores_of,
    start_by_token,
    state_budget,
)

BESIDE = ("paths", "lora")
"""Kinds of parameters that are not the routers' (`_kind`)."""

Progress = Callable[[str, int, int, dict[str, float]], None]
"""`progress(stage, done, total, figures)`."""


@dataclass
class TuneResult:
    """What a run did. Keep ratios and KL are measured on held-out prompts, with hard decisions."""

    directory: str
    seconds: float
    steps: int
    n_trainable: int
    n_train: int
    n_heldout: int
    keep_before: KeepRatio | None
    keep_after: KeepRatio | None
    kl_before: float
    kl_after: float
    moved: float
    """Root mean square change of the router parameters."""
    losses: list[float] = field(default_factory=list)
    static_skip: list[int] = field(default_factory=list)
    """Layers that a static route of the budget skips: the one saved, or the one of the same importance scores."""
    kl_static: float | None = None
    """KL of the latter with the tuned skip paths; None where a static route is saved."""
    explained: dict[str, float] | None = None
    """Share of the variance of each site's contribution that its skip path explained as fitted."""
    choice: Choice | None = None
    """Between routers and a static route, where the recipe asks for it."""


class RouterTrainer(Trainer):
    """A Trainer whose checkpoints hold routers, and that stops at the first bad loss."""

    model: Any

    def __init__(self, *args: Any, recipe: Recipe, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = True  # ask for the number of label tokens of the whole step
        self.losses: list[float] = []
        """One a step."""
        self.keeps: list[float] = []
        self._step = -1
        self.last_good = _snapshot(self.model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        loss, outputs = OBJECTIVES[self.recipe.objective](self.model, inputs, num_items_in_batch, self.recipe.kl_share)
        if torch.is_grad_enabled() and not loss.requires_grad:
            loss.requires_grad_()  # frozen routers let everything execute: nothing to learn in this step
        self.note_keep(outputs.depth_trace)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            _restore(self.model, self.last_good)
            raise TuningError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}; the routers are those of the "
                "last good step. Try a lower learning_rate, or bfloat16 instead of float16."
            )
        self.last_good = _snapshot(self.model)
        if self.state.global_step != self._step:
            self._step = self.state.global_step
            self.losses.append(0.0)
        self.losses[-1] += loss.item()  # a micro-batch's loss is its share of the whole step's
        return loss

    def note_keep(self, trace: Any) -> None:
        """Remembers the hard keep ratio of a training batch."""
        executed = [d.execute[trace.token_mask] if d.execute.dim() == 2 and trace.token_mask is not None else d.execute
                    for d in trace.decisions.values()]  # fmt: skip
        if executed:  # constant routers decide nothing
            self.keeps.append(float(torch.cat([e.flatten() for e in executed]).float().mean()))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = {"others": self.args.learning_rate, "paths": self.recipe.path_learning_rate}
            rates["lora"] = self.recipe.lora_learning_rate
            bias_rate = self.recipe.bias_learning_rate
            rates["biases"] = self.args.learning_rate if bias_rate is None else bias_rate
            parameters: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameters[_kind(name)].append(parameter)
            groups = [{"params": parameters[kind], "lr": rate} for kind, rate in rates.items()]
            self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=self.args.weight_decay)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        save(self.model, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from dynadepth import adapter

        document, tensors = adapter.read(Path(resume_from_checkpoint))
        lora = adapter.read_lora(Path(resume_from_checkpoint), document)
        _restore(self.model, tensors if lora is None else {**tensors, **lora[1]})


class _Phases(TrainerCallback):
    """Routers learn in the recipe's first share of steps; then they are frozen and skip paths learn alone."""

    def __init__(self, model: nn.Module, joint: float) -> None:
        self.routers, self.joint = list(routing_of(model).routers().values()), joint

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for router in self.routers:
            router.requires_grad_(state.global_step < round(self.joint * state.max_steps))


class _Report(TrainerCallback):
    """Hands the trainer's steps to a progress function."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.trainer: RouterTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress and self.trainer and self.trainer.losses:
            recent, keeps = self.trainer.losses[-8:], self.trainer.keeps[-8:]
            figures = {"loss": sum(recent) / len(recent)}
            if keeps:
                figures["keep"] = sum(keeps) / len(keeps)
            self.progress("tune", state.global_step, state.max_steps, figures)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    """Tells of one stage that has no figures."""
    return None if progress is None else (lambda done, total: progress(name, done, total, {}))


def _kind(name: str) -> str:
    """Which learning rate a parameter has."""
    if f".{PATH}." in name:
        return "paths"
    if ".lora_" in name:
        return "lora"
    return "biases" if name.endswith(f"{ROUTER}.bias") else "others"


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is learnt, by the names on disk."""
    routing = routing_of(model)
    beside = {} if routing.lora is None else routing.lora.tensors()
    return {name: tensor.clone() for name, tensor in {**routing.tensors(), **beside}.items()}


def _restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The inverse of `_snapshot`."""
    routing = routing_of(model)
    beside = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    routing.load_tensors({name: tensor for name, tensor in tensors.items() if name not in beside})
    if routing.lora is not None:
        routing.lora.load_tensors(beside)


def tune(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    out: str | Path,
    budget: float | None = None,
    target: str | None = None,
    granularity: str | None = None,
    kv_policy: str | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: Progress | None = None,
) -> TuneResult:
    """Attaches fresh routers to `model`, tunes them on `examples`, calibrates their budgets and saves them in `out`.

    Where the recipe says `choose`, a static route with the same skip paths is saved instead unless the routers are
    better. Held-out examples (the recipe's share, or as many as calibration takes) give the calibration, that choice
    and the figures of the result, never gradients. An interrupted run with the same settings resumes from its last
    checkpoint. Raises TuningError where the loss turns NaN (the last good routers are saved first) or where there are
    too few examples, ConfigError where the recipe leaves nothing to tune.
    """
    started = time.monotonic()
    out = Path(out)
    if is_attached(model):
        raise ConfigError("This model is already routed: dynadepth.detach(model) first.")
    if len(examples) < 2:
        raise TuningError(f"{len(examples)} example leaves nothing to hold out: give at least 2.")

    overrides = {"target": target, "granularity": granularity, "kv_policy": kv_policy}
    attach(model, recipe.config(**overrides))
    try:
        if recipe.lora:
            torch.manual_seed(seed)
            add_lora(model, LoraSettings.from_dict(recipe.lora))
        budget, keep = state_budget(model, recipe, budget, overrides)
        check_learnable(model, recipe)
        routing = routing_of(model)
        shares = sorted({*budgets.KEEPS, round(keep, 4)}) if recipe.calibrate and not routing.is_static else []
        n_heldout = held_out(recipe, routing, len(examples), len(shares))
        heldout, training = list(examples[:n_heldout]), list(examples[n_heldout:])
        routing.provenance = {
            "recipe": recipe.to_dict(),
            "config": routing.config.to_dict(),
            "budget": budget,
            "seed": seed,
            "n_train": len(training),
            "data": data_digest(examples),
        }
        pad = pad_token_id(tokenizer)
        collator = Collator(pad, seed=seed)
        # A sequence is decided on its prompt, a token wherever it stands.
        decided = [
            e.input_ids[: e.prompt_length or collator.prefix_length(e.input_ids)]
            if routing.granularity.sticky
            else e.input_ids
            for e in heldout
        ]
        held_batches = budgets.prompts_to_batches(decided, pad)
        if shares:
            budgets.check_prompts(model, held_batches, len(shares))
        explained = fit(model, training, pad, _stage(progress, "fit"))
        if recipe.order == "damage":
            scores = damage_of(model, heldout, pad, _stage(progress, "importance by removal"))
        else:
            scores = scores_of(model, examples, pad, routing.target.name)
            scores = {site: score for site, score in scores.items() if site in routing.states}
        torch.manual_seed(seed)
        initialise(model, recipe, scores, budget)
        start_by_token(model, recipe, training, pad, budget, _stage(progress, "fit"))
    except BaseException:
        detach(model)
        raise
    start = _snapshot(model)
    before = distance(model, heldout, collator)

    scoring = Collator(pad, seed=seed, score_prompts=recipe.score == "all")
    trainer = _trainer(model, training, scoring, recipe, out, budget, seed, progress)
    checkpoint = resumable(out, routing.provenance) if resume else None
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except (KeyboardInterrupt, TuningError) as error:
        routing.provenance["stopped"] = {"step": trainer.state.global_step, "why": str(error) or "interrupted"}
        if routing.is_static:
            set_budget(model, **{routing.target.name: budget})
        save(model, out)
        raise
    finally:
        for router in routing.routers().values():
            router.requires_grad_(True)
    model.eval()
    now, n_trainable = _snapshot(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    moved = [(now[k] - start[k]).flatten() for k in now if not k.endswith("threshold") and _kind(k) not in BESIDE]
    choice = None
    if shares:
        budgets.calibrate(model, held_batches, shares, _stage(progress, "calibrate"))
        if recipe.choose:
            compared = sorted({budget, *recipe.budgets}, reverse=True)
            choice = choose(model, heldout, collator, compared, scores, _stage(progress, "compare"))
            if choice.chosen == STATIC:
                settle(model, choice.order)
                routing = routing_of(model)
    if routing.is_static or recipe.calibrate:
        set_budget(model, **{routing.target.name: budget})
    after = distance(model, heldout, collator)
    skip = budgets.static_skip(scores, budget, routing.n_layers)
    if isinstance(routing.config, StaticConfig):
        skip = routing.config.skip
    fixed = partial(fixed_routes, model, {site: site.layer not in skip for site in routing.sites})
    result = TuneResult(
        directory=str(out),
        seconds=time.monotonic() - started,
        steps=trainer.state.global_step,
        n_trainable=n_trainable,
        n_train=len(training),
        n_heldout=len(heldout),
        keep_before=before.keep,
        keep_after=after.keep,
        kl_before=before.mean,
        kl_after=after.mean,
        moved=float(torch.cat(moved).square().mean().sqrt()) if moved else 0.0,
        losses=trainer.losses,
        static_skip=list(skip),
        kl_static=None if routing.is_static else distances(model, heldout, collator, [fixed])[0].mean,
        explained=explained,
        choice=choice,
    )
    for path in routing.paths().values():
        path.to(unwrapped(model).dtype)
    if routing.lora is not None:
        routing.lora.to(unwrapped(model).dtype)
    routing.provenance["result"] = {k: v for k, v in asdict(result).items() if k != "directory"}
    save(model, out)
    return result


def _trainer(
    model: nn.Module,
    training: list[Example],
    collator: Collator,
    recipe: Recipe,
    out: Path,
    budget: float,
    seed: int,
    progress: Progress | None,
) -> RouterTrainer:
    device = next(unwrapped(model).parameters()).device
    steps = recipe.max_steps
    per_step = recipe.batch_size * recipe.gradient_accumulation
    total = steps if steps > 0 else max(1, round(recipe.epochs * len(training) / per_step))
    args = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=round(recipe.warmup * total),
        weight_decay=recipe.weight_decay,
        num_train_epochs=recipe.epochs,
        max_steps=steps,
        seed=seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        average_tokens_across_devices=False,
    )
    report = _Report(progress)
    routing = routing_of(model)
    served = recipe.budgets or (budget,)
    keeps = [keep_of(model, b) for b in served]
    controllers: list[TrainerCallback] = []
    if routing.is_static:
        controllers = [RouteController(model, served, seed)]
    elif recipe.controller == "quantile":
        controllers = [QuantileController(model, keeps, seed)]
    trainer = RouterTrainer(
        model=model,
        args=args,
        train_dataset=training,
        data_collator=collator,
        callbacks=[_Phases(model, recipe.joint), *controllers, report],
        recipe=recipe,
    )
    report.trainer = trainer
    trainer.remove_callback(_printer())
    return trainer


def _printer() -> type[TrainerCallback]:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
